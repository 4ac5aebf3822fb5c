"""A GGUF on llama-cpp-python, as its user would: ``embed`` packs texts into batches of 4096 tokens.

python -m runners.llama WORKLOADS.json FILE.gguf
"""

from __future__ import annotations

import llama_cpp
import numpy as np

from runners.protocol import THREADS, Embed, Rows, Vectors, serve

BATCH_TOKENS = 4096


def load(words: list[str]) -> Embed:
    """The model with last-token pooling; its tokenizer reads ids, since every runner gets the same ones."""
    (path,) = words
    model = llama_cpp.Llama(
        path,
        embedding=True,
        n_ctx=8192,
        n_batch=BATCH_TOKENS,
        n_ubatch=BATCH_TOKENS,
        n_threads=THREADS,
        n_threads_batch=THREADS,
        pooling_type=llama_cpp.LLAMA_POOLING_TYPE_LAST,
        verbose=False,
    )
    model.tokenize = lambda text: [int(word) for word in text.split()]

    def embed(rows: Rows, _: str) -> Vectors:
        texts = [" ".join(map(str, row)) for row in rows]
        return np.asarray(model.embed(texts, normalize=True), np.float32)

    return embed


if __name__ == "__main__":
    serve(load, "llama-cpp-python")
