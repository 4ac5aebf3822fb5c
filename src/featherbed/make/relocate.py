"""A graph's weights out of its file into a sidecar, or back into it; every other byte stays as it is.

No model is parsed or held: the files are mapped, protobuf's wire format says where each field begins and ends, and what
is no weight is copied as it lies there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import GraphProto, ModelProto, TensorProto

from featherbed.errors import ModelFolderError, OptionError, OutputError
from featherbed.folder import FileRecord, sidecar_name
from featherbed.make.write import SIDECAR_LEAST_BYTES, Sink, put_outside
from featherbed.wire import SIZED, Field, fields, mapped

GRAPH_LIMIT_BYTES = 2**31  # protobuf holds less
BLOCK_BYTES = 16 * 2**20  # hashed and written at a time
GRAPH = ModelProto.GRAPH_FIELD_NUMBER
INITIALIZER = GraphProto.INITIALIZER_FIELD_NUMBER
RAW = TensorProto.RAW_DATA_FIELD_NUMBER
EXTERNAL_DATA = TensorProto.EXTERNAL_DATA_FIELD_NUMBER

Piece = bytes | memoryview


@dataclass(frozen=True)
class _Tensor:
    """An initializer: its field, what it says beside its bytes, the bytes, and whether they lie in another file.

    ``data`` is None where they are in no one piece, as in a list of numbers: such a tensor stays as it is.
    """

    field: Field
    head: TensorProto
    data: memoryview | None
    outside: bool


def relocate(source: Path, target: Path, beside: bool, anyhow: bool = False) -> dict[str, FileRecord] | None:
    """Write the graph at ``source`` to ``target``, its weights in a sidecar beside it or all inside.

    The sidecar is as ``write_graph`` lays it out. Returns each file's record by name, the graph first; None, with
    nothing written, when the weights lie so already, unless ``anyhow``: then those of several sidecars become one.
    ``source`` and its sidecars stay as they are.
    Raises ModelFolderError on what is no graph of ours, OptionError when a graph would be more than protobuf holds,
    OutputError when writing fails; what was begun is removed.
    """
    try:
        outer = list(fields(mapped(source)))
        (graph,) = (field for field in outer if field.number == GRAPH)
        inner = list(fields(graph.value))
        files: dict[str, memoryview] = {}
        tensors = {id(field): _tensor(field, source, files) for field in inner if field.number == INITIALIZER}
    except Exception as error:  # protobuf's own, and what a cut or foreign file leads to
        raise ModelFolderError(
            f"{source}",
            expected="a graph as `featherbed build` writes it, with its weights",
            found=f"{type(error).__name__}: {error}",
            remedy="fetch or build it again",
        ) from error
    if not anyhow and not any(_moves(tensor, beside) for tensor in tensors.values()):
        return None
    sidecar = target.with_name(sidecar_name(target.name))
    records: dict[str, FileRecord] = {}
    places: dict[int, int] = {}
    try:
        if beside:
            outside = {key: one for key, one in tensors.items() if one.outside or _moves(one, beside)}
            places, records[sidecar.name] = _write_sidecar(outside, sidecar)
        body: list[Piece] = []
        for field in inner:
            tensor = tensors.get(id(field))
            if tensor is None or not (tensor.outside or _moves(tensor, beside)):
                body.append(field.whole)
            else:
                body += _sized(INITIALIZER, _written(tensor, sidecar.name, places.get(id(field))))
        pieces: list[Piece] = []
        for field in outer:
            pieces += _sized(GRAPH, body) if field is graph else [field.whole]
        _check_size(source, sum(map(len, pieces)))
        return {target.name: _write(pieces, target), **records}
    except OSError as error:
        for file in (target, sidecar):
            file.unlink(missing_ok=True)
        raise OutputError(
            f"{target}",
            expected="room and permission for a copy of the weights",
            found=f"{error.strerror or error}",
            remedy="free space, or leave the weights as built",
        ) from error


def name_sidecar(source: Path, target: Path, sidecar: str) -> FileRecord:
    """Write the graph at ``source`` to ``target``, its weights said to lie in ``sidecar``, at their old places there.

    The sidecar itself is the caller's to link. Raises ModelFolderError on what is no graph, OutputError.
    """
    try:
        outer = list(fields(mapped(source)))
        (graph,) = (field for field in outer if field.number == GRAPH)
        body: list[Piece] = []
        for field in fields(graph.value):
            told = _told(field, sidecar) if field.number == INITIALIZER else None
            body += [field.whole] if told is None else _sized(INITIALIZER, [told])
    except Exception as error:  # protobuf's own, and what a cut or foreign file leads to
        raise ModelFolderError(
            f"{source}",
            expected="a graph with its weights in a file beside it",
            found=f"{type(error).__name__}: {error}",
            remedy="fetch or build it again",
        ) from error
    pieces: list[Piece] = []
    for field in outer:
        pieces += _sized(GRAPH, body) if field is graph else [field.whole]
    try:
        return _write(pieces, target)
    except OSError as error:
        raise OutputError(
            f"{target}", expected="room and permission", found=f"{error.strerror or error}", remedy="free space"
        ) from error


def _told(field: Field, sidecar: str) -> bytes | None:
    """An initializer that says another sidecar; None where its bytes lie inside."""
    if not any(part.number == EXTERNAL_DATA for part in fields(field.value)):
        return None
    tensor = TensorProto.FromString(bytes(field.value))
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = sidecar
    return bytes(tensor.SerializeToString(deterministic=True))


def _moves(tensor: _Tensor, beside: bool) -> bool:
    """Whether a tensor's bytes lie where they should not. Constants stay in the graph, as ``write_graph`` has them."""
    if beside:
        return not tensor.outside and tensor.data is not None and len(tensor.data) >= SIDECAR_LEAST_BYTES
    return tensor.outside


