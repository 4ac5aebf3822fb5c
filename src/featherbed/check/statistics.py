"""Ranks, rank correlation, and how far a figure would move with other texts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]
Interval = tuple[float, float]
RESAMPLES, INTERVAL_PERCENT, SEED = 1000, 95, 20261122
AT_ONCE = 2**22  # places drawn


def ranks(values: Floats) -> Floats:
    """Ranks from 1 along the last axis, equal values sharing the mean of theirs; NaN wherever a row has a NaN."""
    count = values.shape[-1]
    order = np.argsort(values, axis=-1)
    ordered = np.take_along_axis(values, order, -1)
    edge = np.ones((*values.shape[:-1], 1), bool)
    differs = ordered[..., 1:] != ordered[..., :-1]
    place = np.arange(count)
    first = np.maximum.accumulate(np.where(np.concatenate([edge, differs], -1), place, 0), axis=-1)
    ends = np.where(np.concatenate([differs, edge], -1), place, count)
    last = np.minimum.accumulate(ends[..., ::-1], axis=-1)[..., ::-1]
    result = np.empty(values.shape)
    np.put_along_axis(result, order, (first + last) / 2 + 1, -1)
    return np.where(np.isnan(values).any(axis=-1, keepdims=True), np.nan, result)


def pearson(a: Floats, b: Floats) -> Floats:
    """Correlation along the last axis; NaN where all of a or all of b are equal, or one is NaN."""
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (a, b))
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.asarray((x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1)), np.float64)


def spearman(a: Floats, b: Floats) -> Floats:
    """Correlation of ranks along the last axis; NaN as ``pearson``."""
    return pearson(ranks(a), ranks(b))


def bootstrap(statistic: Callable[[Places], Floats], count: int) -> Interval:
    """The 95 % interval of a statistic of ``count`` things (percentile bootstrap, Efron 1979), always the same one.

    ``statistic`` takes resamples [R, count] of their places and returns [R].
    """
    rng = np.random.default_rng(SEED)
    together = max(1, AT_ONCE // count)  # resamples of many things would fill the memory
    parts = [
        statistic(rng.integers(0, count, (min(together, RESAMPLES - done), count)))
        for done in range(0, RESAMPLES, together)
    ]
    tail = (100 - INTERVAL_PERCENT) / 2
    low, high = np.percentile(np.concatenate(parts), [tail, 100 - tail])
    return float(low), float(high)


def mean_interval(values: Floats) -> Interval:
    """The interval of the mean of values [N]; NaN as soon as one of them is."""
    return bootstrap(lambda at: np.asarray(values[at].mean(axis=-1), np.float64), len(values))
