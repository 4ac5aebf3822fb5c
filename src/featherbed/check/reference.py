"""Upstream's own vectors: transformers on torch, fed with our token ids. Extra: reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from featherbed.errors import CheckpointError, MissingError
from featherbed.folder import ModelFolder
from featherbed.probe import Probe
from featherbed.progress import Progress, silent
from featherbed.run.batches import batches
from featherbed.run.dense import read_layers, through
from featherbed.run.pooling import normalize, pool
from featherbed.run.tokens import Tokenizer

try:
    import torch
    import transformers
except ModuleNotFoundError as error:
    raise MissingError(
        "the torch reference",
        expected="the packages torch and transformers",
        found=f"no {error.name}",
        remedy="pip install 'featherbed[reference]'",
    ) from error

Vectors = npt.NDArray[np.float32]


def upstream_vectors(model: ModelFolder, checkpoint: Path, probe: Probe, progress: Progress = silent) -> Vectors:
    """Unit vectors [N, D] of the probe's texts from the upstream model in float32.

    Token ids are ours, so a difference is the graph's. No code from the checkpoint's folder is run, and nothing
    is fetched. Raises CheckpointError when the folder is not the model's.
    """
    spec = model.manifest.spec
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(
            f"--reference {checkpoint}",
            expected="the folder of the checkpoint",
            found="no config.json there",
            remedy="give the folder that the model was built from",
        )
    try:
        loaded = transformers.AutoModel.from_pretrained(
            checkpoint, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, local_files_only=True
        ).eval()
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for a bad folder
        raise CheckpointError(
            f"--reference {checkpoint}",
            expected="a checkpoint that transformers loads",
            found=" ".join(str(error).split())[:300],
            remedy="give the folder that the model was built from",
        ) from error
    found = (loaded.config.model_type, loaded.config.hidden_size, loaded.config.vocab_size)
    if found != (spec.family, spec.hidden_width, spec.vocab_size):
        raise CheckpointError(
            f"--reference {checkpoint}",
            expected=f"a {spec.family} of {spec.hidden_width} dimensions and {spec.vocab_size} tokens",
            found=f"{found[0]}, {found[1]} and {found[2]}",
            remedy="give the folder that the model was built from",
        )
    layers = read_layers(checkpoint) if spec.dense else ()
    rows = Tokenizer(model.path, spec).encode(probe.texts).ids
    vectors = np.empty((len(rows), spec.dim), np.float32)
    done = 0
    for batch in batches(rows, spec.pad_id, spec.max_batch_tokens_hint):
        with torch.inference_mode():
            out = loaded(input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask))
        pooled = pool(out.last_hidden_state.numpy(), batch.mask, spec.pooling)
        vectors[batch.places] = normalize(through(layers, pooled))
        done += len(batch.places)
        progress("torch reference", done, len(rows))
    return vectors
