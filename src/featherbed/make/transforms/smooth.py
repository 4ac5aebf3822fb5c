"""SmoothQuant (Xiao et al. 2022): what makes an input's channels hard to round is handed to the weights.

    s_j = max|X_j|^α / max|W_j|^(1 − α)     channel j, over all layers that read the input
    x' = x / s,  W' = W · s                 the same product

The factors are folded into what makes the input: the norm before it when only these layers read it, the rows of
up_proj or of the values where the input is a product with them or an average of them; else a Mul divides.
A group of layers has one s, and so has a weight that stands in the graph twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from featherbed.make.calibrate.texts import Calibration, sites
from featherbed.make.calibrate.walk import Walk, exact, real_rows
from featherbed.make.ir import Array, Graph, Node, constant, is_linear
from featherbed.progress import Progress, silent
from featherbed.recipe import Explicit

Float = npt.NDArray[np.float32]
Group = tuple[str, ...]  # the weights of layers that read one input
NORMS = ("SimplifiedLayerNormalization", "LayerNormalization")
LEAST, MOST = 1e-4, 1e4
DEAD = 1e-12  # a channel that is never used, or a column of zeros: left as it is


@dataclass(frozen=True)
class Peaks:
    """Largest |x| of an input's channels [K], and largest |w| of the columns that read it [K]."""

    inputs: Float
    weights: Float

    def factors(self, alpha: float) -> Float:
        """s [K]; 1 for a channel that is never used."""
        with np.errstate(divide="ignore", invalid="ignore"):
            s = self.inputs.astype(np.float64) ** alpha / self.weights.astype(np.float64) ** (1 - alpha)
        used = (self.inputs > DEAD) & (self.weights > DEAD)
        return np.asarray(np.where(used, np.clip(s, LEAST, MOST), 1), np.float32)


def peaks(graph: Graph, calibration: Calibration, stage: str, progress: Progress = silent) -> dict[Group, Peaks]:
    """The peaks of every group of layers, seen on the calibration's texts."""
    found: dict[Group, Peaks] = {}
    walk = Walk(graph, calibration.batches)
    for at in sites(walk, stage, progress):
        assert at.site is not None
        group = at.site.weights
        largest = np.zeros(graph.weights[group[0]].shape[1], np.float32)
        for batch, x in zip(calibration.batches, at.inputs, strict=True):
            largest = np.maximum(largest, np.abs(x[real_rows(batch, len(x))]).max(axis=0))
        if group in found:
            largest = np.maximum(largest, found[group].inputs)
        columns = np.zeros_like(largest)
        for name in group:
            for block in graph.weights[name].read():
                columns = np.maximum(columns, np.abs(block).max(axis=0))
        found[group] = Peaks(largest, columns)
        at.go({name: exact(graph.weights[name]) for name in group})
    return found


def apply(graph: Graph, alpha: float, explicit: Explicit, found: dict[Group, Peaks]) -> Graph:
    """The graph with every group of ``found`` smoothed by ``alpha``, where ``explicit`` allows what it takes."""
    folder = _Folder(graph)
    for group, seen in found.items():
        folder.smooth(group, seen, alpha, explicit)
    return folder.graph()


