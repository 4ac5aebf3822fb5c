"""How fast and how large each variant is, on this machine: interleaved rounds, medians, a process each."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from featherbed import errors
from featherbed.check.machine import machine
from featherbed.check.page import write_pages
from featherbed.errors import EngineError, OptionError
from featherbed.folder import ModelFolder, dump, open_folder, write_text
from featherbed.progress import Progress, silent
from featherbed.spec import read_json

TOKENS = 128


@dataclass(frozen=True)
class Load:
    """What is run, and how: ``batch`` texts of ``tokens`` tokens, ``rounds`` times; the rest as for an Embedder,
    whose own choice ``threads`` 0 and ``pool_size`` 0 are."""

    tokens: int | None = None  # 128, or the model's longest text if that is less
    batch: int = 8
    rounds: int = 7
    threads: int = 0
    pool_size: int = 0
    provider: str = "auto"

    def __post_init__(self) -> None:
        """Raises OptionError on numbers that make no run."""
        tokens = 1 if self.tokens is None else self.tokens
        if min(tokens, self.batch, self.rounds) < 1 or min(self.threads, self.pool_size) < 0:
            raise OptionError(
                "bench",
                expected="tokens, batch and rounds of at least 1, threads and pool size of at least 0",
                found=f"{self.tokens}, {self.batch}, {self.rounds}, {self.threads} and {self.pool_size}",
                remedy="choose larger numbers",
            )


class _Worker:
    """A variant in its own process."""

    def __init__(self, folder: Path, variant: str, load: Load, stderr: IO[str]) -> None:
        words = [str(folder), variant, str(load.threads), str(load.pool_size), load.provider, str(load.tokens)]
        self.variant = variant
        self._stderr = stderr  # a file and not a pipe: a pipe fills up while nobody reads
        self._process = subprocess.Popen(
            [sys.executable, "-m", "featherbed.check.worker", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        self.load_s, self.provider = 0.0, ""

    def load(self) -> None:
        """Wait for the first vector."""
        answer = self._answer()
        self.load_s, self.provider = answer["load_s"], answer["provider"]

    def run(self, texts: int) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{texts}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._stderr.seek(0)
            last = (
                self._stderr.read().strip().splitlines() or ["a process that vanished, perhaps for lack of memory"]
            )[-1]
            raise EngineError(
                f"bench of variant {self.variant}",
                expected="a run that ends",
                found=last,
                remedy="use fewer tokens or a smaller batch, or see `featherbed verify`",
            )
        answer = dict(json.loads(line))
        if "error" in answer:  # one of ours, raised again on this side
            parts = answer["parts"]
            raise getattr(errors, answer["error"])(
                parts["subject"], expected=parts["expected"], found=parts["found"], remedy=parts["remedy"]
            )
        return answer

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


@contextmanager
def _worker(folder: Path, variant: str, load: Load) -> Iterator[_Worker]:
    with tempfile.TemporaryFile("w+") as stderr:
        worker = _Worker(folder, variant, load, stderr)
        try:
            yield worker
        finally:
            worker.close()


def bench(
    folder: Path | str, variants: Sequence[str] = (), load: Load | None = None, *, save: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Measure the variants of a model folder (all by default), round by round in turn.

    Returns the document of ``bench --json``: ``machine``, ``load`` with the provider really used and, a variant,
    ``tokens_per_s`` and ``texts_per_s`` (median of batches), ``latency_p50_ms`` and ``latency_p95_ms`` (one text
    alone), ``load_s`` (from the call to the first vector, imports and the prepacking of a new file left out),
    ``rss_mib``, ``rss_private_mib`` (anonymous), ``rss_peak_mib``, ``size_bytes``. ``save`` writes it into the
    folder's reports and its card.
    Raises OptionError on an unknown variant or provider, MissingError on one that is not installed, ModelFolderError,
    EngineError.
    """
    opened = open_folder(Path(folder))
    load = load or Load()
    tokens = min(TOKENS, opened.manifest.spec.max_length) if load.tokens is None else load.tokens
    load = replace(load, tokens=tokens)
    if tokens > opened.manifest.spec.max_length:
        raise OptionError(
            "--tokens",
            expected=f"at most {opened.manifest.spec.max_length}, the model's longest text",
            found=str(tokens),
            remedy="choose fewer",
        )
    names = tuple(variants) or tuple(opened.manifest.variants)
    for name in names:
        opened.graph_path(name)
    with ExitStack() as stack:
        workers = []
        for name in names:
            with _worker(opened.path, name, load) as first:
                first.load()  # prepacks the weights and reads the files: neither belongs to how long loading takes
            workers.append(stack.enter_context(_worker(opened.path, name, load)))
            workers[-1].load()
        batches: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        singles: dict[str, list[float]] = {name: [] for name in names}
        total = (load.rounds + 1) * len(workers)
        for turn in range(load.rounds + 1):
            for at, worker in enumerate(workers):
                batch, alone = worker.run(load.batch), worker.run(1)["seconds"]
                if turn:  # the first round warms up
                    batches[worker.variant].append(batch)
                    singles[worker.variant] += [alone, *(worker.run(1)["seconds"] for _ in range(2))]
                progress("bench", turn * len(workers) + at + 1, total)
        measured = {w.variant: _row(opened, w, batches[w.variant], singles[w.variant], load) for w in workers}
    load = replace(load, provider=workers[0].provider)
    document = {"machine": machine(), "load": vars(load), "variants": measured}
    if save:
        _save(opened, document)
    return document


def bench_file(path: Path, load: Load) -> dict[str, float]:
    """Speed and memory of one .onnx file, in a process of its own: ``tokens_per_s``, ``rss_mib``.

    Raises EngineError.
    """
    with _worker(path, "auto", load) as worker:
        worker.load()
        worker.run(load.batch)
        runs = [worker.run(load.batch) for _ in range(load.rounds)]
    seconds = float(np.median([run["seconds"] for run in runs]))
    return {
        "tokens_per_s": round(load.batch * (load.tokens or TOKENS) / seconds, 1),
        "rss_mib": runs[-1]["rss_mib"],
    }


def _row(
    folder: ModelFolder, worker: _Worker, batches: list[dict[str, float]], singles: list[float], load: Load
) -> dict[str, float]:
    seconds = float(np.median([b["seconds"] for b in batches]))
    last = batches[-1]
    return {
        "tokens_per_s": round(load.batch * (load.tokens or 0) / seconds, 1),
        "texts_per_s": round(load.batch / seconds, 2),
        "latency_p50_ms": round(1000 * float(np.percentile(singles, 50)), 2),
        "latency_p95_ms": round(1000 * float(np.percentile(singles, 95)), 2),
        "load_s": round(worker.load_s, 3),
        **{key: last[key] for key in ("rss_mib", "rss_private_mib", "rss_peak_mib")},
        "size_bytes": folder.manifest.size_bytes(worker.variant),
    }


def _save(folder: ModelFolder, document: dict[str, Any]) -> None:
    for name, row in document["variants"].items():
        path = folder.report_path(name)
        report = read_json(path) if path.is_file() else {"variant": name}
        report["bench"] = {"machine": document["machine"], "load": document["load"], **row}
        path.parent.mkdir(exist_ok=True)
        write_text(path, dump(report))
    write_pages(open_folder(folder.path))
