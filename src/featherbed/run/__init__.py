"""Text → vector. Needs numpy, onnxruntime and tokenizers; knows nothing of checkpoints."""
