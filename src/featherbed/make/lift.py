"""Somebody else's graph of hidden states → one of ours: linear layers over rows, aligned tokens, both outputs.

What recipes change must be recognised first: products with a constant matrix become Linear, the lookup of words becomes
Lookup, and whatever works on each token alone works on rows [N, D], as our own families do. All else stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from featherbed.make.graph.blocks import INT, Aligned, Blocks, finish, ports
from featherbed.make.ir import OURS, Array, Graph, Node, Weight
from featherbed.spec import Spec

IDS, MASK, HIDDEN = "input_ids", "attention_mask", "last_hidden_state"
UNARY = ("Gelu", "Relu", "Tanh", "Sigmoid", "Erf", "Softplus", "Sqrt", "Neg", "Cast", "Clip", "LeakyRelu", "Elu")
ALONE = ("Add", "Sub", "Mul", "Div", "Pow", "LayerNormalization", "Where", *UNARY)  # each token by itself
PREFIX, MODULE = "upstream.", "model."  # before names that are theirs; what they have before tensors' names
FLOAT32 = np.dtype(np.float32)
Axes = Mapping[str, tuple[str | int, ...]]


def lift(graph: Graph, axes: Axes, spec: Spec) -> Graph:
    """``graph`` (inputs input_ids and attention_mask, output last_hidden_state) as a reference graph of ``spec``.

    ``axes`` are those of its values, where they are known: only what has the batch's and the sequence's own is taken
    for rows.
    """
    return _Lifter(graph, axes, spec).graph()


class _Lifter:
    def __init__(self, graph: Graph, axes: Axes, spec: Spec) -> None:
        self._graph, self._axes, self._spec = graph, axes, spec
        self._b = b = Blocks(spec.family)
        self._aligned = aligned = Aligned(b, MASK)
        real = b.cast(b.node("Less", aligned.positions, aligned.lengths), INT)
        self._same = {IDS: aligned.move(IDS), MASK: real}  # their names, and ours
        self._rows: dict[str, tuple[str, int]] = {}  # by our names: rows of a value, and their width
        self._wide: dict[str, str] = {}  # a value that has rows only so far, as [B, T, D]
        self._weights = {name: replace(w, name=_weight_name(name)) for name, w in graph.weights.items()}
        self._turned: dict[str, Weight] = {}  # their name of a weight turned [K, N], and the weight [N, K]
        self._uses: dict[str, int] = {}

    def graph(self) -> Graph:
        for node in self._graph.nodes:
            self._take(node)
        hidden = self._same.get(HIDDEN, PREFIX + HIDDEN)
        rows, width = self._rows_of(hidden, self._spec.dim), self._spec.dim
        finish(self._b, lambda x: x, (rows,), self._aligned, self._spec.pooling, width)
        whole = self._b.graph(*ports(width, token_types=False))
        return _unshared(whole.replaced(_needed(whole), whole.weights))

    def _take(self, node: Node) -> None:
        weight = self._matrix(node)
        if node.op == "Identity":
            self._same[node.outputs[0]] = self._name(node.inputs[0])
        elif node.op == "Transpose" and self._is_matrix(node.inputs[0]):
            self._turned[node.outputs[0]] = self._weights[node.inputs[0]]
            self._keep(node)  # dropped at the end unless somebody else reads it
        elif weight is not None:
            self._linear(node, weight)
        elif node.op == "Gather" and self._is_words(node):
            self._same[node.outputs[0]] = self._b.lookup(self._name(node.inputs[1]), self._weights[node.inputs[0]])
        elif not self._on_rows(node):
            self._keep(node)

    def _is_matrix(self, name: str) -> bool:
        weight = self._weights.get(name)
        return weight is not None and len(weight.shape) == 2 and weight.dtype == FLOAT32

    def _is_words(self, node: Node) -> bool:
        rows = self._weights[node.inputs[0]].shape[0] if self._is_matrix(node.inputs[0]) else 0
        first = dict(node.attributes).get("axis", 0) == 0
        return first and rows == self._spec.vocab_size and self._name(node.inputs[1]) == self._same[IDS]

    def _matrix(self, node: Node) -> Weight | None:
        """The weight [N, K] of a product of tokens with a constant; None where it is something else."""
        if node.op != "MatMul" or not self._is_tokens(node.inputs[0]):
            return None
        name = node.inputs[1]
        if self._is_matrix(name):
            return _transposed(self._weights[name])
        return self._turned.get(name)

    def _is_tokens(self, name: str) -> bool:
        """Whether a value of theirs has the axes batch, sequence, width."""
        found, wanted = self._axes.get(name, ()), self._axes.get(IDS, ())
        dynamic = len(wanted) == 2 and all(isinstance(axis, str) for axis in wanted)
        return dynamic and len(found) == 3 and found[:2] == wanted and isinstance(found[2], int)

    def _name(self, name: str) -> str:
        """Our name of a value of theirs; of a weight, added on the way."""
        if name in self._weights:
            return self._b.weight(self._weights[name])
        return self._same.get(name, PREFIX + name if name else "")

    def _rows_of(self, ours: str, width: int) -> str:
        """A value [B, T, width] as rows."""
        if ours not in self._rows:
            flat = self._b.node("Reshape", ours, self._b.const([-1, width]))
            self._rows[ours] = (flat, width)
        return self._rows[ours][0]

    def _put(self, output: str, rows: str, width: int) -> None:
        """A new value that is there as rows."""
        self._rows[PREFIX + output] = (rows, width)
        self._wide[PREFIX + output] = ""

    def _read(self, name: str) -> str:
        """Our name of a value of theirs, to be read with the axes that it has."""
        ours = self._name(name)
        if self._wide.get(ours) == "":
            self._wide[ours] = self._aligned.wide(*self._rows[ours])
        return self._wide.get(ours, ours)

    def _keep(self, node: Node) -> None:
        inputs = tuple(self._read(name) for name in node.inputs)
        self._b.keep(replace(node, inputs=inputs, outputs=tuple(PREFIX + o if o else "" for o in node.outputs)))

    def _linear(self, node: Node, weight: Weight) -> None:
        rows = self._rows_of(self._name(node.inputs[0]), weight.shape[1])
        self._put(node.outputs[0], self._b.linear(rows, weight), weight.shape[0])

    def _on_rows(self, node: Node) -> bool:
        """Take a node over as one on rows, if it is one that works on each token alone."""
        if node.op not in ALONE or len(node.outputs) != 1 or not self._is_tokens(node.outputs[0]):
            return False
        if node.op == "LayerNormalization" and dict(node.attributes).get("axis", -1) not in (-1, 2):
            return False
        width = self._axes[node.outputs[0]][2]
        values = [name for name in node.inputs if name and name not in self._weights]
        tokens = [n for n in values if self._is_tokens(n) and self._axes[n][2] == width]
        small = all(len(self._weights[n].shape) < 2 for n in node.inputs if n in self._weights)
        known = any(self._name(n) in self._rows for n in tokens)
        if not known or tokens != values or not small:
            return False
        assert isinstance(width, int)
        inputs = [self._row_input(name, width) for name in node.inputs]
        if node.op in ("Add", "Mul") and node.inputs[0] in self._weights:
            inputs.reverse()  # what is computed comes first, as in our own
        attributes = dict(node.attributes) | ({"axis": -1} if node.op == "LayerNormalization" else {})
        self._put(node.outputs[0], self._b.node(node.op, *inputs, attributes=attributes), width)
        return True

    def _row_input(self, name: str, width: int) -> str:
        if not name:
            return ""
        if name not in self._weights:
            return self._rows_of(self._name(name), width)
        weight = self._weights[name]
        count = self._uses[name] = self._uses.get(name, 0) + 1
        if len(weight.shape) == 1 and count > 1:  # steps may change it for one reader: each has its own
            weight = replace(weight, name=f"{weight.name}.{count}")
        return self._b.weight(weight)


def _weight_name(name: str) -> str:
    """The checkpoint's own name, where it is one: torch puts the module's before it."""
    own = name.removeprefix(MODULE)
    return own if own != name else PREFIX + name


def _transposed(weight: Weight) -> Weight:
    """A weight [K, N] as [N, K]."""

    def read() -> Iterator[Array]:
        yield np.ascontiguousarray(weight.array().T)

    return Weight(f"{weight.name}.turned", weight.dtype, weight.shape[::-1], read)


def _unshared(graph: Graph) -> Graph:
    """Linear layers and lookups with weights of their own: recipes change them, and other readers must not see it."""
    ours = [node.domain == OURS for node in graph.nodes]
    others = {name for node, mine in zip(graph.nodes, ours, strict=True) if not mine for name in node.inputs}
    nodes, weights = list[Node](), dict(graph.weights)
    for node, mine in zip(graph.nodes, ours, strict=True):
        name = node.inputs[1] if mine else ""
        if name in others:
            weights[f"{name}.own"] = replace(weights[name], name=f"{name}.own")
            node = replace(node, inputs=(node.inputs[0], f"{name}.own"))
        nodes.append(node)
    return graph.replaced(nodes, weights)


def _needed(graph: Graph) -> list[Node]:
    """The nodes that the outputs need."""
    needed, kept = {port.name for port in graph.outputs}, list[Node]()
    for node in reversed(graph.nodes):
        if needed & set(node.outputs):
            kept.append(node)
            needed |= set(node.inputs)
    return kept[::-1]
