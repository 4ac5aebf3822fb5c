"""A folder as somebody else would have published it: right weights, and much that is wrong around them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featherbed.folder import MANIFEST, sidecar_name
from featherbed.make.relocate import name_sidecar, relocate


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """A JSON file with something else in it."""
    path.write_text(json.dumps(change(json.loads(path.read_text("utf-8")))), "utf-8")


def without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda found: {key: value for key, value in found.items() if key not in keys}


def with_sidecar(folder: Path, file: str, name: str = "") -> Path:
    """The graph with its weights in a sidecar, by its right name or by ``name``."""
    graph = folder / file
    moved = graph.with_name("moved.onnx")
    relocate(graph, moved, beside=True, anyhow=True)
    sidecar = graph.with_name(name or sidecar_name(graph.name))
    moved.with_name(sidecar_name(moved.name)).rename(sidecar)
    graph.unlink()
    name_sidecar(moved, graph, sidecar.name)
    moved.unlink()
    return sidecar


def foreign(model: Path, out: Path) -> Path:
    """A copy of one of our folders with every fault that repair mends, and no manifest."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns(MANIFEST, "reports", "README.md", "report.html"))
    with_sidecar(out, "onnx/model_int8.onnx", "model.onnx.data")
    edit(out / "config.json", without("pad_token_id", "transformers.js_config", "architectures"))
    edit(
        out / "tokenizer_config.json",
        lambda found: {**without("padding_side")(found), "model_max_length": 10**30},
    )
    edit(out / "1_Pooling" / "config.json", lambda found: {"pooling_mode": found["pooling_mode"]})
    types = ("base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling", "models.Normalize")
    edit(
        out / "modules.json",
        lambda found: [{**m, "type": f"sentence_transformers.{kind}"} for m, kind in zip(found, types, strict=True)],
    )
    edit(out / "tokenizer.json", lambda found: {**found, "truncation": TRUNCATION})
    (out / "special_tokens_map.json").unlink()
    (out / "sentence_bert_config.json").unlink()
    return out


TRUNCATION = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}


def hashes(folder: Path) -> dict[str, str]:
    """Every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
