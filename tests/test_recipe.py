"""Recipes: frozen values, found by name, the reference always first."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherbed.errors import OptionError
from featherbed.recipe import (
    RECIPES,
    REFERENCE,
    BlockwiseLinear,
    BlockwiseTable,
    DynamicLinear,
    Explicit,
    MixedLinear,
    PerTokenLinear,
    Recipe,
    Rotate,
    Shelf,
    Smooth,
    Step,
    calibrated,
    recipe,
    recipes,
    recorded,
)
from featherbed.steps import (
    Half,
    NormalFloatLinear,
    QuantizedOutput,
    Range,
    Standard,
    StaticLinear,
    UnsignedLinear,
    UnsignedTable,
)

BITS = {
    "fp32": 32, "int8": 8, "int8-block": 8, "int4": 4, "int4-small": 4, "int8-dynamic": 8, "int8-smooth": 8, "q4": 4,
    "int8-full": 8, "uint8": 8, "int8-static": 8, "bnb4": 4, "uint8-out": 8, "fp16": 16, "q4f16": 4,
}  # fmt: skip
NOT_GELU, NOWHERE = Smooth(None, Explicit.NOT_GELU), Smooth(None, Explicit.NOWHERE)
STEPS: dict[str, tuple[Step, ...]] = {
    "fp32": (),
    "int8": (Rotate(), NOT_GELU, PerTokenLinear(8, gptq=True), BlockwiseTable(8, 128)),
    "int8-block": (Rotate(), NOT_GELU, BlockwiseLinear(8, 64, 4, gptq=True), BlockwiseTable(8, 128)),
    "int4": (Rotate(), NOWHERE, BlockwiseLinear(4, 32, None, searched=True, gptq=True), BlockwiseTable(8, 128)),
    "int4-small": (Rotate(), NOWHERE, BlockwiseLinear(4, 64, None, searched=True, gptq=True), BlockwiseTable(4, 64)),
    "int8-dynamic": (DynamicLinear(8),),
    "int8-smooth": (Smooth(None, Explicit.NOT_GELU), DynamicLinear(8)),
    "q4": (BlockwiseLinear(4, 32, None),),
    "int8-full": (DynamicLinear(8), UnsignedTable()),
    "uint8": (UnsignedLinear(8), UnsignedTable()),
    "int8-static": (StaticLinear(8, Range.PERCENTILE, 99.999),),
    "bnb4": (NormalFloatLinear(64),),
    "uint8-out": (Rotate(), NOT_GELU, PerTokenLinear(8, gptq=True), BlockwiseTable(8, 128), QuantizedOutput(0.05)),
    "fp16": (Half(), Standard()),
    "q4f16": (BlockwiseLinear(4, 32, None), Half(), Standard(blocks=True)),
}
MIXED = MixedLinear((("a", PerTokenLinear()), ("b", None), ("c", BlockwiseLinear(4, 32, None))))


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_is_found_by_its_own_name(name: str) -> None:
    found = recipe(name)
    assert found is RECIPES[name]
    assert found.name == name
    assert found.linear_bits == BITS[name]
    assert found.steps == STEPS[name]
    assert found.summary


def test_there_is_one_reference_and_the_compatible_ones_do_what_others_ship() -> None:
    assert [r.name for r in RECIPES.values() if r.shelf is Shelf.REFERENCE] == [REFERENCE]
    assert {r.name for r in RECIPES.values() if r.shelf is Shelf.COMPATIBLE} == {
        "int8-dynamic",
        "int8-smooth",
        "q4",
        "int8-full",
        "uint8",
        "int8-static",
        "bnb4",
        "uint8-out",
        "fp16",
        "q4f16",
    }


@pytest.mark.parametrize("name", list(RECIPES))
def test_ours_look_at_activations_and_of_the_compatible_ones_the_smoothed_the_static_and_outputs(name: str) -> None:
    blind = {"fp32", "int8-dynamic", "q4", "int8-full", "uint8", "bnb4", "fp16", "q4f16"}
    assert recipe(name).calibrated == (name not in blind)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (Rotate(), False),
        (Smooth(), True),
        (Smooth(0.5), True),
        (PerTokenLinear(), False),
        (PerTokenLinear(gptq=True), True),
        (BlockwiseLinear(4, 32, None), False),
        (BlockwiseLinear(4, 32, None, gptq=True), True),
        (DynamicLinear(), False),
        (BlockwiseTable(), False),
        (UnsignedLinear(), False),
        (UnsignedTable(), False),
        (NormalFloatLinear(), False),
        (StaticLinear(), True),
        (QuantizedOutput(), True),
        (MIXED, False),
        (MixedLinear(()), False),
        (MixedLinear((*MIXED.layers, ("d", PerTokenLinear(gptq=True)))), True),
    ],
    ids=str,
)
def test_a_step_is_calibrated_when_something_of_it_looks_at_activations(step: Step, expected: bool) -> None:
    assert calibrated(step) is expected


def test_a_mixed_recipe_has_the_bits_of_its_coarsest_layer_and_tells_each_in_json() -> None:
    mixed = Recipe("mixed", "_mixed", Shelf.OURS, (Rotate(), MIXED, BlockwiseTable()), "each in its own way")
    assert mixed.linear_bits == 4
    assert replace(mixed, steps=(MixedLinear((("a", None),)),)).linear_bits == 32
    assert replace(mixed, steps=(MixedLinear(()),)).linear_bits == 32
    layers = json.loads(json.dumps(mixed.to_json()))["steps"][1]["layers"]
    assert layers[0] == ["a", {"step": "PerTokenLinear", "weight_bits": 8, "gptq": False}]
    assert layers[1] == ["b", None]
    assert layers[2][1]["step"] == "BlockwiseLinear"


def test_no_two_recipes_write_the_same_file() -> None:
    suffixes = [r.suffix for r in RECIPES.values()]
    assert len(set(suffixes)) == len(suffixes)
    assert RECIPES[REFERENCE].suffix == ""
    assert all(r.suffix == "_" + r.name.replace("-", "_") for r in RECIPES.values() if r.name != REFERENCE)


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("int-8", "int8"),
        ("fp23", "fp32"),
        ("int8-blok", "int8-block"),
        ("int8_dynamic", "int8-dynamic"),
        ("int4-smal", "int4-small"),
    ],
)
def test_an_unknown_name_suggests_a_near_one(asked: str, near: str) -> None:
    with pytest.raises(OptionError) as caught:
        recipe(asked)
    text = str(caught.value)
    assert repr(asked) in text
    assert f"did you mean {near}?" in text
    assert all(name in text for name in RECIPES)
    assert len(text.splitlines()) == 1
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("asked", ["zzz", "Größe", "\n", "x" * 1000])
def test_a_name_near_to_none_lists_them_all(asked: str) -> None:
    with pytest.raises(OptionError) as caught:
        recipe(asked)
    assert "choose one of these" in str(caught.value)
    assert "did you mean" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("names", [[], [""], [" ", ""]])
def test_an_empty_list_is_refused(names: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        recipes(names)
    assert "an empty list" in str(caught.value)


@given(names=st.lists(st.sampled_from(list(RECIPES)), min_size=1))
def test_the_reference_is_first_and_nothing_comes_twice(names: list[str]) -> None:
    found = [r.name for r in recipes(names)]
    assert found[0] == REFERENCE
    assert set(found) == {REFERENCE, *names}
    assert len(set(found)) == len(found)
    assert found[1:] == list(dict.fromkeys(name for name in names if name != REFERENCE))


def test_a_group_stands_for_several_and_is_named_where_names_are() -> None:
    assert [r.name for r in recipes(["all"])] == list(RECIPES)
    web = [r.name for r in recipes(["web"])]
    assert web == [name for name in ("fp32", "fp16", "int8", "q4", "q4f16") if name in RECIPES]
    assert [r.name for r in recipes(["bnb4", "web", "int8"])] == ["fp32", "bnb4", *web[1:]]
    with pytest.raises(OptionError, match="all, web"):
        recipes(["everything"])
    with pytest.raises(OptionError, match="all, web"):
        recipes([])


def test_spaces_around_a_name_are_not_part_of_it() -> None:
    assert [r.name for r in recipes([" int8 ", "int8", "q4\t"])] == ["fp32", "int8", "q4"]


def test_one_unknown_name_among_good_ones_is_refused() -> None:
    with pytest.raises(OptionError, match="int9"):
        recipes(["int8", "int9"])


def test_recipes_and_steps_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        RECIPES["int8"].suffix = "_x"  # type: ignore[misc]
    for found in RECIPES.values():
        assert isinstance(found.steps, tuple)
        for step in found.steps:
            for field in fields(step):
                with pytest.raises(FrozenInstanceError):
                    setattr(step, field.name, 2)
        hash(found)


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_says_all_its_parameters_in_json(name: str) -> None:
    plain = json.loads(json.dumps(recipe(name).to_json()))
    assert plain["name"] == name
    assert plain["shelf"] in {"reference", "compatible", "ours"}
    assert plain["suffix"] == recipe(name).suffix
    assert all(
        set(said) == {"step", *vars(step)} for said, step in zip(plain["steps"], recipe(name).steps, strict=True)
    )
    assert recorded(plain).steps == recipe(name).steps


def test_blocks_of_tables_are_powers_of_two() -> None:
    for found in RECIPES.values():
        for step in found.steps:
            if isinstance(step, (BlockwiseTable, BlockwiseLinear)):
                assert step.block >= 16
                assert step.block & (step.block - 1) == 0
