"""What onnxruntime's ``quantize_dynamic(per_channel=True, weight_type=QInt8)`` makes of a MatMul.

One scale and zero point for the whole activation tensor, found at run time: the vector of a text depends
on the texts beside it. Kept because it is what people have; a test holds codes and scales against
onnxruntime's own quantizer.
"""

from __future__ import annotations

from featherbed.make.ir import LINEAR, MICROSOFT, OURS, Graph, Node
from featherbed.make.quantize.columns import column_weights
from featherbed.recipe import DynamicLinear


def apply(graph: Graph, step: DynamicLinear) -> Graph:
    """The graph with every Linear as DynamicQuantizeLinear and an integer product."""
    nodes: list[Node] = []
    weights = dict(graph.weights)
    coded: set[str] = set()
    for node in graph.nodes:
        if (node.domain, node.op) != (OURS, LINEAR):
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
