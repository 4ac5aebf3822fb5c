"""Ranks, correlations and intervals against slow twins."""

from __future__ import annotations

import math

import numpy as np
import pytest

from featherbed.check import statistics
from featherbed.check.statistics import bootstrap, mean_interval, pearson, ranks, spearman


def slow_ranks(values: list[float]) -> list[float]:
    """1 + those below + half of the others it ties with."""
    return [1 + sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def slow_spearman(a: list[float], b: list[float]) -> float:
    x, y = slow_ranks(a), slow_ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    return top / math.sqrt(sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y))


def test_ranks_by_hand() -> None:
    assert ranks(np.asarray([10.0, 20.0, 20.0, 5.0])).tolist() == [2.0, 3.5, 3.5, 1.0]
    assert ranks(np.asarray([7.0])).tolist() == [1.0]
    found = ranks(np.asarray([[1.0, 1.0, 1.0], [1.0, np.nan, 0.0]]))
    assert found[0].tolist() == [2.0, 2.0, 2.0]
    assert np.isnan(found[1]).all()


def test_ranks_and_spearman_are_those_of_the_slow_twins() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 9, (20, 31)).astype(float), rng.standard_normal((20, 31))
    for x, r in zip(a, ranks(a), strict=True):
        assert r.tolist() == slow_ranks(x.tolist())
    for x, y, found in zip(a, b, spearman(a, b), strict=True):
        assert found == pytest.approx(slow_spearman(x.tolist(), y.tolist()), abs=1e-12)


def test_spearman_by_hand() -> None:
    up = np.arange(5.0)
    assert spearman(up, up**3) == pytest.approx(1)
    assert spearman(up, -up) == pytest.approx(-1)
    # 1 − 6 Σd² / (n (n² − 1)) with d = 1, 1, 0, 0
    assert spearman(np.asarray([1.0, 2, 3, 4]), np.asarray([2.0, 1, 3, 4])) == pytest.approx(1 - 12 / 60)
    assert np.isnan(spearman(up, np.ones(5)))


def test_correlation_of_values_is_numpy_s() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((2, 50))
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    assert pearson(a, 3 - 2 * a) == pytest.approx(-1)
    assert np.isnan(pearson(a, np.ones(50)))
    assert np.isnan(pearson(a, np.where(b > 1, np.nan, b)))


def test_the_interval_of_a_mean_is_about_two_standard_errors_and_comes_again() -> None:
    values = np.random.default_rng(2).standard_normal(400)
    low, high = bootstrap(lambda at: values[at].mean(axis=-1), 400)
    assert (low, high) == bootstrap(lambda at: values[at].mean(axis=-1), 400)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert mean_interval(values) == (low, high)
    values[7] = math.nan
    assert all(map(math.isnan, mean_interval(values)))


def test_resamples_drawn_in_parts_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).standard_normal(37)
    whole = mean_interval(values)
    monkeypatch.setattr(statistics, "AT_ONCE", 100)
    assert mean_interval(values) == whole
