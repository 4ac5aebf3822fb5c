"""Codes and scales after GPTQ: each turn against a slow twin, and never for the worse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherbed.make.quantize import simulate
from featherbed.make.quantize.gptq import Codes, Grid, compensated
from featherbed.make.quantize.refine import fitted_scales, moved_codes, refined
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


def slow_codes(weight: Float, codes: Codes, grids: list[Grid], seen: Float) -> Codes:
    """Every code of a column tried, the other columns held."""
    codes = codes.copy()
    for at in range(weight.shape[1]):
        grid = grids[at // BLOCK]
        tried = []
        for code in range(grid.least, grid.most + 1):
            codes_with = codes.copy()
            codes_with[:, at] = code
            tried.append(lost(weight, codes_with, grids, seen))
        codes[:, at] = np.argmin(tried, axis=0) + grid.least
    return codes


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("width", [1, 16, 40, 100])
def test_codes_move_to_where_trying_all_of_them_would_put_them(name: str, width: int) -> None:
    weight, codes, grids, seen = rounded(name, width, width)
    found, expected = moved_codes(weight, codes, grids, BLOCK, seen), slow_codes(weight, codes, grids, seen)
    assert (found != expected).mean() <= 0.01  # halves, where the last bit decides
    assert np.allclose(lost(weight, found, grids, seen), lost(weight, expected, grids, seen), rtol=1e-2)


@pytest.mark.parametrize("width", [1, 16, 40, 100])
def test_scales_are_those_of_least_squares_row_by_row(width: int) -> None:
    weight, codes, grids, seen = rounded("searched", width, width)
    found = np.stack([grid.scale for grid in fitted_scales(weight, codes, grids, BLOCK, seen)], axis=1)
    root = np.linalg.cholesky(seen.astype(np.float64)).T  # H = rootᵀ root
    for row in range(len(weight)):
        steps = np.zeros((width, len(grids)))
        for at, grid in enumerate(grids):
            part = slice(at * BLOCK, (at + 1) * BLOCK)
            steps[part, at] = codes[row, part] - grid.zero[row]
        expected = np.linalg.lstsq(root @ steps, root @ weight[row].astype(np.float64), rcond=None)[0]
        if (expected > 0).all():
            assert found[row] == pytest.approx(expected, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(STEPS)), width=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_no_turn_ever_loses_more(name: str, width: int, seed: int) -> None:
    weight, codes, grids, seen = rounded(name, width, seed)
    before = lost(weight, codes, grids, seen)
    moved = moved_codes(weight, codes, grids, BLOCK, seen)
    after = lost(weight, moved, grids, seen)
    dust = 1e-4 * error(weight, np.zeros_like(weight), seen.astype(np.float64))
    assert (after <= before + dust).all()
    fitted = fitted_scales(weight, moved, grids, BLOCK, seen)
    assert (lost(weight, moved, fitted, seen) <= after + dust).all()
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
