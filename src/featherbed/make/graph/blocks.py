"""The small vocabulary that the families are written in.

Inside a graph the stream of tokens is one matrix [N, D], N = B · T: linear layers, norms and the row
quantization see rows only, so no row can depend on its neighbours. Attention sees [B, T, heads · size].
Tokens are first aligned to the left whatever the caller's padding (see ``align``): the fused attention
wants right padding, and positions then are 0, 1, 2, … for every mask, left, right or with holes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from featherbed.errors import UnknownArchitectureError
from featherbed.make.ir import (
    LINEAR,
    LOOKUP,
    MICROSOFT,
    OURS,
    Attribute,
    Graph,
    Node,
    Port,
    Weight,
    constant,
)
from featherbed.spec import Pooling

Attributes = Mapping[str, Attribute]
Tail = Callable[..., str]
OPSET = 21
FLOAT, INT32, INT, BOOL = 1, 6, 7, 9  # onnx.TensorProto's numbers
BIAS_AT = 10  # the place of GroupQueryAttention's input attention_bias
INT64 = np.dtype(np.int64)
FLOAT32 = np.dtype(np.float32)


class Blocks:
    """Collects nodes and weights; ``graph()`` gives the finished Graph."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: list[Node] = []
        self._weights: dict[str, Weight] = {}
        self._count = 0

    def node(self, op: str, *inputs: str, domain: str = "", out: str = "", attributes: Attributes | None = None) -> str:
        """Add one operator with one output; its name is made up unless ``out`` gives it."""
        if not out:
            self._count += 1
            out = f"{op}_{self._count}"
        self._nodes.append(Node(op, inputs, (out,), domain, tuple((attributes or {}).items())))
        return out

    def keep(self, node: Node) -> None:
        """Add a node as it is, with all its outputs."""
        self._nodes.append(node)

    def weight(self, weight: Weight) -> str:
        """Add a weight; the same name twice is the same weight."""
        self._weights.setdefault(weight.name, weight)
        return weight.name

    def const(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> str:
        """Add a small constant, shared between equal ones."""
        array = np.asarray(value, dtype)
        text = "_".join(str(v) for v in np.ravel(array))
        name = f"const_{array.dtype.name}_{'x'.join(map(str, array.shape)) or 'scalar'}_{text}"
        return self.weight(constant(name, array, array.dtype))

    def cast(self, x: str, kind: int) -> str:
        """x as another element type: BOOL, FLOAT, INT or INT32."""
        return self.node("Cast", x, attributes={"to": kind})

    def linear(self, x: str, weight: Weight, bias: Weight | None = None) -> str:
        """x [N, K] · weightᵀ [K, M] (+ bias [M]) → [N, M]."""
        y = self.node(LINEAR, x, self.weight(weight), domain=OURS)
        return y if bias is None else self.node("Add", y, self.weight(bias))

    def lookup(self, ids: str, table: Weight) -> str:
        """Rows of ``table`` [V, D] at ids [B, T] → [B, T, D]."""
        return self.node(LOOKUP, ids, self.weight(table), domain=OURS)

    def rms_norm(self, x: str, gain: Weight, epsilon: float) -> str:
        """x / sqrt(mean(x²) + ε) · gain over the last axis.

        Neither this nor the layer norm is fused with the sum before it: onnxruntime 1.31's kernels for both at once
        take 1.7 and 5 times as long as the two after each other.
        """
        return self.node(
            "SimplifiedLayerNormalization",
            x,
            self.weight(gain),
            attributes={"axis": -1, "epsilon": epsilon, "stash_type": 1},
        )

    def graph(self, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> Graph:
        """The finished graph, weights in the order of use."""
        empty = Graph(self.name, OPSET, (), {}, inputs, outputs)
        return empty.replaced(self._nodes, self._weights)


class Aligned:
    """The caller's [B, T] axes, and the same tokens moved to the front of their rows.

    ``target`` [B, T] is where each token goes: the k-th real token of a row to k, padding behind them in
    order. It is a permutation of every row, so a gather with it brings hidden states back.
    """

    def __init__(self, blocks: Blocks, mask: str) -> None:
        b = blocks
        self._b = b
        self._shapes: dict[int, str] = {}
        seen = b.cast(mask, BOOL)  # any non-zero is real
        real = b.cast(seen, INT)
        self.shape = b.node("Shape", mask)  # [B, T]
        self.batch = b.node("Gather", self.shape, b.const([0]), attributes={"axis": 0})  # [1]
        self.tokens = b.node("Gather", self.shape, b.const([1]), attributes={"axis": 0})  # [1]
        self.lengths = b.node("ReduceSum", real, b.const([1]), attributes={"keepdims": 1})  # [B, 1]
        rank = b.node("CumSum", real, b.const(1))  # 1-based among the real tokens
        row = b.node("Range", b.const(0), b.node("Squeeze", self.tokens, b.const([0])), b.const(1))  # [T]
        self.positions = row
        padding = b.node("Sub", b.node("Add", self.lengths, row), rank)  # length + padding seen before
        front = b.node("Sub", rank, b.const(1))
        self.target = b.node("Where", seen, front, padding)

    def move(self, ids: str) -> str:
        """ids [B, T] with the real ones first."""
        return self._b.node("ScatterElements", ids, self.target, ids, attributes={"axis": 1})

    def row_starts(self) -> str:
        """[B, 1]: where each row begins in [N, D]."""
        b = self._b
        count = b.node("Squeeze", self.batch, b.const([0]))
        starts = b.node("Mul", b.node("Range", b.const(0), count, b.const(1)), self.tokens)
        return b.node("Unsqueeze", starts, b.const([1]))

    def restore(self, rows: str, out: str) -> str:
        """rows [N, D] → [B, T, D] in the caller's order, real tokens and padding where they were."""
        b = self._b
        flat = b.node("Add", self.row_starts(), self.target)
        return b.node("Gather", rows, flat, out=out, attributes={"axis": 0})

    def seqlens(self) -> tuple[str, str]:
        """What GroupQueryAttention asks for: last index of each row [B] and T, both int32."""
        b = self._b
        total = b.node("Squeeze", self.tokens, b.const([0]))
        return b.cast(self.last(), INT32), b.cast(total, INT32)

    def last(self) -> str:
        """[B]: the place of each row's last real token; 0 for a row without any, kept from reading outside."""
        b = self._b
        return b.node("Max", b.node("Squeeze", b.node("Sub", self.lengths, b.const(1)), b.const([1])), b.const(0))

    def pooled(self, pooling: Pooling) -> str:
        """[B]: the row of [N, D] that pooling by the first or the last token takes."""
        b = self._b
        starts = b.node("Squeeze", self.row_starts(), b.const([1]))
        return b.node("Add", starts, self.last()) if pooling is Pooling.LAST else starts

    def wide(self, rows: str, width: int) -> str:
        """[N, width] → [B, T, width]; no copy."""
        if width not in self._shapes:
            self._shapes[width] = self._b.node("Concat", self.shape, self._b.const([width]), attributes={"axis": 0})
        return self._b.node("Reshape", rows, self._shapes[width])


def check_head_size(size: int, rotary: bool) -> None:
    """Raises UnknownArchitectureError on a head size that onnxruntime's attention kernel refuses at run time."""
    step = 16 if rotary else 8
    if size % step:
        raise UnknownArchitectureError(
            "head size in config.json",
            expected=f"a multiple of {step}, which onnxruntime's fused attention needs",
            found=str(size),
            remedy="open an issue that names the model",
        )


def rotary_tables(b: Blocks, aligned: Aligned, size: int, theta: float, name: str) -> tuple[str, str]:
    """cos and sin [T, size/2] of position · θ^(-2i/size), computed for the T at hand (Su et al., RoFormer).

    In the graph rather than stored: 17 MB less at 32 k positions, and one small product a run. ``name`` is the
    frequencies': by "rotary.frequencies" run/derive.py knows a decoder, and turns tokens behind a cached prompt on.
    """
    frequencies = 1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / size)
    row = b.weight(constant(name, frequencies[None, :], np.float32))
    positions = b.node("Unsqueeze", b.cast(aligned.positions, FLOAT), b.const([1]))
    angles = b.node("Mul", positions, row)
    return b.node("Cos", angles), b.node("Sin", angles)


def attention(
    blocks: Blocks,
    qkv: tuple[str, ...],
    seqlens: tuple[str, str],
    rotary: tuple[str, ...],
    attributes: Attributes,
    bias: str = "",
) -> str:
    """GroupQueryAttention over [B, T, heads · size], padding right; ``bias`` [1, 1 or heads, T, T] is added to scores.

    One output only: asking for the present keys and values would keep them all alive until the run ends.
    """
    inputs = (*qkv, "", "", *seqlens, *rotary)
    if bias:
        inputs += ("",) * (BIAS_AT - len(inputs)) + (bias,)
    full = {"do_rotary": int(bool(rotary)), **attributes}
    return blocks.node("GroupQueryAttention", *inputs, domain=MICROSOFT, attributes=full)


def mean(blocks: Blocks, rows: str, aligned: Aligned, width: int) -> str:
    """Aligned rows [N, D] → the mean of each text's real tokens [B, D]; NaN for a row without any."""
    b = blocks
    weight = b.cast(b.node("Less", aligned.positions, aligned.lengths), FLOAT)  # [B, T]
    weight = b.node("Div", weight, b.cast(aligned.lengths, FLOAT))
    summed = b.node("MatMul", b.node("Unsqueeze", weight, b.const([1])), aligned.wide(rows, width))
    return b.node("Squeeze", summed, b.const([1]))


def present(blocks: Blocks, rows: str, aligned: Aligned) -> str:
    """rows [B, D], one a text: as they are, NaN for a text without tokens, which nobody takes for a vector."""
    b = blocks
    real = b.cast(b.cast(aligned.lengths, BOOL), FLOAT)  # [B, 1]: 1 or 0
    return b.node("Div", b.node("Mul", rows, real), real)  # 0 / 0


def finish(blocks: Blocks, tail: Tail, inputs: tuple[str, ...], aligned: Aligned, pooling: Pooling, width: int) -> None:
    """Both outputs of a model whose last layer ends in ``tail``, which sees rows only.

    ``tail`` turns its inputs, each [N, ·], into hidden states [N, D]. Where one token stands for its text, the
    vector needs the tail of that row alone: it is computed a second time on [B, ·], so that whoever asks for
    ``sentence_embedding`` only, and drops the other output from the graph, is spared the rest.
    """
    b = blocks
    hidden = tail(*inputs)
    aligned.restore(hidden, "last_hidden_state")
    if pooling is Pooling.MEAN:
        pooled = mean(b, hidden, aligned, width)
    else:
        at = aligned.pooled(pooling)
        rows = tail(*(b.node("Gather", x, at, attributes={"axis": 0}) for x in inputs))
        pooled = present(b, rows, aligned)
    b.node("LpNormalization", pooled, out="sentence_embedding", attributes={"axis": -1, "p": 2})


def ports(width: int, token_types: bool) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The inputs and outputs every file of ours has (interop: names and axes that Optimum reads)."""
    axes = ("batch_size", "sequence_length")
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if token_types else [])
    return tuple(Port(n, INT64, axes) for n in names), (
        Port("last_hidden_state", FLOAT32, (*axes, width)),
        Port("sentence_embedding", FLOAT32, (axes[0], width)),
    )
