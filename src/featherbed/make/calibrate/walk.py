"""A graph, walked from linear layer to linear layer on real text: what each of them reads, and what it may become.

Linear layers are products of numpy; whatever lies between two of them is run as a piece by onnxruntime. So only one
weight is in memory at a time, a layer sees its input exactly, and a layer that was rounded hands its error on to the
layers behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherbed.make.ir import LOOKUP, OURS, Array, Graph, Node, Port, Weight, is_linear
from featherbed.make.write import model_bytes
from featherbed.run.batches import Batch
from featherbed.run.session import Piece

Float = npt.NDArray[np.float32]
Values = dict[str, Array]
Layer = Callable[[Float], Float]  # x [R, K] → x · weightᵀ [R, N]


@dataclass(frozen=True)
class Site:
    """A value that linear layers read: its name, and their weights."""

    x: str
    weights: tuple[str, ...]


def exact(weight: Weight) -> Layer:
    """The layer in float."""
    matrix = np.asarray(weight.array(), np.float32).T
    return lambda x: np.asarray(x @ matrix, np.float32)


def pruned(graph: Graph, output: str) -> Graph:
    """The graph with one output, and only the nodes that it needs."""
    needed, kept = {output}, []
    for node in reversed(graph.nodes):
        if needed & set(node.outputs):
            kept.append(node)
            needed |= set(node.inputs)
    ports = tuple(port for port in graph.outputs if port.name == output)
    return Graph(graph.name, graph.opset, graph.nodes, graph.weights, graph.inputs, ports).replaced(
        kept[::-1], graph.weights
    )


class Walk:
    """One way through ``graph`` with some batches: ``site`` is where it stands, None at the end.

    ``inputs`` are the values there, one a batch; ``go`` takes the layers and goes on to the next site. A ``fork`` goes
    on by itself from the same place. At the end ``outputs`` has a graph output of every batch.
    Raises EngineError when onnxruntime refuses a piece.
    """

    def __init__(self, graph: Graph, batches: Sequence[Batch]) -> None:
        names = {port.name for port in graph.inputs}
        self.graph = graph
        self.site: Site | None = None
        self._states = [_feeds(batch, names) for batch in batches]
        self._last_use = {name: at for at, node in enumerate(graph.nodes) for name in node.inputs}
        self._last_use |= {port.name: len(graph.nodes) for port in graph.outputs}
        self._at = 0
        self._seek()

    def fork(self) -> Walk:
        """Another walk that stands here; values are shared, for nobody changes them."""
        other = copy(self)
        other._states = [dict(state) for state in self._states]
        return other

    @property
    def inputs(self) -> list[Float]:
        """The value of the site [R, K] in every batch."""
        assert self.site is not None
        return [np.asarray(state[self.site.x], np.float32) for state in self._states]

    def outputs(self, name: str) -> list[Array]:
        """A graph output in every batch."""
        return [state[name] for state in self._states]

    def go(self, layers: Mapping[str, Layer]) -> None:
        """Past the site, with these layers by their weights' names, to the next one."""
        assert self.site is not None
        for reader in self._readers(self.site.x):
            for state in self._states:
                state[reader.outputs[0]] = layers[reader.inputs[1]](state[self.site.x])
        self._seek()

    def finish(self) -> None:
        """To the end, in float."""
        while self.site is not None:
            self.go({name: exact(self.graph.weights[name]) for name in self.site.weights})

    def _readers(self, x: str) -> list[Node]:
        return [node for node in self.graph.nodes if is_linear(node) and node.inputs[0] == x]

    def _seek(self) -> None:
        """Run what lies before the next layer without a value."""
        nodes, start = self.graph.nodes, self._at
        while self._at < len(nodes):
            node = nodes[self._at]
            if is_linear(node):
                if node.outputs[0] not in self._states[0] and self._last_use.get(node.outputs[0], 0) > self._at:
                    break
                self._run(start, self._at)
                start = self._at + 1
            elif (node.domain, node.op) == (OURS, LOOKUP):
                self._run(start, self._at)
                _look_up(self.graph, node, self._states)
                start = self._at + 1
            self._at += 1
        self._run(start, self._at)
        self.site = None
        if self._at < len(nodes):
            x = nodes[self._at].inputs[0]
            self.site = Site(x, tuple(node.inputs[1] for node in self._readers(x)))

    def _run(self, start: int, end: int) -> None:
        """Nodes from ``start`` to ``end``; then forget what nobody reads from there on."""
        nodes = self.graph.nodes[start:end]
        made = [name for node in nodes for name in node.outputs if self._last_use.get(name, 0) >= end]
        # let go when all batches went through: a session keeps the memory of its largest run
        piece = _piece(self.graph, nodes, made, self._states[0]) if nodes else None
        for state in self._states:
            if piece is not None:
                state.update(zip(made, piece.run(made, state), strict=True))
            for name in [n for n in state if self._last_use.get(n, -1) < end]:
                del state[name]


def _feeds(batch: Batch, names: set[str]) -> Values:
    feeds: Values = {"input_ids": batch.ids, "attention_mask": batch.mask, "token_type_ids": np.zeros_like(batch.ids)}
    return {name: value for name, value in feeds.items() if name in names}


def _look_up(graph: Graph, node: Node, states: list[Values]) -> None:
    """Rows of the table for all batches, in one pass over it."""
    ids, table = node.inputs
    weight = graph.weights[table]
    wanted = np.unique(np.concatenate([state[ids].ravel() for state in states]))
    rows = np.empty((len(wanted), weight.shape[1]), np.float32)
    start = 0
    for block in weight.read():
        first, end = np.searchsorted(wanted, (start, start + len(block)))
        rows[first:end] = block[wanted[first:end] - start]
        start += len(block)
    for state in states:
        state[node.outputs[0]] = rows[np.searchsorted(wanted, state[ids])]


def _piece(graph: Graph, nodes: tuple[Node, ...], outputs: list[str], state: Values) -> Piece:
    """The nodes as a session of their own; ``state`` has what it reads, of any one batch."""
    inside = {name for node in nodes for name in node.outputs}
    read = dict.fromkeys(name for node in nodes for name in node.inputs if name)
    inputs = [name for name in read if name not in inside and name not in graph.weights]
    ports = tuple(Port(n, state[n].dtype, tuple(f"{n}.{axis}" for axis in range(state[n].ndim))) for n in inputs)
    cut = Graph(graph.name, graph.opset, (), {}, ports, tuple(Port(n, np.dtype(np.float32), ()) for n in outputs))
    return Piece(model_bytes(cut.replaced(list(nodes), graph.weights)))


def real_rows(batch: Batch, rows: int) -> npt.NDArray[np.bool_]:
    """Which of ``rows`` rows are no padding: of the tokens moved to the front of their texts, or of one a text."""
    count, width = batch.ids.shape
    if rows != count * width:
        return np.ones(rows, np.bool_)
    return np.asarray(np.arange(width) < batch.mask.sum(axis=1, keepdims=True)).reshape(-1)


def texts_of(batch: Batch, rows: int) -> Iterator[slice]:
    """Each text's rows among ``rows``."""
    count = len(batch.ids)
    for at in range(count):
        yield slice(at * rows // count, (at + 1) * rows // count)