class _Folder:
    """The graph while factors are folded into it."""

    def __init__(self, graph: Graph) -> None:
        self._whole = graph
        self._weights = dict(graph.weights)
        self._made = {name: node for node in graph.nodes for name in node.outputs}
        self._readers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self._readers.setdefault(name, []).append(node)
        self._divided: dict[str, str] = {}  # an input, and the weight of its Mul

    def graph(self) -> Graph:
        nodes: list[Node] = []
        done: set[str] = set()
        for node in self._whole.nodes:
            x = node.inputs[0] if node.inputs else ""
            if is_linear(node) and x in self._divided:
                if x not in done:
                    done.add(x)
                    nodes.append(Node("Mul", (x, self._divided[x]), (f"{x}.smooth",)))
                node = replace(node, inputs=(f"{x}.smooth", node.inputs[1]))
            nodes.append(node)
        return self._whole.replaced(nodes, self._weights)

    def smooth(self, group: Group, seen: Peaks, alpha: float, explicit: Explicit) -> None:
        inputs = list(dict.fromkeys(n.inputs[0] for n in self._readers[group[0]] if is_linear(n)))
        for fold in (self._into_norm, self._into_product, self._into_values):
            factors = fold(group, inputs, seen, alpha)
            if factors is not None:
                break
        else:
            gelu = any(self._made[x].op == "Gelu" for x in inputs)
            if explicit is Explicit.NOWHERE or (gelu and explicit is Explicit.NOT_GELU):
                return
            factors = seen.factors(alpha)
            name = f"{group[0]}.smooth"
            self._weights[name] = constant(name, 1 / factors, np.float32)
            self._divided |= dict.fromkeys(inputs, name)
        for name in group:
            self._scale(name, partial(np.multiply, factors))

    def _scale(self, name: str, change: Callable[[Array], Array]) -> None:
        weight = self._weights[name]

        def read() -> Iterator[Array]:
            for block in weight.read():
                yield np.asarray(change(block), np.float32)

        self._weights[name] = replace(weight, read=read)

    def _only(self, x: str, group: Group) -> bool:
        """Whether only the group's layers see x: directly, or one row a text of it."""
        return all(
            (is_linear(reader) and reader.inputs[1] in group)
            or (reader.op == "Gather" and reader.inputs[0] == x and self._only(reader.outputs[0], group))
            for reader in self._readers[x]
        )

    def _into_norm(self, group: Group, inputs: list[str], seen: Peaks, alpha: float) -> Float | None:
        norms = [self._made[x] for x in inputs]
        if not all(n.op in NORMS and self._only(n.outputs[0], group) for n in norms):
            return None
        for name in dict.fromkeys(name for n in norms for name in n.inputs[1:]):
            if any(reader not in norms for reader in self._readers[name]):
                return None
        factors = seen.factors(alpha)
        for name in dict.fromkeys(name for n in norms for name in n.inputs[1:]):
            self._scale(name, lambda block: block / factors)
        return factors

    def _into_product(self, group: Group, inputs: list[str], seen: Peaks, alpha: float) -> Float | None:
        """x = gate · up: up's rows take the factors."""
        ups: list[Node] = []
        for x in inputs:
            node = self._made[x]
            up = self._made.get(node.inputs[1]) if node.op == "Mul" else None
            if up is None or not is_linear(up) or not self._only(x, group) or len(self._readers[up.outputs[0]]) > 1:
                return None
            ups.append(up)
        name = ups[0].inputs[1]
        if {id(n) for n in self._readers[name]} != {id(n) for n in ups}:
            return None
        factors = seen.factors(alpha)
        self._scale_rows(name, np.float32(1) / factors)
        return factors

    def _into_values(self, group: Group, inputs: list[str], seen: Peaks, alpha: float) -> Float | None:
        """x = averages of the values: their rows take the factors, one for all heads that share a row."""
        attention = self._attention(inputs[0])
        if attention is None or any(self._attention(x) is not attention for x in inputs):
            return None
        start = self._made[inputs[0]]
        top = inputs[0] if start.op != "Gather" else start.inputs[0]
        if not self._only(top, group):
            return None
        attributes = dict(attention.attributes)
        heads, shared = int(str(attributes["num_heads"])), int(str(attributes["kv_num_heads"]))
        layer, bias = self._layer_of(attention.inputs[2] or attention.inputs[0])
        if layer is None or len(self._readers[layer.inputs[1]]) != 1:
            return None

        def together(values: Float) -> Float:  # [heads · size] → the largest of those that share a row
            return np.asarray(values.reshape(shared, heads // shared, -1).max(axis=1), np.float32)

        small = Peaks(together(seen.inputs), together(seen.weights)).factors(alpha)  # [shared, size]
        rows = np.ones(self._weights[layer.inputs[1]].shape[0], np.float32)
        rows[len(rows) - small.size :] = 1 / small.reshape(-1)  # packed or not, values come last
        self._scale_rows(layer.inputs[1], rows)
        if bias is not None:
            self._scale_rows(bias, rows)
        return np.asarray(np.repeat(small, heads // shared, axis=0).reshape(-1), np.float32)

    def _attention(self, x: str) -> Node | None:
        node = self._made.get(x)
        while node is not None and node.op in ("Reshape", "Gather"):
            node = self._made.get(node.inputs[0])
        return node if node is not None and node.op == "GroupQueryAttention" else None

    def _layer_of(self, x: str) -> tuple[Node | None, str | None]:
        """The linear layer that x comes from unchanged, and its bias."""
        node, bias = self._made.get(x), None
        while node is not None and node.op in ("Reshape", "Add") and len(self._readers[node.outputs[0]]) == 1:
            if node.op == "Add":
                if bias is not None or node.inputs[1] not in self._weights:
                    return None, None
                bias = node.inputs[1]
            node = self._made.get(node.inputs[0])
        return (node, bias) if node is not None and is_linear(node) else (None, None)

    def _scale_rows(self, name: str, factors: Float) -> None:
        weight = self._weights[name]

        def read() -> Iterator[Array]:
            start = 0
            for block in weight.read():
                part = factors[start : start + len(block)]
                yield np.asarray(block * (part if block.ndim == 1 else part[:, None]), np.float32)
                start += len(block)

        self._weights[name] = replace(weight, read=read)
