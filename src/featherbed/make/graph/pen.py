"""What steps that write one operator as several write with: names made up, constants shared."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from featherbed.errors import OptionError
from featherbed.make.graph.blocks import Attributes
from featherbed.make.ir import Attribute, Graph, Node, Weight, constant


def scalars(weights: dict[str, Weight]) -> dict[str, Weight]:
    """Weights with those of a single number that are meant as scalars as such: elsewhere they are rows of one.

    onnx's inference and other engines insist on it; onnxruntime 1.31 crashes on some prepacked fused graphs with them.
    """
    meant = {name for name, weight in weights.items() if weight.shape == (1,) and _meant(name)}
    return {name: replace(weight, shape=()) if name in meant else weight for name, weight in weights.items()}


def _meant(name: str) -> bool:
    return (name.startswith("const_") and "_scalar_" in name) or (name.startswith("row.") and name != "row.axis")


class Pen:
    """Nodes and weights of a graph to be. Values that stand for one operator are called ``<its output>/<op>_<n>``."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.nodes: list[Node] = []
        self.weights: dict[str, Weight] = scalars(graph.weights)
        self._count: Counter[str] = Counter()
        self._at = ""

    def begin(self, node: Node) -> None:
        """From here on names are of this node."""
        self._at = node.outputs[0]

    def node(self, op: str, *inputs: str, out: str = "", attributes: Attributes | None = None) -> str:
        """Add one operator of the standard with one output."""
        out = out or self.fresh(op)
        self.nodes.append(Node(op, inputs, (out,), "", tuple((attributes or {}).items())))
        return out

    def split(self, x: str, sizes: tuple[int, ...], axis: int) -> tuple[str, ...]:
        """x cut along ``axis``."""
        outs = tuple(self.fresh("Split") for _ in sizes)
        self.nodes.append(Node("Split", (x, self.const(sizes)), outs, "", (("axis", axis),)))
        return outs

    def fresh(self, op: str) -> str:
        """A name that nothing has."""
        self._count[self._at] += 1
        return f"{self._at}/{op}_{self._count[self._at]}"

    def const(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> str:
        """A small constant, shared between equal ones."""
        array = np.asarray(value, dtype)
        text = "_".join(str(v) for v in np.ravel(array))
        return self.weight(constant(f"const_{array.dtype.name}_{'x'.join(map(str, array.shape)) or 'scalar'}_{text}",
                                    array, array.dtype))  # fmt: skip

    def weight(self, weight: Weight) -> str:
        """Add a weight; the same name twice is the same weight."""
        weight = scalars({weight.name: weight})[weight.name]
        self.weights.setdefault(weight.name, weight)
        return weight.name

    def graph(self) -> Graph:
        """The graph with these nodes."""
        return self._graph.replaced(self.nodes, self.weights)


def refused(node: Node, found: str) -> OptionError:
    """The error of an operator that cannot be said in standard operators."""
    name = f"{node.domain}.{node.op}".removeprefix(".")
    return OptionError(
        f"--operators standard: {name} at {node.outputs[0]}",
        expected="an operator that the ONNX standard's can stand for",
        found=found,
        remedy="leave out this variant, or --operators standard",
    )


def numbers(node: Node) -> dict[str, Attribute]:
    """A node's attributes by name."""
    return dict(node.attributes)
