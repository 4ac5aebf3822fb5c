"""The wall: the GEMMs of a model's linear layers alone, u8 × s8 on onnxruntime, with nothing around them.

    python -m wall WORKLOADS.json CHECKPOINT                   (in the folder benchmarks)

A runner like the others: the rows of a workload are only counted. Its seconds are those of one layer's GEMMs for
that many tokens, times the number of layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from checkpoint import shapes
from onnx import TensorProto, helper, numpy_helper
from runners.protocol import Embed, Rows, Vectors, serve


def layer(config: dict[str, Any]) -> list[tuple[int, int]]:
    """(K, N) of each linear layer of one block."""
    return [(s[1], s[0]) for name, s in shapes(config) if name.startswith("layers.0.") and len(s) == 2]


def operations_per_token(config: dict[str, Any]) -> int:
    """Of all linear layers; a multiplication and an addition are two."""
    return int(2 * sum(k * n for k, n in layer(config)) * config["num_hidden_layers"])


def graph(sizes: list[tuple[int, int]]) -> bytes:
    """One MatMulIntegerToFloat a linear layer; those of one width share their input."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(np.array(1, np.float32), "one"),
        numpy_helper.from_array(np.array(128, np.uint8), "zero"),
    ]
    nodes, outputs = [], []
    for at, (k, n) in enumerate(sizes):
        weights.append(numpy_helper.from_array(rng.integers(-127, 128, (k, n)).astype(np.int8), f"w{at}"))
        weights.append(numpy_helper.from_array(np.full(n, 0.01, np.float32), f"s{at}"))
        names = [f"a{k}", f"w{at}", "one", f"s{at}", "zero"]
        nodes.append(helper.make_node("MatMulIntegerToFloat", names, [f"y{at}"], domain="com.microsoft"))
        outputs.append(helper.make_tensor_value_info(f"y{at}", TensorProto.FLOAT, ["m", n]))
    widths = sorted({k for k, _ in sizes})
    inputs = [helper.make_tensor_value_info(f"a{k}", TensorProto.UINT8, ["m", k]) for k in widths]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(nodes, "layer", inputs, outputs, weights)
    return bytes(helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString())


def load(words: list[str]) -> Embed:
    """A session of one layer's GEMMs."""
    config = json.loads((Path(words[0]) / "config.json").read_text("utf-8"))
    sizes = layer(config)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph(sizes), options, providers=["CPUExecutionProvider"])
    drawn = np.random.default_rng(1).integers(0, 256, 1 << 16).astype(np.uint8)

    def embed(rows: Rows, _: str) -> Vectors:
        binding = session.io_binding()
        for k in {k for k, _ in sizes}:
            binding.bind_cpu_input(f"a{k}", np.resize(drawn, (sum(map(len, rows)), k)))
        for at in range(len(sizes)):
            binding.bind_output(f"y{at}")
        for _layer in range(config["num_hidden_layers"]):
            session.run_with_iobinding(binding)
        return np.zeros((0, 0), np.float32)

    return embed


if __name__ == "__main__":
    serve(load, "onnxruntime")
