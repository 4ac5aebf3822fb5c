"""A step of a recipe, applied: graph in, graph out."""

from __future__ import annotations

from featherbed.make.ir import Graph
from featherbed.make.quantize import blockwise, dynamic, per_token, table
from featherbed.recipe import BlockwiseLinear, BlockwiseTable, DynamicLinear, PerTokenLinear, Step


def apply(graph: Graph, step: Step) -> Graph:
    """The graph after one step; the graph handed in is not changed."""
    match step:
        case PerTokenLinear():
            return per_token.apply(graph, step)
        case DynamicLinear():
            return dynamic.apply(graph, step)
        case BlockwiseLinear():
            return blockwise.apply(graph, step)
        case BlockwiseTable():
            return table.apply(graph, step)
