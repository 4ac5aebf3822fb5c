"""Rotation of the residual stream (QuaRot, Ashkboos et al. 2024; R1 of SpinQuant): no channel stands out any more.

    table       E' = E · R
    into it     W' = Rᵀ · W            o_proj, down_proj, and their biases
    out of it   W' = W · diag(g) · R   q, k, v, gate, up; g is the gain of the norm before them, which becomes 1
    at the end  y = norm(x') · Rᵀ · diag(g)

An RMS norm without gain commutes with R, so this holds for decoders with RMS norms only, and only where layers are
added to the stream as they are: Gemma norms them first, with gains that do not commute with R. R is a Hadamard matrix
times a fixed orthogonal one where the width is no power of two; it needs no calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from featherbed.make.ir import LOOKUP, OURS, Array, Graph, Node, Weight, constant, is_linear

Double = npt.NDArray[np.float64]
Float = npt.NDArray[np.float32]
KEPT = ("Add", "Reshape", "Gather")  # of stream values a stream value
NORM = "SimplifiedLayerNormalization"


def rotation(width: int) -> Double:
    """An orthogonal matrix [D, D] whose entries are all of one size, or nearly: Hadamard ⊗ cosine transform.

    Width = 2^k · m with m odd: Sylvester's Hadamard matrix of 2^k, and the DCT-II of m (1 where m is 1).
    """
    odd = width
    while odd % 2 == 0:
        odd //= 2
    at = np.arange(odd)
    cosine = np.sqrt(2 / odd) * np.cos(np.pi * (2 * at[None, :] + 1) * at[:, None] / (2 * odd))
    cosine[0] /= np.sqrt(2)
    hadamard = np.ones((1, 1))
    while len(hadamard) * odd < width:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]]) / np.sqrt(2)
    return np.asarray(np.kron(hadamard, cosine), np.float64)


def fits(graph: Graph) -> bool:
    """Whether the graph's residual stream is read through RMS norms only, and linear layers are what is added to it."""
    stream = _stream(graph)
    normed = any(node.op == NORM and node.inputs[0] in stream for node in graph.nodes)  # else another exporter's
    if not normed or any(node.op == "LayerNormalization" for node in graph.nodes):
        return False
    made = {name: node for node in graph.nodes for name in node.outputs}
    return all(_added(node, stream, made) for node in graph.nodes if node.op == "Add" and node.outputs[0] in stream)


def _added(node: Node, stream: set[str], made: dict[str, Node]) -> bool:
    """Whether what ``node`` adds to the stream is of the stream, or a linear layer with its biases."""
    for name in node.inputs:
        source = made.get(name)
        while name not in stream and source is not None and not is_linear(source):
            if source.op != "Add":
                return False
            source = made.get(next(i for i in source.inputs if i in made))
    return True


def apply(graph: Graph) -> Graph:
    """The graph with a rotated stream; one where that would be another function comes back as it is."""
    if not fits(graph):
        return graph
    stream = _stream(graph)
    width = next(graph.weights[n.inputs[1]].shape[0] for n in graph.nodes if n.op == NORM and n.inputs[0] in stream)
    exact = rotation(width)
    turn = exact.astype(np.float32)  # products in float32: large models would wait for float64 many times over
    weights, nodes = dict(graph.weights), list[Node]()
    made = {name: node for node in graph.nodes for name in node.outputs}
    gains = {n.outputs[0]: n.inputs[1] for n in graph.nodes if n.op == NORM and n.inputs[0] in stream}
    for gain in dict.fromkeys(gains.values()):  # one each, so that smoothing can fold its factors into it
        weights[f"{gain}.one"] = constant(f"{gain}.one", np.ones(width), np.float32)
    for node in graph.nodes:
        if (node.domain, node.op) == (OURS, LOOKUP):
            weights[node.inputs[1]] = _mapped(graph.weights[node.inputs[1]], lambda rows: rows @ turn)
        elif is_linear(node) and node.inputs[0] in gains:
            gain_of = np.asarray(graph.weights[gains[node.inputs[0]]].array(), np.float32)
            weights[node.inputs[1]] = _mapped(graph.weights[node.inputs[1]], partial(_out, gain=gain_of, turn=turn))
        elif node.op == "Add" and node.outputs[0] in stream:
            for name in _written(node, stream, made):
                weights[name] = _turned(graph.weights[name], turn)
        if node.op != NORM or node.outputs[0] not in gains:
            nodes.append(node)
            continue
        y, gain_name = node.outputs[0], node.inputs[1]
        if any(is_linear(reader) and reader.inputs[0] == y for reader in graph.nodes):
            nodes.append(replace(node, inputs=(node.inputs[0], f"{gain_name}.one")))
            continue
        back = constant(f"{gain_name}.back", exact.T * graph.weights[gain_name].array(), np.float32)
        weights[back.name] = back
        nodes.append(replace(node, inputs=(node.inputs[0], f"{gain_name}.one"), outputs=(f"{y}.rotated",)))
        nodes.append(Node("MatMul", (f"{y}.rotated", back.name), (y,)))
    return graph.replaced(nodes, weights)


def _stream(graph: Graph) -> set[str]:
    """Values of the residual stream: the table's rows, and what layers were added to."""
    stream: set[str] = set()
    for node in graph.nodes:
        table = (node.domain, node.op) == (OURS, LOOKUP)
        if table or (node.op in KEPT and stream & set(node.inputs)):
            stream.add(node.outputs[0])
    return stream


def _written(node: Node, stream: set[str], made: dict[str, Node]) -> Iterator[str]:
    """The weight, and the bias if there is one, of the layer whose output is added to the stream."""
    for name in node.inputs:
        source = made.get(name)
        while name not in stream and source is not None:
            if is_linear(source):
                yield source.inputs[1]
                break
            if source.op != "Add":
                raise AssertionError(f"{source.op} between a layer and the stream")
            bias = next(i for i in source.inputs if i not in made)
            yield bias
            source = made.get(next(i for i in source.inputs if i in made))


def _out(rows: Float, gain: Float, turn: Float) -> Float:
    """Rows of a layer that reads the stream."""
    return np.asarray((rows * gain) @ turn, np.float32)


def _mapped(weight: Weight, change: Callable[[Float], Float]) -> Weight:
    """A weight whose rows go through ``change``, block by block."""

    def read() -> Iterator[Array]:
        for block in weight.read():
            yield np.asarray(change(np.asarray(block, np.float32)), np.float32)

    return replace(weight, read=read)


def _turned(weight: Weight, turn: Float) -> Weight:
    """Rᵀ · W, whole; of a bias, b · R."""

    def read() -> Iterator[Array]:
        yield np.asarray(turn.T @ np.asarray(weight.array(), np.float32), np.float32)

    return replace(weight, read=read)
