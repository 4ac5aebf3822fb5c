"""QDQ: linear layers whose inputs have one range for good, found on calibration texts.

    QuantizeLinear(x, scale, zero)           u8, one scale and zero point a tensor, asymmetric
    DequantizeLinear(codes, scale, zero)
    DequantizeLinear(w, scales, axis 1)      s8, a scale a column, symmetric
    DequantizeLinear(bias, scale · scales)   s32, where there is a bias
    Gemm, or MatMul without a bias           in float, as it is written

As onnxruntime's ``quantize_static`` writes a Gemm with ``per_channel`` whose output stays in float. Engines fuse this
into a product of integers, onnxruntime on a CPU into QGemm and MatMulIntegerToFloat; with a bias in float it would not,
and multiply in float. Nothing is found at run time, so a text's vector does not depend on its batch. Layers that read
the same input share its codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from featherbed.make.ir import Array, Graph, Node, Weight, constant, is_linear, scalar
from featherbed.make.quantize.columns import Codes, round_columns
from featherbed.make.quantize.unsigned import grid
from featherbed.steps import StaticLinear

Float = npt.NDArray[np.float32]
Spans = Mapping[str, tuple[float, float]]  # of a weight's name, least and largest value of what the layer reads
BIAS_ROOM = 1.0001 / (2**31 - 1)  # of a bias, the least step that 32 bits hold it with


def round_layer(rows: Float, bias: Float | None, scale: np.float32, limit: int) -> tuple[Codes, Float, Array, Float]:
    """rows [N, K] and bias [N] behind inputs of that scale → codes [N, K] in ±limit, scales [N], bias codes [N] s32 and
    bias scales [N].

    A column whose steps would be too fine for its bias has coarser ones; one of zeros has those that its bias takes.
    """
    codes, scales = round_columns(rows, limit)
    held = np.zeros(len(rows), np.float32) if bias is None else bias
    least = (np.abs(held.astype(np.float64)) * BIAS_ROOM / np.float64(scale)).astype(np.float32)
    empty = ~rows.any(axis=1)
    coarse = (scales < least) & ~empty
    scales = np.where((empty & (held != 0)) | coarse, least, scales)
    if coarse.any():
        codes[coarse] = np.clip(np.rint(rows[coarse] / scales[coarse, None]), -limit, limit).astype(np.int8)
    steps = (np.float32(scale) * scales).astype(np.float32)
    return codes, scales, np.rint(held.astype(np.float64) / steps).astype(np.int32), steps


def layer_weights(weight: Weight, bias: Weight | None, scale: np.float32, bits: int) -> tuple[Weight, ...]:
    """(codes [K, N] s8, scales [N], zeros) of a float weight [N, K], and the same of its bias [N] where it has one.

    Written one after the other; the rounding is kept for the last and then forgotten.
    """
    limit = 2 ** (bits - 1) - 1

    @lru_cache(maxsize=1)
    def rounded() -> tuple[Array, ...]:
        held = None if bias is None else np.asarray(bias.array(), np.float32).reshape(-1)
        codes, scales, bias_codes, steps = round_layer(np.asarray(weight.array(), np.float32), held, scale, limit)
        return np.ascontiguousarray(codes.T), scales, bias_codes, steps

    def reader(at: int, last: bool) -> Callable[[], Iterator[Array]]:
        def read() -> Iterator[Array]:
            yield rounded()[at]
            if last:
                rounded.cache_clear()

        return read

    def parts(name: str, dtype: Any, shape: tuple[int, ...], at: int, last: bool) -> tuple[Weight, ...]:
        return (
            Weight(f"{name}.s{np.dtype(dtype).itemsize * 8}", np.dtype(dtype), shape, reader(at, False)),
            Weight(f"{name}.scales", np.dtype("<f4"), (rows,), reader(at + 1, last)),
            constant(f"{name}.zeros", np.zeros(rows), dtype),
        )

    rows, columns = weight.shape
    whole = parts(weight.name, np.int8, (columns, rows), 0, bias is None)
    return whole if bias is None else (*whole, *parts(bias.name, np.int32, (rows,), 2, True))


def apply(graph: Graph, step: StaticLinear, spans: Spans) -> Graph:
    """The graph with every Linear, and its bias, as Gemm or MatMul of dequantized values, inputs by their ``spans``."""
    nodes: list[Node] = []
    weights = dict(graph.weights)
    done: set[str] = set()  # values and weights that have their codes
    biases = _biases(graph)
    folded = {add.outputs[0] for add in biases.values()}
    for node in graph.nodes:
        if not is_linear(node):
            nodes += [] if node.outputs[0] in folded else [node]
            continue
        x, name = node.inputs
        scale, zero = grid(*spans[name])
        if x not in done:
            done.add(x)
            parts = scalar(f"{x}.scale", float(scale), np.float32), scalar(f"{x}.zero", int(zero), np.uint8)
            weights |= {part.name: part for part in parts}
            nodes.append(Node("QuantizeLinear", (x, f"{x}.scale", f"{x}.zero"), (f"{x}.u8",)))
            nodes.append(Node("DequantizeLinear", (f"{x}.u8", f"{x}.scale", f"{x}.zero"), (f"{x}.near",)))
        add = biases.get(node.outputs[0])
        bias = None if add is None else graph.weights[_other(add, node.outputs[0])]
        if name not in done:
            done.add(name)
            made = layer_weights(graph.weights[name], bias, scale, step.weight_bits)
            weights |= {part.name: part for part in made}
            nodes.append(_near(name, made[:3], axis=1))
            nodes += [] if bias is None else [_near(bias.name, made[3:], axis=0)]
        if add is None or bias is None:
            nodes.append(Node("MatMul", (f"{x}.near", f"{name}.near"), node.outputs))
        else:
            nodes.append(Node("Gemm", (f"{x}.near", f"{name}.near", f"{bias.name}.near"), add.outputs))
    return graph.replaced(nodes, weights)


def _near(name: str, parts: tuple[Weight, ...], axis: int) -> Node:
    return Node("DequantizeLinear", tuple(part.name for part in parts), (f"{name}.near",), "", (("axis", axis),))


def _other(add: Node, y: str) -> str:
    return add.inputs[1] if add.inputs[0] == y else add.inputs[0]


def _biases(graph: Graph) -> dict[str, Node]:
    """Of values of Linear that only an Add reads, to add a constant row: that Add."""
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for x in node.inputs:
            readers.setdefault(x, []).append(node)
    kept = {port.name for port in graph.outputs}
    found: dict[str, Node] = {}
    for node in filter(is_linear, graph.nodes):
        y, rows = node.outputs[0], graph.weights[node.inputs[1]].shape[0]
        if len(readers.get(y, ())) != 1 or y in kept or readers[y][0].op != "Add":
            continue
        bias = graph.weights.get(_other(readers[y][0], y))
        if bias is not None and bias.shape in {(rows,), (1, rows)}:
            found[y] = readers[y][0]
    return found