def _check_size(source: Path, size: int) -> None:
    if size >= GRAPH_LIMIT_BYTES:
        raise OptionError(
            f"{source.name} with its weights inside",
            expected=f"less than {GRAPH_LIMIT_BYTES / 2**30:g} GiB in one file: protobuf holds no more",
            found=f"{size} bytes, {size / 2**30:.2f} GiB",
            remedy="choose --weights beside",
        )


def _digits(value: int) -> bytes:
    """A number as seven bits a byte."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _sized(number: int, value: Sequence[Piece]) -> list[Piece]:
    """The field of this number, of these bytes."""
    return [_digits(number << 3 | SIZED) + _digits(sum(map(len, value))), *value]


def _tensor(field: Field, source: Path, files: dict[str, memoryview]) -> _Tensor:
    """An initializer of the graph at ``source``; ``files`` are those beside it, mapped, to which it adds its own."""
    parts = list(fields(field.value))
    raw = [part.value for part in parts if part.number == RAW]
    head = TensorProto.FromString(b"".join(part.whole for part in parts if part.number != RAW))
    if head.data_location != TensorProto.EXTERNAL:
        return _Tensor(field, head, raw[-1] if raw else None, False)
    said = {entry.key: entry.value for entry in head.external_data}
    name, offset, size = said["location"], int(said.get("offset", 0)), int(said["length"])
    if Path(name).name != name:
        raise ValueError(f"weights in {name!r}, outside the folder")
    if name not in files:
        files[name] = mapped(source.with_name(name))
    data = files[name][offset : offset + size]
    if offset < 0 or len(data) != size:
        raise ValueError(f"{head.name} is cut: {len(data)} bytes of {size}")
    return _Tensor(field, head, data, True)


def _written(tensor: _Tensor, sidecar: str, place: int | None) -> list[Piece]:
    """A tensor's message: with its bytes or, where it has a place in the sidecar, with that."""
    assert tensor.data is not None
    head = TensorProto()
    head.CopyFrom(tensor.head)
    head.ClearField("external_data")
    head.ClearField("data_location")
    if place is None:
        return [head.SerializeToString(deterministic=True), *_sized(RAW, [tensor.data])]
    put_outside(head, sidecar, place, len(tensor.data))
    return [head.SerializeToString(deterministic=True)]


def _write_sidecar(tensors: dict[int, _Tensor], path: Path) -> tuple[dict[int, int], FileRecord]:
    """The bytes of tensors, a page's start each: where they begin, by key, and the file's record."""
    places: dict[int, int] = {}
    sink = Sink(path)
    try:
        for key, tensor in tensors.items():
            assert tensor.data is not None
            places[key] = sink.to_next_page()
            _pour(tensor.data, sink)
    except BaseException:
        sink.abandon()
        raise
    return places, sink.close()


def _write(pieces: Sequence[Piece], path: Path) -> FileRecord:
    sink = Sink(path)
    try:
        for piece in pieces:
            _pour(piece, sink)
    except BaseException:
        sink.abandon()
        raise
    return sink.close()


def _pour(piece: Piece, sink: Sink) -> None:
    """Block by block: what was just hashed is still at hand when it is written."""
    for at in range(0, len(piece), BLOCK_BYTES):
        sink.write(memoryview(piece)[at : at + BLOCK_BYTES])
