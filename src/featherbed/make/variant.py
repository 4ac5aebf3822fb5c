"""A recipe, applied: reference graph in, the variant's graph out, in onnxruntime's operators.

Steps that look at activations are answered from calibration texts; what was chosen on the way stands in the steps that
come back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from featherbed.errors import OptionError
from featherbed.make import quantize
from featherbed.make.calibrate.ranges import ranges
from featherbed.make.calibrate.texts import Calibration, reference, sites, vectors
from featherbed.make.calibrate.walk import Float, Layer, Walk
from featherbed.make.graph.half import half
from featherbed.make.graph.lower import lower
from featherbed.make.graph.standard import BLOCKS, standard
from featherbed.make.graph.static import static as fixed
from featherbed.make.ir import Graph
from featherbed.make.quantize import output, per_token, simulate, static
from featherbed.make.quantize.columns import Ready
from featherbed.make.quantize.compensate import StepOf, compensate
from featherbed.make.quantize.table import tables
from featherbed.make.transforms import rotate, smooth
from featherbed.progress import Progress, silent
from featherbed.recipe import BlockwiseTable, LinearStep, MixedLinear, Rotate, Smooth, Step, calibrated
from featherbed.steps import (
    Half,
    NormalFloatLinear,
    QuantizedOutput,
    Standard,
    Static,
    StaticLinear,
    UnsignedLinear,
    UnsignedTable,
)

ALPHAS = (0.3, 0.45, 0.6, 0.75, 0.9)
OUTPUT_TOKENS = 16_384  # of the calibration texts, whose vectors say what their codes span
SWEEP_TOKENS = 2048  # of the calibration texts, for each α


@dataclass(frozen=True)
class Made:
    """A variant's graph, and its steps with everything that was chosen."""

    graph: Graph
    steps: tuple[Step, ...]


def made(graph: Graph, steps: tuple[Step, ...], texts: Calibration | None, progress: Progress = silent) -> Made:
    """``graph`` after ``steps``. Raises OptionError when a step needs calibration texts and there are none."""
    chosen: list[Step] = []
    ready: Ready = {}
    original = graph
    for at, step in enumerate(steps):
        if calibrated(step) and texts is None:
            raise OptionError(
                "calibration",
                expected=f"texts, which {type(step).__name__} looks at",
                found="none",
                remedy="give some with --calibration",
            )
        match step:
            case Rotate():
                graph = rotate.apply(graph)
            case Smooth():
                assert texts is not None
                graph, step = _smoothed(graph, step, steps[at + 1 :], texts, progress)
            case StaticLinear():
                assert texts is not None
                graph = static.apply(graph, step, ranges(graph, step, texts, progress))
            case QuantizedOutput():
                assert texts is not None
                step = output.chosen(step, reference(original, texts.part(OUTPUT_TOKENS), "look at vectors", progress))
                graph = output.apply(graph, step)
            case BlockwiseTable() | UnsignedLinear() | UnsignedTable() | NormalFloatLinear():
                graph = quantize.apply(graph, step)
            case Half() | Standard() | Static():
                pass  # of the finished graph, below
            case _:
                if calibrated(step):
                    assert texts is not None
                    table = next((s for s in steps if isinstance(s, BlockwiseTable)), None)
                    read = {} if table is None else tables(graph, table)
                    done = compensate(graph, step_of(step), texts, read, progress)
                    graph, ready = done.graph, done.ready
                graph = quantize.apply(graph, step, ready)
        chosen.append(step)
    return Made(finished(lower(graph), steps), tuple(chosen))


def finished(graph: Graph, steps: tuple[Step, ...]) -> Graph:
    """A graph in onnxruntime's operators in those, types and shapes that ``steps`` ask for.

    Raises OptionError on an operator that the standard has nothing for.
    """
    for step in (step for step in steps if isinstance(step, Standard)):
        graph = standard(graph, (BLOCKS,) if step.blocks else ())
    if any(isinstance(step, Half) for step in steps):
        graph = half(graph)
    for shape in (step for step in steps if isinstance(step, Static)):
        graph = fixed(graph, shape.batch, shape.tokens)
    return graph


def step_of(step: LinearStep | MixedLinear) -> StepOf:
    """How each weight is rounded by a step over all linear layers."""
    if isinstance(step, MixedLinear):
        return dict(step.layers).get
    return lambda _: step


def prepared(graph: Graph, steps: tuple[Step, ...], texts: Calibration, progress: Progress = silent) -> Graph:
    """``graph`` after transforms only, its linear layers still whole. A Smooth among them must say its α."""
    for step in steps:
        if isinstance(step, Rotate):
            graph = rotate.apply(graph)
        elif isinstance(step, Smooth) and step.alpha is not None:
            found = smooth.peaks(graph, texts, "look at activations", progress)
            graph = smooth.apply(graph, step.alpha, step.explicit, found)
    return graph


def chosen_alpha(graph: Graph, steps: tuple[Step, ...], texts: Calibration, progress: Progress = silent) -> float:
    """The α that a Smooth among ``steps`` takes for the linear step behind it, after the steps before it."""
    at = next(place for place, step in enumerate(steps) if isinstance(step, Smooth))
    step = steps[at]
    assert isinstance(step, Smooth)
    graph = prepared(graph, steps[:at], texts, progress)
    _, chosen = _smoothed(graph, step, steps[at + 1 :], texts, progress)
    assert chosen.alpha is not None
    return chosen.alpha


def _smoothed(
    graph: Graph, step: Smooth, following: tuple[Step, ...], texts: Calibration, progress: Progress
) -> tuple[Graph, Smooth]:
    found = smooth.peaks(graph, texts, "look at activations", progress)
    if step.alpha is not None:
        return smooth.apply(graph, step.alpha, step.explicit, found), step
    linear = next(s for s in following if isinstance(s, LinearStep | MixedLinear))
    part = texts.part(SWEEP_TOKENS)
    exact = reference(graph, part, "reference", progress)

    @cache
    def kept(alpha: float) -> float:
        tried = smooth.apply(graph, alpha, step.explicit, found)
        return float((nearest(tried, step_of(linear), part, f"try α {alpha}", progress) * exact).sum(1).mean())

    alpha = highest(ALPHAS, kept)
    return smooth.apply(graph, alpha, step.explicit, found), replace(step, alpha=alpha)


def highest(places: Sequence[float], height: Callable[[float], float]) -> float:
    """The place of ``places`` that a walk uphill from their middle ends at; the first asked among equals."""
    at = len(places) // 2
    while True:
        best = max((i for i in (at, at - 1, at + 1) if 0 <= i < len(places)), key=lambda i: height(places[i]))
        if best == at:
            return places[at]
        at = best


def nearest(graph: Graph, how: StepOf, texts: Calibration, stage: str = "round", progress: Progress = silent) -> Float:
    """Unit vectors [N, D] of ``graph`` with weights rounded to the nearest and inputs as the products see them."""
    behind = per_token.behind_gelu(graph)
    walk = Walk(graph, texts.batches)
    for at in sites(walk, stage, progress):
        assert at.site is not None
        bounded = at.site.x in behind
        layers: dict[str, Layer] = {}
        for name in at.site.weights:
            rounded = simulate.weight(np.asarray(graph.weights[name].array(), np.float32), how(name))
            layers[name] = simulate.layer(rounded, how(name), bounded)
        at.go(layers)
    return vectors(walk)
