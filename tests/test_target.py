"""For which engine: words of the command line, and what they add to a recipe."""

from __future__ import annotations

import pytest

from featherbed.errors import OptionError
from featherbed.recipe import RECIPES, recorded
from featherbed.steps import Standard, Static
from featherbed.target import Target, parse_target


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("fused", ""), Target()),
        (("standard", ""), Target(True)),
        (("fused", "1x128"), Target(False, Static(1, 128))),
        (("standard", "8x2"), Target(True, Static(8, 2))),
    ],
    ids=str,
)
def test_words_become_a_target(words: tuple[str, str], expected: Target) -> None:
    assert parse_target(*words) == expected


@pytest.mark.parametrize(
    "words",
    [
        ("onnx", ""),
        ("", ""),
        *(("fused", w) for w in ("128", "1x", "0x128", "1x1", "-1x128", "1x128x3", "1 x 128", "1x²")),
    ],
    ids=str,
)
def test_other_words_are_refused(words: tuple[str, str]) -> None:
    with pytest.raises(OptionError):
        parse_target(*words)


@pytest.mark.parametrize("recipe", list(RECIPES.values()), ids=lambda r: r.name)
def test_a_target_adds_its_steps_and_the_manifest_gives_them_back(recipe: object) -> None:
    assert recipe in RECIPES.values()
    for one in [r for r in RECIPES.values() if r == recipe]:
        assert Target().recipe(one) == one
        whole = Target(True, Static(1, 16)).recipe(one)
        assert [s for s in whole.steps if isinstance(s, Standard | Static)] == [Standard(), Static(1, 16)]
        assert (whole.name, whole.suffix) == (one.name, one.suffix)
        assert recorded(whole.to_json()).steps == whole.steps


def test_texts_are_no_longer_than_the_shape_nor_than_the_model_takes() -> None:
    assert Target().length(256) == 256
    assert Target(static=Static(1, 128)).length(256) == 128
    with pytest.raises(OptionError, match="expected at most 256 tokens"):
        Target(static=Static(1, 257)).length(256)
