"""Ranges of activations on calibration texts: by least and largest value, by percentile, or by entropy.

The same ranges as onnxruntime's calibrators find when they are given the same values at once (tests compare). Values
pass batch by batch: first for their extremes, then, where the distribution is asked for, into one histogram between
± the largest magnitude. Padding is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from featherbed.make.calibrate.texts import Calibration, sites
from featherbed.make.calibrate.walk import Walk, exact, real_rows
from featherbed.make.ir import Graph
from featherbed.progress import Progress, silent
from featherbed.steps import Range, StaticLinear

Float = npt.NDArray[np.float32]
Histogram = npt.NDArray[np.int64]
Span = tuple[float, float]  # least and largest value
BINS = 2048  # of a histogram
CODES = 128  # that entropy asks how well they tell the histogram
SMOOTHED = 0.0001  # what an empty bin is given: a logarithm has to be taken of it


def ranges(graph: Graph, step: StaticLinear, texts: Calibration, progress: Progress = silent) -> dict[str, Span]:
    """The range of what each linear layer reads, by the layer's weight.

    Weights that are read a second time, for the rows of pooled tokens, keep the range that they were found with: it is
    of all rows.
    """
    found: dict[str, Span] = {}
    walk = Walk(graph, texts.batches)
    for at in sites(walk, "look at activations", progress):
        assert at.site is not None
        names = at.site.weights
        if names[0] not in found:
            rows = [x[real_rows(batch, len(x))] for batch, x in zip(texts.batches, at.inputs, strict=True)]
            found |= dict.fromkeys(names, span(rows, step))
        at.go({name: exact(graph.weights[name]) for name in names})
    return found


def span(values: Sequence[Float], step: StaticLinear) -> Span:
    """The range of some values, part by part."""
    peaks = [(float(part.min()), float(part.max())) for part in values if part.size]
    low, high = min(low for low, _ in peaks), max(high for _, high in peaks)
    if step.activations is Range.MIN_MAX or low == high:
        return low, high
    most = max(abs(low), abs(high))
    counts = np.zeros(BINS, np.int64)
    for part in values:
        counts += np.histogram(part, BINS, range=(-most, most))[0]
    edges = np.histogram_bin_edges(np.zeros(1, np.float32), BINS, range=(-most, most))
    if step.activations is Range.PERCENTILE:
        inner = by_percentile(counts, edges, step.percentile)
    else:
        inner = by_entropy(counts, edges)
    return max(inner[0], low), min(inner[1], high)


def by_percentile(counts: Histogram, edges: npt.NDArray[np.floating], percentile: float) -> Span:
    """Where ``percentile`` per cent of the values lie, half of the others on either side; at an edge below a bin."""
    below = np.cumsum(counts / counts.sum())
    cut = (100 - percentile) / 200
    return float(edges[np.searchsorted(below, cut)]), float(edges[np.searchsorted(below, 1 - cut)])


def by_entropy(counts: Histogram, edges: npt.NDArray[np.floating]) -> Span:
    """The symmetric range whose values, told by CODES codes, diverge least from all values clipped to it.

    Szymon Migacz, 8-bit Inference with TensorRT, 2017; from CODES bins around zero outwards, a bin on each side a time.
    """
    middle, half = len(counts) // 2, CODES // 2
    best, found = np.inf, (float(edges[middle - half]), float(edges[middle + half + 1]))
    for reach in range(half, middle + 1):
        start, end = middle - reach, min(middle + reach + 1, len(counts))
        divergence = _divergence(counts, start, end)
        if divergence < best:
            best, found = divergence, (float(edges[start]), float(edges[end]))
    return found


def _divergence(counts: Histogram, start: int, end: int) -> float:
    """Of the counts clipped to [start, end) from what CODES codes make of them (Kullback-Leibler); inf without any."""
    inside = counts[start:end]
    clipped = inside.copy()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[end:].sum()
    merged = len(inside) // CODES
    whole = merged * CODES
    codes = inside[:whole].reshape(CODES, merged).sum(axis=1)
    codes[-1] += inside[whole:].sum()
    used = (clipped[:whole] != 0).reshape(CODES, merged).sum(axis=1)
    told = np.zeros_like(clipped)  # whole numbers, and nothing behind the last whole code: as theirs
    told[:whole] = np.repeat(np.divide(codes, used, out=np.zeros(CODES), where=used != 0), merged)
    p, q = _smoothed(clipped), _smoothed(told)
    if p is None or q is None:
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


def _smoothed(counts: Histogram) -> Float | None:
    """Counts with a little in each empty bin, taken from the others; None where all are empty."""
    empty = counts == 0
    if empty.all():
        return None
    taken = SMOOTHED * float(empty.sum()) / float((~empty).sum())
    return np.asarray(np.where(empty, SMOOTHED, counts - taken), np.float32)
