"""MatMulBnb4: weights in 4-bit NormalFloat (NF4, of QLoRA), a largest magnitude a block.

A weight [N, K] is one row of numbers, row after row, cut into blocks; where K is no multiple of the block, a block
reaches over the end of a row. Each number, divided by its block's largest magnitude, takes the nearest of sixteen
values that are equally likely under a normal distribution. The first of a pair of codes is in the high half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from featherbed.make.ir import MICROSOFT, Array, Graph, Node, Weight, is_linear
from featherbed.steps import NormalFloatLinear

Float = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
TINY = 1e-30  # the inverse of a magnitude far below it would overflow
NF4 = 1  # the operator's quant_type; 0 is FP4
VALUES = np.asarray(
    [
        -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
    ],
    np.float32,
)  # fmt: skip
ZERO = 7  # the code of 0
BETWEEN = np.asarray(  # the middles of neighbours; where two floats are as near, the one that onnxruntime has
    [
        -0.84809643, -0.6106329, -0.45999527, -0.33967942, -0.2346074, -0.13791174, -0.045525018, 0.03979015,
        0.120255254, 0.20352125, 0.29201376, 0.38931254, 0.5016634, 0.6427869, 0.8614784,
    ],
    np.float32,
)  # fmt: skip


def round_normal(values: Float, block: int) -> tuple[Codes, Float]:
    """Numbers in any shape → codes of as many, in a row, and the largest magnitude of each block.

    A block of nothing above 1e-30 has the code of 0 throughout.
    """
    flat = values.reshape(-1)
    padded = np.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    peaks = np.maximum(padded.max(axis=1), -padded.min(axis=1))
    inverse = np.divide(np.float32(1), peaks, out=np.zeros_like(peaks), where=peaks > TINY)
    codes = np.searchsorted(BETWEEN, padded * inverse[:, None], side="left")
    return codes.astype(np.uint8).reshape(-1)[: len(flat)], peaks


def normal_weights(weight: Weight, step: NormalFloatLinear) -> tuple[Weight, Weight]:
    """(pairs of codes [⌈N · K / 2⌉], largest magnitudes [⌈N · K / block⌉]) of a float weight [N, K]; see columns.py."""

    @lru_cache(maxsize=1)
    def rounded() -> tuple[Array, Array]:
        codes, peaks = round_normal(np.asarray(weight.array(), np.float32), step.block)
        paired = np.pad(codes, (0, len(codes) % 2), constant_values=ZERO)
        return np.asarray((paired[0::2] << 4) | paired[1::2], np.uint8), peaks

    def reader(at: int) -> Callable[[], Iterator[Array]]:
        def read() -> Iterator[Array]:
            yield rounded()[at]
            if at == 1:
                rounded.cache_clear()

        return read

    count = weight.shape[0] * weight.shape[1]
    return (
        Weight(f"{weight.name}.nf4", np.dtype(np.uint8), (-(-count // 2),), reader(0)),
        Weight(f"{weight.name}.peaks", np.dtype("<f4"), (-(-count // step.block),), reader(1)),
    )


def apply(graph: Graph, step: NormalFloatLinear) -> Graph:
    """The graph with every Linear as MatMulBnb4."""
    nodes: list[Node] = []
    weights = dict(graph.weights)
    for node in graph.nodes:
        if not is_linear(node):
            nodes.append(node)
            continue
        x, name = node.inputs
        rows, columns = graph.weights[name].shape
        codes, peaks = normal_weights(graph.weights[name], step)
        weights |= {codes.name: codes, peaks.name: peaks}
        attributes = (("K", columns), ("N", rows), ("block_size", step.block), ("quant_type", NF4))
        nodes.append(Node("MatMulBnb4", (x, codes.name, peaks.name), node.outputs, MICROSOFT, attributes))
    return graph.replaced(nodes, weights)
