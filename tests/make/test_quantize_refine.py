"""Codes and scales after GPTQ: each turn against a slow twin, and never for the worse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherbed.make.quantize import simulate
from featherbed.make.quantize.gptq import Codes, Grid, compensated
from featherbed.make.quantize.refine import refined, turn
from featherbed.recipe import BlockwiseLinear
from tests.make.test_quantize_gptq import Double, Float, correlated, error, gaussian, moments_of

BLOCK = 16
STEPS = {
    "searched": BlockwiseLinear(4, BLOCK, None, searched=True, gptq=True),
    "symmetric": BlockwiseLinear(4, BLOCK, None, gptq=True),
}


def rounded(name: str, width: int, seed: int) -> tuple[Float, Codes, list[Grid], Float]:
    """A weight [9, width], its codes and grids by GPTQ, and H with its damping."""
    weight, moments = gaussian(9, width, seed=seed), moments_of(correlated(3 * width, width, seed + 1))
    codes, grids = compensated(weight, moments.factor(), BLOCK, simulate.fit_of(STEPS[name], weight))
    return weight, codes, grids, moments.damped().astype(np.float32)


def lost(weight: Float, codes: Codes, grids: list[Grid], seen: Float) -> Double:
    return error(weight, simulate.values(codes, grids, BLOCK), seen.astype(np.float64))


def slow_turn(weight: Float, codes: Codes, grids: list[Grid], seen: Float) -> tuple[Codes, list[Grid]]:
    """Every code of a column tried, then a block's scale as least squares has it, all others held."""
    codes, grids = codes.copy(), list(grids)
    root = np.linalg.cholesky(seen.astype(np.float64)).T  # H = rootᵀ root
    for block in range(len(grids)):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        for at in range(part.start, min(part.stop, weight.shape[1])):
            tried = []
            for code in range(grids[block].least, grids[block].most + 1):
                codes_with = codes.copy()
                codes_with[:, at] = code
                tried.append(lost(weight, codes_with, grids, seen))
            codes[:, at] = np.argmin(tried, axis=0) + grids[block].least
        scales = grids[block].scale.copy()
        others = simulate.values(codes, grids, BLOCK)
        others[:, part] = 0
        for row in range(len(weight)):
            steps = root[:, part] @ (codes[row, part] - grids[block].zero[row])
            missing = root @ (weight[row] - others[row])
            found = steps @ missing / (steps @ steps) if steps.any() else scales[row]
            scales[row] = found if found * scales[row] > 0 else scales[row]
        grids[block] = replace(grids[block], scale=scales)
    return codes, grids


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("width", [1, 16, 40, 100])
def test_a_turn_ends_where_trying_everything_in_its_order_ends(name: str, width: int) -> None:
    weight, codes, grids, seen = rounded(name, width, width)
    found, fitted = turn(weight, codes, grids, BLOCK, seen)
    expected, slow = slow_turn(weight, codes, grids, seen)
    same = (found == expected).all(axis=1)  # a half that the last bit decides sends a row another way
    assert same.mean() >= 0.7
    for one, other in zip(fitted, slow, strict=True):
        assert np.allclose(one.scale[same], other.scale[same], rtol=1e-3)
    assert lost(weight, found, fitted, seen).sum() == pytest.approx(lost(weight, expected, slow, seen).sum(), rel=2e-2)


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(STEPS)), width=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_a_turn_never_loses_more(name: str, width: int, seed: int) -> None:
    weight, codes, grids, seen = rounded(name, width, seed)
    before = lost(weight, codes, grids, seen)
    moved, fitted = turn(weight, codes, grids, BLOCK, seen)
    dust = 1e-4 * error(weight, np.zeros_like(weight), seen.astype(np.float64))
    assert (lost(weight, moved, fitted, seen) <= before + dust).all()
    assert all(np.array_equal(one.zero, other.zero) for one, other in zip(fitted, grids, strict=True))
    assert all((one.scale * other.scale > 0).all() for one, other in zip(fitted, grids, strict=True))


def test_two_turns_win_what_gptq_left() -> None:
    weight, codes, grids, seen = rounded("searched", 96, 3)
    again, fitted = refined(weight, codes, grids, BLOCK, seen)
    assert lost(weight, again, fitted, seen).sum() < 0.97 * lost(weight, codes, grids, seen).sum()
    assert again.dtype == codes.dtype
    assert again.min() >= 0
    assert again.max() <= 15


def test_a_weight_on_its_grid_stays_as_it_is() -> None:
    weight, codes, grids, seen = rounded("searched", 48, 4)
    exact = simulate.values(codes, grids, BLOCK)
    again, fitted = refined(exact, codes, grids, BLOCK, seen)
    assert np.array_equal(again, codes)
    assert np.abs(simulate.values(again, fitted, BLOCK) - exact).max() <= 1e-5 * np.abs(exact).max()
    assert weight.shape == exact.shape


def test_a_row_of_zeros_stays_zero() -> None:
    _, codes, grids, seen = rounded("searched", 48, 5)
    weight = np.zeros((9, 48), np.float32)
    zeros = np.stack([grid.zero for grid in grids], axis=1)[:, np.arange(48) // BLOCK].astype(codes.dtype)
    again, fitted = refined(weight, zeros, grids, BLOCK, seen)
    assert not simulate.values(again, fitted, BLOCK).any()
    assert all(np.array_equal(one.scale, other.scale) for one, other in zip(fitted, grids, strict=True))
