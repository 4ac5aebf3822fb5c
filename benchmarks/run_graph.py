"""One .onnx file in a process of its own, on plain onnxruntime: how the main job compares speed fairly.

    python benchmarks/run_graph.py FILE OUTPUT BATCH TOKENS VOCABULARY

Loads, then runs once for every line of standard input, and answers each with a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime as ort
from memory import memory_mib


def main(path: str, output: str, batch: str, tokens: str, vocabulary: str) -> None:
    """Load, then a run a line."""
    started = time.perf_counter()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    print(json.dumps({"load_s": time.perf_counter() - started}), flush=True)
    ids = np.random.default_rng(0).integers(0, int(vocabulary), (int(batch), int(tokens)))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for _ in sys.stdin:
        started = time.perf_counter()
        session.run([output], feeds)
        print(json.dumps({"seconds": time.perf_counter() - started, **memory_mib("self")}), flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    main(*sys.argv[1:])
