"""Embedder: tokens, batches, session and pooling on one screen, in sentence-transformers' words."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featherbed.choice import AUTO, choose
from featherbed.errors import OptionError, TextError
from featherbed.folder import MANIFEST, ModelFolder, open_folder
from featherbed.progress import Progress, bar, silent
from featherbed.run import heap
from featherbed.run.apart import Files
from featherbed.run.batches import LONG_TOKENS, Batch, batches
from featherbed.run.dense import read_layers, through
from featherbed.run.foreign import Foreign, Found, chosen, found
from featherbed.run.pooling import check_mask, cut, normalize, pool
from featherbed.run.ports import Known
from featherbed.run.prompts import Prompts, Seen
from featherbed.run.session import SMALL_NUMBERS, Engine, Memory, Origin, Session, require
from featherbed.run.tokens import Tokenizer, check_texts
from featherbed.run.windows import ahead, windows
from featherbed.spec import Spec

Vectors = npt.NDArray[np.float32]
Places = npt.NDArray[np.intp]
Job = Callable[[bool], Vectors]  # called with ``alone``

LOG = logging.getLogger("featherbed")
QUERY_PROMPTS, DOCUMENT_PROMPTS = ("query",), ("document", "passage", "corpus")
HEAD_START_S = 0.1  # tokenizers holds the interpreter while it reads; onnxruntime needs it only to begin


@dataclass(frozen=True)
class Asked:
    """What is wanted of texts: the prompt before them, the vectors' width, whether at length 1."""

    prompt: str
    width: int
    unit: bool


