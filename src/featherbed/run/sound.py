"""What of a graph's file is refused before onnxruntime sees it, and what the file says of itself.

The file is mapped and walked, never parsed: neither a model in another's repository nor one of ours costs memory here.
Weights may lie in sidecars only where onnxruntime looks for them with care: in the list of weights. Tensors anywhere
else, in attributes, subgraphs, functions, sparse ones, must carry their own bytes.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featherbed.errors import ModelFolderError
from featherbed.wire import Field, fields, numbers

GRAPH_LIMIT_BYTES = 2**31  # protobuf holds less
MOST_BYTES = 2**44  # of one tensor: no model has more, and no product of axes may overflow
DEEPEST = 16  # subgraphs in subgraphs
LFS = b"version https://git-lfs"
BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip  # of TensorProto's data types; 8, strings, have none
FLOAT, UINT8, INT8, FLOAT16 = 1, 2, 3, 10
NUMPY = {FLOAT: "<f4", UINT8: "u1", INT8: "i1", FLOAT16: "<f2"}
# numbers of fields, from onnx.proto
M_GRAPH, M_OPSET, M_FUNCTION, M_TRAINING = 7, 8, 25, 20
G_NODE, G_INITIALIZER, G_INPUT, G_OUTPUT, G_SPARSE = 1, 5, 11, 12, 15
N_INPUT, N_OUTPUT, N_TYPE, N_ATTRIBUTE = 1, 2, 4, 5
A_TENSOR, A_GRAPH, A_TENSORS, A_GRAPHS, A_SPARSE, A_SPARSES = 5, 6, 10, 11, 22, 23
F_NODE, F_DEFAULT, TRAINING_GRAPHS, SPARSE_TENSORS = 7, 11, (1, 2), (1, 2)
T_DIMS, T_TYPE, T_FLOATS, T_INT32S, T_NAME, T_RAW, T_EXTERNAL, T_LOCATION = 1, 2, 4, 5, 8, 9, 13, 14

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Tensor:
    """A weight: its name, type and axes, and where its bytes are.

    ``location`` is the sidecar as the graph names it, None where the bytes are in the graph; ``length`` is in bytes.
    """

    name: str
    kind: int
    dims: tuple[int, ...]
    location: str | None = None
    offset: int = 0
    length: int = 0


@dataclass(frozen=True)
class Port:
    """An input or output: its name, onnx's number of its type, its axes: sizes, names, or None for what is not said.

    ``axes`` None: not even their number is.
    """

    name: str
    kind: int
    axes: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Graph:
    """A graph's file, mapped, and what was read of it. ``scales`` has (scale, zero point) of outputs in integers,
    ``used`` the names that its nodes read: onnxruntime drops weights that none of them does."""

    path: Path
    view: memoryview
    weights: tuple[Tensor, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opset: int
    scales: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    used: frozenset[str] = frozenset()

    @property
    def outside(self) -> tuple[Tensor, ...]:
        """The weights whose bytes are in a sidecar."""
        return tuple(weight for weight in self.weights if weight.location is not None)


def read(path: Path, descriptor: int | None = None) -> Graph:
    """The graph at ``path``, or open as ``descriptor``.

    Raises ModelFolderError on what is none, or what onnxruntime should never see.
    """
    view = _mapped(path) if descriptor is None else _looked_at(path, descriptor)
    try:
        return _graph(path, view)
    except (ValueError, IndexError, RecursionError) as error:
        page = bytes(view[:64]).lstrip().startswith(b"<")
        found = "a page of HTML or XML" if page else " ".join(f"{type(error).__name__}: {error}".split())
        raise _refused(path, found) from error


def _refused(path: Path, found: str) -> ModelFolderError:
    return ModelFolderError(f"{path}", expected="an ONNX model, whole", found=found, remedy="fetch or build it again")


def _mapped(path: Path) -> memoryview:
    descriptor = open_file(path)
    try:
        return _looked_at(path, descriptor)
    finally:
        os.close(descriptor)


def open_file(path: Path) -> int:
    """A descriptor of the file at ``path``. Raises ModelFolderError where there is none."""
    try:
        if not path.is_file():
            raise ModelFolderError(
                f"{path}", expected="an .onnx file", found="no such file", remedy="fetch or build it again"
            )
        return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise _refused(path, f"{getattr(error, 'strerror', None) or error}") from error


def _looked_at(path: Path, descriptor: int) -> memoryview:
    """The bytes of an open file, if they can be a graph's."""
    size = os.fstat(descriptor).st_size
    if not size:
        raise _refused(path, "an empty file")
    if size >= GRAPH_LIMIT_BYTES:
        raise ModelFolderError(
            f"{path}",
            expected=f"less than {GRAPH_LIMIT_BYTES / 2**30:g} GiB: protobuf holds no more",
            found=f"{size} bytes",
            remedy="its weights belong into a sidecar (external data)",
        )
    view = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    if bytes(view[: len(LFS)]) == LFS:
        raise _refused(path, "a git-lfs pointer (run `git lfs pull`)")
    return view


