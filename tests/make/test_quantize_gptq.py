"""GPTQ against a loop that solves, for every column, the least-squares problem it stands for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherbed.make.quantize import simulate
from featherbed.make.quantize.gptq import DAMPING, RIDGE, Fit, Grid, Moments, compensated, inverse_root
from featherbed.recipe import BlockwiseLinear, LinearStep, PerTokenLinear

Float = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
STEPS: dict[str, LinearStep] = {
    "a column of 8 bits": PerTokenLinear(gptq=True),
    "blocks of 8 bits": BlockwiseLinear(8, 16, 4, gptq=True),
    "blocks of 4 bits": BlockwiseLinear(4, 16, None, gptq=True),
    "searched blocks of 4 bits": BlockwiseLinear(4, 16, None, searched=True, gptq=True),
}


def correlated(rows: int, width: int, seed: int, share: float = 0.9) -> Float:
    """Inputs [R, K] whose channels have much in common."""
    rng = np.random.default_rng(seed)
    few = rng.standard_normal((rows, max(1, width // 4))) @ rng.standard_normal((max(1, width // 4), width))
    return np.asarray(share * few + (1 - share) * rng.standard_normal((rows, width)), np.float32)


def gaussian(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def moments_of(x: Float, rounded: Float | None = None, weights: Float | None = None) -> Moments:
    found = Moments(x.shape[1])
    found.add(x, x if rounded is None else rounded, np.ones(len(x), np.float32) if weights is None else weights)
    return found


def damped(moments: Moments) -> Double:
    """H with the damping that ``factor`` has in it."""
    mean = float(np.trace(moments.seen)) / len(moments.seen)
    return np.asarray(moments.seen + (DAMPING * mean or 1.0) * np.eye(len(moments.seen)), np.float64)


def error(weight: Float, rounded: npt.NDArray[np.floating], hessian: Double) -> Double:
    """(w − q) H (w − q)ᵀ of each row [N]."""
    missing = weight.astype(np.float64) - rounded
    return np.asarray(np.einsum("nk,kl,nl->n", missing, hessian, missing), np.float64)


def once(fit: Fit, weight: Float, block: int) -> Fit:
    """The grids of the weight as it was, block by block in order, whatever has become of it."""
    grids = iter([fit(weight[:, at : at + block]) for at in range(0, weight.shape[1], block)])
    return lambda _: next(grids)


def nearest(weight: Float, block: int, fit: Fit) -> tuple[npt.NDArray[np.int16], list[Grid]]:
    """Every column rounded by itself."""
    codes, grids = np.empty(weight.shape, np.int16), []
    for at in range(0, weight.shape[1], block):
        grids.append(fit(weight[:, at : at + block]))
        for column in range(at, min(at + block, weight.shape[1])):
            codes[:, column] = grids[-1].codes(weight[:, column])
    return codes, grids


def plain(weight: Float, hessian: Double, block: int, fit: Fit) -> tuple[npt.NDArray[np.int16], list[Grid], Double]:
    """Codes [N, K], their grids, and how near each row came to a tie: for each column in turn, what is the best that
    all later columns can be, given those that are rounded already?"""
    whole, width = weight.astype(np.float64), weight.shape[1]
    codes, rounded = np.zeros(weight.shape, np.int16), np.zeros(weight.shape)
    grids: list[Grid] = []
    near = np.full(len(weight), np.inf)
    for at in range(width):
        done, rest = slice(None, at), slice(at, None)
        # the least of (w − q) H (w − q)ᵀ over what is free: H_rr d_r = −H_rf d_f
        missed = rounded[:, done] - whole[:, done]
        best = whole.copy()
        best[:, rest] -= np.linalg.solve(hessian[rest, rest], hessian[rest, done] @ missed.T).T
        if at % block == 0:
            grids.append(fit(best[:, at : at + block].astype(np.float32)))
        grid = grids[-1]
        exact = best[:, at] / grid.scale.astype(np.float64)
        near = np.minimum(near, np.abs(np.abs(exact - np.floor(exact)) - 0.5))
        codes[:, at] = np.clip(np.rint(exact) + grid.zero, grid.least, grid.most)
        rounded[:, at] = (codes[:, at] - grid.zero.astype(np.float64)) * grid.scale
    return codes, grids, near


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("rows", "width"), [(7, 48), (5, 40), (12, 16), (3, 1), (6, 5)])
def test_codes_are_those_of_the_plain_loop(name: str, rows: int, width: int) -> None:
    step, weight = STEPS[name], gaussian(rows, width, seed=1)
    moments = moments_of(correlated(200, width, seed=2))
    block = simulate.block_of(step, width)
    fixed = simulate.fit_of(step, weight)
    codes, grids = compensated(weight, moments.factor(), block, once(fixed, weight, block))
    expected, same, near = plain(weight, damped(moments), block, once(fixed, weight, block))
    assert len(grids) == len(same) == -(-width // block)
    clear = near > 1e-3  # the others may be rounded either way, and all that follows with them
    assert clear.mean() > 0.5
    assert np.array_equal(codes[clear], expected[clear])
    found = error(weight, simulate.values(codes, grids, block), damped(moments))
    wanted = error(weight, simulate.values(expected, same, block), damped(moments))
    np.testing.assert_allclose(found[clear], wanted[clear], rtol=1e-4)


@pytest.mark.parametrize("name", STEPS)
def test_a_block_is_fitted_to_what_the_columns_before_it_have_made_of_it(name: str) -> None:
    step, weight = STEPS[name], gaussian(9, 40, seed=3)
    moments = moments_of(correlated(200, 40, seed=4))
    block = simulate.block_of(step, 40)
    codes, grids = compensated(weight, moments.factor(), block, simulate.fit_of(step, weight))
    _, expected, near = plain(weight, damped(moments), block, simulate.fit_of(step, weight))
    clear = near > 1e-3
    for grid, other in zip(grids, expected, strict=True):
        np.testing.assert_allclose(grid.scale[clear], other.scale[clear], rtol=1e-3)
    assert codes.min() >= grids[0].least
    assert codes.max() <= grids[0].most


# what it is for


@pytest.mark.parametrize("name", STEPS)
def test_correlated_inputs_lose_clearly_less_than_to_the_nearest(name: str) -> None:
    step, weight = STEPS[name], gaussian(64, 48, seed=5)
    moments = moments_of(correlated(400, 48, seed=6))
    block = simulate.block_of(step, 48)
    fixed = simulate.fit_of(step, weight)
    found, plainly = (
        error(weight, simulate.values(*made, block), moments.seen).sum()
        for made in (
            compensated(weight, moments.factor(), block, once(fixed, weight, block)),
            nearest(weight, block, once(fixed, weight, block)),
        )
    )
    assert found < 0.6 * plainly


@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 40),
    rows=st.integers(1, 60),
    share=st.floats(0, 1),
    name=st.sampled_from(sorted(STEPS)),
)
def test_next_to_rounding_to_the_nearest_nothing_is_lost(
    seed: int, width: int, rows: int, share: float, name: str
) -> None:
    step, weight = STEPS[name], gaussian(64, width, seed=seed)
    moments = moments_of(correlated(rows, width, seed, share))
    block = simulate.block_of(step, width)
    fixed = simulate.fit_of(step, weight)
    found, plainly = (
        error(weight, simulate.values(*made, block), damped(moments)).sum()
        for made in (
            compensated(weight, moments.factor(), block, once(fixed, weight, block)),
            nearest(weight, block, once(fixed, weight, block)),
        )
    )
    assert found <= 1.3 * plainly  # greedy: a little more may be lost where there is next to nothing to make up for


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 40), name=st.sampled_from(sorted(STEPS)))
def test_inputs_with_nothing_in_common_are_rounded_to_the_nearest(seed: int, width: int, name: str) -> None:
    step, weight = STEPS[name], gaussian(6, width, seed=seed)
    block, fit = simulate.block_of(step, width), simulate.fit_of(step, weight)
    moments = Moments(width)
    moments.seen = np.eye(width)
    codes, _ = compensated(weight, moments.factor(), block, fit)
    assert np.array_equal(codes, nearest(weight, block, fit)[0])


# moments


def some_rows(width: int, seed: int) -> tuple[Float, Float, Float]:
    """x, x̂ [R, K] and weights [R]."""
    x = correlated(90, width, seed)
    return x, x + 0.1 * gaussian(90, width, seed=seed + 1), np.abs(gaussian(90, seed=seed + 2))


@pytest.mark.parametrize("width", [1, 5, 24])
def test_moments_are_sums_of_outer_products(width: int) -> None:
    x, rounded, weights = some_rows(width, 7)
    found = Moments(width)
    for part in (slice(0, 30), slice(30, 31), slice(31, 90)):
        found.add(x[part], rounded[part], weights[part])
    seen, missed = np.zeros((width, width)), np.zeros((width, width))
    for row, other, weight in zip(x.astype(float), rounded.astype(float), weights.astype(float), strict=True):
        seen += weight * np.outer(other, other)
        missed += weight * np.outer(row - other, other)
    assert np.abs(found.seen - seen).max() <= 1e-5 * np.abs(seen).max()
    assert np.abs(found.missed - missed).max() <= 1e-5 * np.abs(seen).max()
    assert found.total == pytest.approx(float(weights.sum(dtype=np.float64)), rel=1e-6)


@pytest.mark.parametrize("width", [1, 5, 24])
def test_the_factor_is_that_of_the_damped_inverse(width: int) -> None:
    moments = moments_of(correlated(90, width, seed=8))
    factor = moments.factor().astype(np.float64)
    assert np.array_equal(factor, np.triu(factor))
    assert (np.diag(factor) > 0).all()
    assert np.abs(factor.T @ factor @ damped(moments) - np.eye(width)).max() < 1e-3


@pytest.mark.parametrize("width", [1, 2, 64, 65, 131, 300])
def test_the_root_of_an_inverse_is_upper_triangular_and_squares_to_it(width: int) -> None:
    matrix = damped(moments_of(correlated(2 * width, width, seed=8)))
    root = inverse_root(matrix)
    assert np.array_equal(root, np.triu(root))
    expected = np.linalg.inv(matrix)
    assert np.abs(root.T @ root - expected).max() <= 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("width", [1, 5, 24, 100])
def test_the_moved_weight_is_the_ridge_regression_on_what_the_float_layer_gives(width: int) -> None:
    x, rounded, weights = some_rows(width, 9)
    weight = gaussian(11, width, seed=10)
    moments = moments_of(x, rounded, weights)
    # rows √ω · x̂ against what is missing, and one row a column that holds the change to 0
    root = np.sqrt(weights.astype(np.float64))[:, None]
    ridge = np.sqrt(RIDGE * np.trace(moments.seen) / width)
    left = np.concatenate([root * rounded, ridge * np.eye(width)])
    right = np.concatenate([root * ((x - rounded).astype(np.float64) @ weight.T), np.zeros((width, 11))])
    change = np.linalg.lstsq(left, right, rcond=None)[0].T
    assert np.abs(change).max() > 1e-2
    assert np.abs(moments.moved(weight) - (weight + change)).max() <= 1e-4 * np.abs(weight).max()


def test_a_layer_whose_inputs_are_exact_is_not_moved() -> None:
    weight = gaussian(11, 24, seed=10)
    assert np.array_equal(moments_of(correlated(90, 24, seed=8)).moved(weight), weight)


@pytest.mark.parametrize("width", [1, 24])
def test_the_shift_is_the_mean_that_the_rounded_layer_lacks(width: int) -> None:
    x, rounded, weights = some_rows(width, 11)
    weight, other = gaussian(11, width, seed=12), gaussian(11, width, seed=13)
    rows = [
        ω * (weight.astype(float) @ row - other.astype(float) @ seen)
        for row, seen, ω in zip(x.astype(float), rounded.astype(float), weights.astype(float), strict=True)
    ]
    expected = np.sum(rows, axis=0) / weights.sum(dtype=np.float64)
    assert np.abs(moments_of(x, rounded, weights).shift(weight, other) - expected).max() <= 1e-5


def test_rows_of_padding_change_nothing_whatever_is_in_them() -> None:
    x, rounded, weights = some_rows(12, 14)
    junk = np.full((5, 12), np.nan, np.float32)
    order = np.random.default_rng(0).permutation(95)
    mixed = [np.concatenate([part, junk])[order] for part in (x, rounded)]
    found = moments_of(mixed[0], mixed[1], np.concatenate([weights, np.zeros(5, np.float32)])[order])
    again = moments_of(x, rounded, weights)
    for key in ("seen", "missed", "mean_float", "mean_rounded"):
        first, second = getattr(found, key), getattr(again, key)
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4 * np.abs(second).max())
    assert found.total == pytest.approx(again.total)


@pytest.mark.parametrize("name", STEPS)
def test_a_layer_that_never_sees_anything_is_rounded_to_the_nearest(name: str) -> None:
    step, weight = STEPS[name], gaussian(6, 40, seed=15)
    for empty in (Moments(40), moments_of(np.zeros((20, 40), np.float32))):
        assert np.array_equal(empty.moved(weight), weight)
        assert not empty.shift(weight, weight).any()
        block, fit = simulate.block_of(step, 40), simulate.fit_of(step, weight)
        codes, grids = compensated(weight, empty.factor(), block, fit)
        assert np.array_equal(codes, nearest(weight, block, fit)[0])
        assert np.isfinite(simulate.values(codes, grids, block)).all()
