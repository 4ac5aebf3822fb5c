"""Who is found, and where: places of relevant documents among all, and what the usual measures make of them.

Places are pessimistic: a document stands behind those it ties with, so a model whose vectors are all the same finds
nothing, and last where a score is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featherbed.check.statistics import Floats, Places, mean_interval
from featherbed.dataset import Search

Vectors = npt.NDArray[np.float32]
DEPTH = 10  # of nDCG and MRR
FAR = 100  # of the wider recall, and of what fusion looks at
FUSION = 60  # k of reciprocal rank fusion, Cormack et al. 2009
NUMBERS = 2**24  # similarities held at a time
MEASURES = ("top_1", "ndcg_at_10", "mrr_at_10", "recall_at_10", "recall_at_100")


@dataclass(frozen=True)
class Found:
    """Every measure of every query, [Q] each, from 0 to 1."""

    measures: Mapping[str, Floats]

    def to_json(self) -> dict[str, Any]:
        """Means and their intervals."""
        means = {name: float(values.mean()) for name, values in self.measures.items()}
        intervals = {name: list(mean_interval(values)) for name, values in self.measures.items()}
        return {"queries": len(next(iter(self.measures.values()))), **means, "intervals": intervals}


def dense(queries: Vectors, documents: Vectors) -> Iterator[Floats]:
    """Similarities [D] of each of the unit vectors queries [Q, D'] with documents [D, D']."""
    together = max(1, NUMBERS // max(1, len(documents)))
    for start in range(0, len(queries), together):
        yield from (queries[start : start + together] @ documents.T).astype(np.float64)


def hits(scores: Floats) -> Places:
    """The first hundred documents by ``scores`` [D], in their order; NaN and −∞ are no hits."""
    ordered = np.argsort(-scores, kind="stable")[:FAR]  # NaN last
    return np.asarray(ordered[scores[ordered] > -np.inf], np.int64)


def fused(count: int, *rankings: Places) -> Floats:
    """Reciprocal rank fusion: scores [``count``], the sums of 1 / (60 + rank) over the rankings' ``hits``."""
    total = np.zeros(count)
    for ranking in rankings:
        total[ranking] += 1 / (FUSION + 1 + np.arange(len(ranking)))
    return total


def found(search: Search, scores: Iterator[Floats]) -> Found:
    """The measures of a search whose queries gave these scores [D], in their order; a whole has its best piece's."""
    rows = [measured(places(_whole(one, search.wholes), wanted), wanted) for one, wanted in _judged(scores, search)]
    return Found({name: np.asarray([row[name] for row in rows], np.float64) for name in MEASURES})


def _judged(scores: Iterator[Floats], search: Search) -> Iterator[tuple[Floats, dict[int, float]]]:
    return zip(scores, search.relevant, strict=True)


def _whole(scores: Floats, wholes: Places) -> Floats:
    """Scores [D] of pieces → [W] of the wholes they belong to."""
    count = int(wholes.max()) + 1
    if count == len(wholes):
        return scores
    best = np.full(count, -np.inf)
    np.maximum.at(best, wholes, scores)
    return best


def places(scores: Floats, wanted: Mapping[int, float]) -> list[int]:
    """From 0, where each of the ``wanted`` documents stands among all by ``scores`` [D].

    Behind every other one that it ties with; relevant ones that tie with each other stand with the lowest grade first.
    """
    others = np.ones(len(scores), bool)
    others[list(wanted)] = False
    rest = scores[others]
    found = []
    for document, grade in wanted.items():
        own = scores[document]
        ahead = int((~(rest < own)).sum())
        for other, worth in wanted.items():
            if other != document:
                tied = not (scores[other] < own or scores[other] > own)
                ahead += bool(scores[other] > own or (tied and (worth, other) < (grade, document)))
        found.append(ahead)
    return found


def measured(places: list[int], wanted: Mapping[int, float]) -> dict[str, float]:
    """The measures of one query whose relevant documents stand at ``places``.

    nDCG with the grade itself as gain, as trec_eval has it (Järvelin and Kekäläinen 2002).
    """
    grades = list(wanted.values())
    gained = sum(grade / np.log2(at + 2) for at, grade in zip(places, grades, strict=True) if at < DEPTH)
    best = sum(grade / np.log2(at + 2) for at, grade in enumerate(sorted(grades, reverse=True)[:DEPTH]))
    first = min(places)
    return {
        "top_1": float(first == 0),
        "ndcg_at_10": float(gained / best),
        "mrr_at_10": 1 / (first + 1) if first < DEPTH else 0.0,
        "recall_at_10": sum(at < DEPTH for at in places) / len(places),
        "recall_at_100": sum(at < FAR for at in places) / len(places),
    }
