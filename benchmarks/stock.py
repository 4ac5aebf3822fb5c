"""The path people take without featherbed: torch export, then onnxruntime's own quantizers.

    python benchmarks/stock.py export CHECKPOINT OUT.onnx
    python benchmarks/stock.py int8 FP32.onnx OUT.onnx
    python benchmarks/stock.py q4 FP32.onnx OUT.onnx

Runs in an environment of its own: torch, transformers, onnx, onnxscript, onnxruntime.
"""

from __future__ import annotations

import sys
from pathlib import Path


def export(checkpoint: str, out: str) -> None:
    """torch.onnx.export(dynamo=True) of the transformers model, dynamic in batch and sequence."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    model = model.eval()
    model.config.use_cache = False

    class Hidden(torch.nn.Module):
        """The model with one output."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            """Hidden states [B, T, D]."""
            result: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return result

    ids = torch.arange(1, 65).reshape(2, 32)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0  # with padding, or the mask is baked in
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        Hidden(), (ids, mask), out, dynamo=True, external_data=True,
        input_names=["input_ids", "attention_mask"], output_names=["last_hidden_state"],
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
    )  # fmt: skip


def int8(source: str, out: str) -> None:
    """quantize_dynamic, per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source, out, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"],
        use_external_data_format=True,
    )  # fmt: skip


def q4(source: str, out: str) -> None:
    """MatMulNBits, 4 bits, block 32, symmetric."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(out, use_external_data_format=True)


if __name__ == "__main__":
    verbs = {"export": export, "int8": int8, "q4": q4}
    if len(sys.argv) != 4 or sys.argv[1] not in verbs:
        sys.exit(__doc__)
    Path(sys.argv[3]).parent.mkdir(parents=True, exist_ok=True)
    verbs[sys.argv[1]](sys.argv[2], sys.argv[3])
