"""A graph in float16: weights, products and what lies between them; sums stay in float32, and so do inputs and outputs.

    float16   linear layers, both products of attention, tables, activations between them
    float32   the residual stream, norms, softmax, rotary angles, pooling: whatever adds up many numbers or large ones

A product of two activations, as in front of a gated feed-forward's last layer, may pass 65504 in models with massive
activations. There each row is divided by its largest value before it becomes float16, and the layer's output is
multiplied by it in float32: no row can overflow, whatever the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from featherbed.errors import CheckpointError
from featherbed.make.graph.pen import Pen
from featherbed.make.ir import Array, Graph, Node, Weight

FLOAT, HALF = 1, 10  # onnx.TensorProto's numbers
F16, F32 = np.dtype("<f2"), np.dtype("<f4")
MOST = 65504.0
TINY = 1e-30  # keeps a row of zeros from dividing by zero
LINEAR = {"Gemm", "MatMulNBits"}
MOVES = {
    "Reshape", "Transpose", "Gather", "Squeeze", "Unsqueeze", "Slice", "Split", "Identity", "Expand",
    "ScatterElements", "Concat",
}  # fmt: skip
FOLLOW = {"Mul", "Gelu", "Sigmoid", "Tanh", "Erf", "Relu", "Neg", "Div"}  # in float16 where what they read is
NO_FLOAT = {
    "Shape", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "And", "Or", "Not", "QuantizeLinear",
    "DynamicQuantizeLinear", "MatMulInteger", "Size",
}  # fmt: skip
BOUNDED = {"Sigmoid", "Softmax", "Tanh"}  # a factor that is no larger than 1
AROUND_SOFTMAX = {"Reshape", "Add", "Mul", "Div", "Tanh", "Cast", "Where"}


def half(graph: Graph) -> Graph:
    """``graph``, in operators of the standard and MatMulNBits, in float16.

    Raises CheckpointError, when a weight is read, on one that float16 cannot hold.
    """
    return _Halving(graph).graph()


def half_weight(weight: Weight) -> Weight:
    """A float32 weight in float16, cast block by block as it is read."""

    def read() -> Iterator[Array]:
        for part in weight.read():
            with np.errstate(over="ignore"):
                cast = np.ascontiguousarray(part, F16)
            if not np.isfinite(cast).all():
                raise CheckpointError(
                    f"{weight.name} in float16",
                    expected=f"weights within ±{MOST:.0f}",
                    found=f"{float(np.abs(part).max()):g}",
                    remedy="leave out the variants in float16",
                )
            yield cast

    return replace(weight, name=f"{weight.name}.f16", dtype=F16, read=read)


@dataclass
class _Halving:
    """Node by node: what type it computes in, and casts where that is not what it is handed."""

    source: Graph

    def __post_init__(self) -> None:
        graph = self.source
        self._pen = Pen(graph)
        self._made = {out: node for node in graph.nodes for out in node.outputs}
        self._readers: dict[str, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            for name in node.inputs:
                self._readers[name].append(node)
        self._near = self._near_softmax()
        self._kind = {port.name: FLOAT for port in graph.inputs if port.dtype == F32}  # of values that are floats
        self._casts: dict[tuple[str, int], str] = {}
        self._scaled: dict[str, tuple[str, str]] = {}  # products of activations: rows within ±1, and their scales

    def graph(self) -> Graph:
        """The graph in float16."""
        ports = {port.name for port in self.source.outputs if port.dtype == F32}
        for node in self.source.nodes:
            self._pen.begin(node)
            if node.op in LINEAR and node.inputs[0] in self._scaled:
                self._scaled_linear(node)
            else:
                self._plain(node)
        for name in ports:
            if self._kind.get(name) == HALF:
                self._as_output(name)
        return self._pen.graph()

    # what a node computes in

    def _floats(self, node: Node) -> list[str]:
        return [name for name in node.inputs if name in self._kind or self._is_float(name)]

    def _is_float(self, name: str) -> bool:
        return name in self.source.weights and self.source.weights[name].dtype == F32

    def _near_softmax(self) -> set[str]:
        """Outputs of the products on both sides of a softmax."""
        found = set()
        for node in self.source.nodes:
            if node.op == "Softmax":
                found |= {n.outputs[0] for n in self._reached(node.inputs[0], back=True)}
                found |= {n.outputs[0] for n in self._reached(node.outputs[0], back=False)}
        return found

    def _reached(self, name: str, back: bool) -> Iterator[Node]:
        made = [self._made[name]] if name in self._made else []
        for node in made if back else self._readers[name]:
            if node.op == "MatMul":
                yield node
            elif node.op in AROUND_SOFTMAX:
                for other in node.inputs if back else node.outputs:
                    yield from self._reached(other, back)

    def _type(self, node: Node, floats: list[str]) -> int:
        weights = self.source.weights
        if node.op in LINEAR or node.op == "DequantizeLinear":
            return HALF
        if node.op == "MatMul":
            return HALF if node.inputs[1] in weights or node.outputs[0] in self._near else FLOAT
        values = [name for name in floats if name not in weights]
        if node.op in MOVES and node.op != "Concat":
            first = node.inputs[0]
            return HALF if first in weights and len(weights[first].shape) > 1 else self._kind.get(first, FLOAT)
        adds = node.op in {"Add", "Sub"} and len(values) == 1  # a bias; two activations are the residual stream
        if (node.op in FOLLOW or node.op == "Concat" or adds) and values and not self._to_scale(node):
            return HALF if all(self._kind[name] == HALF for name in values) else FLOAT
        return FLOAT

    def _to_scale(self, node: Node) -> bool:
        """Whether a node is a product of two activations, neither of them bounded, that a linear layer reads."""
        if node.op != "Mul" or not any(n.op in LINEAR for n in self._readers[node.outputs[0]]):
            return False
        makers = [self._made.get(name) for name in node.inputs]
        return all(maker is not None and maker.op not in BOUNDED for maker in makers)

    # what is written

    def _plain(self, node: Node) -> None:
        floats = self._floats(node)
        if not floats or node.op in NO_FLOAT or (node.op == "Cast" and node.inputs[0] not in self._kind):
            self._pen.nodes.append(node)
            if node.op == "Cast" and dict(node.attributes)["to"] == FLOAT:
                self._kind[node.outputs[0]] = FLOAT
            return
        kind = self._type(node, floats)
        inputs = tuple(self._as(name, kind) if name in floats else name for name in node.inputs)
        self._pen.nodes.append(replace(node, inputs=inputs))
        for out in node.outputs:
            self._kind[out] = kind
        if self._to_scale(node):
            self._scale_rows(node.outputs[0])

    def _scale_rows(self, product: str) -> None:
        pen = self._pen
        size = pen.node("Abs", product)
        peak = pen.node("ReduceMax", size, pen.const([-1]), attributes={"keepdims": 1})
        peak = pen.node("Max", peak, pen.const(TINY, np.float32))
        self._scaled[product] = pen.node("Div", product, peak), peak
        self._kind[self._scaled[product][0]] = FLOAT

    def _scaled_linear(self, node: Node) -> None:
        x, peak = self._scaled[node.inputs[0]]
        floats = self._floats(node)
        rest = tuple(self._as(name, HALF) if name in floats else name for name in node.inputs[1:])
        out = self._pen.fresh(node.op)
        self._pen.nodes.append(replace(node, inputs=(self._as(x, HALF), *rest), outputs=(out,)))
        self._kind[out], self._kind[node.outputs[0]] = HALF, FLOAT
        self._pen.node("Mul", self._as(out, FLOAT), peak, out=node.outputs[0])

    def _as(self, name: str, kind: int) -> str:
        """A value or weight in a type: as it is, or cast, once."""
        if self._is_float(name):
            return name if kind == FLOAT else self._pen.weight(half_weight(self.source.weights[name]))
        if self._kind[name] == kind:
            return name
        if (name, kind) not in self._casts:
            cast = f"{name}/{'f16' if kind == HALF else 'f32'}"
            self._casts[name, kind] = self._pen.node("Cast", name, out=cast, attributes={"to": kind})
        return self._casts[name, kind]

    def _as_output(self, name: str) -> None:
        """An output of the graph that came out in float16, in float32."""
        inner = f"{name}/f16"
        nodes = [
            replace(n, inputs=tuple(inner if x == name else x for x in n.inputs),
                    outputs=tuple(inner if x == name else x for x in n.outputs))
            for n in self._pen.nodes
        ]  # fmt: skip
        self._pen.nodes[:] = nodes
        self._pen.node("Cast", inner, out=name, attributes={"to": FLOAT})
