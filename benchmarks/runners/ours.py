"""A variant of a featherbed folder: the embedder plans batches and threads itself, unless the flag is "fixed".

python -m runners.ours WORKLOADS.json FOLDER VARIANT
"""

from __future__ import annotations

import numpy as np

from featherbed import Embedder
from featherbed.run.batches import collate
from runners.protocol import FIXED, Embed, Rows, Vectors, chunks, serve


def load(words: list[str]) -> Embed:
    """An embedder with its defaults."""
    folder, variant = words
    embedder = Embedder(folder, variant)
    pad = embedder.spec.pad_id

    def embed(rows: Rows, flag: str) -> Vectors:
        if flag == FIXED:  # batches of 32 in arrival order, exactly as composed
            return np.concatenate([embedder.embed(collate(chunk, pad)) for chunk in chunks(rows)])
        return embedder.embed_ids(rows)

    return embed


if __name__ == "__main__":
    serve(load, "featherbed", "onnxruntime")
