"""Qwen3 checkpoint → GGUF, with the gguf package alone, in llama.cpp's environment.

    python benchmarks/convert_llama.py q8_0|q4_0 CHECKPOINT OUT.gguf

Linear layers in the type asked for, the embedding table in Q8_0, norms in F32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of Qwen3Model."""
    name = name.removesuffix(".weight")
    if not name.startswith("layers."):
        return f"{TOP_NAMES[name]}.weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def tensors(path: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Names and values of a bfloat16 safetensors file, one at a time."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    stored = np.memmap(path, np.uint8, "r", offset=8 + size)
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            bits = stored[start:end].view("<u2").astype(np.uint32) << 16
            yield name, bits.view(np.float32).reshape(entry["shape"])


def describe(writer: Any, checkpoint: Path) -> None:
    """The model's numbers and its vocabulary."""
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_pooling_type(gguf.PoolingType.LAST)
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
    vocabulary = {at: token for token, at in tokenizer["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    ids = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([special.get(at) or vocabulary.get(at) or f"[PAD{at}]" for at in ids])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.CONTROL if at in special else kinds.NORMAL if at in vocabulary else kinds.UNUSED for at in ids]
    )
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_eos_token_id(config["eos_token_id"])


def main(kind: str, checkpoint: str, out: str) -> None:
    """Write the file."""
    types = gguf.GGMLQuantizationType
    linear = types[kind.upper()]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, "qwen3", use_temp_file=True)
    describe(writer, Path(checkpoint))
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    for name, value in tensors(Path(checkpoint) / "model.safetensors"):
        if value.ndim == 1:
            writer.add_tensor(gguf_name(name), value)
            continue
        chosen = types.Q8_0 if name.startswith("embed_tokens") else linear
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(value, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("q8_0", "q4_0"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
