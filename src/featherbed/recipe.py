"""Recipes: what happens to the weights, as frozen values. No code that touches a weight lives here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass
from enum import StrEnum
from typing import Any

from featherbed.errors import OptionError
from featherbed.steps import (
    Ending,
    Half,
    NormalFloatLinear,
    QuantizedOutput,
    Range,
    Standard,
    Static,
    StaticLinear,
    UnsignedLinear,
    UnsignedTable,
    WholeLinear,
)


class Shelf(StrEnum):
    """Where a recipe stands: the reference, what the ecosystem ships, or what we recommend."""

    REFERENCE = "reference"
    COMPATIBLE = "compatible"
    OURS = "ours"


class Explicit(StrEnum):
    """Where smoothing may put a Mul, when nothing before an input can take its factors."""

    NOWHERE = "nowhere"
    NOT_GELU = "not-gelu"  # rounding a scale a token spends its codes well there by itself
    ANYWHERE = "anywhere"


@dataclass(frozen=True)
class Rotate:
    """The residual stream rotated by a Hadamard matrix; models with layer norms stay as they are."""


@dataclass(frozen=True)
class Smooth:
    """What makes inputs hard to round, handed to the weights (SmoothQuant).

    ``alpha`` says how much of it; None tries several and keeps the one whose vectors come nearest.
    """

    alpha: float | None = None
    explicit: Explicit = Explicit.ANYWHERE


@dataclass(frozen=True)
class PerTokenLinear:
    """Linear layers as W8A8: s8 weights with a scale a column, u8 activations with a scale a token.

    ``gptq`` lets each column make up for those rounded before it, on calibration texts.
    """

    weight_bits: int = 8
    gptq: bool = False


@dataclass(frozen=True)
class DynamicLinear:
    """Linear layers as ``quantize_dynamic`` writes them: s8 weights with a scale a column,
    u8 activations with one scale and zero point a *tensor*."""

    weight_bits: int = 8


@dataclass(frozen=True)
class BlockwiseLinear:
    """Linear layers as MatMulNBits: weights in blocks of ``block`` along the input, float activations.

    ``accuracy_level`` 4 lets onnxruntime round the activations to 8 bits a block; None leaves it unset.
    ``searched`` gives each block a zero point, and the scale among several that loses least. ``gptq`` lets each
    column make up for those rounded before it, on calibration texts.
    """

    bits: int
    block: int
    accuracy_level: int | None
    searched: bool = False
    gptq: bool = False


@dataclass(frozen=True)
class BlockwiseTable:
    """The token embedding table in 4 or 8 bits, a scale a block of ``block`` along the row (a power of two)."""

    bits: int = 8
    block: int = 128


LinearStep = PerTokenLinear | DynamicLinear | BlockwiseLinear


@dataclass(frozen=True)
class MixedLinear:
    """Linear layers each in their own way: (weight's name, how), None for float; found by ``featherbed tune``."""

    layers: tuple[tuple[str, LinearStep | None], ...]


Step = (
    Rotate | Smooth | LinearStep | MixedLinear | BlockwiseTable
    | WholeLinear | UnsignedTable | QuantizedOutput | Ending
)  # fmt: skip


def bits_of(step: LinearStep | WholeLinear | None) -> int:
    """Bits of a weight that a step rounds; 32 for None."""
    if step is None:
        return 32
    if isinstance(step, NormalFloatLinear):
        return 4
    return step.bits if isinstance(step, BlockwiseLinear) else step.weight_bits


def calibrated(step: Step) -> bool:
    """Whether a step looks at what activations are on real texts."""
    if isinstance(step, MixedLinear):
        return any(how is not None and calibrated(how) for _, how in step.layers)
    return isinstance(step, Smooth | StaticLinear | QuantizedOutput) or (
        isinstance(step, (PerTokenLinear, BlockwiseLinear)) and step.gptq
    )


def _plain(value: object) -> object:
    """A step as plain values."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if is_dataclass(value):
        return {"step": type(value).__name__, **{key: _plain(part) for key, part in vars(value).items()}}
    return value


@dataclass(frozen=True)
class Recipe:
    """A named list of steps from the reference graph to a variant."""

    name: str
    suffix: str
    shelf: Shelf
    steps: tuple[Step, ...]
    summary: str
    again: str = ""  # the suffix under which the same file is there once more: a name that others load by default

    @property
    def linear_bits(self) -> int:
        """Bits of a linear layer's weight, the fewest of all: 32 where no step touches them, 16 after Half alone."""
        for step in self.steps:
            if isinstance(step, MixedLinear):
                return min((bits_of(how) for _, how in step.layers), default=32)
            if isinstance(step, LinearStep | WholeLinear):
                return bits_of(step)
        return 16 if self.half else 32

    @property
    def half(self) -> bool:
        """Whether it computes in float16."""
        return any(isinstance(step, Half) for step in self.steps)

    @property
    def calibrated(self) -> bool:
        """Whether making it needs calibration texts."""
        return any(map(calibrated, self.steps))

    def to_json(self) -> dict[str, object]:
        """The recipe as plain values, for the manifest and a file's metadata."""
        steps = [_plain(step) for step in self.steps]
        return {"name": self.name, "suffix": self.suffix, "shelf": self.shelf.value, "steps": steps}


STEPS: dict[str, type[Step]] = {
    step.__name__: step
    for step in (
        Rotate, Smooth, PerTokenLinear, DynamicLinear, BlockwiseLinear, MixedLinear, BlockwiseTable,
        UnsignedLinear, UnsignedTable, StaticLinear, NormalFloatLinear, QuantizedOutput, Half, Standard, Static,
    )
}  # fmt: skip


def _step_of(plain: dict[str, Any]) -> Step:
    values = {key: value for key, value in plain.items() if key != "step"}
    if "layers" in values:
        values["layers"] = tuple((name, None if way is None else _step_of(way)) for name, way in values["layers"])
    if "explicit" in values:
        values["explicit"] = Explicit(values["explicit"])
    if "activations" in values:
        values["activations"] = Range(values["activations"])
    return STEPS[plain["step"]](**values)


def recorded(plain: dict[str, Any]) -> Recipe:
    """The recipe that a manifest records.

    Raises OptionError when it has steps that this version does not know.
    """
    try:
        steps = tuple(map(_step_of, plain["steps"]))
        return Recipe(str(plain["name"]), str(plain["suffix"]), Shelf(plain["shelf"]), steps, "")
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(
            "a recipe in the manifest",
            expected=f"steps among {', '.join(STEPS)}",
            found=f"{type(error).__name__}: {error}",
            remedy="update featherbed, or build the folder again",
        ) from error


REFERENCE = "fp32"
TUNED = "tuned"
DEFAULT = (REFERENCE, "int8", "int8-block")  # what build makes when nobody says otherwise

INT8 = (Rotate(), Smooth(explicit=Explicit.NOT_GELU), PerTokenLinear(gptq=True), BlockwiseTable())

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(REFERENCE, "", Shelf.REFERENCE, (), "the reference: upstream's function in float32"),
        Recipe(
            "int8",
            "_int8",
            Shelf.OURS,
            INT8,
            "W8A8 with one activation scale a token, smoothed, GPTQ, 8-bit embedding table: the fastest",
            "_quantized",
        ),
        Recipe(
            "int8-block",
            "_int8_block",
            Shelf.OURS,
            (
                Rotate(),
                Smooth(explicit=Explicit.NOT_GELU),
                BlockwiseLinear(bits=8, block=64, accuracy_level=4, gptq=True),
                BlockwiseTable(),
            ),
            "MatMulNBits in 8 bits, block 64, smoothed, GPTQ, 8-bit embedding table: the most faithful",
        ),
        Recipe(
            "int4",
            "_int4",
            Shelf.OURS,
            (
                Rotate(),
                Smooth(explicit=Explicit.NOWHERE),
                BlockwiseLinear(bits=4, block=32, accuracy_level=None, searched=True, gptq=True),
                BlockwiseTable(),
            ),
            "MatMulNBits in 4 bits, searched zero points, GPTQ, block 32, 8-bit embedding table: little memory",
        ),
        Recipe(
            "int4-small",
            "_int4_small",
            Shelf.OURS,
            (
                Rotate(),
                Smooth(explicit=Explicit.NOWHERE),
                BlockwiseLinear(bits=4, block=64, accuracy_level=None, searched=True, gptq=True),
                BlockwiseTable(bits=4, block=64),
            ),
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
            "int8-smooth",
            "_int8_smooth",
            Shelf.COMPATIBLE,
            (Smooth(explicit=Explicit.NOT_GELU), DynamicLinear()),
            "SmoothQuant with α found on the model, then int8-dynamic: depends on the batch",
        ),
        Recipe(
            "q4",
            "_q4",
            Shelf.COMPATIBLE,
            (BlockwiseLinear(bits=4, block=32, accuracy_level=None),),
            "MatMulNBits in 4 bits, block 32, symmetric, as most published q4 files",
        ),
        Recipe(
            "int8-full",
            "_int8_full",
            Shelf.COMPATIBLE,
            (DynamicLinear(), UnsignedTable()),
            "int8-dynamic with the embedding tables in 8 bits: depends on the batch",
        ),
        Recipe(
            "uint8",
            "_uint8",
            Shelf.COMPATIBLE,
            (UnsignedLinear(), UnsignedTable()),
            "quantize_dynamic to u8, a scale a matrix, tables too, as transformers.js: depends on the batch",
        ),
        Recipe(
            "int8-static",
            "_int8_static",
            Shelf.COMPATIBLE,
            (StaticLinear(),),
            "QDQ: s8 weights a scale a column, activations calibrated: the same in every batch",
        ),
        Recipe(
            "bnb4",
            "_bnb4",
            Shelf.COMPATIBLE,
            (NormalFloatLinear(),),
            "MatMulBnb4: NF4, block 64",
        ),
        Recipe(
            "uint8-out",
            "_uint8_out",
            Shelf.COMPATIBLE,
            (*INT8, QuantizedOutput()),
            "int8 with its vector once more in u8, as the output sentence_embedding_quantized",
        ),
        Recipe(
            "fp16",
            "_fp16",
            Shelf.COMPATIBLE,
            (Half(), Standard()),
            "float16 in standard operators, sums in float32: for GPUs and neural engines",
        ),
        Recipe(
            "q4f16",
            "_q4f16",
            Shelf.COMPATIBLE,
            (BlockwiseLinear(bits=4, block=32, accuracy_level=None), Half(), Standard(blocks=True)),
            "q4, and float16 for the rest: what browsers load on a GPU",
        ),
    )
}


