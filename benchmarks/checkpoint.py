"""Make a checkpoint of Qwen3-Embedding-0.6B's shape with random weights: speed, memory and size without a hub.

    python benchmarks/checkpoint.py TOKENIZER_FOLDER OUT

TOKENIZER_FOLDER holds the real config.json and tokenizer.json of Qwen3-Embedding-0.6B.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROWS = 4096  # rows drawn at a time
POOLING = {
    "word_embedding_dimension": 1024,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
    "pooling_mode_weightedmean_tokens": False,
    "pooling_mode_lasttoken": True,
    "include_prompt": True,
}
MODULES = [
    {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for at, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")))
]
PROMPTS = {
    "prompts": {
        "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
        "document": "",
    },
    "default_prompt_name": None,
    "similarity_fn_name": "cosine",
}


def shapes(config: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen3Model's tensors."""
    width, middle, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    yield "embed_tokens.weight", (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}"
        yield f"{at}.input_layernorm.weight", (width,)
        for name, rows, columns in (
            ("self_attn.q_proj", q, width), ("self_attn.k_proj", kv, width), ("self_attn.v_proj", kv, width),
            ("self_attn.o_proj", width, q), ("mlp.gate_proj", middle, width), ("mlp.up_proj", middle, width),
            ("mlp.down_proj", width, middle),
        ):  # fmt: skip
            yield f"{at}.{name}.weight", (rows, columns)
        yield f"{at}.self_attn.q_norm.weight", (size,)
        yield f"{at}.self_attn.k_norm.weight", (size,)
        yield f"{at}.post_attention_layernorm.weight", (width,)
    yield "norm.weight", (width,)


def make(tokenizer: Path, out: Path) -> None:
    """Write the checkpoint: bfloat16, norms near 1, the rest normal with deviation 0.02.

    Weights that are there already stay: they are always the same.
    """
    config = json.loads((tokenizer / "config.json").read_text("utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer / "config.json", out / "config.json")
    shutil.copyfile(tokenizer / "tokenizer.json", out / "tokenizer.json")
    limits = {"model_max_length": 32768, "padding_side": "left", "pad_token": "<|endoftext|>"}
    (out / "tokenizer_config.json").write_text(json.dumps(limits), "utf-8")
    (out / "1_Pooling").mkdir(exist_ok=True)
    (out / "1_Pooling" / "config.json").write_text(json.dumps(POOLING), "utf-8")
    (out / "config_sentence_transformers.json").write_text(json.dumps(PROMPTS), "utf-8")
    (out / "modules.json").write_text(json.dumps(MODULES), "utf-8")
    if not (out / "model.safetensors").is_file():
        weights(config, out / "model.safetensors")


def weights(config: dict[str, int], path: Path) -> None:
    """Write the tensors, drawn a few rows at a time."""
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name, shape in shapes(config):
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(20261121)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in shapes(config):
            for start in range(0, shape[0], ROWS):
                drawn = rng.standard_normal((min(ROWS, shape[0] - start), *shape[1:]), np.float32)
                drawn = 1 + 0.1 * drawn if len(shape) == 1 else 0.02 * drawn
                file.write((drawn.view(np.uint32) >> 16).astype("<u2").tobytes())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    make(Path(sys.argv[1]), Path(sys.argv[2]))
