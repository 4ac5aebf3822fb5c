"""A checkpoint on sentence-transformers and torch: its modules, and the batches of its ``encode``, without the texts.

python -m runners.sentence_transformers WORKLOADS.json CHECKPOINT
"""

from __future__ import annotations

import numpy as np
import sentence_transformers
import torch

from runners.protocol import BATCH, Embed, Rows, Vectors, padded, serve


def load(words: list[str]) -> Embed:
    """The model in float32 on the CPU."""
    (path,) = words
    model = sentence_transformers.SentenceTransformer(path, device="cpu", model_kwargs={"dtype": torch.float32})

    def one(rows: Rows) -> Vectors:
        ids, mask = padded(rows)
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        vectors = model(features)["sentence_embedding"].numpy()
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    def embed(rows: Rows, _: str) -> Vectors:
        order = np.argsort([-len(row) for row in rows], kind="stable")  # as encode does: the longest first
        with torch.inference_mode():
            batches = [one([rows[at] for at in order[s : s + BATCH]]) for s in range(0, len(rows), BATCH)]
        return np.concatenate(batches)[np.argsort(order)]

    return embed


if __name__ == "__main__":
    serve(load, "sentence-transformers", "torch", "transformers")
