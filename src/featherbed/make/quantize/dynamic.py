"""What onnxruntime's ``quantize_dynamic(per_channel=True, weight_type=QInt8)`` makes of a MatMul.

One scale and zero point for the whole activation tensor, found at run time: the vector of a text depends
on the texts beside it. Kept because it is what people have; a test holds codes and scales against
onnxruntime's own quantizer.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import numpy.typing as npt

from featherbed.make.ir import MICROSOFT, Graph, Node, is_linear
from featherbed.make.quantize.columns import column_weights
from featherbed.recipe import DynamicLinear

Float = npt.NDArray[np.float32]


def rounded_tensor(x: Float) -> Float:
    """x [N, K] as the graph's products see it: one scale and zero point for all of it."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high - low) / 255 or 1.0)
    zero = np.rint(-low / scale)
    return np.asarray((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale, np.float32)


def apply(graph: Graph, step: DynamicLinear, only: Container[str] | None = None) -> Graph:
    """The graph with every Linear, or those of ``only``, as DynamicQuantizeLinear and an integer product."""
    nodes: list[Node] = []
    weights = dict(graph.weights)
    coded: set[str] = set()
    for node in graph.nodes:
        if not is_linear(node) or (only is not None and node.inputs[1] not in only):
            nodes.append(node)
            continue
        x, name = node.inputs
        if x not in coded:
            coded.add(x)
            nodes.append(Node("DynamicQuantizeLinear", (x,), (f"{x}.u8", f"{x}.scale", f"{x}.zero")))
        codes, scales = column_weights(weights[name], step.weight_bits)
        weights |= {codes.name: codes, scales.name: scales}
        # inputs: A, B, a_scale, b_scale, a_zero_point; no b_zero_point: the codes are symmetric
        product = (f"{x}.u8", codes.name, f"{x}.scale", scales.name, f"{x}.zero")
        nodes.append(Node("MatMulIntegerToFloat", product, node.outputs, MICROSOFT))
    return graph.replaced(nodes, weights)
