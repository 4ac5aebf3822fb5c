"""A stock .onnx file on fastembed, registered as a model of one's own, in batches of 32 (its own, of 256,
need 30 GB with the 0.6B shape).

python -m runners.fastembed WORKLOADS.json FOLDER POOLING

FOLDER holds model.onnx and the tokenizer's files.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

from runners.protocol import BATCH, Embed, Rows, Vectors, padded, serve

POOLING = {"lasttoken": PoolingType.LAST_TOKEN, "mean": PoolingType.MEAN}
NAME = "bench/stock"


def encodings(texts: list[str]) -> list[SimpleNamespace]:
    """Texts that are ids already, padded as a tokenizer would."""
    ids, mask = padded([[int(word) for word in text.split()] for text in texts])
    return [SimpleNamespace(ids=row, attention_mask=real) for row, real in zip(ids, mask, strict=True)]


def load(words: list[str]) -> Embed:
    """The model; its tokenizer reads ids, since every runner gets the same ones."""
    folder, pooling = words
    width = json.loads((Path(folder) / "config.json").read_text("utf-8"))["hidden_size"]
    TextEmbedding.add_custom_model(
        NAME,
        pooling=POOLING[pooling],
        normalization=True,
        sources=ModelSource(hf=NAME),
        dim=width,
        model_file="model.onnx",
    )
    model = TextEmbedding(NAME, specific_model_path=folder)
    model.model.tokenize = encodings

    def embed(rows: Rows, _: str) -> Vectors:
        texts = [" ".join(map(str, row)) for row in rows]
        return np.asarray(list(model.embed(texts, batch_size=BATCH)), np.float32)

    return embed


if __name__ == "__main__":
    serve(load, "fastembed", "onnxruntime")
