"""Whether what a file computes in float16 stays within what float16 holds.

On a CPU onnxruntime computes such a file in float32 and would not notice: so the largest magnitude of every value in
float16 is asked for, on real texts, as further outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, shape_inference

from featherbed.errors import OptionError
from featherbed.run.batches import collate, fitted
from featherbed.run.session import Piece

MOST = 65504.0
TEXTS = 16  # at a time


def check_range(path: Path, rows: Sequence[Sequence[int]], pad_id: int) -> float:
    """The largest magnitude in float16 of the graph at ``path`` on rows of token ids, padding included.

    Raises OptionError where it is more than float16 holds, or no number, EngineError when the graph does not run.
    """
    model = onnx.load(str(path), load_external_data=False)
    fixed = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim]
    names = _with_peaks(model)
    piece = Piece(model.SerializeToString(), path.parent)
    largest = 0.0
    for start in range(0, len(rows), TEXTS):
        batch = collate(rows[start : start + TEXTS], pad_id)
        for part, _ in fitted(batch, (fixed[0], fixed[1])) if all(fixed) else [(batch, len(batch.ids))]:
            feeds = {"input_ids": part.ids, "attention_mask": part.mask, "token_type_ids": np.zeros_like(part.ids)}
            peaks = piece.run([f"{name}/peak" for name in names], feeds)
            for name, peak in zip(names, peaks, strict=True):
                if not float(peak) <= MOST:
                    raise OptionError(
                        f"{path.stem} in float16",
                        expected=f"values within ±{MOST:.0f} on the shipped texts",
                        found=f"{float(peak):g} at {name}",
                        remedy="leave out the variants in float16: this model's activations are too large",
                    )
                largest = max(largest, float(peak))
    return largest


def _with_peaks(model: onnx.ModelProto) -> list[str]:
    """Ask ``model`` for the largest magnitude of each of its values in float16, and nothing else; their names."""
    graph = model.graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulNBits":  # of com.microsoft: onnx does not know what it gives
            graph.value_info.append(helper.make_tensor_value_info(node.output[0], kinds[node.input[2]], None))
    known = {v.name: v.type.tensor_type.elem_type for v in shape_inference.infer_shapes(model).graph.value_info}
    names = [out for node in graph.node for out in node.output if known.get(out) == TensorProto.FLOAT16]
    del graph.output[:], graph.value_info[:]
    for name in names:
        graph.node.extend(
            [
                helper.make_node("Cast", [name], [f"{name}/wide"], to=TensorProto.FLOAT),
                helper.make_node("Abs", [f"{name}/wide"], [f"{name}/size"]),
                helper.make_node("ReduceMax", [f"{name}/size"], [f"{name}/peak"], keepdims=0),
            ]
        )
        graph.output.append(helper.make_tensor_value_info(f"{name}/peak", TensorProto.FLOAT, []))
    return names
