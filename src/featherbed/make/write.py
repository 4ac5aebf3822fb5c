"""A graph into an .onnx file and its sidecar, tensor by tensor; how external data is laid out is known here only.

Offsets follow from shapes alone, so the sidecar is written front to back, block by block, hashed on the
way, and no weight outlives its turn.
"""

from __future__ import annotations

import hashlib
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from featherbed.errors import OutputError
from featherbed.folder import FileRecord, file_record, sidecar_name
from featherbed.make.ir import MICROSOFT, Array, Graph, Node, Port, Weight

IR_VERSION = 10
INLINE_LIMIT_BYTES = 128 * 2**20  # below it one file is handier, and protobuf still cheap to parse
SIDECAR_ALIGN = 4096  # a page, so that a tensor can be mapped by itself
SIDECAR_LEAST_BYTES = 128  # constants stay in the graph, where shape inference can see them

AHEAD = 3  # blocks read before they are written: 16 MB each

Advance = Callable[[int], None]


class Sink:
    """A file that counts and hashes what goes through it, and syncs before it closes."""

    def __init__(self, path: Path, advance: Advance = lambda _: None) -> None:
        self.path = path
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._advance = advance
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Take these bytes."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
        self._advance(len(data))

    def to_next_page(self) -> int:
        """Zeros up to where a tensor of a sidecar may begin; that place, in bytes from the file's start."""
        self.write(bytes(-self.size % SIDECAR_ALIGN))
        return self.size

    def close(self) -> FileRecord:
        """What was written; from here on it survives a power cut."""
        with self._file:  # closed even when the disk fails here
            self._file.flush()
            os.fsync(self._file.fileno())
        return FileRecord(self._hash.hexdigest(), self.size)

    def abandon(self) -> None:
        """Close after a failure."""
        self._file.close()


def write_graph(
    graph: Graph, path: Path, metadata: dict[str, str], advance: Advance = lambda _: None,
    inline_limit_bytes: int = INLINE_LIMIT_BYTES,
) -> dict[str, FileRecord]:  # fmt: skip
    """Write ``graph`` to ``path``, with a sidecar beside it when its weights pass the limit.

    ``metadata`` goes into the model's metadata_props. ``advance`` is told the bytes written as they go.
    Returns the record of each file by name. Raises OutputError when writing fails; what was begun is removed.
    """
    total = sum(w.size_bytes for w in graph.weights.values())
    split = total > inline_limit_bytes
    sidecar = path.with_name(sidecar_name(path.name))
    records: dict[str, FileRecord] = {}
    try:
        if split:
            places, records[sidecar.name] = _write_sidecar(graph, sidecar, advance)
        else:
            places = {}
        model = _model(graph, metadata, places, sidecar.name)
        sink = Sink(path, (lambda _: None) if split else advance)
        try:
            sink.write(model.SerializeToString(deterministic=True))
        except BaseException:
            sink.abandon()
            raise
        records[path.name] = sink.close()
    except OSError as error:
        for file in (path, sidecar):
            file.unlink(missing_ok=True)
        raise OutputError(
            f"{path}",
            expected=f"room and permission for {total / 1e6:.0f} MB",
            found=f"{error.strerror or error}",
            remedy="free space or choose another folder with -o",
        ) from error
    return records


def write_again(path: Path, target: Path) -> dict[str, FileRecord]:
    """A graph that was written, and its sidecar, once more under another name: a link where the disk has them.

    A graph with a sidecar names it, so it is another file then, and the sidecar is copied: onnx refuses one that
    is linked. Returns the record of each file by name. Raises OutputError.
    """
    sidecar, beside = (one.with_name(sidecar_name(one.name)) for one in (path, target))
    try:
        if not sidecar.is_file():
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
            return {target.name: file_record(target)}
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = beside.name if entry.key == "location" else entry.value
        target.write_bytes(model.SerializeToString(deterministic=True))
        shutil.copyfile(sidecar, beside)
        return {target.name: file_record(target), beside.name: file_record(beside)}
    except OSError as error:
        raise OutputError(
            f"{target}",
            expected="room for a copy of the weights",
            found=f"{error.strerror or error}",
            remedy="free space or choose another folder with -o",
        ) from error


