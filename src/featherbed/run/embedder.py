"""Embedder: tokens, batches, session and pooling on one screen, in sentence-transformers' words."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featherbed.errors import OptionError, TextError
from featherbed.folder import ModelFolder, open_folder
from featherbed.progress import Progress, bar, silent
from featherbed.run.batches import Batch, batches
from featherbed.run.pooling import check_mask, normalize, pool
from featherbed.run.session import Session, require
from featherbed.run.tokens import Tokenizer, check_texts
from featherbed.spec import Spec, read_spec

Vectors = npt.NDArray[np.float32]

LOG = logging.getLogger("featherbed")
AUTO = "auto"
PREFERENCE = ("int8", "int8-block", "fp32")  # fastest first, among variants that passed their gates
QUERY_PROMPTS = ("query",)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
WINDOW_TEXTS = 8192  # texts tokenized and sorted together: enough to fill batches, little enough to hold


class Embedder:
    """Turns texts into vectors with one variant of a model folder, or with a bare .onnx file.

    Safe to use from many threads at once: they share one session.
    """

    def __init__(
        self,
        model: str | Path,
        variant: str = AUTO,
        *,
        threads: int | None = None,
        batch_tokens: int | None = None,
        prepack: bool = True,
    ) -> None:
        """Open ``model``: a model folder, or an .onnx file with its tokenizer and configs beside or above it.

        ``variant`` "auto" takes int8, int8-block or fp32, the first that did not fail its gates. ``batch_tokens``
        bounds the tokens of one run, padding included. ``prepack`` False leaves float weights mapped from the
        file: slower, but they are not copied into memory. Raises ModelFolderError, SpecError, TokenizerError or
        EngineError when the model cannot be used, OptionError on an unknown variant.
        """
        if batch_tokens is not None and batch_tokens < 1:
            raise OptionError("batch_tokens", expected="at least 1", found=str(batch_tokens), remedy="leave it out")
        path, self.spec, home = self._locate(Path(model), variant)
        self.batch_tokens = batch_tokens or self.spec.max_batch_tokens_hint
        self._tokenizer = Tokenizer(home, self.spec)
        self._session = Session(path, threads, prepack, width=self.spec.dim)

    def _locate(self, model: Path, variant: str) -> tuple[Path, Spec, Path]:
        self._ours = model.suffix != ".onnx"
        if not self._ours:
            if variant != AUTO:
                raise OptionError(
                    f"variant {variant!r} of {model}",
                    expected="no variant: the file is one",
                    found="one",
                    remedy="leave it out, or give the model's folder",
                )
            self.variant = model.stem
            home = model.parent if (model.parent / "config.json").is_file() else model.parent.parent
            return model, read_spec(home), home
        folder = open_folder(model)
        self.variant = choose(folder) if variant == AUTO else variant
        require(folder.variant(self.variant).least_onnxruntime, f"variant {self.variant} of {folder.path}")
        return folder.graph_path(self.variant), folder.manifest.spec, folder.path

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
        comes before each text. ``truncate_dim`` keeps the first components and normalises what is kept.
        Texts longer than the model takes are cut, keeping the end token, and the log says how many.
        Raises TextError on what is not text, OptionError on an unknown prompt or dimension.
        """
        single = isinstance(texts, str)
        rows = _rows(texts)
        before = self._prompt(prompt_name, prompt)
        width = self._width(truncate_dim)
        result = np.empty((len(rows), width), np.float32)
        with ExitStack() as stack:
            report = stack.enter_context(bar()) if show_progress_bar else progress
            done = cut_texts = 0
            for start in range(0, len(rows), WINDOW_TEXTS):
                tokens = self._tokenizer.encode(rows[start : start + WINDOW_TEXTS], before)
                cut_texts += tokens.truncated
                for batch in batches(tokens.ids, self.spec.pad_id, self.batch_tokens):
                    vectors = self.embed(batch, normalize_embeddings)[:, :width]
                    cut = normalize_embeddings and width < self.spec.dim
                    result[start + batch.places] = normalize(vectors) if cut else vectors
                    done += len(batch.places)
                    report("embed", done, len(rows))
        if cut_texts:
            LOG.warning(
                "%d of %d texts have more than %d tokens and were cut", cut_texts, len(rows), self.spec.max_length
            )
        return result[0] if single else result

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

    def embed(self, batch: Batch, unit: bool = True) -> Vectors:
        """Vectors [B, D] of one batch exactly as composed, at length 1 unless ``unit`` is False.

        Raises TextError when a row of the mask is all zero, EngineError when the run fails.
        """
        check_mask(batch.mask)
        if unit and self._session.pools:
            vectors = self._session.vectors(batch)
            return vectors if self._ours else normalize(vectors)  # an output's name is no promise of its length
        pooled = pool(self._session.hidden(batch), batch.mask, self.spec.pooling)
        return normalize(pooled) if unit else pooled

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


def choose(folder: ModelFolder) -> str:
    """The variant "auto" means: of those whose gates did not fail, the first of PREFERENCE, else any.

    Raises OptionError when every variant failed.
    """
    sound = [v.name for v in folder.manifest.variants.values() if v.passed is not False]
    for name in (*PREFERENCE, *sound):
        if name in sound:
            return name
    raise OptionError(
        f"variant auto of {folder.path}",
        expected="a variant that passed its gates",
        found=f"none of {', '.join(folder.manifest.variants)}",
        remedy="name one to use it all the same, or build the folder again",
    )