def _graph(path: Path, view: memoryview) -> Graph:
    outer = list(fields(view))
    graphs = [f for f in outer if f.number == M_GRAPH]
    if len(graphs) != 1:
        raise ValueError("no graph in it" if not graphs else "several graphs in it")
    used: set[str] = set()
    for f in outer:
        if f.number in (M_FUNCTION, M_TRAINING):
            _check_beside(f)
    inner = list(fields(graphs[0].value))
    if not any(f.number == G_NODE for f in inner):
        raise ValueError("no graph in it")
    opset = max((_opset(f.value) for f in outer if f.number == M_OPSET), default=0)
    if not opset:
        raise ValueError("no version of ai.onnx's operators (opset) in it")
    messages: dict[str, memoryview] = {}
    weights = []
    for f in inner:
        if f.number == G_INITIALIZER:
            weights.append(_tensor(f.value))
            messages[weights[-1].name] = f.value
        elif f.number == G_SPARSE:
            _check_sparse(f.value)
    outputs = tuple(_port(f.value) for f in inner if f.number == G_OUTPUT)
    scales = {}
    for f in inner:
        if f.number == G_NODE:
            found = _node(f.value, messages, DEEPEST, used)
            if found is not None:
                scales[found[0]] = found[1:]
    names = {port.name for port in outputs}
    inputs = tuple(p for p in (_port(f.value) for f in inner if f.number == G_INPUT) if p.name not in messages)
    kept = {name: pair for name, pair in scales.items() if name in names}
    return Graph(path, view, tuple(weights), inputs, outputs, opset, kept, frozenset(used | names))


def _opset(message: memoryview) -> int:
    domain, version = "", 0
    for f in fields(message):
        if f.number == 1:
            domain = f.text
        elif f.number == 2:
            version = f.integer
    return version if domain in ("", "ai.onnx") else 0


def _port(message: memoryview) -> Port:
    name, kind, axes = "", 0, None
    for f in fields(message):
        if f.number == 1:
            name = f.text
        elif f.number == 2:
            for tensor in (t for t in fields(f.value) if t.number == 1):
                for part in fields(tensor.value):
                    if part.number == 1:
                        kind = part.integer
                    elif part.number == 2:
                        axes = tuple(_axis(d.value) for d in fields(part.value) if d.number == 1)
    return Port(name, kind, axes)


def _axis(message: memoryview) -> int | str | None:
    for f in fields(message):
        return f.integer if f.number == 1 else f.text or None if f.number == 2 else None
    return None


def _node(
    message: memoryview, weights: dict[str, memoryview], depth: int, used: set[str]
) -> tuple[str, Array, Array] | None:
    """Checks a node's attributes, and notes the names it reads as ``used``.

    Of one that rounds: its output's name, its scale and its zero point.
    """
    kind, inputs, outputs = "", list[str](), list[str]()
    for f in fields(message):
        if f.number == N_INPUT:
            inputs.append(f.text)
        elif f.number == N_OUTPUT:
            outputs.append(f.text)
        elif f.number == N_TYPE:
            kind = f.text
        elif f.number == N_ATTRIBUTE:
            _check_attribute(f.value, depth, used)
    used.update(inputs)
    if kind != "QuantizeLinear" or len(inputs) < 2 or inputs[1] not in weights:
        return None
    scale = small(weights[inputs[1]])
    zero = small(weights[inputs[2]]) if len(inputs) > 2 and inputs[2] in weights else np.zeros(1, np.uint8)
    return None if scale is None or zero is None else (outputs[0], scale, zero)


def _check_attribute(message: memoryview, depth: int, used: set[str]) -> None:
    for f in fields(message):
        if f.number in (A_TENSOR, A_TENSORS):
            _own_bytes(_tensor(f.value))
        elif f.number in (A_SPARSE, A_SPARSES):
            _check_sparse(f.value)
        elif f.number in (A_GRAPH, A_GRAPHS):
            _check_inner(f.value, depth - 1, used)


