"""Recipes, applied: what was chosen stands in the steps that come back, and outliers cost nothing any more."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherbed.errors import OptionError
from featherbed.make.calibrate.texts import Calibration, reference
from featherbed.make.ir import Graph
from featherbed.make.quantize import apply
from featherbed.make.transforms import rotate, smooth
from featherbed.make.variant import ALPHAS, Made, highest, made, nearest, step_of
from featherbed.make.write import model_bytes
from featherbed.recipe import (
    RECIPES,
    BlockwiseLinear,
    BlockwiseTable,
    DynamicLinear,
    LinearStep,
    MixedLinear,
    PerTokenLinear,
    Rotate,
    Smooth,
    Step,
    calibrated,
)
from tests.conftest import FIXTURES, NAMES, cosines_of, planted, ran, reference_of, texts_for, upstream

PLANTED = {  # every place where a fixture's family can have outliers that its function does not show
    "qwen3-tied": ("norms", "down", "values"),
    "qwen3-biased": ("norms", "down", "values"),
    "bert-mean": ("values",),
    "bert-cls": ("values",),
}


@cache
def made_of(folder: Path, steps: tuple[Step, ...]) -> Made:
    return made(reference_of(folder), steps, texts_for(folder))


def lost(name: str, graph: Graph) -> float:
    """1 − mean cosine to upstream's own vectors, on texts that were not calibrated on."""
    known = upstream(name)
    return float(1 - cosines_of(ran(graph, known.ids, known.mask)[1], known.unit).mean())


# texts


@pytest.mark.parametrize("recipe", [name for name, found in RECIPES.items() if found.calibrated])
def test_a_step_that_looks_at_activations_needs_texts(recipe: str) -> None:
    with pytest.raises(OptionError, match=r"^calibration: expected texts, which (Smooth|\w+Linear) looks at") as caught:
        made(reference_of(FIXTURES / "bert-cls"), RECIPES[recipe].steps, None)
    assert "--calibration" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("recipe", [name for name, found in RECIPES.items() if not found.calibrated])
def test_other_recipes_need_none_and_do_not_look_at_those_they_are_given(recipe: str) -> None:
    graph, steps = reference_of(FIXTURES / "bert-cls"), RECIPES[recipe].steps
    without = made(graph, steps, None)
    assert without.steps == steps
    assert model_bytes(without.graph) == model_bytes(made(graph, steps, texts_for(FIXTURES / "bert-cls")).graph)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_checkpoint_and_texts_give_the_same_bytes(name: str) -> None:
    for recipe in ("int8", "int8-block", "int4", "int8-smooth"):
        first, second = (
            made(reference_of(FIXTURES / name), RECIPES[recipe].steps, texts_for(FIXTURES / name)) for _ in range(2)
        )
        assert first.steps == second.steps
        assert model_bytes(first.graph) == model_bytes(second.graph)


def test_other_texts_give_other_bytes() -> None:
    graph, texts = reference_of(FIXTURES / "bert-cls"), texts_for(FIXTURES / "bert-cls")
    fewer = Calibration(texts.probe, texts.batches[1:], texts.pooling)
    first, second = (made(graph, RECIPES["int8"].steps, seen).graph for seen in (texts, fewer))
    assert model_bytes(first) != model_bytes(second)


# what was chosen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", ["int8", "int8-block", "int4"])
def test_the_alpha_that_comes_back_keeps_more_than_those_beside_it(name: str, recipe: str) -> None:
    steps = RECIPES[recipe].steps
    found = made_of(FIXTURES / name, steps)
    assert len(found.steps) == len(steps)
    chosen = found.steps[1]
    assert isinstance(chosen, Smooth)
    assert chosen.alpha in ALPHAS
    assert [step for step in found.steps if not isinstance(step, Smooth)] == [
        step for step in steps if not isinstance(step, Smooth)
    ]
    # the same with α given, and neither α beside it is nearer to the float vectors on the same texts
    again = made(reference_of(FIXTURES / name), found.steps, texts_for(FIXTURES / name))
    assert again.steps == found.steps
    assert model_bytes(again.graph) == model_bytes(found.graph)
    graph, texts = rotate.apply(reference_of(FIXTURES / name)), texts_for(FIXTURES / name)
    peaks, exact = smooth.peaks(graph, texts, "look"), reference(graph, texts, "reference")
    linear = next(step for step in steps if isinstance(step, LinearStep))
    kept = {
        alpha: float(
            (nearest(smooth.apply(graph, alpha, chosen.explicit, peaks), step_of(linear), texts) * exact).sum()
        )
        for alpha in ALPHAS
    }
    at = ALPHAS.index(chosen.alpha)
    assert all(kept[beside] <= kept[chosen.alpha] for beside in ALPHAS[max(0, at - 1) : at + 2])
    assert len(set(kept.values())) > 1


