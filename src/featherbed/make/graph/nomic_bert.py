"""Nomic's encoders (nomic-embed-text-v1.5): BERT with rotary positions, SwiGLU, and no biases but the norms'.

Function: transformers' NomicBertModel, and the code that the checkpoints came with (nomic-ai/contrastors), on the same
tokens padded right. Checkpoints are read under the names they were published with; config.json in both spellings.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from featherbed.errors import UnknownArchitectureError
from featherbed.families import renamed
from featherbed.make.checkpoint import Checkpoint
from featherbed.make.graph.blocks import Aligned, Blocks, attention, check_head_size, finish, ports, rotary_tables
from featherbed.make.ir import MICROSOFT, Graph, Weight
from featherbed.spec import Spec
from featherbed.values import integer, number

THETA = 1000.0
FREQUENCIES = "encoder.rotary.frequencies"  # not the name by which run/derive.py knows a decoder
BUILT: dict[str, tuple[object, ...]] = {  # what a setting may say, where it is there
    "activation_function": ("swiglu",), "hidden_act": ("silu",), "prenorm": (False,), "parallel_block": (False,),
    "causal": (False,), "is_decoder": (False,), "use_rms_norm": (False,), "rotary_emb_fraction": (1, 1.0),
    "rotary_emb_interleaved": (False,), "rotary_emb_scale_base": (None,), "rotary_scaling_factor": (None,),
    "qkv_proj_bias": (False,), "mlp_fc1_bias": (False,), "mlp_fc2_bias": (False,), "num_experts": (None, 0),
    "moe_every_n_layers": (None, 0, -1), "norm_mlp": (None, False), "attn_norm": (None, False),
}  # fmt: skip


def _check(config: dict[str, Any]) -> None:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = {key: config[key] for key, known in BUILT.items() if key in config and config[key] not in known}
    if scaling.get("rope_type", "default") != "default":
        found["rope_type"] = scaling["rope_type"]
    if found:
        raise UnknownArchitectureError(
            "config.json of a nomic_bert model",
            expected=", ".join(f"{key} {BUILT[key][0]!r}" if key in BUILT else f"{key} 'default'" for key in found),
            found=", ".join(f"{key} {value!r}" for key, value in found.items()),
            remedy="open an issue that names the model",
        )


def _theta(config: dict[str, Any]) -> float:
    scaling = config.get("rope_parameters") or {}
    if "rope_theta" in scaling:
        return number(scaling, "rope_theta", THETA)
    return number(config, "rope_theta" if "rope_theta" in config else "rotary_emb_base", THETA)


def build(checkpoint: Checkpoint, spec: Spec) -> Graph:
    """The reference graph of a nomic_bert checkpoint.

    Raises CheckpointError when a tensor is missing or of another shape, UnknownArchitectureError on settings
    that are not built here.
    """
    _check(checkpoint.config)
    config = renamed(checkpoint.config)
    width, layers = integer(config, "hidden_size"), integer(config, "num_hidden_layers")
    heads, middle = integer(config, "num_attention_heads"), integer(config, "intermediate_size")
    size = integer(config, "head_dim", width // heads)
    check_head_size(size, rotary=True)
    epsilon = number(config, "layer_norm_eps", 1e-12)
    b = Blocks(spec.family)

    def weight(name: str, *shape: int) -> Weight:
        return checkpoint.weight(name, shape)

    def norm(x: str, name: str) -> str:
        gain, shift = (b.weight(weight(f"{name}.{part}", width)) for part in ("weight", "bias"))
        return b.node("LayerNormalization", x, gain, shift, attributes={"axis": -1, "epsilon": epsilon})

    def tail(seen: str, x: str, layer: int) -> str:
        """What follows attention: rows in, rows out."""
        at = f"encoder.layers.{layer}"
        out = b.linear(seen, weight(f"{at}.attn.out_proj.weight", width, heads * size))
        x = norm(b.node("Add", out, x), f"{at}.norm1")
        gate = b.linear(x, weight(f"{at}.mlp.fc12.weight", middle, width))
        gate = b.node("QuickGelu", gate, domain=MICROSOFT, attributes={"alpha": 1.0})  # x · sigmoid(x): SiLU
        up = b.linear(x, weight(f"{at}.mlp.fc11.weight", middle, width))
        out = b.linear(b.node("Mul", gate, up), weight(f"{at}.mlp.fc2.weight", width, middle))
        return norm(b.node("Add", out, x), f"{at}.norm2")

    aligned = Aligned(b, "attention_mask")
    seqlens = aligned.seqlens()
    tables = rotary_tables(b, aligned, size, _theta(config), FREQUENCIES)
    words = b.lookup(aligned.move("input_ids"), weight("embeddings.word_embeddings.weight", spec.vocab_size, width))
    kinds = integer(config, "type_vocab_size", 2)
    types = b.weight(weight("embeddings.token_type_embeddings.weight", kinds, width))
    typed = b.node("Gather", types, aligned.move("token_type_ids"), attributes={"axis": 0})
    x = b.node("Reshape", norm(b.node("Add", words, typed), "emb_ln"), b.const([-1, width]))
    for layer in range(layers):
        qkv = b.linear(x, weight(f"encoder.layers.{layer}.attn.Wqkv.weight", 3 * heads * size, width))
        packed = (aligned.wide(qkv, 3 * heads * size), "", "")
        seen = attention(b, packed, seqlens, tables, {"num_heads": heads, "kv_num_heads": heads, "causal": 0})
        seen = b.node("Reshape", seen, b.const([-1, heads * size]))
        if layer + 1 < layers:
            x = tail(seen, x, layer)
    finish(b, partial(tail, layer=layers - 1), (seen, x), aligned, spec.pooling, width)
    return b.graph(*ports(width, token_types=True))
