"""An OpenVINO IR, as its user would: latency hint, f32 activations, batches of 32 in arrival order.

python -m runners.openvino WORKLOADS.json FILE.xml POOLING
"""

from __future__ import annotations

import numpy as np
import openvino as ov

from runners.protocol import THREADS, Embed, Rows, Vectors, chunks, padded, pooled, serve


def load(words: list[str]) -> Embed:
    """The compiled model."""
    path, pooling = words
    options = {
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = ov.Core().compile_model(path, "CPU", options)

    def one(rows: Rows) -> Vectors:
        ids, mask = padded(rows)
        return pooled(model({"input_ids": ids, "attention_mask": mask})[0], mask, pooling)

    def embed(rows: Rows, _: str) -> Vectors:
        return np.concatenate([one(chunk) for chunk in chunks(rows)])

    return embed


if __name__ == "__main__":
    serve(load, "openvino")
