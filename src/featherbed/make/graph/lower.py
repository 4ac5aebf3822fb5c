"""What no step has touched becomes float: Linear → Gemm, Lookup → Gather.

Gemm reads a weight as checkpoints store it, [N, K]: nothing is transposed when a file is written.
"""

from __future__ import annotations

from featherbed.make.ir import LINEAR, LOOKUP, OURS, Graph, Node


def lower(graph: Graph) -> Graph:
    """The graph with onnx operators only."""
    nodes: list[Node] = []
    for node in graph.nodes:
        if (node.domain, node.op) == (OURS, LINEAR):
            node = Node("Gemm", node.inputs, node.outputs, "", (("transB", 1),))
        elif (node.domain, node.op) == (OURS, LOOKUP):
            node = Node("Gather", (node.inputs[1], node.inputs[0]), node.outputs, "", (("axis", 0),))
        nodes.append(node)
    return graph.replaced(nodes, graph.weights)