class Embedder:
    """Turns texts into vectors with one variant of a model folder, or with a bare .onnx file.

    Safe to use from many threads at once: they share one session.
    """

    def __init__(
        self,
        model: str | Path | Files,
        variant: str = AUTO,
        *,
        threads: int | None = None,
        pool_size: int | None = None,
        provider: str = "auto",
        batch_tokens: int | None = None,
        memory: Memory | None = None,
        foreign: Foreign | None = None,
    ) -> None:
        """Open ``model``: a model folder, someone else's folder with .onnx files in it, or a bare .onnx file with its
        tokenizer and configs beside or above it, or apart.

        ``variant`` "auto" takes int8, int8-block or fp32, the first that did not fail its gates. ``threads`` is how
        many cores may be busy (all), ``pool_size`` how many batches are run at a time (chosen by the work at hand);
        all share one set of weights. ``provider`` is "cpu", "cuda", "coreml", "openvino", or "auto": CUDA where
        there is one, else the CPU. ``batch_tokens`` bounds the tokens computed at a time, padding included, by all
        runs together. ``memory`` says what is kept: prepacked weights on disk, prompts. ``foreign`` says what files of
        others leave open; of theirs, ``variant`` is a file's name, or what stands behind "model_" in it.
        Raises ModelFolderError, SpecError, TokenizerError or EngineError when the model cannot be used, OptionError
        on an unknown variant or option, MissingError when the provider is not installed.
        """
        if batch_tokens is not None and batch_tokens < 1:
            raise OptionError("batch_tokens", expected="at least 1", found=str(batch_tokens), remedy="leave it out")
        path, self.spec, home, origin = self._locate(model, variant, foreign)
        engine = Engine(threads, pool_size, provider, memory or Memory())
        with ThreadPoolExecutor(1) as beside:  # a large vocabulary takes as long to read as mapped weights
            session = beside.submit(Session, path, engine, self.spec.dim, origin)
            wait([session], HEAD_START_S)
            self._tokenizer = Tokenizer(home, self.spec)
            self._session = session.result()
        self._dense = cache(partial(read_layers, home))  # of pooled vectors only: our graphs have them inside
        self._fit(home)
        self.batch_tokens = batch_tokens or self.spec.max_batch_tokens_hint
        self.provider = self._session.provider
        self._prompts = Prompts(self._tokenizer, self._session.past) if self._session.keeps_past else None
        heap.give_back()

    def _locate(self, model: str | Path | Files, variant: str, said: Foreign | None) -> tuple[Path, Spec, Path, Origin]:
        """(graph, spec, place of the tokenizer, whose it is) of a folder of ours, one of others, or a bare file."""
        self._found: Found | None = None
        if isinstance(model, Files):
            apart = self._found = model.of_others(said or Foreign())
            self.variant = model.graph.stem
            return model.graph, apart.spec, apart.home, Origin(True, None, apart.known)
        model = Path(model)
        bare = model.suffix == ".onnx" and not model.is_dir()
        if bare and variant != AUTO:
            raise OptionError(
                f"variant {variant!r} of {model}",
                expected="no variant: the file is one",
                found="one",
                remedy="leave it out, or give the model's folder",
            )
        folder, name = _ours(model, bare)
        if folder is None:
            path = model if bare else chosen(model, variant)
            self._found = found(path, said or Foreign(), None if bare else model)
            self.variant = path.stem
            return path, self._found.spec, self._found.home, Origin(True, None, self._found.known)
        if said is not None:
            raise OptionError(
                f"foreign= for {model}",
                expected="nothing: it is a folder of ours, and its manifest says it all",
                found=f"{said}",
                remedy="leave it out",
            )
        name = name or (choose(folder.manifest, str(folder.path)) if variant == AUTO else variant)
        self.variant = model.stem if bare else name
        require(folder.variant(name).least_onnxruntime, f"variant {name} of {folder.path}")
        check = partial(folder.check_hashes, folder.variant(name).files)
        spec = folder.manifest.spec
        known = Known(pad_id=spec.pad_id, hidden_width=spec.hidden_dim)
        return folder.graph_path(name), spec, folder.path, Origin(False, check, known)

    def _fit(self, home: Path) -> None:
        """What the graph itself says of the model, where that is more than its folder does."""
        longest = min(self.spec.max_length, self._session.ports.length or self.spec.max_length)
        spec = self._found.fitting(self._session.ports) if self._found else replace(self.spec, max_length=longest)
        if spec != self.spec:
            self.spec, self._tokenizer = spec, Tokenizer(home, spec)

    @property
    def notices(self) -> tuple[str, ...]:
        """What is odd about the file that runs: axes that are fixed."""
        return self._session.notices

    def encode(
        self,
        texts: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        show_progress_bar: bool = False,
        progress: Progress = silent,
    ) -> Vectors:
        """Vectors [N, D] float32 of N texts in their order; [D] for a single string.

        The text of ``prompt``, or the folder's prompt called ``prompt_name``, or the folder's default prompt
        comes before each text. ``truncate_dim`` keeps the first components, behind a
        layer norm where the model was trained so, and normalises what is kept.
        Texts longer than the model takes are cut, keeping the end token, and the log says how many.
        Raises TextError on what is not text, OptionError on an unknown prompt or dimension.
        """
        single = isinstance(texts, str)
        rows = _rows(texts)
        result = np.empty((len(rows), self._width(truncate_dim)), np.float32)
        start = 0
        with ExitStack() as stack:
            report = stack.enter_context(bar()) if show_progress_bar else progress
            asked = Asked(self._prompt(prompt_name, prompt), result.shape[1], normalize_embeddings)
            for vectors in self._windows(rows, asked, lambda done: report("embed", done, len(rows))):
                result[start : start + len(vectors)] = vectors
                start += len(vectors)
        return result[0] if single else result

    def stream(
        self,
        texts: Iterable[str],
        prompt_name: str | None = None,
        *,
        truncate_dim: int | None = None,
        progress: Progress = silent,
    ) -> Generator[Vectors]:
        """``encode`` of texts without end: vectors [n, D] of the next n texts, in their order.

        Holds two windows of at most WINDOW_TEXTS texts, however many there are. Raises as ``encode``, at the text.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise TextError(
                "texts", expected="several strings", found=type(texts).__name__, remedy="pass a list of them, or encode"
            )
        asked = Asked(self._prompt(prompt_name, None), self._width(truncate_dim), True)
        yield from self._windows(texts, asked, lambda done: progress("embed", done, 0))

    def _windows(self, texts: Iterable[str], asked: Asked, report: Callable[[int], None]) -> Iterator[Vectors]:
        """Vectors of one window of texts after the other; the next are tokenized while these are computed."""
        cut_texts = done = 0
        for tokens in ahead(self._tokenizer.encode(rows, asked.prompt) for rows in windows(texts)):
            cut_texts += tokens.truncated
            result = np.empty((len(tokens.ids), asked.width), np.float32)
            for places, vectors in self._vectors(tokens.ids, asked):
                if asked.width < self.spec.dim:
                    vectors = cut(vectors, asked.width, self.spec.norm_before_cut, asked.unit)
                result[places] = vectors
                done += len(places)
                report(done)
            yield result
        if cut_texts:
            LOG.warning("%d texts have more than %d tokens and were cut", cut_texts, self.spec.max_length)

    def embed_ids(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Unit vectors [N, D] of rows of token ids, special tokens included, in batches of the engine's own choice."""
        result = np.empty((len(rows), self.spec.dim), np.float32)
        for places, vectors in self._vectors(rows, Asked("", self.spec.dim, True)):
            result[places] = vectors
        return result

    def _vectors(self, ids: Sequence[Sequence[int]], asked: Asked) -> Iterator[tuple[Places, Vectors]]:
        """(places, vectors [·, D]) of all rows, as they are done: ``runs`` at a time where there is enough to do."""
        jobs = list(self._jobs(ids, asked))
        try:
            if self._session.runs == 1 or len(jobs) == 1:
                yield from ((places, job(True)) for places, job in jobs)
            else:
                yield from _side_by_side(jobs, self._session.runs)
        finally:
            if sum(map(len, ids)) * self.spec.dim > self._session.runs * SMALL_NUMBERS:
                heap.give_back()

    def _jobs(self, ids: Sequence[Sequence[int]], asked: Asked) -> Iterator[tuple[Places, Job]]:
        kept = self._prompts if asked.prompt and asked.unit and self._session.keeps_past else None
        seen = kept.get(asked.prompt, len(ids)) if kept else None
        rest = []
        for place, row in enumerate(ids):
            if seen is not None and _goes_behind(seen, row, len(ids) == 1):
                tail = list(row[len(seen.ids) :])
                yield np.asarray([place]), partial(self._session.behind, seen.past, tail)
            else:
                rest.append(place)
        if rest:
            for batch in batches([ids[p] for p in rest], self.spec.pad_id, self.batch_tokens, self._session.runs):
                yield np.asarray(rest)[batch.places], partial(self.embed, batch, asked.unit)

    def encode_query(
        self,
        texts: str | Sequence[str],
        *,
        truncate_dim: int | None = None,
        show_progress_bar: bool = False,
        progress: Progress = silent,
    ) -> Vectors:
        """``encode`` with the folder's query prompt, where it has one."""
        return self.encode(
            texts,
            self._named(QUERY_PROMPTS),
            truncate_dim=truncate_dim,
            show_progress_bar=show_progress_bar,
            progress=progress,
        )

    def encode_document(
        self,
        texts: str | Sequence[str],
        *,
        truncate_dim: int | None = None,
        show_progress_bar: bool = False,
        progress: Progress = silent,
    ) -> Vectors:
        """``encode`` with the folder's document prompt, where it has one."""
        return self.encode(
            texts,
            self._named(DOCUMENT_PROMPTS),
            truncate_dim=truncate_dim,
            show_progress_bar=show_progress_bar,
            progress=progress,
        )

    def similarity(self, a: Vectors, b: Vectors) -> Vectors:
        """Cosines [N, M] of the rows of a [N, D] and b [M, D]. Raises OptionError when their widths differ."""
        if a.shape[-1] != b.shape[-1]:
            raise OptionError(
                "similarity",
                expected="vectors of one width",
                found=f"{a.shape[-1]} and {b.shape[-1]}",
                remedy="use the same model and truncate_dim for both",
            )
        return np.asarray(normalize(np.atleast_2d(a)) @ normalize(np.atleast_2d(b)).T, np.float32)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts without any prompt, special tokens included. Raises TextError."""
        return self._tokenizer.encode(texts).ids

    def embed(self, batch: Batch, unit: bool = True, alone: bool = True) -> Vectors:
        """Vectors [B, D] of one batch exactly as composed, at length 1 unless ``unit`` is False.

        ``alone`` False leaves cores to other calls at the same time. Raises TextError when a row of the mask is all
        zero, EngineError when the run fails.
        """
        check_mask(batch.mask)
        if unit and self._session.pools:
            vectors = self._session.vectors(batch, alone)
            return vectors if self._session.unit else normalize(vectors)
        pooled = pool(self._session.hidden(batch), batch.mask, self.spec.pooling)
        pooled = through(self._dense(), pooled) if self.spec.dense else pooled
        return normalize(pooled) if unit else pooled

    @property
    def prompts_bytes(self) -> int:
        """Memory of what is kept of prompts; 0 for encoders, which keep nothing."""
        return self._prompts.size_bytes if self._prompts else 0

    def _named(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in self.spec.prompts), None)

    def _prompt(self, name: str | None, text: str | None) -> str:
        if text is not None:
            return text
        name = name if name is not None else self.spec.default_prompt_name
        if name is None:
            return ""
        if name not in self.spec.prompts:
            names = ", ".join(self.spec.prompts)
            raise OptionError(
                f"prompt {name!r}",
                expected=f"one of {names}" if names else "no name: this model has no prompts",
                found="no such prompt" if names else "one",
                remedy="give its text as prompt=",
            )
        return self.spec.prompts[name]

    def _width(self, truncate_dim: int | None) -> int:
        if truncate_dim is None:
            return self.spec.dim
        whole = isinstance(truncate_dim, int) and not isinstance(truncate_dim, bool)
        if not whole or not 1 <= truncate_dim <= self.spec.dim:
            raise OptionError(
                "truncate_dim (--dim)",
                expected=f"a whole number from 1 to {self.spec.dim}",
                found=repr(truncate_dim),
                remedy="leave it out for the whole vector",
            )
        return truncate_dim


def _ours(model: Path, bare: bool) -> tuple[ModelFolder | None, str | None]:
    """The folder of ours that ``model`` is, or that vouches for a bare file as one of its variants, and that one."""
    if not bare:
        return (open_folder(model), None) if (model / MANIFEST).is_file() else (None, None)
    home = model.absolute().parent.parent
    if (home / MANIFEST).is_file():
        folder = open_folder(home)
        for one in folder.manifest.variants.values():
            if folder.path / one.files[0] == model.absolute():
                return folder, one.name
    return None, None


def _side_by_side(jobs: list[tuple[Places, Job]], runs: int) -> Iterator[tuple[Places, Vectors]]:
    """Results of jobs as they are done, ``runs`` of them at a time. Those not begun are dropped with the iterator."""
    with ThreadPoolExecutor(runs) as pool:
        waiting = {pool.submit(job, False): places for places, job in jobs}
        try:
            yield from ((waiting[job], job.result()) for job in as_completed(waiting))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _goes_behind(seen: Seen, row: Sequence[int], single: bool) -> bool:
    """Whether a row begins with the prompt, and is short enough: a long one is better off in a batch of its like."""
    kept = len(seen.ids)
    # two tokens at least: the kernel for a single one rounds otherwise
    return kept + 1 < len(row) <= LONG_TOKENS and (single or len(row) <= 2 * kept) and list(row[:kept]) == seen.ids


def _rows(texts: object) -> list[str]:
    """The texts as a list, every one of them text: what is not is named before anything is embedded."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable):
        raise TextError(
            "texts", expected="a string or several", found=type(texts).__name__, remedy="pass a list of strings"
        )
    rows = list(texts)
    check_texts(rows)
    return rows
