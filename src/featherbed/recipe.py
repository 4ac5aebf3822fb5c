"""Recipes: what happens to the weights, as frozen values. No code that touches a weight lives here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from featherbed.errors import OptionError


class Shelf(StrEnum):
    """Where a recipe stands: the reference, what the ecosystem ships, or what we recommend."""

    REFERENCE = "reference"
    COMPATIBLE = "compatible"
    OURS = "ours"


@dataclass(frozen=True)
class PerTokenLinear:
    """Linear layers as W8A8: s8 weights with a scale a column, u8 activations with a scale a token."""

    weight_bits: int = 8


@dataclass(frozen=True)
class DynamicLinear:
    """Linear layers as ``quantize_dynamic`` writes them: s8 weights with a scale a column,
    u8 activations with one scale and zero point a *tensor*."""

    weight_bits: int = 8


@dataclass(frozen=True)
class BlockwiseLinear:
    """Linear layers as MatMulNBits: weights in blocks of ``block`` along the input, float activations.

    ``accuracy_level`` 4 lets onnxruntime round the activations to 8 bits a block; None leaves it unset.
    ``searched`` gives each block a zero point, and the scale among several that loses least.
    """

    bits: int
    block: int
    accuracy_level: int | None
    searched: bool = False


@dataclass(frozen=True)
class BlockwiseTable:
    """The token embedding table in 4 or 8 bits, a scale a block of ``block`` along the row (a power of two)."""

    bits: int = 8
    block: int = 128


Step = PerTokenLinear | DynamicLinear | BlockwiseLinear | BlockwiseTable


@dataclass(frozen=True)
class Recipe:
    """A named list of steps from the reference graph to a variant."""

    name: str
    suffix: str
    shelf: Shelf
    steps: tuple[Step, ...]
    summary: str

    @property
    def linear_bits(self) -> int:
        """Bits of a linear layer's weight: 32 where no step touches them."""
        for step in self.steps:
            if isinstance(step, BlockwiseLinear):
                return step.bits
            if isinstance(step, (PerTokenLinear, DynamicLinear)):
                return step.weight_bits
        return 32

    def to_json(self) -> dict[str, object]:
        """The recipe as plain values, for the manifest and a file's metadata."""
        steps = [{"step": type(step).__name__, **vars(step)} for step in self.steps]
        return {"name": self.name, "suffix": self.suffix, "shelf": self.shelf.value, "steps": steps}


REFERENCE = "fp32"
DEFAULT = (REFERENCE, "int8", "int8-block")  # what build makes when nobody says otherwise

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(REFERENCE, "", Shelf.REFERENCE, (), "the reference: upstream's function in float32"),
        Recipe(
            "int8",
            "_int8",
            Shelf.OURS,
            (PerTokenLinear(), BlockwiseTable()),
            "W8A8 with one activation scale a token, 8-bit embedding table: the fastest",
        ),
        Recipe(
            "int8-block",
            "_int8_block",
            Shelf.OURS,
            (BlockwiseLinear(bits=8, block=64, accuracy_level=4), BlockwiseTable()),
            "MatMulNBits in 8 bits, block 64, 8-bit embedding table: the most faithful",
        ),
        Recipe(
            "int4",
            "_int4",
            Shelf.OURS,
            (BlockwiseLinear(bits=4, block=32, accuracy_level=None, searched=True), BlockwiseTable()),
            "MatMulNBits in 4 bits with searched zero points, block 32, 8-bit embedding table: little memory",
        ),
        Recipe(
            "int4-small",
            "_int4_small",
            Shelf.OURS,
            (BlockwiseLinear(bits=4, block=64, accuracy_level=None, searched=True), BlockwiseTable(bits=4, block=64)),
            "the same in blocks of 64, with a 4-bit embedding table: the smallest",
        ),
        Recipe(
            "int8-dynamic",
            "_int8_dynamic",
            Shelf.COMPATIBLE,
            (DynamicLinear(),),
            "quantize_dynamic per channel, as most published INT8 files: depends on the batch",
        ),
        Recipe(
            "q4",
            "_q4",
            Shelf.COMPATIBLE,
            (BlockwiseLinear(bits=4, block=32, accuracy_level=None),),
            "MatMulNBits in 4 bits, block 32, symmetric, as most published q4 files",
        ),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises OptionError when there is none.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=1)
    raise OptionError(
        f"variant {name!r}",
        expected=f"one of {', '.join(RECIPES)}",
        found="no such recipe",
        remedy=f"did you mean {near[0]}?" if near else "choose one of these",
    )


def recipes(names: Iterable[str]) -> tuple[Recipe, ...]:
    """Recipes for ``names`` without doubles, the reference always first: every other answers to it.

    Raises OptionError on an unknown name or an empty list.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not wanted:
        raise OptionError(
            "--variants",
            expected=f"a comma-separated list of {', '.join(RECIPES)}",
            found="an empty list",
            remedy="name at least one variant",
        )
    found = [recipe(name) for name in wanted if name != REFERENCE]
    return (RECIPES[REFERENCE], *found)
