"""What no step has touched becomes float: Linear → MatMul, Lookup → Gather."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from featherbed.make.ir import LINEAR, LOOKUP, OURS, Array, Graph, Node, Weight


def transposed(weight: Weight) -> Weight:
    """weight [N, K] as [K, N], the layout MatMul reads."""

    def read() -> Iterator[Array]:
        yield np.ascontiguousarray(weight.array().T)

    rows, columns = weight.shape
    return Weight(f"{weight.name}.T", weight.dtype, (columns, rows), read)


def lower(graph: Graph) -> Graph:
    """The graph with onnx operators only."""
    nodes: list[Node] = []
    weights = dict(graph.weights)
    for node in graph.nodes:
        if (node.domain, node.op) == (OURS, LINEAR):
            matrix = transposed(weights[node.inputs[1]])
            weights[matrix.name] = matrix
            node = Node("MatMul", (node.inputs[0], matrix.name), node.outputs)
        elif (node.domain, node.op) == (OURS, LOOKUP):
            node = Node("Gather", (node.inputs[1], node.inputs[0]), node.outputs, "", (("axis", 0),))
        nodes.append(node)
    return graph.replaced(nodes, weights)
