"""The graph while it is being made: nodes, and weights that are read only when they are written.

Two operators here are ours and never reach a file: ``Linear`` (x, weight [N, K] → x · weightᵀ) and
``Lookup`` (ids, table [V, D] → rows). A recipe's steps turn them into what onnxruntime runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

MICROSOFT = "com.microsoft"
OURS = "featherbed"
LINEAR = "Linear"
LOOKUP = "Lookup"

Array = npt.NDArray[Any]
Attribute = int | float | str | tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A named constant. ``read`` yields it in row blocks, C order, which concatenate to ``shape``.

    ``parts`` are the rows of each matrix, where it is several of a checkpoint laid on top of each other. ``packed`` is
    INT4 or UINT4 where two numbers share a byte, the first in the low half: ``dtype`` is uint8 then, and what is read
    are bytes.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    read: Callable[[], Iterator[Array]] = field(compare=False)
    parts: tuple[int, ...] = ()
    packed: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        count = math.prod(self.shape)
        return (count + 1) // 2 if self.packed else count * self.dtype.itemsize

    def array(self) -> Array:
        """The whole tensor in memory; of a packed one the bytes."""
        blocks = list(self.read())
        whole = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return whole.reshape(-1 if self.packed else self.shape)


def constant(name: str, value: npt.ArrayLike, dtype: npt.DTypeLike) -> Weight:
    """A small weight from a value at hand."""
    array = np.ascontiguousarray(np.asarray(value, dtype=dtype))
    return Weight(name, array.dtype, array.shape, lambda: iter((array,)))


def scalar(name: str, value: float, dtype: npt.DTypeLike) -> Weight:
    """A single number without axes, as QuantizeLinear wants one scale for a whole tensor."""
    array = np.asarray(value, dtype=dtype)
    return Weight(name, array.dtype, (), lambda: iter((array,)))


@dataclass(frozen=True)
class Node:
    """One operator. ``""`` stands for an input that is left out."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str = ""
    attributes: tuple[tuple[str, Attribute], ...] = ()


def is_linear(node: Node) -> bool:
    """Whether a node is a linear layer that no step has touched."""
    return (node.domain, node.op) == (OURS, LINEAR)


@dataclass(frozen=True)
class Port:
    """A graph input or output: name, element type, axes by name or size."""

    name: str
    dtype: np.dtype[np.generic]
    axes: tuple[str | int, ...]


@dataclass(frozen=True)
class Graph:
    """A whole graph. Steps take one and return another; nothing is changed in place.

    ``values`` are types and shapes of values in between, where they are known.
    """

    name: str
    opset: int
    nodes: tuple[Node, ...]
    weights: dict[str, Weight]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    values: tuple[Port, ...] = ()

    def replaced(self, nodes: list[Node], weights: dict[str, Weight]) -> Graph:
        """This graph with other nodes; weights that no node reads any more are dropped.

        Weights are kept in the order in which nodes use them, which is the order in which they are written.
        """
        used = dict.fromkeys(name for node in nodes for name in node.inputs if name in weights)
        kept = {name: weights[name] for name in used}
        return Graph(self.name, self.opset, tuple(nodes), kept, self.inputs, self.outputs)

    def linear_names(self) -> tuple[str, ...]:
        """The weights of all Linear nodes that no step has turned into something else yet."""
        return tuple(n.inputs[1] for n in self.nodes if is_linear(n))
