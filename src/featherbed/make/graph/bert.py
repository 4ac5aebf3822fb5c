"""BERT encoders (MiniLM, bge, e5): learned positions, post-layer norms, GELU.

Function: transformers' BertModel on the same ids and mask, right padding; for any other padding, what
BertModel gives for the same tokens padded right.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from featherbed.errors import UnknownArchitectureError
from featherbed.make.checkpoint import Checkpoint
from featherbed.make.graph.blocks import Aligned, Blocks, attention, check_head_size, finish, ports
from featherbed.make.ir import Array, Graph, Weight
from featherbed.spec import Spec, integer, number

OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def _stacked(name: str, parts: tuple[Weight, ...]) -> Weight:
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


def build(checkpoint: Checkpoint, spec: Spec) -> Graph:
    """The reference graph of a bert checkpoint.

    Raises CheckpointError when a tensor is missing or of another shape, UnknownArchitectureError on settings
    that are not built here.
    """
    config = checkpoint.config
    act, kind = config.get("hidden_act", "gelu"), config.get("position_embedding_type", "absolute")
    if act != "gelu" or kind != "absolute" or config.get("is_decoder"):
        raise UnknownArchitectureError(
            "config.json of a bert model",
            expected="an encoder with hidden_act gelu and absolute positions",
            found=f"hidden_act {act!r}, position_embedding_type {kind!r}, is_decoder {config.get('is_decoder')!r}",
            remedy="open an issue that names the model",
        )
    width, layers = integer(config, "hidden_size"), integer(config, "num_hidden_layers")
    heads, middle = integer(config, "num_attention_heads"), integer(config, "intermediate_size")
    check_head_size(width // heads, rotary=False)
    epsilon = number(config, "layer_norm_eps", 1e-12)
    root = "bert." if checkpoint.has("bert.embeddings.word_embeddings.weight") else ""

    b = Blocks("bert")

    def weight(name: str, *shape: int) -> Weight:
        full = root + name
        for new, old in OLD_NAMES.items():
            if full.endswith(new) and not checkpoint.has(full):
                full = full.removesuffix(new) + old
        return checkpoint.weight(full, shape)

    def norm(x: str, name: str) -> str:
        gain, shift = weight(f"{name}.weight", width), weight(f"{name}.bias", width)
        return b.node(
            "LayerNormalization", x, b.weight(gain), b.weight(shift), attributes={"axis": -1, "epsilon": epsilon}
        )

    def linear(x: str, name: str, rows: int, columns: int) -> str:
        return b.linear(x, weight(f"{name}.weight", rows, columns), weight(f"{name}.bias", rows))

    def tail(seen: str, x: str, layer: int) -> str:
        """What follows attention: rows in, rows out."""
        at = f"encoder.layer.{layer}"
        out = linear(seen, f"{at}.attention.output.dense", width, width)
        x = norm(b.node("Add", out, x), f"{at}.attention.output.LayerNorm")
        inner = b.linear(x, weight(f"{at}.intermediate.dense.weight", middle, width))
        # as a row: onnxruntime would join a plain bias and the Gelu into a kernel half as fast as the two
        inner = b.node("Add", inner, b.weight(_row(weight(f"{at}.intermediate.dense.bias", middle))))
        out = linear(b.node("Gelu", inner), f"{at}.output.dense", width, middle)
        return norm(b.node("Add", out, x), f"{at}.output.LayerNorm")

    aligned = Aligned(b, "attention_mask")
    seqlens = aligned.seqlens()
    words = b.lookup(aligned.move("input_ids"), weight("embeddings.word_embeddings.weight", spec.vocab_size, width))
    longest = integer(config, "max_position_embeddings")
    positions = b.weight(weight("embeddings.position_embeddings.weight", longest, width))
    placed = b.node("Gather", positions, aligned.positions, attributes={"axis": 0})  # [T, D]
    types = b.weight(weight("embeddings.token_type_embeddings.weight", integer(config, "type_vocab_size", 2), width))
    typed = b.node("Gather", types, aligned.move("token_type_ids"), attributes={"axis": 0})
    x = b.node("Add", b.node("Add", words, typed), placed)
    x = b.node("Reshape", norm(x, "embeddings.LayerNorm"), b.const([-1, width]))
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        parts = [f"{at}.attention.self.{part}" for part in ("query", "key", "value")]
        qkv = b.linear(
            x,
            _stacked(f"{at}.attention.self.qkv.weight", tuple(weight(f"{p}.weight", width, width) for p in parts)),
            _stacked(f"{at}.attention.self.qkv.bias", tuple(weight(f"{p}.bias", width) for p in parts)),
        )
        packed = (aligned.wide(qkv, 3 * width), "", "")
        seen = attention(b, packed, seqlens, (), {"num_heads": heads, "kv_num_heads": heads, "causal": 0})
        seen = b.node("Reshape", seen, b.const([-1, width]))
        if layer + 1 < layers:
            x = tail(seen, x, layer)
    finish(b, partial(tail, layer=layers - 1), (seen, x), aligned, spec.pooling, width)
    return b.graph(*ports(width, token_types=True))
