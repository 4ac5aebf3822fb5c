"""A graph for one batch size and one length: what is known of shapes then is computed now, and written down.

Shapes of standard operators are onnx's own inference; those of com.microsoft are told here. Whatever follows from
shapes and small constants alone (positions, masks of causal attention, rotary tables) becomes a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TypeProto, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from featherbed.make.graph.pen import scalars
from featherbed.make.ir import Array, Graph, Node, Port, Weight, constant
from featherbed.make.write import IR_VERSION, node_proto

SMALL = 4096  # numbers of a weight that may be computed with
LARGEST = 2**20  # bytes of a constant that is computed
WHOLE = {"DequantizeLinear"}  # weights stay in their bits
Known = tuple[np.dtype[Any], tuple[int, ...]]
Rule = Callable[[dict[str, Any], list[Known]], Known]


def _attention(said: dict[str, Any], inputs: list[Known]) -> Known:
    kind, (batch, tokens, width) = inputs[0]
    heads, shared = said["num_heads"], said["kv_num_heads"]
    packed = not inputs[1][1]
    return kind, (batch, tokens, width * heads // (heads + 2 * shared) if packed else width)


def _rows(said: dict[str, Any], inputs: list[Known]) -> Known:
    return inputs[0][0], (*inputs[0][1][:-1], said["N"])


def _product(_: dict[str, Any], inputs: list[Known]) -> Known:
    return inputs[3][0], (*inputs[0][1][:-1], inputs[1][1][-1])


def _table(said: dict[str, Any], inputs: list[Known]) -> Known:
    return inputs[2][0], (*inputs[1][1], inputs[0][1][1] * 8 // said.get("bits", 4))


def _same(_: dict[str, Any], inputs: list[Known]) -> Known:
    return inputs[0]


RULES: dict[str, Rule] = {
    "GroupQueryAttention": _attention,
    "MatMulNBits": _rows,
    "MatMulBnb4": _rows,
    "MatMulIntegerToFloat": _product,
    "GatherBlockQuantized": _table,
    "QuickGelu": _same,
    "SimplifiedLayerNormalization": _same,
}


def static(graph: Graph, batch: int, tokens: int) -> Graph:
    """``graph`` for ``batch`` texts of ``tokens`` tokens; ``values`` has the shapes of what lies in between."""
    graph = replace(graph, weights=scalars(graph.weights))
    sizes: dict[str | int, int] = {}
    for port in graph.inputs:
        sizes |= dict(zip(port.axes, (batch, tokens), strict=True))
    fixed = _Fixed(graph, sizes)
    for node in graph.nodes:
        fixed.add(node)
    return fixed.graph()


def _fixed(port: Port, sizes: dict[str | int, int]) -> Port:
    return replace(port, axes=tuple(sizes.get(axis, axis) for axis in port.axes))


class _Fixed:
    """Node by node: shapes, and values where they follow from them."""

    def __init__(self, graph: Graph, sizes: dict[str | int, int]) -> None:
        self._graph = graph
        self._inputs = tuple(_fixed(port, sizes) for port in graph.inputs)
        self._outputs = tuple(_fixed(port, sizes) for port in graph.outputs)
        self._known: dict[str, Known] = {name: (w.dtype, w.shape) for name, w in graph.weights.items()}
        self._known |= {p.name: (p.dtype, tuple(int(n) for n in p.axes)) for p in self._inputs}
        self._values: dict[str, Array] = {
            name: weight.array()
            for name, weight in graph.weights.items()
            if math.prod(weight.shape) <= SMALL and not weight.packed
        }
        self._weights: dict[str, Weight] = dict(graph.weights)
        self._nodes: list[Node] = []

    def graph(self) -> Graph:
        """The graph with fixed shapes."""
        done = replace(self._graph, inputs=self._inputs, outputs=self._outputs)
        done = done.replaced(self._nodes, self._weights)
        ends = {port.name for port in self._outputs}
        made = [out for node in done.nodes for out in node.outputs if out in self._known and out not in ends]
        return replace(done, values=tuple(Port(name, *self._known[name]) for name in made))

    def add(self, node: Node) -> None:
        """The node, or the constant that it comes to."""
        if node.op == "Shape" and node.inputs[0] in self._known and not node.attributes:
            self._keep(node.outputs[0], np.asarray(self._known[node.inputs[0]][1], np.int64))
            return
        self._infer(node)
        found = [self._known.get(out) for out in node.outputs]
        small = all(one is not None and math.prod(one[1]) * one[0].itemsize <= LARGEST for one in found)
        if not node.domain and node.op not in WHOLE and small and all(x in self._values for x in node.inputs if x):
            for out, value in zip(node.outputs, self._run(node), strict=True):
                self._keep(out, value)
        else:
            self._nodes.append(node)

    def _keep(self, name: str, value: Array) -> None:
        self._values[name] = value
        self._known[name] = (value.dtype, value.shape)
        self._weights[name] = replace(constant(name, value, value.dtype), shape=value.shape)

    def _run(self, node: Node) -> list[Array]:
        names = [name for name in dict.fromkeys(node.inputs) if name]
        tensors = [numpy_helper.from_array(self._values[name], name) for name in names]
        ends = [helper.make_tensor_value_info(out, _kind(self._known[out][0]), None) for out in node.outputs]
        proto = helper.make_graph([node_proto(node)], "one", [], ends, tensors)
        model = helper.make_model(proto, opset_imports=self._opset(), ir_version=IR_VERSION)
        return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, {})]

    def _opset(self) -> list[onnx.OperatorSetIdProto]:
        return [helper.make_opsetid("", self._graph.opset)]

    def _infer(self, node: Node) -> None:
        """Type and shape of what a node gives, where its inputs' are known."""
        if node.op in RULES:
            inputs = [self._known.get(name, (np.dtype(np.float32), ())) for name in node.inputs]
            self._known[node.outputs[0]] = RULES[node.op](dict(node.attributes), inputs)
        if node.domain or node.op in RULES or any(x not in self._known for x in node.inputs if x):
            return
        types = {x: self._type(x) for x in node.inputs if x}
        data = {x: numpy_helper.from_array(self._values[x], x) for x in node.inputs if x in self._values}
        schema = defs.get_schema(node.op, self._graph.opset, "")
        found = shape_inference.infer_node_outputs(
            schema, node_proto(node), types, data, opset_imports=self._opset(), ir_version=IR_VERSION
        )
        for out, kind in found.items():
            tensor = kind.tensor_type
            if all(axis.HasField("dim_value") for axis in tensor.shape.dim) and tensor.HasField("shape"):
                dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
                self._known[out] = (dtype, tuple(axis.dim_value for axis in tensor.shape.dim))

    def _type(self, name: str) -> TypeProto:
        weight = self._graph.weights.get(name)
        dtype, shape = self._known[name]
        packed = weight is not None and weight.packed
        kind = onnx.TensorProto.DataType.Value(weight.packed) if weight is not None and packed else _kind(dtype)
        return helper.make_tensor_type_proto(kind, shape)


def _kind(dtype: np.dtype[Any]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(dtype))
