"""The reference file of a model folder, back into the graph it was written from: its weights stay in the file.

Only what ``graph/lower.py`` made of our own graphs is turned back: Gemm without bias into Linear, the Gather of the
widest vocabulary into Lookup. ``read_foreign`` turns nothing back: lift.py lifts what another exporter wrote, and
rewrite.py writes variants once more in other operators.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from featherbed.errors import ModelFolderError
from featherbed.make.ir import LINEAR, LOOKUP, OURS, Array, Attribute, Graph, Node, Port, Weight

BLOCK_BYTES = 16 * 2**20
PACKED: dict[int, str] = {TensorProto.INT4: "INT4", TensorProto.UINT4: "UINT4"}  # two numbers a byte
TABLE_SOURCE = "ScatterElements"  # token ids, moved to the front of their texts


def read_graph(path: Path) -> Graph:
    """The graph of a reference file of ours. Raises ModelFolderError when it is not one."""
    try:
        model = onnx.load(str(path), load_external_data=False)
        made_by = {name: node.op_type for node in model.graph.node for name in node.output}
        weights = {w.name: _weight(w, path.parent) for w in model.graph.initializer}
        nodes = tuple(_node(node, made_by, weights) for node in model.graph.node)
        opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        inputs, outputs = (tuple(map(_port, ports)) for ports in (model.graph.input, model.graph.output))
    except Exception as error:  # protobuf's, onnx's and the file system's: they share no base
        raise _refused(path, f"{type(error).__name__}: {error}") from error
    graph = Graph(model.graph.name, opset, nodes, weights, inputs, outputs)
    if not graph.linear_names() or not any(n.op == LOOKUP for n in nodes):
        raise _refused(path, "no linear layers and no embedding table")
    return graph


def read_foreign(path: Path) -> tuple[Graph, dict[str, tuple[str | int, ...]]]:
    """A graph of another exporter, its nodes as they are and its constants as weights; and the axes of its values.

    Raises ValueError on what our graphs have no place for: functions, and operators with graphs inside.
    """
    model = onnx.load(str(path), load_external_data=False)
    if model.functions:
        raise ValueError(f"functions of its own: {model.functions[0].name}")
    weights = {w.name: _weight(w, path.parent) for w in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Constant":
            weights[node.output[0]] = _constant(node)
            continue
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.TENSOR) for a in node.attribute):
            raise ValueError(f"{node.op_type} with a graph or a tensor inside")
        attributes = tuple((a.name, _attribute(a)) for a in node.attribute)
        nodes.append(Node(node.op_type, tuple(node.input), tuple(node.output), node.domain, attributes))
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    inputs, outputs = (tuple(map(_port, ports)) for ports in (model.graph.input, model.graph.output))
    known = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    axes = {v.name: _axes(v) for v in known if v.type.tensor_type.HasField("shape")}
    return Graph(model.graph.name, opset, tuple(nodes), weights, inputs, outputs), axes


def _constant(node: onnx.NodeProto) -> Weight:
    """The value of a Constant, which has a spelling for each kind."""
    kind, value = node.attribute[0].name, helper.get_attribute_value(node.attribute[0])
    if kind == "value":
        array = numpy_helper.to_array(value)
    else:
        array = np.asarray(value, np.float32 if "float" in kind else np.int64)
    return Weight(node.output[0], array.dtype, array.shape, partial(iter, (array,)))


def _refused(path: Path, found: str) -> ModelFolderError:
    return ModelFolderError(
        f"{path}",
        expected="the fp32 variant as `featherbed build` writes it",
        found=found,
        remedy="build the folder again with this version",
    )


def _node(node: onnx.NodeProto, made_by: dict[str, str], weights: dict[str, Weight]) -> Node:
    inputs, outputs = tuple(node.input), tuple(node.output)
    if node.op_type == "Gemm" and len(inputs) == 2:
        return Node(LINEAR, inputs, outputs, OURS)
    table = weights.get(inputs[0]) if node.op_type == "Gather" else None
    if table is not None and len(table.shape) == 2 and made_by.get(inputs[1]) == TABLE_SOURCE:
        others = [w.shape[0] for w in weights.values() if len(w.shape) == 2 and w.shape[1] == table.shape[1]]
        if table.shape[0] == max(others):  # token types are looked up by moved ids as well
            return Node(LOOKUP, (inputs[1], inputs[0]), outputs, OURS)
    attributes = tuple((a.name, _attribute(a)) for a in node.attribute)
    return Node(node.op_type, inputs, outputs, node.domain, attributes)


def _attribute(attribute: onnx.AttributeProto) -> Attribute:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, int | float) else tuple(value)


def _port(port: onnx.ValueInfoProto) -> Port:
    kind = port.type.tensor_type.elem_type
    return Port(port.name, np.dtype(helper.tensor_dtype_to_np_dtype(kind)), _axes(port))


def _axes(port: onnx.ValueInfoProto) -> tuple[str | int, ...]:
    return tuple(d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim)


def _weight(tensor: TensorProto, folder: Path) -> Weight:
    dtype, shape = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)), tuple(tensor.dims)
    packed, laid = PACKED.get(tensor.data_type, ""), shape
    if packed:
        dtype, laid = np.dtype(np.uint8), ((math.prod(shape) + 1) // 2,)
    if tensor.data_location != TensorProto.EXTERNAL:
        whole = np.frombuffer(_pairs(tensor), dtype) if packed else numpy_helper.to_array(tensor)
        return Weight(tensor.name, dtype, shape, partial(iter, (whole,)), packed=packed)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file, offset = folder / entries["location"], int(entries.get("offset", 0))
    if Path(entries["location"]).name != entries["location"]:
        raise ValueError(f"weights in {entries['location']!r}, outside the folder")
    return Weight(tensor.name, dtype, shape, partial(_rows, file, dtype, offset, laid), packed=packed)


def _pairs(tensor: TensorProto) -> bytes:
    """Numbers of 4 bits, two a byte: they lie in one piece, or a pair an entry in a list."""
    return tensor.raw_data if tensor.HasField("raw_data") else bytes(tensor.int32_data)


def _rows(file: Path, dtype: np.dtype[np.generic], offset: int, shape: tuple[int, ...]) -> Iterator[Array]:
    """A tensor that lies in a file, mapped, some rows at a time."""
    if not shape:
        yield np.fromfile(file, dtype, 1, offset=offset).reshape(())
        return
    mapped = np.memmap(file, dtype, "r", offset, shape)
    rows = max(1, BLOCK_BYTES // (dtype.itemsize * math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield np.asarray(mapped[start : start + rows])
