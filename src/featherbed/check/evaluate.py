"""Variants on somebody's dataset: retrieval by vectors, by words and by both; similarity of rated pairs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featherbed.check.lexical import lexical
from featherbed.check.machine import machine
from featherbed.check.parity import cosines
from featherbed.check.retrieval import Found, Vectors, dense, found, fused, hits
from featherbed.check.statistics import Floats, Places, bootstrap, pearson, spearman
from featherbed.dataset import Pairs, Search
from featherbed.errors import OptionError
from featherbed.folder import ModelFolder
from featherbed.progress import Progress, silent
from featherbed.run.embedder import Embedder

DENSE, LEXICAL, HYBRID = "dense", "lexical", "hybrid"
MODES = (DENSE, LEXICAL, HYBRID)


@dataclass(frozen=True)
class Evaluation:
    """What was found on one dataset: figures by variant and mode; lexical ones, which need no variant, under ""."""

    dataset: dict[str, Any]
    rows: dict[tuple[str, str], dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = [{"variant": variant or None, "mode": mode, **figures} for (variant, mode), figures in self.rows.items()]
        return {"dataset": self.dataset, "machine": machine(), "results": rows}


def parse_modes(words: Sequence[str]) -> tuple[str, ...]:
    """Ways to search, each once. Raises OptionError on an unknown one, or none."""
    for word in words:
        if word not in MODES:
            raise OptionError(
                f"--modes {word}", expected=", ".join(MODES), found="another word", remedy="choose among these"
            )
    if not words:
        raise OptionError("--modes", expected=", ".join(MODES), found="none", remedy="choose among these")
    return tuple(mode for mode in MODES if mode in words)


def evaluated(
    folder: ModelFolder, variants: Sequence[str], dataset: Search | Pairs, modes: Sequence[str],
    progress: Progress = silent,
) -> Evaluation:  # fmt: skip
    """Every variant on a dataset. ``modes`` matter to searches only.

    Raises MissingError when words are asked for and bm25s is not installed, EngineError when a run fails.
    """
    if isinstance(dataset, Pairs):
        named = {"name": dataset.name, "files_sha256": dataset.files_sha256, "pairs": len(dataset.scores)}
        rows = {(name, DENSE): _similar(Embedder(folder.path, name), dataset, name, progress) for name in variants}
        return Evaluation(named, rows)
    return Evaluation(described(dataset), dict(_searched(folder, variants, dataset, modes, progress)))


def described(search: Search) -> dict[str, Any]:
    """What a report says of its dataset."""
    counts = {"documents": len(search.documents), "queries": len(search.queries)}
    return {"name": search.name, "files_sha256": search.files_sha256} | counts


def _searched(
    folder: ModelFolder, variants: Sequence[str], search: Search, modes: Sequence[str], progress: Progress
) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    said: list[Places] = []  # by words, a query each

    def remembered(scores: Iterator[Floats]) -> Iterator[Floats]:
        for one in scores:
            said.append(hits(one))
            yield one

    if {LEXICAL, HYBRID} & set(modes):  # first: what is missing is said before hours of work
        figures = found(search, remembered(lexical(search.queries, search.documents, progress))).to_json()
        if LEXICAL in modes:
            yield ("", LEXICAL), figures
    for name in variants if {DENSE, HYBRID} & set(modes) else ():
        queries, documents, seconds = embedded(Embedder(folder.path, name), search, name, progress)
        chunks = {"chunks_per_s": len(documents) / seconds}
        if DENSE in modes:
            yield (name, DENSE), found(search, dense(queries, documents)).to_json() | chunks
        if HYBRID in modes:
            ranked = zip(dense(queries, documents), said, strict=True)
            both = (fused(len(documents), hits(near), words) for near, words in ranked)
            yield (name, HYBRID), found(search, both).to_json() | chunks


def embedded(embedder: Embedder, search: Search, name: str, progress: Progress) -> tuple[Vectors, Vectors, float]:
    """Unit vectors of queries [Q, D'] and documents [D, D'], each behind the folder's prompt, and the seconds that the
    documents took."""
    queries = embedder.encode_query(search.queries, progress=lambda _, at, of: progress(f"{name}: queries", at, of))
    start = time.perf_counter()
    documents = embedder.encode_document(
        search.documents, progress=lambda _, at, of: progress(f"{name}: documents", at, of)
    )
    return queries, documents, time.perf_counter() - start


def by_vectors(embedder: Embedder, search: Search, name: str, progress: Progress = silent) -> Found:
    """The measures of one embedder's vectors."""
    queries, documents, _ = embedded(embedder, search, name, progress)
    return found(search, dense(queries, documents))


def _similar(embedder: Embedder, pairs: Pairs, name: str, progress: Progress) -> dict[str, Any]:
    texts = list(dict.fromkeys((*pairs.left, *pairs.right)))
    vectors = embedder.encode(texts, progress=lambda _, at, of: progress(f"{name}: sentences", at, of))
    at = {text: place for place, text in enumerate(texts)}
    left, right = (vectors[[at[text] for text in side]] for side in (pairs.left, pairs.right))
    near = cosines(left, right)
    between = bootstrap(lambda rows: spearman(near[rows], pairs.scores[rows]), len(near))
    return {
        "pairs": len(near),
        "spearman": _finite(spearman(near, pairs.scores)),
        "pearson": _finite(pearson(near, pairs.scores)),
        "intervals": {"spearman": [_finite(edge) for edge in between]},
    }


def _finite(value: float | Floats) -> float | None:
    """For JSON: of pairs that are all alike, or so few that a resample is, nothing can be said."""
    return float(value) if np.isfinite(value) else None
