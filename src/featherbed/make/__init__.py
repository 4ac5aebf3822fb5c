"""Checkpoint → variant. Needs numpy and onnx; no torch, and no onnxruntime."""
