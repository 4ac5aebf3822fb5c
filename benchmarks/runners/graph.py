"""A stock .onnx file on plain onnxruntime, as its user would: batches of 32 in arrival order, pooled in numpy.

python -m runners.graph WORKLOADS.json FILE.onnx POOLING
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from runners.protocol import Embed, Rows, Vectors, chunks, padded, pooled, serve


def load(words: list[str]) -> Embed:
    """A session with onnxruntime's defaults."""
    path, pooling = words
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def one(rows: Rows) -> Vectors:
        ids, mask = padded(rows)
        (hidden,) = session.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})
        return pooled(hidden, mask, pooling)

    def embed(rows: Rows, _: str) -> Vectors:
        return np.concatenate([one(chunk) for chunk in chunks(rows)])

    return embed


if __name__ == "__main__":
    serve(load, "onnxruntime")
