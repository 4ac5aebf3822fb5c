"""What a rounded layer computes, in numpy: its inputs as the kernel sees them, its weight as the codes stand for it.

Slow and plain, for calibration: files are judged by what onnxruntime makes of them, never by this.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featherbed.make.calibrate.walk import Layer
from featherbed.make.ir import Array
from featherbed.make.quantize import blockwise, columns, dynamic, per_token
from featherbed.make.quantize.gptq import Codes, Fit, Grid
from featherbed.recipe import BlockwiseLinear, DynamicLinear, LinearStep, PerTokenLinear

Float = npt.NDArray[np.float32]


def inputs(x: Float, step: LinearStep | None, bounded: bool) -> Float:
    """x [R, K] as the products see it; None is a layer left in float. ``bounded``: x comes out of a GELU."""
    match step:
        case PerTokenLinear():
            return per_token.rounded_rows(x, bounded)
        case BlockwiseLinear():
            return blockwise.rounded_inputs(x, step)
        case DynamicLinear():
            return dynamic.rounded_tensor(x)
        case None:
            return x


def weight(values: Float, step: LinearStep | None) -> Float:
    """A weight [N, K], rounded to the nearest and back."""
    match step:
        case PerTokenLinear() | DynamicLinear():
            codes, scales = columns.round_columns(values, 2 ** (step.weight_bits - 1) - 1)
            return np.asarray(codes * scales[:, None], np.float32)
        case BlockwiseLinear():
            return np.asarray(_nearest(values, step), np.float32)
        case None:
            return values


def _nearest(values: Float, step: BlockwiseLinear) -> Float:
    zeros: Array
    if step.searched:
        codes, scales, zeros = blockwise.search_blocks(values, step.bits, step.block)
    else:
        codes, scales = blockwise.round_blocks(values, step.bits, step.block)
        zeros = np.full(scales.shape, 2 ** (step.bits - 1))
    whole = (codes.astype(np.float32) - zeros[:, :, None]) * scales[:, :, None]
    return np.asarray(whole.reshape(len(values), -1)[:, : values.shape[1]], np.float32)


def layer(rounded: Float, step: LinearStep | None, bounded: bool) -> Layer:
    """The layer with a weight [N, K] that was rounded and back."""
    return lambda x: np.asarray(inputs(x, step, bounded) @ rounded.T, np.float32)


def block_of(step: LinearStep, width: int) -> int:
    """How many columns share a grid: a block's, or all of them."""
    return step.block if isinstance(step, BlockwiseLinear) else width


def fit_of(step: LinearStep, weight: Float) -> Fit:
    """How a step's grids are fitted to columns [N, block] of ``weight`` [N, K]."""
    if not isinstance(step, BlockwiseLinear):
        limit = 2 ** (step.weight_bits - 1) - 1
        _, scales = columns.round_columns(weight, limit)
        whole = Grid(scales, np.zeros_like(scales), -limit, limit)
        return lambda _: whole
    most = 2**step.bits - 1

    def fit(part: Float) -> Grid:
        if step.searched:
            _, scales, zeros = blockwise.search_blocks(part, step.bits, part.shape[1])
            return Grid(scales[:, 0], zeros[:, 0].astype(np.float32), 0, most)
        _, scales = blockwise.round_blocks(part, step.bits, part.shape[1])
        some = np.where(scales[:, 0] != 0, scales[:, 0], np.float32(1))
        return Grid(some, np.full_like(some, 2 ** (step.bits - 1)), 0, most)

    return fit


def arrays(codes: Codes, grids: list[Grid], step: LinearStep) -> tuple[Array, ...]:
    """Codes [N, K] and their grids as the arrays that the step's weights consist of."""
    if not isinstance(step, BlockwiseLinear):
        return np.ascontiguousarray(codes.T.astype(np.int8)), grids[0].scale
    count, width = codes.shape
    missing = -width % step.block
    zeros = np.stack([grid.zero for grid in grids], axis=1).astype(np.uint8)
    whole = codes.astype(np.uint8)
    if missing:  # what is behind the last column meets zeros: any code will do
        whole = np.pad(whole, ((0, 0), (0, missing)))
    scales = np.ascontiguousarray(np.stack([grid.scale for grid in grids], axis=1), np.float32)
    cut = whole.reshape(count, -1, step.block)
    return blockwise.packed_arrays(cut, scales, zeros if step.searched else None, step.bits)


def values(codes: Codes, grids: list[Grid], block: int) -> Float:
    """What codes [N, K] stand for."""
    scales = np.stack([grid.scale for grid in grids], axis=1)
    zeros = np.stack([grid.zero for grid in grids], axis=1)
    at = np.arange(codes.shape[1]) // block
    return np.asarray((codes - zeros[:, at]) * scales[:, at], np.float32)