@given(
    rising=st.lists(st.floats(0, 1), max_size=6, unique=True),
    falling=st.lists(st.floats(0, 1), max_size=6, unique=True),
)
def test_a_single_peak_is_found_and_only_what_lies_on_the_way_is_asked(
    rising: list[float], falling: list[float]
) -> None:
    heights = [*sorted(rising), 2.0, *sorted(falling, reverse=True)]
    asked: list[int] = []

    def height(place: float) -> float:
        asked.append(int(place))
        return heights[int(place)]

    middle, peak = len(heights) // 2, len(rising)
    assert highest(range(len(heights)), height) == peak
    assert set(asked) <= set(range(min(middle, peak) - 1, max(middle, peak) + 2))


def test_among_equal_heights_the_middle_is_kept() -> None:
    assert highest((1.0, 2.0, 3.0, 4.0, 5.0), lambda _: 0.0) == 3.0
    assert highest((7.0,), lambda _: 0.0) == 7.0


def test_an_alpha_that_is_given_is_not_searched() -> None:
    told: list[str] = []
    graph, texts = reference_of(FIXTURES / "bert-cls"), texts_for(FIXTURES / "bert-cls")
    steps = (Smooth(alpha=0.8), DynamicLinear())
    found = made(graph, steps, texts, lambda stage, *_: told.append(stage))
    assert found.steps == steps
    assert set(told) == {"look at activations"}


def test_stages_of_progress_are_these() -> None:
    told: list[str] = []
    graph, texts = reference_of(FIXTURES / "bert-cls"), texts_for(FIXTURES / "bert-cls")
    made(graph, RECIPES["int8"].steps, texts, lambda stage, *_: told.append(stage))
    tried = [f"try α {alpha}" for alpha in ALPHAS]
    stages = list(dict.fromkeys(told))
    assert stages[:3] == ["look at activations", "reference", "try α 0.6"]
    assert len(stages[2:-1]) >= 3
    assert set(stages[2:-1]) <= set(tried)
    assert stages[-1] == "calibrate"


