"""After GPTQ, which never looks back: codes moved once more, and scales fitted to the codes, turn by turn.

With w a row of the weight, q what its codes stand for, and H the moments of the layer's input, both lower
(w − q) H (w − q)ᵀ, row by row:

    codes, column by column (coordinate descent):  q_c ← round(q_c + R_c / H_cc), with R = (w − q) H kept up to date
    scales, a row's blocks at once (least squares):  (Z H Zᵀ) s = Z H wᵀ, with Z [blocks, K] codes − zero, else 0
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from featherbed.make.quantize.gptq import TOGETHER, Codes, Double, Float, Grid

ROUNDS = 2  # docs/lab.md has what they win
ROWS = 1024  # whose blocks are fitted at a time: a small matrix each
DUST = 1e-6  # of a system's mean diagonal: a block of codes that are all zero leaves its scale open


def refined(weight: Float, codes: Codes, grids: list[Grid], block: int, seen: Float) -> tuple[Codes, list[Grid]]:
    """Codes [N, K] and grids that meet ``weight`` [N, K] better, or as well, on inputs with moments ``seen`` [K, K]."""
    for _ in range(ROUNDS):
        codes = moved_codes(weight, codes, grids, block, seen)
        grids = fitted_scales(weight, codes, grids, block, seen)
    return codes, grids


def moved_codes(weight: Float, codes: Codes, grids: list[Grid], block: int, seen: Float) -> Codes:
    """Each column's codes where they are best, given all others."""
    width = weight.shape[1]
    codes = codes.T.copy()  # [K, N]: a column of the weight is a row here
    parts = [codes[at * block : (at + 1) * block].astype(np.float32) for at in range(len(grids))]
    values = np.concatenate([grid.values(part) for grid, part in zip(grids, parts, strict=True)])
    pull = seen @ (weight.T - values)
    for start in range(0, width, TOGETHER):
        end = min(start + TOGETHER, width)
        steps = np.empty((end - start, len(weight)), np.float32)
        for at in range(start, end):
            grid = grids[at // block]
            code = grid.codes(values[at] + pull[at] / seen[at, at])
            steps[at - start] = grid.values(code) - values[at]
            codes[at] = code
            pull[at:end] -= seen[at:end, at, None] * steps[at - start]
        pull[end:] -= seen[end:, start:end] @ steps  # columns before are done with
    return np.ascontiguousarray(codes.T)


def fitted_scales(weight: Float, codes: Codes, grids: list[Grid], block: int, seen: Float) -> list[Grid]:
    """The grids with the scales [N] that are best for the codes, in rows where all of them keep their sign."""
    scales = np.stack([grid.scale for grid in grids], axis=1)
    zeros = np.stack([grid.zero for grid in grids], axis=1)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        scales[rows] = _fitted(weight[rows], codes[rows], scales[rows], zeros[rows], block, seen)
    return [replace(grid, scale=np.ascontiguousarray(scales[:, at])) for at, grid in enumerate(grids)]


def _fitted(weight: Float, codes: Codes, scales: Float, zeros: Float, block: int, seen: Float) -> Float:
    width, blocks = weight.shape[1], scales.shape[1]
    starts = np.arange(0, width, block)
    steps = (codes - zeros[:, np.arange(width) // block]).astype(np.float32)  # [N, K]
    right = np.add.reduceat((weight @ seen) * steps, starts, axis=1).astype(np.float64)  # [N, blocks]
    left = np.empty((len(weight), blocks, blocks))
    for at, start in enumerate(starts):
        part = slice(start, start + block)
        left[:, at] = np.add.reduceat((steps[:, part] @ seen[part]) * steps, starts, axis=1)
    dust = DUST * np.einsum("nbb->n", left) / blocks
    open_ends = np.where(dust > 0, dust, 1.0)[:, None, None] * np.eye(blocks)
    # towards the old scale, not towards nothing: a block that says nothing keeps what it had
    aim = right[:, :, None] + open_ends @ scales[:, :, None]
    found = np.linalg.solve(left + open_ends, aim)[:, :, 0].astype(np.float32)
    better = _error(left, right, found) < _error(left, right, scales)
    return np.where((better & (found * scales > 0).all(axis=1))[:, None], found, scales)


def _error(left: Double, right: Double, scales: Float) -> Double:
    """(w − q) H (w − q)ᵀ of each row, less what no scale changes."""
    s = scales.astype(np.float64)
    return np.asarray(np.einsum("nb,nbc,nc->n", s, left, s) - 2 * np.einsum("nb,nb->n", right, s), np.float64)