WEB = (REFERENCE, "fp16", "int8", "q4", "q4f16")  # what transformers.js looks for
GROUPS = {"all": tuple(RECIPES), "web": tuple(name for name in WEB if name in RECIPES)}


def recipe(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises OptionError when there is none.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, (*RECIPES, *GROUPS), n=1)
    raise OptionError(
        f"variant {name!r}",
        expected=f"one of {', '.join((*RECIPES, *GROUPS))}",
        found="no such recipe",
        remedy=f"did you mean {near[0]}?" if near else "choose one of these",
    )


def recipes(names: Iterable[str]) -> tuple[Recipe, ...]:
    """Recipes for ``names`` without doubles, the reference always first: every other answers to it.

    "all" and "web" among them stand for several. Raises OptionError on an unknown name or an empty list.
    """
    words = (name.strip() for name in names)
    wanted = list(dict.fromkeys(name for word in words if word for name in GROUPS.get(word, (word,))))
    if not wanted:
        raise OptionError(
            "--variants",
            expected=f"a comma-separated list of {', '.join((*RECIPES, *GROUPS))}",
            found="an empty list",
            remedy="name at least one variant",
        )
    found = [recipe(name) for name in wanted if name != REFERENCE]
    return (RECIPES[REFERENCE], *found)