def model_bytes(graph: Graph) -> bytes:
    """A small graph whole in memory. Of its outputs only the names count: onnxruntime finds their types."""
    model = _model(graph, {}, {}, "")
    for port in model.graph.output:
        port.ClearField("type")
    return bytes(model.SerializeToString(deterministic=True))


def ahead(weights: list[Weight]) -> Iterator[tuple[Weight, Array]]:
    """The blocks of all weights in order, read and rounded in a thread while the last ones are hashed and written.

    At most ``AHEAD`` blocks wait. An error while reading is raised here; leaving early stops the thread.
    """
    waiting: queue.Queue[tuple[Weight, Array] | BaseException | None] = queue.Queue(AHEAD)
    left = threading.Event()

    def put(item: tuple[Weight, Array] | BaseException | None) -> bool:
        while not left.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for weight in weights:
                size = 0
                for block in weight.read():
                    size += block.nbytes
                    if not put((weight, block)):
                        return
                if size != weight.size_bytes:
                    raise AssertionError(f"{weight.name} gave {size} bytes, its shape says {weight.size_bytes}")
            put(None)
        except BaseException as error:  # carried over to the thread that writes
            put(error)

    thread = threading.Thread(target=produce, name="featherbed-read", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()
        thread.join()


def _write_sidecar(graph: Graph, path: Path, advance: Advance) -> tuple[dict[str, int], FileRecord]:
    places: dict[str, int] = {}
    sink = Sink(path, advance)
    try:
        external = [w for w in graph.weights.values() if w.size_bytes >= SIDECAR_LEAST_BYTES]
        for weight, block in ahead(external):
            if weight.name not in places:
                places[weight.name] = sink.to_next_page()
            sink.write(block.data.cast("B"))
    except BaseException:
        sink.abandon()
        raise
    return places, sink.close()


def put_outside(proto: TensorProto, location: str, offset: int, size_bytes: int) -> None:
    """Say of a tensor where its bytes lie, in which file beside the graph."""
    proto.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": size_bytes}.items():
        proto.external_data.add(key=key, value=str(value))


def _tensor(weight: Weight, places: dict[str, int], location: str) -> TensorProto:
    kind = TensorProto.DataType.Value(weight.packed) if weight.packed else helper.np_dtype_to_tensor_dtype(weight.dtype)
    proto = TensorProto(name=weight.name, dims=weight.shape, data_type=kind)
    if weight.name in places:
        put_outside(proto, location, places[weight.name], weight.size_bytes)
    else:
        proto.raw_data = weight.array().tobytes()
    return proto


def _port(port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, helper.np_dtype_to_tensor_dtype(port.dtype), port.axes)


def node_proto(node: Node) -> onnx.NodeProto:
    """A node as onnx writes it."""
    proto = helper.make_node(node.op, node.inputs, node.outputs, name=node.outputs[0], domain=node.domain)
    proto.attribute.extend(helper.make_attribute(key, value) for key, value in sorted(node.attributes))
    return proto


def _model(graph: Graph, metadata: dict[str, str], places: dict[str, int], location: str) -> onnx.ModelProto:
    nodes = [node_proto(n) for n in graph.nodes]
    proto = helper.make_graph(
        nodes,
        graph.name,
        [_port(p) for p in graph.inputs],
        [_port(p) for p in graph.outputs],
        [_tensor(w, places, location) for w in graph.weights.values()],
        value_info=[_port(p) for p in graph.values],
    )
    domains = [helper.make_opsetid("", graph.opset)]
    if any(n.domain == MICROSOFT for n in graph.nodes):
        domains.append(helper.make_opsetid(MICROSOFT, 1))
    model = helper.make_model(proto, opset_imports=domains, producer_name="featherbed", ir_version=IR_VERSION)
    for key, value in sorted(metadata.items()):
        model.metadata_props.add(key=key, value=value)
    return model
