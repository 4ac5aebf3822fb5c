"""W8A8 with one activation scale a token: the row of a token is rounded by its own largest value.

    r = max|x| over the row / 127           one scale a token
    u = round(x / r) + 128                  u8, so that onnxruntime takes its u8 × s8 kernels (VNNI, AMX)
    y = (u − 128) · codes · column scale · r

Behind a GELU, whose values are hardly negative, zero is 20 and not 128: steps nearly half as wide.

Nothing of a row depends on another row, so a text's vector does not depend on its batch. The row axis of
QuantizeLinear takes the scales as they are: two reads of x for the range, one pass to round.
Layers that read the same input (q, k, v; gate, up) share its codes. A row scale is left out where its readers
do not see it, and multiplied in behind the next product (``_late_scales``).
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import numpy.typing as npt

from featherbed.make.ir import MICROSOFT, Graph, Node, constant, is_linear
from featherbed.make.quantize.columns import Ready, column_weights
from featherbed.recipe import PerTokenLinear

NORM = "SimplifiedLayerNormalization"
Float = npt.NDArray[np.float32]
LIMIT = 127.0
GELU_LOW = 0.17  # GELU's least value is −0.16997: one read of its rows is spared
GELU_ZERO = 20  # and few codes are enough below zero: the others are spent above it
TINY = 1e-30  # keeps a row of zeros from dividing by zero; its codes are all zero


def _row_codes(x: str, bounded: bool) -> list[Node]:
    """x [N, K] → ``x.u8`` [N, K] and ``x.scale`` [N, 1]. ``bounded``: no value is below −GELU_LOW."""
    keep = (("keepdims", 1),)
    nodes = [Node("ReduceMax", (x, "row.axis"), (f"{x}.max",), "", keep)]
    step, zero = ("row.gelu_step", "row.gelu_zero") if bounded else ("row.step", "row.zero")
    if bounded:
        nodes += [Node("Max", (f"{x}.max", "row.gelu_low"), (f"{x}.peak",))]
    else:
        nodes += [
            Node("ReduceMin", (x, "row.axis"), (f"{x}.min",), "", keep),
            Node("Neg", (f"{x}.min",), (f"{x}.low",)),
            Node("Max", (f"{x}.max", f"{x}.low", "row.tiny"), (f"{x}.peak",)),
        ]
    return [
        *nodes,
        Node("Mul", (f"{x}.peak", step), (f"{x}.scale",)),
        Node("Squeeze", (f"{x}.scale", "row.axis"), (f"{x}.scales",)),
        Node("Shape", (f"{x}.scales",), (f"{x}.rows",)),
        Node("Expand", (zero, f"{x}.rows"), (f"{x}.zeros",)),
        Node("QuantizeLinear", (x, f"{x}.scales", f"{x}.zeros"), (f"{x}.u8",), "", (("axis", 0),)),
    ]


def rounded_rows(x: Float, bounded: bool) -> Float:
    """x [N, K] as the graph's products see it. ``bounded``: it comes out of a GELU."""
    if bounded:
        zero, peak = GELU_ZERO, np.maximum(x.max(axis=1), GELU_LOW / GELU_ZERO * (255 - GELU_ZERO))
    else:
        zero, peak = 128, np.maximum(np.abs(x).max(axis=1), TINY)
    scales = (peak / np.float32(255 - zero)).astype(np.float32)[:, None]
    codes = np.clip(np.rint(x / scales), -zero, 255 - zero)
    return np.asarray(codes * scales, np.float32)


def behind_gelu(graph: Graph) -> set[str]:
    """Values that come out of a GELU."""
    return {node.outputs[0] for node in graph.nodes if node.op == "Gelu"}


def apply(graph: Graph, step: PerTokenLinear, ready: Ready | None = None, only: Container[str] | None = None) -> Graph:
    """The graph with every Linear, or those of ``only``, as row quantization, integer product and two scales.

    ``ready`` has the arrays of weights that were rounded before, by name; see columns.py.
    """
    ready = ready or {}
    nodes: list[Node] = []
    weights = dict(graph.weights)
    for weight in (
        constant("row.axis", [-1], np.int64),
        constant("row.tiny", TINY, np.float32),
        constant("row.gelu_low", GELU_LOW / GELU_ZERO * (255 - GELU_ZERO), np.float32),
        constant("row.gelu_step", 1 / (255 - GELU_ZERO), np.float32),
        constant("row.gelu_zero", GELU_ZERO, np.uint8),
        constant("row.step", 1 / LIMIT, np.float32),
        constant("row.zero", 128, np.uint8),
        constant("row.one", 1, np.float32),
    ):
        weights[weight.name] = weight
    coded: set[str] = set()
    gelus = behind_gelu(graph)
    chosen = {name for name in graph.linear_names() if only is None or name in only}
    late = _late_scales(graph, chosen)
    unscaled: dict[str, str] = {}  # values that still lack a row scale, and that scale's name
    for node in graph.nodes:
        if not is_linear(node) or node.inputs[1] not in chosen:
            nodes.append(node)
            carried = [unscaled[x] for x in node.inputs if x in unscaled]
            if carried and node.outputs[0] in late and node.op != NORM:  # a norm forgets the scale
                unscaled[node.outputs[0]] = carried[0]
            continue
        x, name = node.inputs
        y = node.outputs[0]
        if x not in coded:
            coded.add(x)
            nodes += _row_codes(x, bounded=x in gelus)
            if x in unscaled:
                nodes.append(Node("Mul", (f"{x}.scale", unscaled[x]), (f"{x}.whole",)))
        scale = f"{x}.whole" if x in unscaled else f"{x}.scale"
        codes, scales = column_weights(graph.weights[name], step.weight_bits, ready.get(name))
        weights |= {codes.name: codes, scales.name: scales}
        product = (f"{x}.u8", codes.name, "row.one", scales.name, "row.gelu_zero" if x in gelus else "row.zero")
        raw = y if y in late else f"{y}.product"
        nodes.append(Node("MatMulIntegerToFloat", product, (raw,), MICROSOFT))
        if y in late:
            unscaled[y] = scale
        else:
            nodes.append(Node("Mul", (raw, scale), (y,)))
    return graph.replaced(nodes, weights)


def _late_scales(graph: Graph, chosen: set[str]) -> set[str]:
    """Values whose row scale nobody needs yet: every reader rounds rows by their own largest value, or divides
    by their root mean square, or is a product or a new shape read in the same way.

    Rounding does not see a scale at all. An RMS norm sees it in its ε only: next to rows 1/scale times larger,
    ε shrinks by scale², and it is there for rows of zeros.
    """
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for x in node.inputs:
            readers.setdefault(x, []).append(node)
    kept = {port.name for port in graph.outputs}
    late: set[str] = set()
    for node in reversed(graph.nodes):  # readers stand behind what they read
        y = node.outputs[0]
        if y not in kept and readers.get(y) and all(_indifferent(reader, y, late, chosen) for reader in readers[y]):
            late.add(y)
    return late


def _indifferent(reader: Node, y: str, late: set[str], chosen: set[str]) -> bool:
    if is_linear(reader):
        return reader.inputs[0] == y and reader.inputs[1] in chosen
    if reader.op == NORM:
        return reader.inputs[0] == y
    if reader.op == "Mul":  # by something that is not itself without its scale: one scale is carried, not two
        return reader.outputs[0] in late and reader.inputs[1] == y != reader.inputs[0]
    return reader.op == "Reshape" and reader.inputs[0] == y and reader.outputs[0] in late
