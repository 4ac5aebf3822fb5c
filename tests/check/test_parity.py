"""Cosines, triplets and what vectors must be by themselves; each detector is tripped by a planted fault."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from featherbed.check.parity import COMPARED, agreement, anisotropy, cosines, margins, neighbourhood, unit_norm_error

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


def test_margins_say_which_triplets_are_in_order() -> None:
    rows = np.asarray([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    assert margins(rows, ((0, 1, 2), (2, 0, 1))) == pytest.approx([0.8 - 0, 0 - 0.6])
    assert margins(rows, ()).shape == (0,)


def test_percentiles_and_the_worst_places_come_from_the_same_rows() -> None:
    good = unit_rows(300, 8)
    bad = good.copy()
    for at in (4, 7, 200):
        bad[at] = -bad[at]
    bad[9] = 0
    found = agreement(bad, good)
    assert {place for place, _ in found.worst_places[:3]} == {4, 7, 200}
    assert found.worst_places[3][0] == 9
    assert [cosine for _, cosine in found.worst_places[:4]] == pytest.approx([-1, -1, -1, 0])
    assert found.percentile(0) == pytest.approx(found.worst)
    assert found.percentile(1) == pytest.approx(np.sort(found.rows)[2:4].mean(), abs=0.5)
    bad[3, 0] = math.nan
    assert agreement(bad, good).worst_places[0][0] == 3


def slow_neighbours(rows: Vectors, at: int, count: int) -> set[int]:
    others = [i for i in range(len(rows)) if i != at]
    return set(sorted(others, key=lambda i: -slow_cosine(rows[at], rows[i]))[:count])


def test_neighbours_are_those_of_the_slow_twin() -> None:
    good = unit_rows(40, 6)
    noisy = good + np.float32(0.2) * unit_rows(40, 6, seed=1)
    noisy /= np.linalg.norm(noisy, axis=1, keepdims=True)
    found = neighbourhood(noisy, good)
    expected = [len(slow_neighbours(noisy, at, 10) & slow_neighbours(good, at, 10)) / 10 for at in range(40)]
    assert found.neighbours.tolist() == pytest.approx(expected)
    assert 0.5 < np.mean(expected) < 1
    pairs = [(i, j) for i in range(40) for j in range(i)]
    a, b = ([slow_cosine(rows[i], rows[j]) for i, j in pairs] for rows in (noisy, good))
    assert found.pearson == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
    assert 0.5 < found.spearman < 1


def test_a_text_s_neighbourhood_is_whole_when_nothing_changed_whatever_the_number_of_texts() -> None:
    for count in (2, 3, 11, 12, COMPARED + 5):
        rows = unit_rows(count, 6)
        found = neighbourhood(rows, rows)
        assert len(found.neighbours) == min(count, COMPARED)
        assert found.neighbours.min() == 1
        if count > 2:
            assert found.pearson == pytest.approx(1)
            assert found.spearman == pytest.approx(1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_row_that_is_not_finite_spoils_the_neighbourhood(value: float) -> None:
    good = unit_rows(20, 8)
    bad = good.copy()
    bad[3, 2] = value
    found = neighbourhood(bad, good)
    assert math.isnan(found.pearson)
    assert math.isnan(found.spearman)
    assert np.isnan(found.neighbours).all()


def test_a_single_text_has_no_neighbourhood() -> None:
    found = neighbourhood(unit_rows(1, 8), unit_rows(1, 8))
    assert math.isnan(found.spearman)
    assert np.isnan(found.neighbours).all()