@pytest.mark.parametrize(
    "step",
    # 7 bits: no CPU's 16-bit sums of two products saturate
    [PerTokenLinear(7), BlockwiseLinear(8, 64, 4), BlockwiseLinear(4, 32, None, searched=True), DynamicLinear(7)],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_tried_in_numpy_is_what_onnxruntime_would_compute(name: str, step: LinearStep) -> None:
    graph, texts = reference_of(FIXTURES / name), texts_for(FIXTURES / name)
    found = nearest(graph, lambda _: step, texts)
    expected = np.concatenate([ran(apply(graph, step), batch.ids, batch.mask)[1] for batch in texts.batches])
    exact = reference(graph, texts, "reference")
    off = 1 - cosines_of(found, expected)
    assert np.median(off) < 1e-6
    # a code that a last bit tips is a small part of what rounding costs
    assert off.max() < 5e-4
    assert off.mean() <= 0.1 * (1 - cosines_of(expected, exact)).mean()


# outliers


@pytest.mark.parametrize("name", NAMES)
def test_an_outlier_channel_hurts_plain_int8_and_smoothing_heals_it(name: str) -> None:
    quiet, loud = FIXTURES / name, planted(name, *PLANTED[name])
    plain = (PerTokenLinear(),)
    before = lost(name, made_of(quiet, plain).graph)
    assert before < 1e-3
    assert lost(name, made_of(loud, ()).graph) < 1e-5  # in float nobody can tell
    assert lost(name, made_of(loud, plain).graph) > 10 * before
    assert lost(name, made_of(loud, (Smooth(), *plain)).graph) < 1.5 * before


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-biased"])
def test_outliers_of_norms_are_healed_by_rotation_as_well(name: str) -> None:
    quiet, loud = FIXTURES / name, planted(name, "norms")
    before = lost(name, made_of(quiet, (PerTokenLinear(),)).graph)
    assert lost(name, made_of(loud, (PerTokenLinear(),)).graph) > 10 * before
    assert lost(name, made_of(loud, (Rotate(), PerTokenLinear())).graph) < 1.5 * before


@pytest.mark.parametrize("recipe", ["int8", "int8-block"])
@pytest.mark.parametrize("name", NAMES)
def test_whole_recipes_are_as_good_with_outliers_as_plain_rounding_is_without(name: str, recipe: str) -> None:
    steps = RECIPES[recipe].steps
    linear = next(step for step in steps if isinstance(step, LinearStep))
    plain = PerTokenLinear() if isinstance(linear, PerTokenLinear) else BlockwiseLinear(8, 64, 4)
    before = lost(name, made_of(FIXTURES / name, (plain,)).graph)
    for folder in (FIXTURES / name, planted(name, *PLANTED[name])):
        assert lost(name, made_of(folder, steps).graph) < 1.5 * before


# each layer in its own way


WAYS: tuple[LinearStep | None, ...] = (
    PerTokenLinear(gptq=True),
    BlockwiseLinear(4, 32, None, searched=True, gptq=True),
    None,
    BlockwiseLinear(8, 64, 4),
)


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_rounded_each_in_the_way_that_stands_beside_their_names(name: str) -> None:
    graph = reference_of(FIXTURES / name)
    keys = tuple(dict.fromkeys(graph.linear_names()))
    mixed = MixedLinear(tuple((key, WAYS[at % len(WAYS)]) for at, key in enumerate(keys)))
    found = made_of(FIXTURES / name, (mixed, BlockwiseTable()))
    assert found.steps == (mixed, BlockwiseTable())
    times = Counter(graph.linear_names())
    for key, how in mixed.layers:
        match how:
            case None:
                expected, weight = "Gemm", key
            case BlockwiseLinear():
                expected, weight = "MatMulNBits", f"{key}.q{how.bits}"
            case _:
                expected, weight = "MatMulIntegerToFloat", f"{key}.s8"
        nodes = [node for node in found.graph.nodes if weight in node.inputs]
        assert [node.op for node in nodes] == [expected] * times[key], key
        for node in nodes:
            if isinstance(how, BlockwiseLinear):
                values = dict(node.attributes)
                assert (values["bits"], values["block_size"]) == (how.bits, how.block)
                assert values.get("accuracy_level") == how.accuracy_level
            if isinstance(how, PerTokenLinear):
                maker = next(n for n in found.graph.nodes if node.inputs[0] in n.outputs)
                assert maker.op == "QuantizeLinear"
    assert lost(name, found.graph) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_is_not_named_stays_in_float(name: str) -> None:
    graph = reference_of(FIXTURES / name)
    first, *others = dict.fromkeys(graph.linear_names())
    found = made_of(FIXTURES / name, (MixedLinear(((first, PerTokenLinear(gptq=True)),)),)).graph
    in_float = {node.inputs[1] for node in found.nodes if node.op == "Gemm"}
    assert in_float == set(others)
    assert lost(name, found) < 1e-3


def test_mixed_layers_that_are_all_alike_are_the_recipe_of_one_step() -> None:
    graph, texts = reference_of(FIXTURES / "bert-cls"), texts_for(FIXTURES / "bert-cls")
    for step in (PerTokenLinear(gptq=True), BlockwiseLinear(8, 64, 4, gptq=True), PerTokenLinear()):
        mixed = MixedLinear(tuple((key, step) for key in dict.fromkeys(graph.linear_names())))
        assert calibrated(mixed) == calibrated(step)
        one, other = (made(graph, (way,), texts).graph for way in (step, mixed))
        assert model_bytes(one) == model_bytes(other)
