"""The embedding table in 8 or 4 bits, a scale a block of a row.

Only the rows that are read are ever touched, so the table costs the disk, not the memory. 8 bits are looked up by
operators of the standard: onnxruntime-web's build for WebGPU has no kernel of GatherBlockQuantized on the CPU, and a
file for the web must open there. They give the same numbers and cost 0.3 ms more for 1,024 rows of 384. 4 bits, which
would need six operators more, are GatherBlockQuantized's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from featherbed.make.graph.pen import Pen
from featherbed.make.graph.rows import scaled, stretch
from featherbed.make.ir import LOOKUP, MICROSOFT, OURS, Array, Graph, Node, Weight
from featherbed.make.quantize.blockwise import pack, round_blocks
from featherbed.recipe import BlockwiseTable

FLOAT = 1  # onnx.TensorProto's number


def table_weights(table: Weight, bits: int, block: int) -> tuple[Weight, Weight]:
    """(codes [V, D · bits / 8] u8 with zero point 2^(bits−1), scales [V, blocks]) of a float table [V, D].

    Rounded block of rows by block of rows: a 600 MB table is never in memory whole. The scales, which are
    small, are kept from the pass over the codes that is written before them.
    """
    kept: list[Array] = []

    rows, width = table.shape
    blocks = -(-width // block)

    def read_codes() -> Iterator[Array]:
        kept.clear()
        passed: list[Array] = []
        for part in table.read():
            codes, scales = round_blocks(np.asarray(part, np.float32), bits, block)
            passed.append(scales)
            yield np.ascontiguousarray(pack(codes, bits).reshape(len(part), -1)[:, : width * bits // 8])
        kept.extend(passed)  # only when whole: a pass may be left halfway

    def read_scales() -> Iterator[Array]:
        if not kept:
            for _ in read_codes():
                pass
        yield np.concatenate(kept)
        kept.clear()

    return (
        Weight(f"{table.name}.q{bits}", np.dtype(np.uint8), (rows, width * bits // 8), read_codes),
        Weight(f"{table.name}.scales", np.dtype("<f4"), (rows, blocks), read_scales),
    )


def tables(graph: Graph, step: BlockwiseTable) -> dict[str, Weight]:
    """The graph's embedding tables by name, as their codes stand for them."""
    names = {n.inputs[1] for n in graph.nodes if (n.domain, n.op) == (OURS, LOOKUP)}
    return {name: _read_back(graph.weights[name], step) for name in names}


def _read_back(table: Weight, step: BlockwiseTable) -> Weight:
    zero = 2 ** (step.bits - 1)

    def read() -> Iterator[Array]:
        for part in table.read():
            codes, scales = round_blocks(np.asarray(part, np.float32), step.bits, step.block)
            values = (codes.astype(np.float32) - zero) * scales[:, :, None]
            yield np.ascontiguousarray(values.reshape(len(part), -1)[:, : table.shape[1]], np.float32)

    return replace(table, read=read)


def apply(graph: Graph, step: BlockwiseTable) -> Graph:
    """The graph with every Lookup as one of codes."""
    pen = Pen(graph)
    for node in graph.nodes:
        pen.begin(node)
        if (node.domain, node.op) != (OURS, LOOKUP):
            pen.nodes.append(node)
        elif step.bits == 8:
            _standard(pen, node, step)
        else:
            _fused(pen, node, step)
    return graph.replaced(pen.nodes, pen.weights | graph.weights)  # scalars as they were: nothing else is changed


def _fused(pen: Pen, node: Node, step: BlockwiseTable) -> None:
    ids, name = node.inputs
    codes, scales = map(pen.weight, table_weights(pen.weights[name], step.bits, step.block))
    attributes = (("bits", step.bits), ("block_size", step.block), ("gather_axis", 0), ("quantize_axis", 1))
    pen.nodes.append(Node("GatherBlockQuantized", (codes, ids, scales), node.outputs, MICROSOFT, attributes))


def _standard(pen: Pen, node: Node, step: BlockwiseTable) -> None:
    ids, name = node.inputs
    codes, scales = table_weights(pen.weights[name], step.bits, step.block)
    rows, width = codes.shape
    size = stretch(width, step.block)

    def signed() -> Iterator[Array]:
        for part in codes.read():
            yield (part ^ np.uint8(2**7)).view(np.int8).reshape(len(part), -1, size)

    cut = replace(codes, dtype=np.dtype(np.int8), shape=(rows, width // size, size), read=signed)
    columns = replace(scales, shape=(*scales.shape, 1))
    read, each = (pen.node("Gather", pen.weight(part), ids, attributes={"axis": 0}) for part in (cut, columns))
    floats = pen.node("Cast", read, attributes={"to": FLOAT})
    scaled(pen, floats, each, (width, step.block), node.outputs[0])
