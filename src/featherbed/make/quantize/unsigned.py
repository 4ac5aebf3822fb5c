"""u8 with one scale and zero point a matrix, as onnxruntime's ``quantize_dynamic`` rounds without ``per_channel``.

    scale = (high − low) / 255     over the whole matrix, its range widened to hold 0
    zero  = round(−low / scale)    in double precision, as theirs
    code  = clip(round(w / scale) + zero, 0, 255), half to even

Their rounding of what a Gather reads is the same whatever the type of the weights. u8 × u8 has no VNNI instruction.
A matrix of several laid on top of each other (q, k, v) has a scale for each of them: in others' files they are apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt

from featherbed.make.ir import LOOKUP, MICROSOFT, OURS, Array, Graph, Node, Weight, is_linear

Float = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
MOST = 255
LEAST_SCALE = float(np.finfo(np.float32).tiny)


def grid(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of u8 codes for values between ``low`` and ``high``; 1 and 0 where all are zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / MOST
    if scale < LEAST_SCALE:
        return np.float32(1), np.uint8(0)
    return np.float32(scale), np.uint8(round(-low / scale))


def codes_of(values: Float, scale: np.float32 | Float, zero: np.uint8 | Codes) -> Codes:
    """The u8 codes of values on a grid."""
    found = np.rint(values / scale)
    found += zero
    return np.asarray(np.clip(found, 0, MOST, out=found).astype(np.uint8))


def round_matrix(rows: Float) -> tuple[Codes, np.float32, np.uint8]:
    """rows → codes of the same shape, scale and zero point with rows ≈ (codes − zero) · scale."""
    scale, zero = grid(float(rows.min()), float(rows.max()))
    return codes_of(rows, scale, zero), scale, zero


def matrix_weights(weight: Weight) -> tuple[Weight, Weight, Weight]:
    """(codes [K, N] u8 as MatMulInteger reads them, scale, zero point) of a float weight [N, K].

    Scale and zero point are single numbers; of a weight with several parts they are [N], the same for all of a part.
    """

    @lru_cache(maxsize=1)
    def rounded() -> tuple[Array, Array, Array]:
        whole = np.asarray(weight.array(), np.float32)
        ends = np.cumsum(weight.parts or whole.shape[:1])
        parts = [round_matrix(part) for part in np.split(whole, ends[:-1])]
        codes = np.ascontiguousarray(np.concatenate([codes for codes, _, _ in parts]).T)
        if len(parts) == 1:
            return codes, np.asarray(parts[0][1]), np.asarray(parts[0][2])
        scales, zeros = (np.repeat([part[at] for part in parts], weight.parts) for at in (1, 2))
        return codes, scales, zeros

    def reader(at: int) -> Callable[[], Iterator[Array]]:
        def read() -> Iterator[Array]:
            yield rounded()[at]
            if at == 2:
                rounded.cache_clear()

        return read

    rows, columns = weight.shape
    shape = (rows,) if len(weight.parts) > 1 else ()
    return (
        Weight(f"{weight.name}.u8", np.dtype(np.uint8), (columns, rows), reader(0)),
        Weight(f"{weight.name}.scale", np.dtype("<f4"), shape, reader(1)),
        Weight(f"{weight.name}.zero", np.dtype(np.uint8), shape, reader(2)),
    )


def table_weights(table: Weight) -> tuple[Weight, Weight, Weight]:
    """(codes [V, D] u8, scale, zero point) of a float table [V, D].

    Read twice, block of rows by block of rows, first for the range: a 600 MB table is never in memory whole.
    """

    @cache
    def found() -> tuple[np.float32, np.uint8]:
        peaks = [(float(part.min()), float(part.max())) for part in table.read()]
        return grid(min(low for low, _ in peaks), max(high for _, high in peaks))

    def read_codes() -> Iterator[Array]:
        for part in table.read():
            yield codes_of(np.asarray(part, np.float32), *found())

    return (
        Weight(f"{table.name}.u8", np.dtype(np.uint8), table.shape, read_codes),
        Weight(f"{table.name}.scale", np.dtype("<f4"), (), lambda: iter((np.asarray(found()[0]),))),
        Weight(f"{table.name}.zero", np.dtype(np.uint8), (), lambda: iter((np.asarray(found()[1]),))),
    )


def linear(graph: Graph) -> Graph:
    """The graph with every Linear as DynamicQuantizeLinear and a product of u8 and u8."""
    nodes: list[Node] = []
    weights = dict(graph.weights)
    coded: set[str] = set()
    for node in graph.nodes:
        if not is_linear(node):
            nodes.append(node)
            continue
        x, name = node.inputs
        if x not in coded:
            coded.add(x)
            nodes.append(Node("DynamicQuantizeLinear", (x,), (f"{x}.u8", f"{x}.scale", f"{x}.zero")))
        codes, scale, zero = matrix_weights(graph.weights[name])
        weights |= {part.name: part for part in (codes, scale, zero)}
        # inputs: A, B, a_scale, b_scale, a_zero_point, b_zero_point
        product = (f"{x}.u8", codes.name, f"{x}.scale", scale.name, f"{x}.zero", zero.name)
        nodes.append(Node("MatMulIntegerToFloat", product, node.outputs, MICROSOFT))
    return graph.replaced(nodes, weights)


def tables(graph: Graph) -> Graph:
    """The graph with every table of the checkpoint that is looked up in as u8, its rows dequantized behind the Gather.

    Tables of positions and of token types are among them, as quantize_dynamic takes every Gather; a table that no
    checkpoint has, such as one of sines, is none of them.
    """
    nodes: list[Node] = []
    weights = dict(graph.weights)
    for node in graph.nodes:
        found = _table(node, graph)
        if found is None:
            nodes.append(node)
            continue
        name, ids = found
        codes, scale, zero = table_weights(graph.weights[name])
        weights |= {part.name: part for part in (codes, scale, zero)}
        out = node.outputs[0]
        nodes.append(Node("Gather", (codes.name, ids), (f"{out}.u8",), "", (("axis", 0),)))
        nodes.append(Node("DequantizeLinear", (f"{out}.u8", scale.name, zero.name), node.outputs))
    return graph.replaced(nodes, weights)


def _table(node: Node, graph: Graph) -> tuple[str, str] | None:
    """The table and the ids of a node that looks up rows of one."""
    if (node.domain, node.op) == (OURS, LOOKUP):
        return node.inputs[1], node.inputs[0]
    weight = graph.weights.get(node.inputs[0]) if (node.domain, node.op) == ("", "Gather") else None
    if weight is None or weight.dtype.kind != "f" or len(weight.shape) != 2 or not weight.name.endswith(".weight"):
        return None
    return weight.name, node.inputs[1]
