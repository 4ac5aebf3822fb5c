"""W8A8 with one activation scale a token: the row of a token is rounded by its own largest value.

    r = max|x| over the row / 127           one scale a token
    u = round(x / r) + 128                  u8, so that onnxruntime takes its u8 × s8 kernels (VNNI, AMX)
    y = (u − 128) · codes · column scale · r

Nothing of a row depends on another row, so a text's vector does not depend on its batch. The row axis of
QuantizeLinear takes the scales as they are: two reads of x for the range, one pass to round.
Layers that read the same input (q, k, v; gate, up) share its codes.
"""

from __future__ import annotations

import numpy as np

from featherbed.make.ir import LINEAR, MICROSOFT, OURS, Graph, Node, constant
from featherbed.make.quantize.columns import column_weights
from featherbed.recipe import PerTokenLinear

LIMIT = 127.0
TINY = 1e-30  # keeps a row of zeros from dividing by zero; its codes are all zero


def _row_codes(x: str) -> list[Node]:
    """x [N, K] → ``x.u8`` [N, K] and ``x.scale`` [N, 1]."""
    return [
        Node("ReduceMax", (x, "row.axis"), (f"{x}.max",), "", (("keepdims", 1),)),
        Node("ReduceMin", (x, "row.axis"), (f"{x}.min",), "", (("keepdims", 1),)),
        Node("Neg", (f"{x}.min",), (f"{x}.low",)),
        Node("Max", (f"{x}.max", f"{x}.low", "row.tiny"), (f"{x}.peak",)),
        Node("Mul", (f"{x}.peak", "row.step"), (f"{x}.scale",)),
        Node("Squeeze", (f"{x}.scale", "row.axis"), (f"{x}.scales",)),
        Node("Shape", (f"{x}.scales",), (f"{x}.rows",)),
        Node("Expand", ("row.zero", f"{x}.rows"), (f"{x}.zeros",)),
        Node("QuantizeLinear", (x, f"{x}.scales", f"{x}.zeros"), (f"{x}.u8",), "", (("axis", 0),)),
    ]


def apply(graph: Graph, step: PerTokenLinear) -> Graph:
    """The graph with every Linear as row quantization, integer product and two scales."""
    nodes: list[Node] = []
    weights = dict(graph.weights)
    for weight in (
        constant("row.axis", [-1], np.int64),
        constant("row.tiny", TINY, np.float32),
        constant("row.step", 1 / LIMIT, np.float32),
        constant("row.zero", 128, np.uint8),
        constant("row.one", 1, np.float32),
    ):
        weights[weight.name] = weight
    coded: set[str] = set()
    for node in graph.nodes:
        if (node.domain, node.op) != (OURS, LINEAR):
            nodes.append(node)
            continue
        x, name = node.inputs
        y = node.outputs[0]
        if x not in coded:
            coded.add(x)
            nodes += _row_codes(x)
        codes, scales = column_weights(weights[name], step.weight_bits)
        weights |= {codes.name: codes, scales.name: scales}
        product = (f"{x}.u8", codes.name, "row.one", scales.name, "row.zero")
        nodes.append(Node("MatMulIntegerToFloat", product, (f"{y}.product",), MICROSOFT))
        nodes.append(Node("Mul", (f"{y}.product", f"{x}.scale"), (y,)))
    return graph.replaced(nodes, weights)
