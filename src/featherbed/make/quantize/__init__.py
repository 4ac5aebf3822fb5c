"""A rounding step of a recipe, applied: graph in, graph out."""

from __future__ import annotations

from dataclasses import replace

from featherbed.make.ir import Graph
from featherbed.make.quantize import blockwise, bnb4, dynamic, per_token, table, unsigned
from featherbed.make.quantize.columns import Ready
from featherbed.recipe import (
    BlockwiseLinear,
    BlockwiseTable,
    DynamicLinear,
    LinearStep,
    MixedLinear,
    PerTokenLinear,
)
from featherbed.steps import NormalFloatLinear, UnsignedLinear, UnsignedTable

Rounding = LinearStep | MixedLinear | BlockwiseTable | UnsignedLinear | UnsignedTable | NormalFloatLinear


def apply(graph: Graph, step: Rounding, ready: Ready | None = None) -> Graph:
    """The graph after one step; the graph handed in is not changed.

    ``ready`` has the arrays of weights that were rounded before, by name; all others are rounded to the nearest.
    """
    match step:
        case PerTokenLinear():
            return per_token.apply(graph, step, ready)
        case DynamicLinear():
            return dynamic.apply(graph, step)
        case BlockwiseLinear():
            return blockwise.apply(graph, step, ready)
        case BlockwiseTable():
            return table.apply(graph, step)
        case UnsignedLinear():
            return unsigned.linear(graph)
        case UnsignedTable():
            return unsigned.tables(graph)
        case NormalFloatLinear():
            return bnb4.apply(graph, step)
        case MixedLinear():
            return _mixed(graph, step, ready)


def _mixed(graph: Graph, step: MixedLinear, ready: Ready | None) -> Graph:
    groups: dict[LinearStep, set[str]] = {}
    for name, how in step.layers:
        if isinstance(how, PerTokenLinear):  # compensated or not, layers of one input share its codes
            how = replace(how, gptq=False)
        if how is not None:
            groups.setdefault(how, set()).add(name)
    for how, names in groups.items():
        match how:
            case PerTokenLinear():
                graph = per_token.apply(graph, how, ready, names)
            case DynamicLinear():
                graph = dynamic.apply(graph, how, names)
            case BlockwiseLinear():
                graph = blockwise.apply(graph, how, ready, names)
    return graph
