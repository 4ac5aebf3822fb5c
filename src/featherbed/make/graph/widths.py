"""How wide values are along their last axis, where nodes and weights say it."""

from __future__ import annotations

from featherbed.make.ir import Graph, Node

SAME = {
    "SimplifiedLayerNormalization", "LayerNormalization", "Add", "Sub", "Mul", "Div", "Cast", "Cos", "Sin", "Gelu",
    "QuickGelu", "Sigmoid", "Tanh", "Max", "Neg",
}  # fmt: skip
SMALL = 16  # numbers of a shape


class Widths:
    """The last axis of every value of a graph that can be told."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[str, int] = {name: w.shape[-1] for name, w in graph.weights.items() if w.shape}
        self._ends: dict[str, int] = {}  # of shapes: their last number
        for name, weight in graph.weights.items():
            if len(weight.shape) == 1 and 0 < weight.shape[0] <= SMALL and weight.dtype.kind == "i":
                self._ends[name] = int(weight.array()[-1])
        for node in graph.nodes:
            width = self._width(node)
            if width > 0:
                self._known[node.outputs[0]] = width

    def of(self, name: str) -> int:
        """The width of a value; 0 where nobody says it."""
        return self._known.get(name, 0)

    def _width(self, node: Node) -> int:
        weights, inputs, said = self._graph.weights, node.inputs, dict(node.attributes)
        if node.op in SAME:
            return max((self._known.get(name, 0) for name in inputs), default=0)
        if node.op == "Concat" and inputs[-1] in self._ends:
            self._ends[node.outputs[0]] = self._ends[inputs[-1]]
        if node.op == "Reshape":
            return self._ends.get(inputs[1], 0)
        if node.op in {"MatMulNBits", "MatMulBnb4"}:
            return int(str(said["N"]))
        if node.op == "Gemm" and said.get("transB"):
            return weights[inputs[1]].shape[0] if inputs[1] in weights else 0
        if node.op in {"MatMul", "MatMulIntegerToFloat", "MatMulInteger"}:
            return self._known.get(inputs[1], 0)
        return 0
