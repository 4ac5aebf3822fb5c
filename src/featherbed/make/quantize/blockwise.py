"""MatMulNBits: weights in blocks along the input, one scale a block.

Symmetric rounding is onnxruntime's own, code for code (a test compares): the block's value of largest magnitude
lands on the most negative code, scale = that value / −2^(bits−1). Searched rounding has a zero point a block:
of the block's range, and the range drawn in by a few steps, it keeps the grid with the least squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from featherbed.make.ir import MICROSOFT, Array, Attribute, Graph, Node, Weight, is_linear
from featherbed.make.quantize.columns import Ready
from featherbed.recipe import BlockwiseLinear

DRAWN = (1.0, 0.96, 0.92, 0.88)  # 0.84 and less win next to nowhere
Float = npt.NDArray[np.float32]
LEVEL_INT8 = 4  # MatMulNBits' accuracy_level that rounds activations
TINY = 1e-30  # scales below it would leave float32's normal range
Codes = npt.NDArray[np.uint8]


def round_blocks(rows: Float, bits: int, block: int) -> tuple[Codes, Float]:
    """rows [N, K] → codes [N, blocks, block] u8 with zero point 2^(bits−1), scales [N, blocks].

    K is padded with zeros to whole blocks; a block of nothing above 1e-30 is all zero. rows ≈ (codes − zero) · scales.
    """
    count, width = rows.shape
    blocks = -(-width // block)
    if blocks * block != width:
        rows = np.pad(rows, ((0, 0), (0, blocks * block - width)))
    cut = rows.reshape(count, blocks, block)
    high, low = cut.max(axis=2), cut.min(axis=2)
    peak = np.where(high > -low, high, low)  # signed value of largest magnitude
    peak = np.where(np.abs(peak) > TINY, peak, np.float32(0))
    zero = 2 ** (bits - 1)
    scales = (peak / np.float32(-zero)).astype(np.float32)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    codes = cut * inverse[:, :, None]
    codes += np.float32(zero)
    # half away from zero, as roundf does; the values are not negative but for the clip below
    np.floor(codes + np.float32(0.5), out=codes)
    np.clip(codes, 0, 2 * zero - 1, out=codes)
    return codes.astype(np.uint8), scales


def search_blocks(rows: Float, bits: int, block: int) -> tuple[Codes, Float, Codes]:
    """rows [N, K] → codes [N, blocks, block], scales and zero points [N, blocks]; rows ≈ (codes − zero) · scale.

    Each end of a block's range, widened to hold 0, is drawn in by the same factor of ``DRAWN``; the factor with
    the least sum of squared errors wins, the widest among equals. A block of nothing above 1e-30 is all zero.
    """
    count, width = rows.shape
    blocks = -(-width // block)
    if blocks * block != width:
        rows = np.pad(rows, ((0, 0), (0, blocks * block - width)))
    cut = rows.reshape(count, blocks, block)
    high, low = np.maximum(cut.max(axis=2), 0), np.minimum(cut.min(axis=2), 0)
    most = np.float32(2**bits - 1)
    best = np.full((count, blocks), np.inf, np.float32)
    scales, zeros = np.zeros_like(best), np.zeros((count, blocks), np.uint8)
    for factor in DRAWN:
        scale = (high - low) * np.float32(factor) / most
        scale = np.where(scale > TINY, scale, np.float32(1))
        zero = np.rint(-low * np.float32(factor) / scale)
        codes = _grid(cut, scale, zero, most)
        codes -= zero[:, :, None]
        codes *= scale[:, :, None]
        codes -= cut
        error = np.einsum("nbk,nbk->nb", codes, codes)
        better = error < best
        best = np.where(better, error, best)
        scales = np.where(better, scale, scales)
        zeros = np.where(better, zero, zeros).astype(np.uint8)
    return _grid(cut, scales, zeros.astype(np.float32), most).astype(np.uint8), scales, zeros


def _grid(cut: Float, scale: Float, zero: Float, most: np.float32) -> Float:
    codes = cut / scale[:, :, None]
    np.rint(codes, out=codes)
    codes += zero[:, :, None]
    np.clip(codes, 0, most, out=codes)
    return np.asarray(codes, np.float32)


def pack(codes: Codes, bits: int) -> Codes:
    """codes [N, blocks, block] → bytes [N, blocks, block · bits / 8]; the first of a pair in the low half."""
    if bits == 8:
        return codes
    return np.asarray(codes[:, :, 0::2] | (codes[:, :, 1::2] << 4), np.uint8)


def packed_arrays(codes: Codes, scales: Float, zeros: Codes | None, bits: int) -> tuple[Array, ...]:
    """The arrays of ``block_weights`` from codes [N, blocks, block], scales and zero points [N, blocks]."""
    packed = np.ascontiguousarray(pack(codes, bits))
    return packed, scales.reshape(-1), *(() if zeros is None else (pack_zeros(zeros, bits).reshape(-1),))


def rounded_inputs(x: Float, step: BlockwiseLinear) -> Float:
    """x [N, K] as the products see it: at level 4 in 8 bits a block, else as it is."""
    if step.accuracy_level != LEVEL_INT8:
        return x
    count, width = x.shape
    cut = np.pad(x, ((0, 0), (0, -width % step.block))).reshape(count, -1, step.block)
    scales = np.maximum(np.abs(cut).max(axis=2, keepdims=True) / np.float32(127), np.float32(TINY))
    return np.asarray((np.rint(cut / scales) * scales).reshape(count, -1)[:, :width], np.float32)


def block_weights(weight: Weight, step: BlockwiseLinear, ready: tuple[Array, ...] | None = None) -> tuple[Weight, ...]:
    """(packed codes [N, blocks, bytes], scales [N · blocks]) of a float weight [N, K]; see columns.py.

    A searched step adds zero points [N · bytes], packed two a byte row by row when they have 4 bits. ``ready`` are
    these arrays where the weight was rounded before.
    """
    bits, block = step.bits, step.block

    @lru_cache(maxsize=1)
    def rounded() -> tuple[Array, ...]:
        if ready is not None:
            return ready
        values = np.asarray(weight.array(), np.float32)
        codes, scales, *zeros = (search_blocks if step.searched else round_blocks)(values, bits, block)
        return packed_arrays(codes, scales, zeros[0] if zeros else None, bits)

    def reader(part: int, last: bool) -> Callable[[], Iterator[Array]]:
        def read() -> Iterator[Array]:
            yield rounded()[part]
            if last:
                rounded.cache_clear()

        return read

    rows, columns = weight.shape
    blocks = -(-columns // block)
    u8, name = np.dtype(np.uint8), weight.name
    parts: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = [
        (f"{name}.q{bits}", u8, (rows, blocks, block * bits // 8)),
        (f"{name}.scales", np.dtype("<f4"), (rows * blocks,)),
    ]
    if step.searched:
        parts.append((f"{name}.zeros", u8, (rows * -(-blocks * bits // 8),)))
    return tuple(Weight(*part, reader(at, at + 1 == len(parts))) for at, part in enumerate(parts))


def pack_zeros(zeros: Codes, bits: int) -> Codes:
    """Zero points [N, blocks] → bytes [N, ⌈blocks · bits / 8⌉]; the first of a pair in the low half."""
    if bits == 8:
        return zeros
    padded = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
    return np.asarray(padded[:, 0::2] | (padded[:, 1::2] << 4), np.uint8)


def apply(graph: Graph, step: BlockwiseLinear, ready: Ready | None = None, only: Container[str] | None = None) -> Graph:
    """The graph with every Linear, or those of ``only``, as MatMulNBits.

    ``ready`` has the arrays of weights that were rounded before.
    """
    ready = ready or {}
    nodes: list[Node] = []
    weights = dict(graph.weights)
    for node in graph.nodes:
        if not is_linear(node) or (only is not None and node.inputs[1] not in only):
            nodes.append(node)
            continue
        x, name = node.inputs
        rows, columns = weights[name].shape
        parts = block_weights(graph.weights[name], step, ready.get(name))
        weights |= {part.name: part for part in parts}
        attributes: list[tuple[str, Attribute]] = [
            ("K", columns), ("N", rows), ("bits", step.bits), ("block_size", step.block),
        ]  # fmt: skip
        if step.accuracy_level is not None:
            attributes.append(("accuracy_level", step.accuracy_level))
        inputs = (x, *(part.name for part in parts))
        nodes.append(Node("MatMulNBits", inputs, node.outputs, MICROSOFT, tuple(attributes)))
    return graph.replaced(nodes, weights)
