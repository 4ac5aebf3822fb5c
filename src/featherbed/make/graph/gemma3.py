"""Gemma 3 as an encoder (EmbeddingGemma): both sides seen, four RMS norms a layer, rotary, GeGLU.

Function: transformers' Gemma3TextModel with use_bidirectional_attention in float32, on the same ids and mask. Gains
here are upstream's plus one, and the table is upstream's times the root of the width, as float32 has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from featherbed.make.checkpoint import Checkpoint
from featherbed.make.graph.blocks import Aligned, Blocks, attention, check_head_size, finish, ports
from featherbed.make.graph.windows import FULL, SLIDING, Base, layer_types, refused, rotary_bases, sights
from featherbed.make.ir import Array, Graph, Weight
from featherbed.spec import Spec, integer, number

BASES = {FULL: Base("rope_theta", 1_000_000.0), SLIDING: Base("rope_local_base_freq", 10_000.0)}


def _check(config: dict[str, Any]) -> None:
    for key, only, silent in (
        ("use_bidirectional_attention", True, False),
        ("is_causal", True, True),  # transformers takes False for a window one token wider
        ("hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh"),
        ("attn_logit_softcapping", None, None),
    ):
        if config.get(key, silent) != only:
            raise refused(f"{key} of a gemma3_text model", repr(only), repr(config.get(key, silent)))


def _kinds(config: dict[str, Any], layers: int) -> tuple[str, ...]:
    every = integer(config, "sliding_window_pattern", integer(config, "_sliding_window_pattern", 6))
    return layer_types(config, tuple(SLIDING if (layer + 1) % every else FULL for layer in range(layers)))


def _mapped(weight: Weight, change: Callable[[Array], Array]) -> Weight:
    """A weight whose numbers go through ``change``, block by block."""

    def read() -> Iterator[Array]:
        for block in weight.read():
            yield np.asarray(change(block), np.float32)

    return replace(weight, read=read)


def build(checkpoint: Checkpoint, spec: Spec) -> Graph:
    """The reference graph of a gemma3_text checkpoint.

    Raises CheckpointError when a tensor is missing or of another shape, UnknownArchitectureError on settings
    that are not built here.
    """
    config = checkpoint.config
    _check(config)
    width, layers = integer(config, "hidden_size"), integer(config, "num_hidden_layers")
    heads, middle = integer(config, "num_attention_heads"), integer(config, "intermediate_size")
    kv_heads, size = integer(config, "num_key_value_heads", 4), integer(config, "head_dim", 256)
    check_head_size(size, rotary=True)
    kinds, reach = _kinds(config, layers), integer(config, "sliding_window", 4096) // 2
    scale = number(config, "query_pre_attn_scalar", 256) ** -0.5
    epsilon, biased = number(config, "rms_norm_eps", 1e-6), bool(config.get("attention_bias"))
    root = "model." if checkpoint.has("model.embed_tokens.weight") else ""

    b = Blocks("gemma3_text")

    def weight(name: str, *shape: int) -> Weight:
        return checkpoint.weight(root + name, shape)

    def norm(x: str, name: str, wide: int = width) -> str:
        return b.rms_norm(x, _mapped(weight(f"{name}.weight", wide), lambda gain: gain + np.float32(1)), epsilon)

    def project(x: str, name: str, rows: int, columns: int) -> str:
        bias = weight(f"{name}.bias", rows) if biased and ".self_attn." in name else None
        return b.linear(x, weight(f"{name}.weight", rows, columns), bias)

    def heads_of(x: str, at: str, letter: str, count: int) -> str:
        """q or k: an RMS norm of every head on its own."""
        made = project(x, f"{at}.self_attn.{letter}_proj", count * size, width)
        split = b.node("Reshape", made, b.const([-1, count, size]))
        return aligned.wide(norm(split, f"{at}.self_attn.{letter}_norm", size), count * size)

    def tail(seen: str, stream: str, layer: int) -> tuple[str, str]:
        """What follows attention: rows in, (normed rows, residual stream) out."""
        at = f"layers.{layer}"
        x = project(seen, f"{at}.self_attn.o_proj", width, heads * size)
        stream = b.node("Add", norm(x, f"{at}.post_attention_layernorm"), stream)
        x = norm(stream, f"{at}.pre_feedforward_layernorm")
        gate = b.node("Gelu", project(x, f"{at}.mlp.gate_proj", middle, width), attributes={"approximate": "tanh"})
        up = project(x, f"{at}.mlp.up_proj", middle, width)
        x = project(b.node("Mul", gate, up), f"{at}.mlp.down_proj", width, middle)
        stream = b.node("Add", norm(x, f"{at}.post_feedforward_layernorm"), stream)
        return norm(stream, f"layers.{layer + 1}.input_layernorm" if layer + 1 < layers else "norm"), stream

    aligned = Aligned(b, "attention_mask")
    seqlens = aligned.seqlens()
    sight = sights(b, aligned, size, rotary_bases(config, BASES), reach, kinds)
    root_of_width = np.float32(width**0.5)
    table = _mapped(weight("embed_tokens.weight", spec.vocab_size, width), lambda rows: rows * root_of_width)
    stream = b.node("Reshape", b.lookup(aligned.move("input_ids"), table), b.const([-1, width]))
    x = norm(stream, "layers.0.input_layernorm")
    for layer in range(layers):
        at, own = f"layers.{layer}", sight[kinds[layer]]
        q, k = heads_of(x, at, "q", heads), heads_of(x, at, "k", kv_heads)
        v = aligned.wide(project(x, f"{at}.self_attn.v_proj", kv_heads * size, width), kv_heads * size)
        shape = {"num_heads": heads, "kv_num_heads": kv_heads, "causal": 0, "scale": scale}
        seen = attention(b, (q, k, v), seqlens, own.rotary, shape, own.bias)
        seen = b.node("Reshape", seen, b.const([-1, heads * size]))
        if layer + 1 < layers:
            x, stream = tail(seen, stream, layer)
    last = partial(tail, layer=layers - 1)
    finish(b, lambda *rows: last(*rows)[0], (seen, stream), aligned, spec.pooling, width)
    return b.graph(*ports(width, token_types=False))
