"""After GPTQ, which never looks back: codes are moved once more and scales fitted to them, a block at a time.

With w a row of the weight, q what its codes stand for, H the moments of the layer's input and R = (w − q) H kept up to
date, (w − q) H (w − q)ᵀ gets lower, or stays, with each of these (coordinate descent):

    a code:   q_c ← round(q_c + R_c / H_cc) on the block's grid
    a scale:  s_b ← s_b + z R_bᵀ / z H_bb zᵀ, with z = codes − zero of block b
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from featherbed.make.quantize.gptq import Codes, Float, Grid

ROUNDS = 2  # docs/lab.md has what they win


def refined(weight: Float, codes: Codes, grids: list[Grid], block: int, seen: Float) -> tuple[Codes, list[Grid]]:
    """Codes [N, K] and grids that meet ``weight`` [N, K] better, or as well, on inputs with moments ``seen`` [K, K]."""
    for _ in range(ROUNDS):
        codes, grids = turn(weight, codes, grids, block, seen)
    return codes, grids


def turn(weight: Float, codes: Codes, grids: list[Grid], block: int, seen: Float) -> tuple[Codes, list[Grid]]:
    """Every code and every scale once, each put where it is best given all others."""
    moved = codes.T.astype(np.float32)  # [K, N]: a column of the weight is a row here
    places = [slice(start, start + block) for start in range(0, len(moved), block)]
    values = np.concatenate([grid.values(moved[part]) for grid, part in zip(grids, places, strict=True)])
    pull = seen @ (weight.T - values)  # R
    fitted: list[Grid] = []
    for grid, part in zip(grids, places, strict=True):
        before, here = values[part].copy(), seen[part, part]
        for at in range(len(here)):
            place = part.start + at
            moved[place] = grid.codes(values[place] + pull[place] / here[at, at])
            step = grid.values(moved[place]) - values[place]
            values[place] += step
            pull[part] -= here[:, at, None] * step
        fitted.append(_with_scale(grid, moved[part], pull[part], here))
        values[part] = fitted[-1].values(moved[part])
        rest = slice(part.stop, None)  # blocks before are done with
        pull[rest] -= seen[rest, part] @ (values[part] - before)
    return np.ascontiguousarray(moved.T).astype(np.int16), fitted


def _with_scale(grid: Grid, codes: Float, pull: Float, here: Float) -> Grid:
    """The grid with the scales [N] that are best for the codes, where they keep their sign."""
    steps = codes - grid.zero
    weigh = np.einsum("kn,kn->n", steps, here @ steps)
    change = np.einsum("kn,kn->n", steps, pull) / np.where(weigh > 0, weigh, np.float32(1))
    scale = grid.scale + np.where(weigh > 0, change, np.float32(0))
    return replace(grid, scale=np.where(scale * grid.scale > 0, scale, grid.scale).astype(np.float32))
