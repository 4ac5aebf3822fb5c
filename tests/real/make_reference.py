"""Upstream's vectors for some texts of the shipped probe, with transformers on torch. Needs the extra `reference`.

python tests/real/make_reference.py CHECKPOINT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from featherbed.probe import shipped

EVERY = 19  # of the 756 texts: 40, short ones, passages and code


def main(checkpoint: str) -> None:
    """Write reference.safetensors beside this file."""
    texts = list(shipped().texts[::EVERY])
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"]
    pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    tensors = {"input_ids": tokens["input_ids"], "attention_mask": mask, "embeddings": pooled}
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        Path(__file__).parent / "reference.safetensors",
        {"texts": json.dumps(texts, ensure_ascii=False)},
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
