"""Write a checkpoint of a family's published shape with random weights. Needs torch and transformers.

    python benchmarks/random_checkpoint.py FAMILY LIKE OUT

LIKE is a folder with a tokenizer of that family, and the files of sentence-transformers: tests/fixtures has them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.fixtures.make_fixtures import as_published

# the settings in which a published model differs from its family's own in transformers
SHAPES = {
    "bert": {},  # bge-base
    # multilingual-e5-base
    "xlm-roberta": {"vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1},
    "mpnet": {"max_position_embeddings": 514},  # all-mpnet-base-v2
    "nomic_bert": {},  # nomic-embed-text-v1.5
    "modernbert": {},  # gte-modernbert-base
    "gemma3_text": {  # embeddinggemma-300m
        "vocab_size": 262_144, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 24,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256,
        "sliding_window": 512, "max_position_embeddings": 2048, "use_bidirectional_attention": True,
    },
    "qwen2": {  # gte-Qwen2's smaller relatives
        "vocab_size": 151_646, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
    },
    "qwen3": {  # Qwen3-Embedding-0.6B
        "vocab_size": 151_669, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000,
    },
}  # fmt: skip


def write(family: str, like: Path, out: Path) -> None:
    """The checkpoint: norms near 1 and not at 1, special tokens as the tokenizer's own configuration has them."""
    shutil.copytree(like, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    own = json.loads((like / "config.json").read_text("utf-8"))
    special = {k: own[k] for k in ("pad_token_id", "bos_token_id", "eos_token_id") if own.get(k) is not None}
    config = transformers.AutoConfig.for_model(family, **SHAPES[family] | special)
    torch.manual_seed(20261122)
    model = transformers.AutoModel.from_config(config).to(torch.float32)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name.lower() or name.endswith("bias"):
                value.add_(0.1 * torch.randn_like(value))
    state = {k: v.contiguous() for k, v in model.state_dict().items() if "position_ids" not in k}
    save_file(as_published(state, config), out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config.to_dict(), default=str), "utf-8")
    width = config.hidden_size
    for place, sizes in zip(sorted(out.glob("*_Dense")), ((width, 4 * width), (4 * width, width)), strict=False):
        said = json.loads((place / "config.json").read_text("utf-8"))
        said |= {"in_features": sizes[0], "out_features": sizes[1]}
        (place / "config.json").write_text(json.dumps(said), "utf-8")
        save_file({"linear.weight": 0.02 * torch.randn(sizes[1], sizes[0])}, place / "model.safetensors")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__)
    write(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
