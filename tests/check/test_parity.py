"""Cosines, triplets and what vectors must be by themselves; each detector is tripped by a planted fault."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from featherbed.check.parity import agreement, anisotropy, cosines, triplets, unit_norm_error

Vectors = npt.NDArray[np.float32]


def unit_rows(count: int, width: int, seed: int = 0) -> Vectors:
    rows = np.random.default_rng(seed).standard_normal((count, width))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def slow_cosine(a: Vectors, b: Vectors) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    lengths = math.sqrt(sum(float(x) ** 2 for x in a)) * math.sqrt(sum(float(y) ** 2 for y in b))
    return dot / lengths if lengths else 0.0


@given(arrays(np.float32, (3, 5), elements=st.floats(-4, 4, width=32)))
def test_cosines_equal_the_plain_sum(rows: Vectors) -> None:
    other = np.roll(rows, 1, axis=0)
    expected = [slow_cosine(a, b) for a, b in zip(rows, other, strict=True)]
    assert np.abs(cosines(rows, other) - expected).max() <= 1e-9


def test_the_worst_row_is_seen_beside_a_thousand_good_ones() -> None:
    good = unit_rows(1000, 32)
    bad = good.copy()
    bad[7] = -bad[7]
    assert agreement(bad, good).worst == pytest.approx(-1)
    assert agreement(bad, good).mean > 0.99


def test_a_row_of_zeros_has_cosine_zero_and_not_one() -> None:
    good = unit_rows(10, 8)
    bad = good.copy()
    bad[3] = 0
    assert agreement(bad, good).worst == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_row_that_is_not_finite_spoils_mean_and_worst(value: float) -> None:
    good = unit_rows(10, 8)
    bad = good.copy()
    bad[3, 2] = value
    found = agreement(bad, good)
    assert math.isnan(found.mean)
    assert math.isnan(found.worst)


def test_anisotropy_is_the_mean_cosine_of_all_different_pairs() -> None:
    rows = unit_rows(20, 6)
    pairs = [slow_cosine(rows[i], rows[j]) for i in range(20) for j in range(20) if i != j]
    assert anisotropy(rows) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert anisotropy(np.repeat(rows[:1], 5, axis=0)) == pytest.approx(1, abs=1e-6)
    assert math.isnan(anisotropy(rows[:1]))


def test_a_vector_that_is_not_of_unit_length_is_seen() -> None:
    rows = unit_rows(20, 6)
    assert unit_norm_error(rows) < 1e-6
    rows[4] *= 1.25
    assert unit_norm_error(rows) == pytest.approx(0.25, abs=1e-6)


def test_triplets_count_the_order_and_average_the_margin() -> None:
    rows = np.asarray([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    correct, margin = triplets(rows, ((0, 1, 2), (2, 0, 1)))
    assert correct == 1
    assert margin == pytest.approx((0.8 - 0.6) / 2)
    correct, margin = triplets(rows, ())
    assert correct == 0
    assert math.isnan(margin)
