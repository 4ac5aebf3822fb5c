"""Vectors against the reference's vectors, row by row and each among the others; what vectors must be by themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherbed.check.statistics import Floats, pearson, spearman

Vectors = npt.NDArray[np.float32]
NEAREST = 10
COMPARED = 2000  # texts whose similarities with each other are looked at: two million pairs say enough
SHOWN = 10  # of the worst texts


@dataclass(frozen=True)
class Agreement:
    """Cosines [N] of rows with the reference's rows. Everything is NaN as soon as one row is not finite."""

    rows: Floats

    @property
    def mean(self) -> float:
        """Of all rows."""
        return float(self.rows.mean())

    @property
    def worst(self) -> float:
        """Of all rows."""
        return float(self.rows.min())

    def percentile(self, percent: float) -> float:
        """The cosine below which ``percent`` of the rows lie."""
        return float(np.percentile(self.rows, percent))

    @property
    def worst_places(self) -> tuple[tuple[int, float], ...]:
        """(row, cosine) of the worst rows, the worst one first; one that is not finite before all."""
        order = np.argsort(np.where(np.isnan(self.rows), -np.inf, self.rows), kind="stable")[:SHOWN]
        return tuple((int(at), float(self.rows[at])) for at in order)


@dataclass(frozen=True)
class Neighbourhood:
    """What is left of the similarities of texts with each other.

    ``pearson`` and ``spearman`` correlate those of all pairs with the reference's; ``neighbours`` [n] is each text's
    share of its ten nearest texts that are still among its ten nearest.
    """

    pearson: float
    spearman: float
    neighbours: Floats


def cosines(a: Vectors, b: Vectors) -> npt.NDArray[np.float64]:
    """Row-wise cosines [N] of a and b [N, D], in float64.

    A row of zeros has cosine 0 with everything, a row that is not finite has NaN: neither can hide in a mean.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    products = np.einsum("nd,nd->n", x, y)
    with np.errstate(invalid="ignore"):  # inf / inf: overwritten with NaN below
        cosine = np.divide(products, lengths, out=np.zeros_like(products), where=lengths != 0)
    cosine[~np.isfinite(x).all(axis=1) | ~np.isfinite(y).all(axis=1)] = math.nan
    return np.asarray(cosine, np.float64)


def agreement(vectors: Vectors, reference: Vectors) -> Agreement:
    """How well ``vectors`` [N, D] keep ``reference`` [N, D]."""
    return Agreement(cosines(vectors, reference))


def neighbourhood(vectors: Vectors, reference: Vectors) -> Neighbourhood:
    """How well unit ``vectors`` [N, D] keep who is near to whom in ``reference`` [N, D].

    Of more than COMPARED texts, evenly spaced ones. NaN where there are too few texts, or one is not finite.
    """
    if len(vectors) > COMPARED:
        at = np.linspace(0, len(vectors) - 1, COMPARED).round().astype(int)
        vectors, reference = vectors[at], reference[at]
    if len(vectors) < 2 or not (np.isfinite(vectors).all() and np.isfinite(reference).all()):
        return Neighbourhood(math.nan, math.nan, np.full(len(vectors), math.nan))
    found, expected = _similarities(vectors), _similarities(reference)
    pairs = np.triu_indices(len(found), 1)
    a, b = found[pairs], expected[pairs]
    near, nearer = _nearest(found), _nearest(expected)
    kept = [len(set(x) & set(y)) / len(y) for x, y in zip(near.tolist(), nearer.tolist(), strict=True)]
    return Neighbourhood(float(pearson(a, b)), float(spearman(a, b)), np.asarray(kept, np.float64))


def _similarities(vectors: Vectors) -> Floats:
    x = vectors.astype(np.float64)
    return np.asarray(x @ x.T, np.float64)


def _nearest(similarities: Floats) -> npt.NDArray[np.intp]:
    """Each row's nearest others [N, NEAREST], or as many as there are."""
    others = similarities.copy()
    np.fill_diagonal(others, -np.inf)
    return np.argsort(-others, axis=1, kind="stable")[:, : min(NEAREST, len(others) - 1)]


def anisotropy(vectors: Vectors) -> float:
    """Mean cosine of different rows of unit vectors: (|Σv|² − N) / (N (N − 1)); NaN for a single row."""
    count = len(vectors)
    if count < 2:
        return math.nan
    total = vectors.astype(np.float64).sum(axis=0)
    return float((total @ total - count) / (count * (count - 1)))


def unit_norm_error(vectors: Vectors) -> float:
    """Largest | |v| − 1 |."""
    return float(np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max())


def margins(vectors: Vectors, places: tuple[tuple[int, int, int], ...]) -> Floats:
    """cos(anchor, positive) − cos(anchor, negative) of each triplet: above 0 is in order."""
    if not places:
        return np.empty(0)
    anchor, positive, negative = (vectors[list(column)] for column in zip(*places, strict=True))
    return cosines(anchor, positive) - cosines(anchor, negative)
