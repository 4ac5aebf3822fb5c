"""Vectors against the reference's vectors, row by row; and what vectors must be by themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """Cosines of N rows with the reference's rows: their mean and the worst."""

    mean: float
    worst: float


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
    """How well ``vectors`` [N, D] keep ``reference`` [N, D]; NaN as soon as one row is not finite."""
    rows = cosines(vectors, reference)
    return Agreement(float(rows.mean()), float(rows.min()))


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


def triplets(vectors: Vectors, places: tuple[tuple[int, int, int], ...]) -> tuple[int, float]:
    """(triplets in order, mean margin): cos(anchor, positive) − cos(anchor, negative); margin NaN without any."""
    if not places:
        return 0, math.nan
    anchor, positive, negative = (vectors[list(column)] for column in zip(*places, strict=True))
    margins = cosines(anchor, positive) - cosines(anchor, negative)
    return int((margins > 0).sum()), float(margins.mean())
