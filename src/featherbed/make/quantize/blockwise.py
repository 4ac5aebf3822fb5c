"""MatMulNBits: weights in blocks along the input, one scale a block, symmetric.

The rounding is onnxruntime's own, code for code (a test compares): the block's value of largest magnitude
lands on the most negative code, scale = that value / −2^(bits−1).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from featherbed.make.ir import LINEAR, MICROSOFT, OURS, Array, Attribute, Graph, Node, Weight
from featherbed.recipe import BlockwiseLinear

Float = npt.NDArray[np.float32]
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


def pack(codes: Codes, bits: int) -> Codes:
    """codes [N, blocks, block] → bytes [N, blocks, block · bits / 8]; the first of a pair in the low half."""
    if bits == 8:
        return codes
    return np.asarray(codes[:, :, 0::2] | (codes[:, :, 1::2] << 4), np.uint8)


def block_weights(weight: Weight, bits: int, block: int) -> tuple[Weight, Weight]:
    """(packed codes [N, blocks, bytes], scales [N · blocks]) of a float weight [N, K]; see columns.py."""

    @lru_cache(maxsize=1)
    def rounded() -> tuple[Codes, Float]:
        codes, scales = round_blocks(np.asarray(weight.array(), np.float32), bits, block)
        return np.ascontiguousarray(pack(codes, bits)), scales.reshape(-1)

    def read_codes() -> Iterator[Array]:
        yield rounded()[0]

    def read_scales() -> Iterator[Array]:
        yield rounded()[1]
        rounded.cache_clear()

    rows, columns = weight.shape
    blocks = -(-columns // block)
    return (
        Weight(f"{weight.name}.q{bits}", np.dtype(np.uint8), (rows, blocks, block * bits // 8), read_codes),
        Weight(f"{weight.name}.scales", np.dtype("<f4"), (rows * blocks,), read_scales),
    )


def apply(graph: Graph, step: BlockwiseLinear) -> Graph:
    """The graph with every Linear as MatMulNBits."""
    nodes: list[Node] = []
    weights = dict(graph.weights)
    for node in graph.nodes:
        if (node.domain, node.op) != (OURS, LINEAR):
            nodes.append(node)
            continue
        x, name = node.inputs
        rows, columns = weights[name].shape
        codes, scales = block_weights(weights[name], step.bits, step.block)
        weights |= {codes.name: codes, scales.name: scales}
        attributes: list[tuple[str, Attribute]] = [
            ("K", columns), ("N", rows), ("bits", step.bits), ("block_size", step.block),
        ]  # fmt: skip
        if step.accuracy_level is not None:
            attributes.append(("accuracy_level", step.accuracy_level))
        nodes.append(Node("MatMulNBits", (x, codes.name, scales.name), node.outputs, MICROSOFT, tuple(attributes)))
    return graph.replaced(nodes, weights)
