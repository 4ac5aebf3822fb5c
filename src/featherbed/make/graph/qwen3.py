"""Qwen decoders as embedders: RMS norms, grouped-query attention, rotary, SwiGLU; norms on q and k (3) or biases (2).

Function: transformers' Qwen3Model or Qwen2Model on the same ids and mask. Where config.json says is_causal false, as
the gte-Qwen2 models do, every token sees all others.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from featherbed.errors import UnknownArchitectureError
from featherbed.make.checkpoint import Checkpoint
from featherbed.make.graph.blocks import (
    Aligned,
    Attributes,
    Blocks,
    attention,
    check_head_size,
    finish,
    ports,
    rotary_tables,
)
from featherbed.make.ir import MICROSOFT, Graph, Weight
from featherbed.spec import Spec, integer, number

FREQUENCIES = "rotary.frequencies"  # by this name run/derive.py knows a decoder


def _rope_theta(config: dict[str, Any]) -> float:
    """The rotary base; transformers 5 writes it under rope_parameters, 4 at the top."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise UnknownArchitectureError(
            "config.json rope scaling",
            expected="rope_type default",
            found=repr(kind),
            remedy="build the model without rope scaling",
        )
    return number(scaling if "rope_theta" in scaling else config, "rope_theta", 10_000.0)


def _check(config: dict[str, Any]) -> None:
    windowed = config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ())
    if config.get("hidden_act", "silu") != "silu" or windowed:
        raise UnknownArchitectureError(
            f"config.json of a {config.get('model_type')} model",
            expected="hidden_act silu and full attention in every layer",
            found=f"hidden_act {config.get('hidden_act')!r}, sliding window {bool(windowed)}",
            remedy="open an issue that names the model",
        )


def build(checkpoint: Checkpoint, spec: Spec) -> Graph:
    """The reference graph of a qwen3 or qwen2 checkpoint.

    Raises CheckpointError when a tensor is missing or of another shape, UnknownArchitectureError on settings
    that are not built here.
    """
    config = checkpoint.config
    _check(config)
    width, layers = integer(config, "hidden_size"), integer(config, "num_hidden_layers")
    heads, middle = integer(config, "num_attention_heads"), integer(config, "intermediate_size")
    kv_heads = integer(config, "num_key_value_heads", heads)
    size = integer(config, "head_dim", width // heads)
    check_head_size(size, rotary=True)
    epsilon = number(config, "rms_norm_eps", 1e-6)
    second = spec.family == "qwen2"
    biased = {f"{part}_proj": second or bool(config.get("attention_bias", False)) for part in "qkv"}
    biased["o_proj"] = bool(config.get("attention_bias", False)) and not second
    both_ways: Attributes = {} if config.get("is_causal", True) else {"causal": 0}
    root = "model." if checkpoint.has("model.embed_tokens.weight") else ""

    b = Blocks(spec.family)

    def weight(name: str, *shape: int) -> Weight:
        return checkpoint.weight(root + name, shape)

    def project(x: str, name: str, rows: int, columns: int) -> str:
        bias = weight(f"{name}.bias", rows) if biased.get(name.rpartition(".")[2]) else None
        return b.linear(x, weight(f"{name}.weight", rows, columns), bias)

    def head_norm(x: str, name: str, count: int) -> str:
        """RMS norm of every head on its own: [N, count · size] seen as [N, count, size]. Qwen2 has none."""
        if second:
            return aligned.wide(x, count * size)
        split = b.node("Reshape", x, b.const([-1, count, size]))
        normed = b.rms_norm(split, weight(name, size), epsilon)
        return aligned.wide(normed, count * size)

    def tail(seen: str, stream: str, layer: int) -> tuple[str, str]:
        """What follows attention: rows in, (normed rows, residual stream) out."""
        at = f"layers.{layer}"
        x = project(seen, f"{at}.self_attn.o_proj", width, heads * size)
        stream = b.node("Add", x, stream)
        x = b.rms_norm(stream, weight(f"{at}.post_attention_layernorm.weight", width), epsilon)
        gate = project(x, f"{at}.mlp.gate_proj", middle, width)
        gate = b.node("QuickGelu", gate, domain=MICROSOFT, attributes={"alpha": 1.0})  # x · sigmoid(x): SiLU
        up = project(x, f"{at}.mlp.up_proj", middle, width)
        x = project(b.node("Mul", gate, up), f"{at}.mlp.down_proj", width, middle)
        following = f"layers.{layer + 1}.input_layernorm.weight" if layer + 1 < layers else "norm.weight"
        stream = b.node("Add", x, stream)
        return b.rms_norm(stream, weight(following, width), epsilon), stream

    aligned = Aligned(b, "attention_mask")
    seqlens = aligned.seqlens()
    cos, sin = rotary_tables(b, aligned, size, _rope_theta(config), FREQUENCIES)
    table = weight("embed_tokens.weight", spec.vocab_size, width)
    embedded = b.lookup(aligned.move("input_ids"), table)
    stream = b.node("Reshape", embedded, b.const([-1, width]))
    x = b.rms_norm(stream, weight("layers.0.input_layernorm.weight", width), epsilon)
    for layer in range(layers):
        at = f"layers.{layer}"
        q = head_norm(project(x, f"{at}.self_attn.q_proj", heads * size, width), f"{at}.self_attn.q_norm.weight", heads)
        k = head_norm(
            project(x, f"{at}.self_attn.k_proj", kv_heads * size, width), f"{at}.self_attn.k_norm.weight", kv_heads
        )
        v = aligned.wide(project(x, f"{at}.self_attn.v_proj", kv_heads * size, width), kv_heads * size)
        seen = attention(b, (q, k, v), seqlens, (cos, sin), {"num_heads": heads, "kv_num_heads": kv_heads, **both_ways})
        seen = b.node("Reshape", seen, b.const([-1, heads * size]))
        if layer + 1 < layers:
            x, stream = tail(seen, stream, layer)
    last = partial(tail, layer=layers - 1)
    finish(b, lambda *rows: last(*rows)[0], (seen, stream), aligned, spec.pooling, width)
    return b.graph(*ports(width, token_types=False))