def _check_beside(message: Field) -> None:
    """A function's nodes and their defaults, or a training's graphs."""
    for f in fields(message.value):
        if message.number == M_FUNCTION and f.number == F_NODE:
            _node(f.value, {}, DEEPEST, set())
        elif message.number == M_FUNCTION and f.number == F_DEFAULT:
            _check_attribute(f.value, DEEPEST, set())
        elif message.number == M_TRAINING and f.number in TRAINING_GRAPHS:
            _check_inner(f.value, DEEPEST, set())


def _check_inner(message: memoryview, depth: int, used: set[str]) -> None:
    """A graph inside a graph: no tensor of it lies in another file."""
    if depth < 1:
        raise ValueError(f"more than {DEEPEST} graphs inside each other")
    for f in fields(message):
        if f.number == G_INITIALIZER:
            _own_bytes(_tensor(f.value))
        elif f.number == G_SPARSE:
            _check_sparse(f.value)
        elif f.number == G_NODE:
            _node(f.value, {}, depth, used)


def _check_sparse(message: memoryview) -> None:
    """A sparse tensor's values and places, which are tensors."""
    for f in fields(message):
        if f.number in SPARSE_TENSORS:
            _own_bytes(_tensor(f.value))


def _own_bytes(tensor: Tensor) -> None:
    if tensor.location is not None:
        raise ValueError(f"a tensor outside the list of weights, {tensor.name!r}, in another file, {tensor.location!r}")


def _tensor(message: memoryview) -> Tensor:
    """A tensor, its sizes checked. Raises ValueError."""
    dims, kind, name, location, said, raw = list[int](), 0, "", 0, dict[str, str](), None
    for f in fields(message):
        if f.number == T_DIMS:
            dims += numbers(f)
        elif f.number == T_TYPE:
            kind = f.integer
        elif f.number == T_NAME:
            name = f.text
        elif f.number == T_RAW:
            raw = f.value
        elif f.number == T_LOCATION:
            location = f.integer
        elif f.number == T_EXTERNAL:
            entry = {part.number: part.text for part in fields(f.value)}
            said[entry.get(1, "")] = entry.get(2, "")
    size = _bytes(name, kind, dims)
    if location == 1 or said:
        return _outside(Tensor(name, kind, tuple(dims)), said, size)
    if raw is not None and len(raw) != size:
        raise ValueError(f"weight {name!r} is {len(raw)} bytes where its axes {dims} say {size}")
    if raw is None and size > 16 * len(message):  # a list of numbers has a byte a number, or more
        raise ValueError(f"weight {name!r} has no bytes for its axes {dims}")
    return Tensor(name, kind, tuple(dims))


def _bytes(name: str, kind: int, dims: list[int]) -> int:
    count = 1
    for axis in dims:
        if axis < 0:
            raise ValueError(f"weight {name!r} has the axes {dims}")
        count *= axis
    if count > MOST_BYTES:
        raise ValueError(f"weight {name!r} has the axes {dims}: more numbers than any memory holds")
    if kind != 8 and kind not in BITS:
        raise ValueError(f"weight {name!r} is of type {kind}, which is none")
    return (count * BITS.get(kind, 0) + 7) // 8


def _outside(tensor: Tensor, said: dict[str, str], size: int) -> Tensor:
    """A weight in a sidecar. What else is said of it, a checksum for one, is nobody's business here."""
    name = tensor.name
    if not said.get("location"):
        raise ValueError(f"weight {name!r} is in another file that has no name")
    found = {}
    for key, default in (("offset", 0), ("length", size)):
        text = said.get(key, str(default))
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise ValueError(f"weight {name!r} has the {key} {text!r}")
        found[key] = int(text)
    if found["length"] != size:
        raise ValueError(f"weight {name!r} is {found['length']} bytes where its axes {list(tensor.dims)} say {size}")
    return Tensor(name, tensor.kind, tensor.dims, said["location"], found["offset"], size)


def small(message: memoryview) -> Array | None:
    """The numbers of a tensor that is a scale or a zero point; None where they are not in the graph or of that kind."""
    tensor = _tensor(message)
    if tensor.location is not None or tensor.kind not in NUMPY:
        return None
    kind = np.dtype(NUMPY[tensor.kind])
    values: list[float] = []
    for f in fields(message):
        if f.number == T_RAW:
            return np.frombuffer(bytes(f.value), kind)
        if f.number == T_FLOATS:
            values += np.frombuffer(bytes(f.value), "<f4").tolist()
        elif f.number == T_INT32S:
            values += numbers(f)
    if tensor.kind == FLOAT16:
        return np.asarray(values, np.uint16).view(kind)
    return np.asarray(values, kind)
