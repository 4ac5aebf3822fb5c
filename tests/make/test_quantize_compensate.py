"""GPTQ over whole graphs, held against two walks taken by hand: each layer is rounded for what it will really read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import pytest

from featherbed.make.calibrate.texts import ends, reference, row_weights, vectors
from featherbed.make.calibrate.walk import Layer, Walk, exact
from featherbed.make.ir import Array, Graph, Weight
from featherbed.make.quantize import apply, per_token, simulate
from featherbed.make.quantize.compensate import Compensated, StepOf, compensate
from featherbed.make.quantize.gptq import Moments, compensated
from featherbed.make.quantize.refine import refined
from featherbed.make.quantize.table import tables
from featherbed.recipe import BlockwiseLinear, BlockwiseTable, LinearStep, MixedLinear, PerTokenLinear, bits_of
from tests.conftest import FIXTURES, NAMES, cosines_of, ran, reference_of, texts_for

Float = npt.NDArray[np.float32]
STEPS: dict[str, LinearStep] = {
    "int8": PerTokenLinear(7, gptq=True),  # 7 bits: no CPU's 16-bit sums of two products saturate
    "int8-block": BlockwiseLinear(8, 64, 4, gptq=True),
    "int4": BlockwiseLinear(4, 32, None, searched=True, gptq=True),
}
COARSE = BlockwiseTable(4, 16)


def ways(name: str, recipe: str) -> StepOf:
    """How each layer is rounded: all alike, or "mixed"."""
    if recipe != "mixed":
        return lambda _: STEPS[recipe]
    known = [*STEPS.values(), None]
    each = {key: known[at % 4] for at, key in enumerate(dict.fromkeys(reference_of(FIXTURES / name).linear_names()))}
    return each.get


@cache
def done(name: str, recipe: str) -> tuple[Graph, dict[str, Weight], Compensated]:
    """A fixture's graph, its tables as they will read, and the layers that were rounded."""
    graph = reference_of(FIXTURES / name)
    read = tables(graph, COARSE)
    return graph, read, compensate(graph, ways(name, recipe), texts_for(FIXTURES / name), read)


def float_vectors(name: str) -> Float:
    return reference(reference_of(FIXTURES / name), texts_for(FIXTURES / name), "reference")


def file_vectors(graph: Graph, name: str) -> Float:
    return np.concatenate([ran(graph, batch.ids, batch.mask)[1] for batch in texts_for(FIXTURES / name).batches])


def written(name: str, recipe: str) -> Graph:
    """The graph that is written: every layer with the codes it was given."""
    graph, _, found = done(name, recipe)
    how = ways(name, recipe)
    mixed = MixedLinear(tuple((key, how(key)) for key in dict.fromkeys(graph.linear_names())))
    return apply(apply(found.graph, mixed, found.ready), COARSE)


class ByHand:
    """Two walks side by side; every layer is rounded at its first site, by the moments of that site alone."""

    def __init__(self, name: str, recipe: str) -> None:
        self.graph, read, _ = done(name, recipe)
        self.how, self.texts = ways(name, recipe), texts_for(FIXTURES / name)
        self.arrays: dict[str, tuple[Array, ...]] = {}
        self.shifts: dict[str, Float] = {}
        self._layers: dict[str, Layer] = {}
        self._floats = Walk(self.graph, self.texts.batches)
        turned = Graph(**{**vars(self.graph), "weights": self.graph.weights | read})
        self.rounded = Walk(turned, self.texts.batches)
        while self._floats.site is not None:
            assert self.rounded.site == self._floats.site
            keys = self._floats.site.weights
            for key in keys:
                if key not in self._layers:
                    self._layers[key] = self._layer(key)
            self._floats.go({key: exact(self.graph.weights[key]) for key in keys})
            self.rounded.go({key: self._layers[key] for key in keys})

    def _layer(self, key: str) -> Layer:
        step = self.how(key)
        if step is None:
            return exact(self.graph.weights[key])
        assert self._floats.site is not None
        weight = self.graph.weights[key].array().astype(np.float32)
        bounded = self._floats.site.x in per_token.behind_gelu(self.graph)
        moments = Moments(weight.shape[1])
        for batch, x, seen in zip(self.texts.batches, self._floats.inputs, self.rounded.inputs, strict=True):
            counts = row_weights(batch, len(x), self.texts.pooling, key in ends(self.graph))
            moments.add(x, simulate.inputs(seen, step, bounded), counts)
        moved, block = moments.moved(weight), simulate.block_of(step, weight.shape[1])
        codes, grids = compensated(moved, moments.factor(), block, simulate.fit_of(step, moved))
        if bits_of(step) < 8:
            codes, grids = refined(moved, codes, grids, block, moments.damped().astype(np.float32))
        self.arrays[key] = simulate.arrays(codes, grids, step)
        values = simulate.values(codes, grids, block)
        self.shifts[key] = moments.shift(weight, values) if bias_of(self.graph, key) else np.zeros(len(weight), "f4")
        return partial(through, values=values, shift=self.shifts[key], seen=partial(self._seen, step, bounded))

    def _seen(self, step: LinearStep, bounded: bool, x: Float) -> Float:
        return simulate.inputs(x, step, bounded)


