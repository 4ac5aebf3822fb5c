"""The reference file of a model folder, back into the graph it was written from: its weights stay in the file.

Only what ``graph/lower.py`` made of our own graphs is turned back: Gemm without bias into Linear, the Gather of the
widest vocabulary into Lookup.
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
    kind = port.type.tensor_type
    axes = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
    return Port(port.name, np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)), axes)


def _weight(tensor: TensorProto, folder: Path) -> Weight:
    dtype, shape = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)), tuple(tensor.dims)
    if tensor.data_location != TensorProto.EXTERNAL:
        whole = numpy_helper.to_array(tensor)
        return Weight(tensor.name, dtype, shape, partial(iter, (whole,)))
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file, offset = folder / entries["location"], int(entries.get("offset", 0))
    if Path(entries["location"]).name != entries["location"]:
        raise ValueError(f"weights in {entries['location']!r}, outside the folder")

    def read() -> Iterator[Array]:
        mapped = np.memmap(file, dtype, "r", offset, shape)
        rows = max(1, BLOCK_BYTES // (dtype.itemsize * math.prod(shape[1:])))
        for start in range(0, shape[0], rows):
            yield np.asarray(mapped[start : start + rows])

    return Weight(tensor.name, dtype, shape, read)
