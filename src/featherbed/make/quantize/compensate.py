"""GPTQ over a whole graph: two walks side by side, one in float, one through the layers rounded so far.

Each layer is rounded for the inputs it will really see, so what the layers before it did wrong is made up for as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from featherbed.make.calibrate.texts import Calibration, ends, row_weights, sites
from featherbed.make.calibrate.walk import Layer, Walk, exact
from featherbed.make.ir import Array, Graph, Weight, is_linear
from featherbed.make.quantize import per_token, simulate
from featherbed.make.quantize.gptq import Moments, compensated
from featherbed.make.quantize.refine import refined
from featherbed.progress import Progress, silent
from featherbed.recipe import LinearStep, bits_of

Float = npt.NDArray[np.float32]
FINE_BITS = 8  # where GPTQ leaves nothing worth a second look
StepOf = Callable[[str], LinearStep | None]  # a weight's name → how it is rounded; None leaves it in float


@dataclass(frozen=True)
class Compensated:
    """A graph whose biases make up for what rounding shifts, and the rounded weights' arrays by name."""

    graph: Graph
    ready: dict[str, tuple[Array, ...]]


@dataclass(frozen=True)
class _Layer:
    """A rounded layer: its step, whether its inputs come out of a GELU, its weight [N, K] and its output's shift."""

    step: LinearStep | None
    bounded: bool
    weight: Float
    shift: Float

    def __call__(self, x: Float) -> Float:
        """x [R, K] → [R, N]."""
        seen = simulate.inputs(x, self.step, self.bounded)
        return np.asarray(seen @ self.weight.T + self.shift, np.float32)


def compensate(
    graph: Graph, step_of: StepOf, calibration: Calibration, tables: dict[str, Weight],
    progress: Progress = silent,
) -> Compensated:  # fmt: skip
    """Round every linear layer of ``graph`` as ``step_of`` says. ``tables`` are embedding tables as they will read.

    Raises EngineError when onnxruntime refuses a piece of the graph.
    """
    biases, behind, late = _biases(graph), per_token.behind_gelu(graph), ends(graph)
    layers: dict[str, _Layer] = {}
    ready: dict[str, tuple[Array, ...]] = {}
    shifts: dict[str, Float] = {}
    rounded = Walk(replace(graph, weights=graph.weights | tables), calibration.batches)
    for float_walk in sites(Walk(graph, calibration.batches), "calibrate", progress):
        site = float_walk.site
        assert site is not None
        exactly: dict[str, Layer] = {}
        moments: dict[LinearStep, Moments] = {}
        for name in site.weights:
            values = np.asarray(graph.weights[name].array(), np.float32)
            exactly[name] = exact(replace(graph.weights[name], read=partial(iter, (values,))))
            if name in layers:
                continue
            step, bounded = step_of(name), site.x in behind
            if step is None:
                layers[name] = _Layer(None, bounded, values, np.zeros(len(values), np.float32))
                continue
            if step not in moments:
                moments[step] = _moments(float_walk, rounded, step, bounded, calibration, name in late)
            layers[name], ready[name] = _round(values, step, bounded, moments[step], name in biases)
            if name in biases:
                shifts[biases[name]] = layers[name].shift
        rounded.go({name: layers[name] for name in site.weights})
        float_walk.go(exactly)
        for name in set(site.weights) - late:  # nobody reads them again: four times the model would pile up
            del layers[name]
    weights = dict(graph.weights)
    for bias, shift in shifts.items():
        weights[bias] = _shifted(weights[bias], shift)
    return Compensated(replace(graph, weights=weights), ready)


def _moments(
    walk: Walk, rounded: Walk, step: LinearStep, bounded: bool, calibration: Calibration, late: bool
) -> Moments:
    moments: Moments | None = None
    for batch, x, seen in zip(calibration.batches, walk.inputs, rounded.inputs, strict=True):
        moments = moments or Moments(x.shape[1])
        weights = row_weights(batch, len(x), calibration.pooling, late)
        moments.add(x, simulate.inputs(seen, step, bounded), weights)
    assert moments is not None
    return moments


def _round(
    values: Float, step: LinearStep, bounded: bool, moments: Moments, biased: bool
) -> tuple[_Layer, tuple[Array, ...]]:
    moved = moments.moved(values)
    block = simulate.block_of(step, values.shape[1])
    codes, grids = compensated(moved, moments.factor(), block, simulate.fit_of(step, moved))
    if bits_of(step) < FINE_BITS:
        codes, grids = refined(moved, codes, grids, block, moments.damped().astype(np.float32))
    weight = simulate.values(codes, grids, block)
    shift = moments.shift(values, weight) if biased else np.zeros(len(values), np.float32)
    return _Layer(step, bounded, weight, shift), simulate.arrays(codes, grids, step)


def _biases(graph: Graph) -> dict[str, str]:
    """Weights of linear layers whose output meets a bias at once, and that bias."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        if is_linear(node):
            readers = [n for n in graph.nodes if node.outputs[0] in n.inputs]
            if len(readers) == 1 and readers[0].op == "Add" and readers[0].inputs[1] in graph.weights:
                found[node.inputs[1]] = readers[0].inputs[1]
    return found


def _shifted(bias: Weight, shift: Float) -> Weight:
    whole = np.asarray(bias.array() + shift.reshape(bias.shape), np.float32)
    return replace(bias, read=lambda: iter((whole,)))
