"""Steps that reproduce what the ecosystem ships, pure data; those that our own recipes share stand in recipe.py."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Range(StrEnum):
    """How the range of an activation is found from what it was on calibration texts."""

    MIN_MAX = "min-max"
    PERCENTILE = "percentile"  # without the outermost values
    ENTROPY = "entropy"  # where the codes tell most of the distribution (Kullback-Leibler)


@dataclass(frozen=True)
class UnsignedLinear:
    """Linear layers as ``quantize_dynamic(weight_type=QUInt8)`` writes them: u8 weights with one scale and zero point
    a matrix, u8 activations with one of each a tensor, found at run time."""

    weight_bits: int = 8


@dataclass(frozen=True)
class UnsignedTable:
    """Embedding tables, those of positions too, as ``quantize_dynamic`` writes what a Gather reads: u8 with one scale
    and zero point a table."""


@dataclass(frozen=True)
class StaticLinear:
    """Linear layers between QuantizeLinear and DequantizeLinear: s8 weights with a scale a column, u8 activations with
    one scale and zero point a tensor, calibrated.

    ``percentile`` is how many per cent of an activation's values stay inside, where the range goes by it.
    """

    weight_bits: int = 8
    activations: Range = Range.PERCENTILE
    percentile: float = 99.999


@dataclass(frozen=True)
class NormalFloatLinear:
    """Linear layers as MatMulBnb4: weights in 4-bit NormalFloat (NF4), a largest magnitude a block of ``block``."""

    block: int = 64


WholeLinear = UnsignedLinear | StaticLinear | NormalFloatLinear  # all linear layers at once: never mixed nor GPTQ


@dataclass(frozen=True)
class QuantizedOutput:
    """The vector once more in u8, as the output ``sentence_embedding_quantized``.

    Its scale and zero point span what components are on calibration texts, and ``margin`` of that span more at each
    end; values beyond are clipped. ``scale`` 0 stands for not chosen yet.
    """

    margin: float = 0.05
    scale: float = 0.0
    zero_point: int = 0


@dataclass(frozen=True)
class Half:
    """Weights and products in float16, sums in float32; what no other step has rounded."""


@dataclass(frozen=True)
class Standard:
    """Operators of the ONNX standard only. ``blocks`` leaves MatMulNBits, which browsers and GPUs have kernels for."""

    blocks: bool = False


@dataclass(frozen=True)
class Static:
    """Fixed shapes: ``batch`` texts of ``tokens`` tokens each, for engines that want them."""

    batch: int
    tokens: int


Ending = Half | Standard | Static  # what is done to the finished graph, in this order
