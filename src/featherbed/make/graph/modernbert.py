"""ModernBERT encoders (gte-modernbert, modernbert-embed): local and global attention, rotary, GeGLU, pre-layer norms.

Function: transformers' ModernBertModel on the same ids and mask, right padding; for any other padding, what it
gives for the same tokens padded right. Heads for masked words or classes are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from featherbed.make.checkpoint import Checkpoint
from featherbed.make.graph.blocks import Aligned, Blocks, attention, check_head_size, finish, ports
from featherbed.make.graph.windows import FULL, SLIDING, Base, layer_types, refused, rotary_bases, sights
from featherbed.make.ir import Array, Graph, Weight
from featherbed.spec import Spec, integer, number

BASES = {FULL: Base("global_rope_theta", 160_000.0), SLIDING: Base("local_rope_theta", 10_000.0)}


def _check(config: dict[str, Any], width: int, heads: int) -> None:
    act = config.get("hidden_activation", "gelu")
    if act != "gelu":
        raise refused("hidden_activation of a modernbert model", "gelu", repr(act))
    if width % heads:
        raise refused("heads of a modernbert model", f"a divisor of {width}", str(heads))
    check_head_size(width // heads, rotary=True)


def _kinds(config: dict[str, Any], layers: int) -> tuple[str, ...]:
    every = integer(config, "global_attn_every_n_layers", 3)
    return layer_types(config, tuple(SLIDING if layer % every else FULL for layer in range(layers)))


def _part(whole: Weight, name: str, start: int, end: int) -> Weight:
    """Rows from ``start`` to ``end`` of a weight: two layers that upstream keeps in one."""

    def read() -> Iterator[Array]:
        at = 0
        for block in whole.read():
            rows = block[max(start - at, 0) : max(end - at, 0)]
            at += len(block)
            if len(rows):
                yield rows

    return replace(whole, name=f"{whole.name}.{name}", shape=(end - start, *whole.shape[1:]), read=read)


def build(checkpoint: Checkpoint, spec: Spec) -> Graph:
    """The reference graph of a modernbert checkpoint.

    Raises CheckpointError when a tensor is missing or of another shape, UnknownArchitectureError on settings
    that are not built here.
    """
    config = checkpoint.config
    width, layers = integer(config, "hidden_size"), integer(config, "num_hidden_layers")
    heads, middle = integer(config, "num_attention_heads"), integer(config, "intermediate_size")
    _check(config, width, heads)
    kinds, reach = _kinds(config, layers), integer(config, "local_attention", 128) // 2
    epsilon = number(config, "norm_eps", 1e-5)
    biased = {part: bool(config.get(f"{part}_bias")) for part in ("norm", "attention", "mlp")}
    root = "model." if checkpoint.has("model.embeddings.tok_embeddings.weight") else ""

    b = Blocks("modernbert")

    def weight(name: str, *shape: int) -> Weight:
        return checkpoint.weight(root + name, shape)

    def norm(x: str, name: str) -> str:
        inputs = [b.weight(weight(f"{name}.weight", width))]
        inputs += [b.weight(weight(f"{name}.bias", width))] if biased["norm"] else []
        return b.node("LayerNormalization", x, *inputs, attributes={"axis": -1, "epsilon": epsilon})

    def linear(x: str, name: str, rows: int, columns: int, part: str) -> str:
        bias = weight(f"{name}.bias", rows) if biased[part] else None
        return b.linear(x, weight(f"{name}.weight", rows, columns), bias)

    def gated(x: str, at: str) -> str:
        """gelu(first half of Wi) · second half."""
        both = weight(f"{at}.Wi.weight", 2 * middle, width)
        shift = weight(f"{at}.Wi.bias", 2 * middle) if biased["mlp"] else None

        def half(name: str, start: int) -> str:
            bias = None if shift is None else _part(shift, name, start, start + middle)
            return b.linear(x, _part(both, name, start, start + middle), bias)

        return b.node("Mul", b.node("Gelu", half("gate", 0)), half("up", middle))

    def tail(seen: str, stream: str, layer: int) -> tuple[str, str]:
        """What follows attention: rows in, (normed rows, residual stream) out."""
        at = f"layers.{layer}"
        stream = b.node("Add", linear(seen, f"{at}.attn.Wo", width, width, "attention"), stream)
        x = gated(norm(stream, f"{at}.mlp_norm"), f"{at}.mlp")
        stream = b.node("Add", linear(x, f"{at}.mlp.Wo", width, middle, "mlp"), stream)
        return norm(stream, f"layers.{layer + 1}.attn_norm" if layer + 1 < layers else "final_norm"), stream

    aligned = Aligned(b, "attention_mask")
    seqlens = aligned.seqlens()
    sight = sights(b, aligned, width // heads, rotary_bases(config, BASES), reach, kinds)
    table = weight("embeddings.tok_embeddings.weight", spec.vocab_size, width)
    words = b.node("Reshape", b.lookup(aligned.move("input_ids"), table), b.const([-1, width]))
    stream = x = norm(words, "embeddings.norm")  # the first layer has no norm of its own
    for layer in range(layers):
        qkv = linear(x, f"layers.{layer}.attn.Wqkv", 3 * width, width, "attention")
        packed, own = (aligned.wide(qkv, 3 * width), "", ""), sight[kinds[layer]]
        shape = {"num_heads": heads, "kv_num_heads": heads, "causal": 0}
        seen = b.node("Reshape", attention(b, packed, seqlens, own.rotary, shape, own.bias), b.const([-1, width]))
        if layer + 1 < layers:
            x, stream = tail(seen, stream, layer)
    last = partial(tail, layer=layers - 1)
    finish(b, lambda *rows: last(*rows)[0], (seen, stream), aligned, spec.pooling, width)
    return b.graph(*ports(width, token_types=False))
