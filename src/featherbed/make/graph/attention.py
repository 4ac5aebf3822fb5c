"""GroupQueryAttention in operators of the standard, as onnxruntime's kernel computes it for a prompt without a past.

    scores = q · kᵀ · scale                 heads [B, H, T, S]; those that share a key are rows of one product
    scores = cap · tanh(scores / cap)       with softcap
    seen   = softmax(scores + bias + mask) · v

Rows of padding give numbers without meaning and never NaN: every row sees one key at least.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featherbed.make.graph.pen import Pen, numbers, refused
from featherbed.make.graph.widths import Widths
from featherbed.make.ir import Node

LEAST = -65504.0  # what a key that is not seen gets: the least that float16 holds, and never -inf by itself
FLOAT = 1
INT = 7
TAKEN = {"num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "causal", "do_rotary"}
NEUTRAL = {
    "rotary_interleaved": 0, "smooth_softmax": 0, "qk_output": 0, "k_quant_type": "NONE", "v_quant_type": "NONE",
    "kv_cache_bit_width": 0, "sliding_window_cache": 0,
}  # fmt: skip
# inputs by place
BIAS = 10
PLACES = {0, 1, 2, 5, 6, 7, 8, BIAS}


@dataclass(frozen=True)
class Shape:
    """What a GroupQueryAttention says of itself."""

    heads: int
    kv_heads: int
    size: int
    scale: float
    softcap: float
    window: int
    causal: bool
    rotary: bool


class Attention:
    """Writes one node after the other; masks and rotary tables are shared between them."""

    def __init__(self, pen: Pen, widths: Widths) -> None:
        self._pen, self._widths = pen, widths
        self._masks: dict[tuple[str, str, bool, int], str] = {}
        self._tables: dict[tuple[str, ...], tuple[str, str]] = {}

    def __call__(self, node: Node) -> None:
        """Add what stands for ``node``. Raises OptionError on what is not written here."""
        pen, inputs = self._pen, (*node.inputs, *[""] * (BIAS + 1 - len(node.inputs)))
        at = self._shape(node, inputs)
        q, k, v = self._heads(inputs, at)
        if at.rotary:
            tables = self._turns(inputs[7], inputs[8], inputs[6])
            q, k = self._turned(q, tables), self._turned(k, tables)
        q = pen.node("Mul", q, pen.const(at.scale, np.float32))  # before the product, which has less to hold then
        shared = at.heads != at.kv_heads
        if shared:
            q = pen.node("Reshape", q, pen.const([0, at.kv_heads, -1, at.size]))
        scores = pen.node("MatMul", q, pen.node("Transpose", k, attributes={"perm": (0, 1, 3, 2)}))
        if shared:
            scores = pen.node("Reshape", scores, pen.const([0, at.heads, -1, 0]))
        if at.softcap:
            cap = pen.const(at.softcap, np.float32)
            scores = pen.node("Mul", pen.node("Tanh", pen.node("Div", scores, cap)), cap)
        if inputs[BIAS]:
            scores = pen.node("Add", scores, inputs[BIAS])
        scores = pen.node("Add", scores, self._mask(inputs[5], inputs[6], at))
        weights = pen.node("Softmax", scores, attributes={"axis": -1})
        if shared:
            weights = pen.node("Reshape", weights, pen.const([0, at.kv_heads, -1, 0]))
        seen = pen.node("MatMul", weights, v)
        if shared:
            seen = pen.node("Reshape", seen, pen.const([0, at.heads, -1, at.size]))
        seen = pen.node("Transpose", seen, attributes={"perm": (0, 2, 1, 3)})
        pen.node("Reshape", seen, pen.const([0, 0, at.heads * at.size]), out=node.outputs[0])

    def _shape(self, node: Node, inputs: tuple[str, ...]) -> Shape:
        said = numbers(node)
        others = {key: value for key, value in said.items() if key not in TAKEN and NEUTRAL.get(key) != value}
        extra = [place for place, name in enumerate(inputs) if name and place not in PLACES]
        if others or extra or any(node.outputs[1:]):
            raise refused(node, f"attributes {others}, inputs {extra}, {len(node.outputs)} outputs")

        def number(name: str) -> float:
            return float(str(said.get(name, 0)))

        heads, kv_heads = int(str(said["num_heads"])), int(str(said["kv_num_heads"]))
        width = self._widths.of(inputs[0])
        size = width // (heads if inputs[1] else heads + 2 * kv_heads)
        rotary = bool(said.get("do_rotary", 0))
        turned = 2 * self._widths.of(inputs[7]) if rotary else size
        if size == 0 or turned != size:
            raise refused(node, f"heads of {size or 'unknown'} numbers, {turned} of them turned")
        scale = number("scale") or 1 / float(np.sqrt(np.float32(size)))
        window, causal = int(str(said.get("local_window_size", -1))), bool(said.get("causal", 1))
        return Shape(heads, kv_heads, size, scale, number("softcap"), window, causal, rotary)

    def _heads(self, inputs: tuple[str, ...], at: Shape) -> tuple[str, str, str]:
        """q, k and v as [B, heads, T, size]."""
        pen = self._pen

        def seen(x: str, heads: int) -> str:
            return pen.node("Reshape", x, pen.const([0, 0, heads, at.size]))

        counts = (at.heads, at.kv_heads, at.kv_heads)
        if inputs[1]:
            parts = tuple(seen(x, count) for x, count in zip(inputs[:3], counts, strict=True))
        else:
            parts = pen.split(seen(inputs[0], sum(counts)), counts, axis=2)
        q, k, v = (pen.node("Transpose", part, attributes={"perm": (0, 2, 1, 3)}) for part in parts)
        return q, k, v

    def _turns(self, cos: str, sin: str, total: str) -> tuple[str, str]:
        """What heads and heads with their halves swapped are multiplied by: [cos, cos] and [-sin, sin], each [T, size].

        A table that is stored may have more rows than there are tokens.
        """
        pen = self._pen
        if (cos, sin) not in self._tables:
            tables = []
            for table in (cos, sin):
                if table in pen.weights:
                    end = pen.node("Unsqueeze", pen.node("Cast", total, attributes={"to": INT}), pen.const([0]))
                    table = pen.node("Slice", table, pen.const([0]), end, pen.const([0]))
                tables.append(table)
            low, high = tables
            whole = pen.node("Concat", low, low, attributes={"axis": -1})
            signed = pen.node("Concat", pen.node("Neg", high), high, attributes={"axis": -1})
            self._tables[cos, sin] = whole, signed
        return self._tables[cos, sin]

    def _turned(self, x: str, tables: tuple[str, str]) -> str:
        """x [B, heads, T, size], each pair (i, i + size / 2) turned by its position's angle."""
        pen = self._pen
        outs = (pen.fresh("Split"), pen.fresh("Split"))
        pen.nodes.append(Node("Split", (x,), outs, "", (("axis", -1), ("num_outputs", 2))))
        swapped = pen.node("Concat", outs[1], outs[0], attributes={"axis": -1})
        return pen.node("Add", pen.node("Mul", x, tables[0]), pen.node("Mul", swapped, tables[1]))

    def _mask(self, last: str, total: str, at: Shape) -> str:
        """0 for keys that are seen, LEAST for others: [T, T] for causal attention, else [B, 1, 1, T].

        A causal row of a real token sees real tokens only: padding stands behind them.
        """
        pen, kind = self._pen, (last, total, at.causal, at.window)
        if kind not in self._masks:
            zero, one = pen.const(0, np.int32), pen.const(1, np.int32)
            places = pen.node("Range", zero, total, one)
            if at.causal:
                rows = pen.node("Unsqueeze", places, pen.const([1]))
                seen = pen.node("LessOrEqual", places, rows)
                if at.window >= 0:
                    near = pen.node("Greater", places, pen.node("Sub", rows, pen.const(at.window, np.int32)))
                    seen = pen.node("And", seen, near)
            else:
                seen = pen.node("LessOrEqual", places, pen.node("Unsqueeze", last, pen.const([1])))
                seen = pen.node("Unsqueeze", seen, pen.const([1, 2]))
            floor, nothing = pen.const(LEAST, np.float32), pen.const(0, np.float32)
            self._masks[kind] = pen.node("Where", seen, nothing, floor)
        return self._masks[kind]
