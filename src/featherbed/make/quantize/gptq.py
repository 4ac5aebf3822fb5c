"""GPTQ (Frantar et al. 2022): a weight's columns are rounded one after the other, and the columns that are still to
come make up for what each rounding did to the layer's output.

With H = Σ x xᵀ over the inputs x that the layer will see, damped, and H⁻¹ = Uᵀ U, U upper triangular:

    q_c = round(w_c),  e = (w_c − q_c) / U_cc,  w_k ← w_k − e · U_ck for all k > c

Before it the weight is moved to where it meets the float layer's output best, given that its inputs x̂ are those of a
model that is rounded already while the float layer saw x (least squares, held to W by a ridge λ; GPTAQ, Li et al. 2025,
aims at the same):

    W ← W + W · C · (H + λI)⁻¹,  C = Σ (x − x̂) x̂ᵀ

and after it the mean of what is left goes into the layer's bias, where it has one. Columns keep their order, so blocks
keep their grids and no file needs an index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int16]
DAMPING = 0.01  # of H's mean diagonal
TOGETHER = 64  # columns whose errors are handed on to the columns behind them in one product
SMALL = 64  # triangular matrices that are inverted as a whole
RIDGE = 0.1  # of the same: 0.01 fits the calibration's texts and not others (docs/lab.md)


@dataclass(frozen=True)
class Grid:
    """What codes mean, an output row each: value = (code − zero) · scale; scale and zero [N]."""

    scale: Float
    zero: Float
    least: int
    most: int

    def codes(self, values: Float) -> Float:
        """The nearest codes to ``values`` [N]."""
        return np.asarray(np.clip(np.rint(values / self.scale) + self.zero, self.least, self.most), np.float32)

    def values(self, codes: Float) -> Float:
        """What ``codes`` [N] stand for."""
        return np.asarray((codes - self.zero) * self.scale, np.float32)


Fit = Callable[[Float], Grid]  # columns [N, block] → their grid


class Moments:
    """Sums over weighted rows of a layer's input: float x and rounded x̂, [R, K] each."""

    def __init__(self, width: int) -> None:
        self.seen = np.zeros((width, width))  # H = Σ x̂ x̂ᵀ
        self.missed = np.zeros((width, width))  # C = Σ (x − x̂) x̂ᵀ
        self.mean_float, self.mean_rounded = np.zeros(width), np.zeros(width)
        self.total = 0.0

    def add(self, x: Float, rounded: Float, weights: Float) -> None:
        """Take rows in; ``weights`` [R]."""
        kept = weights > 0
        x, rounded, weights = x[kept], rounded[kept], weights[kept, None]
        root = np.sqrt(weights)
        seen, missed = rounded * root, (x - rounded) * root
        self.seen += seen.T @ seen  # of one array, so that BLAS makes half of it
        self.missed += missed.T @ seen
        self.mean_float += (x * weights).sum(axis=0, dtype=np.float64)
        self.mean_rounded += (rounded * weights).sum(axis=0, dtype=np.float64)
        self.total += float(weights.sum())

    def moved(self, weight: Float) -> Float:
        """The weight [N, K] whose products with x̂ come nearest to those of ``weight`` with x."""
        ridge = RIDGE * np.trace(self.seen) / len(self.seen) or 1.0
        root = inverse_root((self.seen + ridge * np.eye(len(self.seen))).astype(np.float32))
        return np.asarray(weight + weight @ self.missed.astype(np.float32) @ root.T @ root, np.float32)

    def shift(self, weight: Float, rounded: Float) -> Float:
        """[N]: mean output of ``weight`` on x less that of ``rounded`` on x̂."""
        mean = (weight @ self.mean_float - rounded @ self.mean_rounded) / (self.total or 1.0)
        return np.asarray(mean, np.float32)

    def damped(self) -> Double:
        """H [K, K] with the damping that everything of GPTQ counts with."""
        size = len(self.seen)
        return np.asarray(self.seen + (DAMPING * np.trace(self.seen) / size or 1.0) * np.eye(size), np.float64)

    def factor(self) -> Float:
        """U [K, K], upper triangular, with (H + damping)⁻¹ = Uᵀ U."""
        return np.asarray(inverse_root(self.damped()), np.float32)


def inverse_root(matrix: Float | Double) -> Float | Double:
    """U [K, K], upper triangular, with matrix⁻¹ = Uᵀ U, of a positive definite ``matrix`` and in its type."""
    # matrix = T Tᵀ with T upper triangular is Cholesky's factor from the other end; then U = T⁻¹
    return _inverse(np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1])


def _inverse(upper: Float | Double) -> Float | Double:
    """The inverse of an upper triangular matrix, by quarters: products are what BLAS is fastest at."""
    size = len(upper)
    if size <= SMALL:
        return np.triu(np.linalg.inv(upper))
    half = size // 2
    inverse = np.zeros_like(upper)
    inverse[:half, :half] = _inverse(upper[:half, :half])
    inverse[half:, half:] = _inverse(upper[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ upper[:half, half:] @ inverse[half:, half:]
    return inverse


def compensated(weight: Float, factor: Float, block: int, fit: Fit) -> tuple[Codes, list[Grid]]:
    """weight [N, K] → codes [N, K], and the grid of each block of columns, fitted when its turn comes."""
    count, width = weight.shape
    left = np.ascontiguousarray(weight.T)  # [K, N]: a column of the weight is a row here
    codes = np.empty((width, count), np.int16)
    grids: list[Grid] = []
    for start in range(0, width, block):
        whole = min(start + block, width)
        grids.append(fit(np.ascontiguousarray(left[start:whole].T)))
        for first in range(start, whole, TOGETHER):
            end = min(first + TOGETHER, whole)
            errors = np.empty((end - first, count), np.float32)
            for at in range(first, end):
                code = grids[-1].codes(left[at])
                codes[at] = code
                error = (left[at] - grids[-1].values(code)) / factor[at, at]
                errors[at - first] = error
                left[at + 1 : end] -= factor[at, at + 1 : end, None] * error
            if end < width:
                left[end:] -= factor[first:end, end:].T @ errors
    return np.ascontiguousarray(codes.T), grids
