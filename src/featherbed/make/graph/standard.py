"""Operators of com.microsoft, and fused ones, in operators of the ONNX standard (opset 21), for every other engine.

    GroupQueryAttention            attention.py
    SimplifiedLayerNormalization   x / sqrt(mean(x²) + ε) · gain, in the form that onnxruntime fuses again
    QuickGelu                      x · sigmoid(αx)
    MatMulIntegerToFloat           MatMulInteger, then the scales
    MatMulNBits                    DequantizeLinear in blocks, Gemm: weights stay in their bits, activations in float
    GatherBlockQuantized           rows of codes and rows of scales, multiplied: rows.py

MatMulNBits keeps its weight [N, K] in front of a Gemm and not [K, N] in front of a MatMul: onnxruntime would fuse the
latter into MatMulNBits at level 4, which rounds activations whatever the recipe says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import numpy as np

from featherbed.make.graph.attention import FLOAT, Attention
from featherbed.make.graph.pen import Pen, numbers, refused
from featherbed.make.graph.rows import scaled, stretch
from featherbed.make.graph.widths import Widths
from featherbed.make.ir import Array, Graph, Node, Weight

HALVES = 2  # numbers in a byte of 4 bits
NIBBLES = 0x88  # the highest bit of both: code − 8, in two's complement
BLOCKS = "MatMulNBits"
Write = Callable[[Pen, Node], None]


def standard(graph: Graph, kept: Collection[str] = ()) -> Graph:
    """The graph with operators of the standard only, and those of ``kept``.

    Raises OptionError on an operator, or a form of it, that nothing here writes.
    """
    pen = Pen(graph)
    attention = Attention(pen, Widths(graph))
    for node in graph.nodes:
        pen.begin(node)
        if node.op in kept or not (node.domain or node.op in FUSED):
            pen.nodes.append(node)
        elif node.op == "GroupQueryAttention":
            attention(node)
        elif node.op in FUSED:
            FUSED[node.op](pen, node)
        else:
            raise refused(node, "no such way")
    return pen.graph()


def _rms_norm(pen: Pen, node: Node) -> None:
    said = numbers(node)
    x, gain = node.inputs
    if said.get("axis", -1) != -1 or len(node.outputs) > 1:
        raise refused(node, f"axis {said.get('axis')}, {len(node.outputs)} outputs")
    square = pen.node("Pow", x, pen.const(2, np.float32))
    mean = pen.node("ReduceMean", square, pen.const([-1]), attributes={"keepdims": 1})
    root = pen.node("Sqrt", pen.node("Add", mean, pen.const(said["epsilon"], np.float32)))
    pen.node("Mul", pen.node("Div", x, root), gain, out=node.outputs[0])


def _quick_gelu(pen: Pen, node: Node) -> None:
    alpha = numbers(node).get("alpha", 1.702)
    x = node.inputs[0]
    inner = x if alpha == 1 else pen.node("Mul", x, pen.const(alpha, np.float32))
    pen.node("Mul", x, pen.node("Sigmoid", inner), out=node.outputs[0])


def _integer_product(pen: Pen, node: Node) -> None:
    x, codes, x_scale, scale, zero, weight_zero, bias = (*node.inputs, *[""] * (7 - len(node.inputs)))
    points = (zero, weight_zero) if weight_zero else (zero,) if zero else ()
    product = pen.node("MatMulInteger", x, codes, *points)
    floats = pen.node("Cast", product, attributes={"to": FLOAT})
    factor = scale if _is_one(pen, x_scale) else pen.node("Mul", x_scale, scale)
    if bias:
        pen.node("Add", pen.node("Mul", floats, factor), bias, out=node.outputs[0])
    else:
        pen.node("Mul", floats, factor, out=node.outputs[0])


def _is_one(pen: Pen, name: str) -> bool:
    weight = pen.weights.get(name)
    return weight is not None and weight.shape in {(), (1,)} and weight.array().item() == 1


def _blocks(pen: Pen, node: Node) -> None:
    said = numbers(node)
    x, codes, scales, zeros, *others = (*node.inputs, "")
    bits, block = int(str(said.get("bits", 4))), int(str(said["block_size"]))
    rows, columns = int(str(said["N"])), int(str(said["K"]))
    zero = pen.weights.get(zeros)
    if any(others) or bits not in {4, 8} or (zero is not None and zero.dtype != np.uint8):
        raise refused(node, f"{bits} bits, inputs {node.inputs[3:]}")
    count = -(-columns // block)
    inputs = (
        pen.weight(_codes(pen.weights[codes], bits, columns, signed=zero is None)),
        pen.weight(replace(pen.weights[scales], name=f"{scales}.blocks", shape=(rows, count))),
        *(() if zero is None else (pen.weight(_zeros(zero, bits, rows, count)),)),
    )
    weight = pen.node("DequantizeLinear", *inputs, attributes={"axis": 1, "block_size": block})
    pen.node("Gemm", x, weight, out=node.outputs[0], attributes={"transB": 1})


def _codes(weight: Weight, bits: int, columns: int, signed: bool) -> Weight:
    """Codes [N, blocks, bytes] as a tensor [N, columns], its numbers signed where there are no zero points."""
    rows, blocks, width = weight.shape
    flip = np.uint8(0 if not signed else NIBBLES if bits == 4 else 0x80)

    def read() -> Iterator[Array]:
        whole = weight.array().reshape(rows, blocks * width)
        yield np.ascontiguousarray(_cut(whole, bits, columns) ^ flip)

    if bits == 8:
        kind = np.dtype(np.int8 if signed else np.uint8)
        return Weight(f"{weight.name}.rows", kind, (rows, columns), read)
    return Weight(f"{weight.name}.rows", weight.dtype, (rows, columns), read, packed="INT4" if signed else "UINT4")


def _zeros(weight: Weight, bits: int, rows: int, blocks: int) -> Weight:
    """Zero points, each row of them in whole bytes, as a tensor [N, blocks]."""

    def read() -> Iterator[Array]:
        yield _cut(weight.array().reshape(rows, -1), bits, blocks)

    return Weight(f"{weight.name}.blocks", weight.dtype, (rows, blocks), read, packed="UINT4" if bits == 4 else "")


def _cut(whole: Array, bits: int, columns: int) -> Array:
    """Rows of bytes → the first ``columns`` numbers of each, packed without a gap between rows."""
    if bits == 8:
        return whole[:, :columns]
    if columns % HALVES == 0:
        return whole[:, : columns // HALVES]
    numbers = np.stack((whole & 15, whole >> 4), axis=-1).reshape(len(whole), -1)[:, :columns].reshape(-1)
    numbers = np.append(numbers, np.zeros(numbers.size % HALVES, np.uint8))
    return np.asarray(numbers[0::2] | (numbers[1::2] << 4), np.uint8)


def _table(pen: Pen, node: Node) -> None:
    said = numbers(node)
    codes, ids, scales = node.inputs[:3]
    bits, block = int(str(said.get("bits", 4))), int(str(said.get("block_size", 128)))
    plain = said.get("gather_axis", 0) == 0 and said.get("quantize_axis", 1) == 1
    if any(node.inputs[3:]) or bits != 4 or not plain:
        raise refused(node, f"{bits} bits, inputs {node.inputs[3:]}, axes {said}")
    width = pen.weights[codes].shape[1] * HALVES
    size = stretch(width, block)
    rows = pen.node("Gather", codes, ids, attributes={"axis": 0})
    low = pen.node("BitwiseAnd", rows, pen.const(15, np.uint8))
    high = pen.node("BitShift", rows, pen.const(4, np.uint8), attributes={"direction": "RIGHT"})
    last = pen.const([-1])
    pairs = pen.node("Concat", *(pen.node("Unsqueeze", x, last) for x in (low, high)), attributes={"axis": -1})
    cut = pen.node("Reshape", pairs, pen.const([0, 0, width // size, size]))
    centred = pen.node("Sub", pen.node("Cast", cut, attributes={"to": FLOAT}), pen.const(8, np.float32))
    whole = pen.weights[scales]
    columns = pen.weight(replace(whole, name=f"{scales}.blocks", shape=(*whole.shape, 1)))
    scaled(pen, centred, pen.node("Gather", columns, ids, attributes={"axis": 0}), (width, block), node.outputs[0])


FUSED: dict[str, Write] = {
    "SimplifiedLayerNormalization": _rms_norm,
    "QuickGelu": _quick_gelu,
    "MatMulIntegerToFloat": _integer_product,
    BLOCKS: _blocks,
    "GatherBlockQuantized": _table,
}
