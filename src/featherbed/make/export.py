"""Any other architecture → reference graph, through torch: it exports hidden states. Extra: reference.

No code from the checkpoint's folder is run, and nothing is fetched.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from featherbed.errors import CheckpointError, MissingError, UnknownArchitectureError
from featherbed.families import FAMILIES
from featherbed.make.checkpoint import Checkpoint
from featherbed.make.graph.blocks import OPSET
from featherbed.make.ir import Graph
from featherbed.make.lift import HIDDEN, IDS, MASK, lift
from featherbed.make.read import read_foreign
from featherbed.spec import Spec

try:
    import onnxscript  # noqa: F401  # torch's exporter needs it, and says so late
    import torch
    import transformers
except ModuleNotFoundError as error:
    raise MissingError(
        "an architecture that is not built here",
        expected=f"a model_type among {', '.join(FAMILIES)}, or the packages torch, transformers and onnxscript",
        found=f"no {error.name}",
        remedy="pip install 'featherbed[reference]'",
    ) from error

GRAPH = "exported.onnx"
TEXTS, TOKENS = 3, 7  # of the sample: neither 0 nor 1, which an exporter takes for constants
QUIET = ("torch.onnx", "torch.export", "onnxscript")


class _Hidden(torch.nn.Module):
    """A model that takes ids and mask, and gives hidden states only."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Any, mask: Any) -> Any:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def exported(checkpoint: Checkpoint, spec: Spec, place: Path) -> Graph:
    """The reference graph of a checkpoint that transformers knows; its weights stay in a file in ``place``.

    Raises CheckpointError when weights are missing, UnknownArchitectureError when transformers cannot load it or torch
    cannot export it.
    """
    try:
        model, loaded = transformers.AutoModel.from_pretrained(
            checkpoint.folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True,
            local_files_only=True, attn_implementation="eager", output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for a bad folder
        raise _refused(spec, "a checkpoint that transformers loads", error) from error
    missing = sorted(name for name in loaded["missing_keys"] if not name.startswith("pooler."))
    if missing:  # transformers makes them up
        raise CheckpointError(
            f"tensor {missing[0]!r} of {checkpoint.folder}",
            expected=f"all weights of a model of model_type {spec.family!r}",
            found=f"{len(missing)} missing",
            remedy="fetch the checkpoint again, or check that config.json belongs to these weights",
        )
    model.config.use_cache = False
    levels = {name: logging.getLogger(name).level for name in QUIET}
    try:
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _export(_Hidden(model).eval(), spec, place / GRAPH)
        graph, axes = read_foreign(place / GRAPH)
    except Exception as error:  # torch's exporter raises errors of a dozen kinds
        raise _refused(spec, "a model that torch exports with dynamic batch and sequence", error) from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    return lift(graph, axes, spec)


def _export(model: Any, spec: Spec, path: Path) -> None:
    """Write ``model`` with dynamic axes. The sample has padding: without any, the mask would be dropped."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, spec.vocab_size, (TEXTS, TOKENS), generator=generator)
    lengths = torch.arange(TOKENS, TOKENS - TEXTS, -1)[:, None]
    mask = (torch.arange(TOKENS)[None] < lengths).to(torch.int64)
    ids = torch.where(mask > 0, ids, spec.pad_id)
    batch, sequence = torch.export.Dim("batch_size"), torch.export.Dim("sequence_length", max=spec.max_length)
    axes = {0: batch, 1: sequence}
    # names and weights as they are: constants are folded when the file is loaded
    program = torch.onnx.export(
        model, (ids, mask), dynamo=True, dynamic_shapes=(axes, axes), input_names=[IDS, MASK], output_names=[HIDDEN],
        opset_version=OPSET, optimize=False, verbose=False,
    )  # fmt: skip
    program.save(str(path), external_data=True)


def _refused(spec: Spec, expected: str, error: Exception) -> UnknownArchitectureError:
    return UnknownArchitectureError(
        f"a model of model_type {spec.family!r}",
        expected=expected,
        found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        remedy=f"choose a model of another architecture; {', '.join(FAMILIES)} are built without torch",
    )