def through(x: Float, values: Float, shift: Float, seen: Callable[[Float], Float]) -> Float:
    return np.asarray(seen(x) @ values.T + shift, np.float32)


def bias_of(graph: Graph, key: str) -> str | None:
    """The bias that is added to a layer's output, looked for by name alone."""
    stem = key.removesuffix(".weight")
    return next((name for name in graph.weights if name in (f"{stem}.bias", f"{stem}.bias.row")), None)


@cache
def by_hand(name: str, recipe: str) -> ByHand:
    return ByHand(name, recipe)


ALL = [(name, recipe) for name in NAMES for recipe in (*STEPS, "mixed")]


@pytest.mark.parametrize(("name", "recipe"), ALL)
def test_each_layer_is_rounded_for_the_inputs_it_will_read(name: str, recipe: str) -> None:
    plain, found = by_hand(name, recipe), done(name, recipe)[2]
    assert found.ready.keys() == plain.arrays.keys()
    for key, parts in plain.arrays.items():
        for one, other in zip(found.ready[key], parts, strict=True):
            assert np.array_equal(one, other), key


@pytest.mark.parametrize(("name", "recipe"), ALL)
def test_a_bias_takes_what_rounding_shifts_and_nothing_else_of_the_graph_changes(name: str, recipe: str) -> None:
    graph, _, found = done(name, recipe)
    plain = by_hand(name, recipe)
    assert found.graph.nodes == graph.nodes
    assert found.graph.weights.keys() == graph.weights.keys()
    shifts = {bias: plain.shifts[key] for key in plain.shifts if (bias := bias_of(graph, key))}
    for key, weight in graph.weights.items():
        after = found.graph.weights[key].array()
        assert after.shape == weight.shape
        moved = (after - weight.array()).ravel()
        expected = shifts.get(key, np.zeros(moved.size, np.float32))
        assert np.abs(moved - expected).max() <= 1e-6 * max(1, np.abs(weight.array()).max()), key
    layers = [key for key in dict.fromkeys(graph.linear_names()) if ways(name, recipe)(key) is not None]
    biased = {
        "bert-mean": len(layers),
        "bert-cls": len(layers),
        "qwen3-tied": 0,  # it has none
        "qwen3-biased": sum(".self_attn." in key for key in layers),
    }
    assert len(shifts) == biased[name]
    assert all(np.abs(shift).max() > 0 for shift in shifts.values())


@pytest.mark.parametrize(("name", "recipe"), ALL)
def test_the_file_computes_what_the_walk_through_rounded_layers_ended_in(name: str, recipe: str) -> None:
    expected = vectors(by_hand(name, recipe).rounded)
    off = 1 - cosines_of(file_vectors(written(name, recipe), name), expected)
    assert np.median(off) < 1e-6
    assert off.max() < 5e-4  # a code that a last bit tips, and what the layers behind it make of that


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", STEPS)
def test_on_its_own_texts_far_less_is_lost_than_to_the_nearest(name: str, recipe: str) -> None:
    graph, texts = reference_of(FIXTURES / name), texts_for(FIXTURES / name)
    found = compensate(graph, ways(name, recipe), texts, {})
    lost, plainly = (
        float(1 - cosines_of(file_vectors(made, name), float_vectors(name)).mean())
        for made in (apply(found.graph, STEPS[recipe], found.ready), apply(graph, STEPS[recipe]))
    )
    assert lost < 0.3 * plainly


def test_a_layer_that_stays_in_float_has_no_arrays() -> None:
    graph, _, found = done("bert-mean", "mixed")
    how = ways("bert-mean", "mixed")
    left = {key for key in graph.linear_names() if how(key) is None}
    assert left
    assert found.ready.keys() == set(graph.linear_names()) - left


def test_progress_goes_from_nothing_to_every_layer() -> None:
    told: list[tuple[str, int, int]] = []
    graph, texts = reference_of(FIXTURES / "bert-cls"), texts_for(FIXTURES / "bert-cls")
    compensate(graph, lambda _: STEPS["int8"], texts, {}, lambda *row: told.append(row))
    total = len(set(graph.linear_names()))
    assert (told[0], told[-1]) == (("calibrate", 0, total), ("calibrate", total, total))
