"""What BERT and its kin share: a norm behind every sum, GELU between two layers, q, k and v read as one.

The families differ in what a token's first state is made of, in their tensors' names, and in what attention adds to
its scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce

from featherbed.errors import UnknownArchitectureError
from featherbed.make.checkpoint import Checkpoint
from featherbed.make.graph.blocks import Aligned, Blocks, attention, check_head_size, finish, ports
from featherbed.make.ir import Array, Graph, Weight
from featherbed.spec import Spec, integer, number

OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


@dataclass(frozen=True)
class Names:
    """What a family calls the tensors of attention in a layer: q, k and v, what follows, and the norm behind it."""

    qkv: tuple[str, str, str]
    out: str
    norm: str


BERT = Names(
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "attention.output.LayerNorm",
)


def check_encoder(checkpoint: Checkpoint) -> None:
    """Raises UnknownArchitectureError on settings of config.json that are not built here."""
    config = checkpoint.config
    act, kind = config.get("hidden_act", "gelu"), config.get("position_embedding_type", "absolute")
    if act != "gelu" or kind != "absolute" or config.get("is_decoder"):
        raise UnknownArchitectureError(
            f"config.json of a {config.get('model_type')} model",
            expected="an encoder with hidden_act gelu and absolute positions",
            found=f"hidden_act {act!r}, position_embedding_type {kind!r}, is_decoder {config.get('is_decoder')!r}",
            remedy="open an issue that names the model",
        )


def stacked(name: str, parts: tuple[Weight, ...]) -> Weight:
    """Weights laid on top of each other along the first axis: q, k and v read their input once."""

    def read() -> Iterator[Array]:
        for part in parts:
            yield from part.read()

    first = parts[0]
    rows = tuple(p.shape[0] for p in parts)
    return Weight(name, first.dtype, (sum(rows), *first.shape[1:]), read, rows)


def _row(bias: Weight) -> Weight:
    """A bias [M] as [1, M]."""

    def read() -> Iterator[Array]:
        yield bias.array()[None]

    return Weight(f"{bias.name}.row", bias.dtype, (1, *bias.shape), read)


class Encoder:
    """A graph in the making: ``words`` first, then ``start`` with what is added to them, then ``finish``."""

    def __init__(self, checkpoint: Checkpoint, spec: Spec, root: str, names: Names = BERT) -> None:
        config = checkpoint.config
        self._checkpoint, self._spec, self._names = checkpoint, spec, names
        self.width, self._layers = integer(config, "hidden_size"), integer(config, "num_hidden_layers")
        self.heads, self._middle = integer(config, "num_attention_heads"), integer(config, "intermediate_size")
        check_head_size(self.width // self.heads, rotary=False)
        self._epsilon = number(config, "layer_norm_eps", 1e-12)
        self._root = root if checkpoint.has(f"{root}embeddings.word_embeddings.weight") else ""
        self.b = Blocks(spec.family)
        self.aligned = Aligned(self.b, "attention_mask")
        self._seqlens = self.aligned.seqlens()

    def weight(self, name: str, *shape: int) -> Weight:
        """A tensor below the root, by its new name or its old one."""
        full = self._root + name
        for new, old in OLD_NAMES.items():
            if full.endswith(new) and not self._checkpoint.has(full):
                full = full.removesuffix(new) + old
        return self._checkpoint.weight(full, shape)

    def words(self) -> str:
        """[B, T, D]: the table's rows of the tokens, moved to the front of their texts."""
        table = self.weight("embeddings.word_embeddings.weight", self._spec.vocab_size, self.width)
        return self.b.lookup(self.aligned.move("input_ids"), table)

    def positions(self, first: int) -> str:
        """[T, D]: the position table's rows from ``first`` on."""
        b, at = self.b, self.aligned.positions
        longest = integer(self._checkpoint.config, "max_position_embeddings")
        table = b.weight(self.weight("embeddings.position_embeddings.weight", longest, self.width))
        places = b.node("Add", at, b.const(first)) if first else at
        return b.node("Gather", table, places, attributes={"axis": 0})

    def start(self, *summands: str) -> str:
        """[N, D]: the first state, normed."""
        x = reduce(partial(self.b.node, "Add"), summands)
        return self.b.node("Reshape", self._norm(x, "embeddings.LayerNorm"), self.b.const([-1, self.width]))

    def finish(self, x: str, bias: str = "", token_types: bool = False) -> Graph:
        """All layers and both outputs. ``bias`` [1, heads, T, T] is added to the scores of every layer."""
        attributes = {"num_heads": self.heads, "kv_num_heads": self.heads, "causal": 0}
        for layer in range(self._layers):
            packed = (self.aligned.wide(self._qkv(x, f"encoder.layer.{layer}"), 3 * self.width), "", "")
            seen = attention(self.b, packed, self._seqlens, (), attributes, bias)
            seen = self.b.node("Reshape", seen, self.b.const([-1, self.width]))
            if layer + 1 < self._layers:
                x = self._tail(seen, x, layer)
        last = partial(self._tail, layer=self._layers - 1)
        finish(self.b, last, (seen, x), self.aligned, self._spec.pooling, self.width)
        return self.b.graph(*ports(self.width, token_types))

    def _norm(self, x: str, name: str) -> str:
        gain, shift = (self.b.weight(self.weight(f"{name}.{part}", self.width)) for part in ("weight", "bias"))
        return self.b.node("LayerNormalization", x, gain, shift, attributes={"axis": -1, "epsilon": self._epsilon})

    def _linear(self, x: str, name: str, rows: int, columns: int) -> str:
        return self.b.linear(x, self.weight(f"{name}.weight", rows, columns), self.weight(f"{name}.bias", rows))

    def _qkv(self, x: str, at: str) -> str:
        parts, name = [f"{at}.{part}" for part in self._names.qkv], f"{at}.{self._names.qkv[0].rpartition('.')[0]}.qkv"
        return self.b.linear(
            x,
            stacked(f"{name}.weight", tuple(self.weight(f"{p}.weight", self.width, self.width) for p in parts)),
            stacked(f"{name}.bias", tuple(self.weight(f"{p}.bias", self.width) for p in parts)),
        )

    def _tail(self, seen: str, x: str, layer: int) -> str:
        """What follows attention: rows in, rows out."""
        b, at, width, middle = self.b, f"encoder.layer.{layer}", self.width, self._middle
        out = self._linear(seen, f"{at}.{self._names.out}", width, width)
        x = self._norm(b.node("Add", out, x), f"{at}.{self._names.norm}")
        inner = b.linear(x, self.weight(f"{at}.intermediate.dense.weight", middle, width))
        # as a row: onnxruntime would join a plain bias and the Gelu into a kernel half as fast as the two
        inner = b.node("Add", inner, b.weight(_row(self.weight(f"{at}.intermediate.dense.bias", middle))))
        out = self._linear(b.node("Gelu", inner), f"{at}.output.dense", width, middle)
        return self._norm(b.node("Add", out, x), f"{at}.output.LayerNorm")
