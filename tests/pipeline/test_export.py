"""One variant where another server looks: it opens there, gives its vectors, and names its sidecar rightly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer

from featherbed.check.facts import facts
from featherbed.folder import file_record, open_folder
from featherbed.pipeline.export import LAYOUTS, export
from featherbed.run.embedder import Embedder
from tests.foreign_folder import hashes, with_sidecar

Copy = Callable[[str], Path]


def as_tei_runs_it(folder: Path, text: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """model.onnx or onnx/model.onnx, int64 inputs, float32 ``sentence_embedding``: what its OrtBackend does."""
    graph = next(path for path in (folder / "model.onnx", folder / "onnx" / "model.onnx") if path.exists())
    json.loads((folder / "config.json").read_text("utf-8"))["num_hidden_layers"]
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    ids = np.array([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids], np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    named = {port.name for port in session.get_inputs()}
    (found,) = session.run(["sentence_embedding"], {name: feeds[name] for name in named})
    assert found.dtype == np.float32
    return np.asarray(found[0])


@pytest.mark.parametrize("sidecar", ["", "int8.data", "model_int8.onnx_data"])
def test_a_variant_is_the_only_model_of_the_new_folder(copied: Copy, tmp_path: Path, sidecar: str) -> None:
    source, out = copied("bert-mean"), tmp_path / "laid"
    expected = Embedder(source, "int8").encode("rain in the night")
    if sidecar:  # as if built so: the manifest says what lies there
        with_sidecar(source, "onnx/model_int8.onnx", sidecar)
        files = [f"onnx/{name}" for name in ("model_int8.onnx", sidecar)]
        manifest = json.loads((source / "featherbed.json").read_text("utf-8"))
        manifest["variants"]["int8"]["files"] = files
        manifest["files"] |= {name: vars(file_record(source / name)) for name in files}
        (source / "featherbed.json").write_text(json.dumps(manifest), "utf-8")
    before = hashes(source)
    done = export(source, "int8", out)
    assert hashes(source) == before
    assert done.cosine >= 0.99999
    assert [graph.file for graph in facts(out).graphs] == ["onnx/model.onnx"]
    assert np.abs(as_tei_runs_it(out, "rain in the night") - expected).max() <= 1e-5
    names = {path.name for path in (out / "onnx").iterdir()}
    assert names == ({"model.onnx", "model.onnx_data"} if sidecar else {"model.onnx"})
    told = json.loads((out / "config.json").read_text("utf-8")).get("transformers.js_config")
    assert told == ({"use_external_data_format": {"model.onnx": True}} if sidecar else None)
    assert {finding.rule.id for finding in done.findings if finding.rule.fails} <= {"tei-onnxruntime", "tei-config"}


def test_weights_are_linked_and_what_tells_of_other_variants_stays_behind(copied: Copy, tmp_path: Path) -> None:
    source, out = copied("qwen3-tied"), tmp_path / "laid"
    export(source, "fp32", out, "browser")
    laid = out / LAYOUTS["browser"][0]
    assert laid.stat().st_ino == (source / "onnx" / "model.onnx").stat().st_ino
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert not there & {"featherbed.json", "README.md", "report.html", "onnx/model.onnx"}
    assert {"tokenizer.json", "modules.json", "1_Pooling/config.json", "config.json"} <= there


def test_an_export_that_differs_fails(copied: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featherbed.pipeline import export as room

    laid = iter([np.eye(3)[[0, 1, 2]], np.eye(3)[[1, 0, 2]]])
    monkeypatch.setattr(room, "ours", lambda *_: next(laid))
    done = export(copied("bert-mean"), "int8", tmp_path / "laid")
    assert (done.cosine, done.passed) == (0.0, False)


def test_a_folder_of_another_is_exported_by_its_file(copied: Copy, tmp_path: Path) -> None:
    source = copied("bert-mean")
    spec = open_folder(source).manifest.spec
    (source / "featherbed.json").unlink()
    done = export(source, "onnx/model_int8.onnx", tmp_path / "laid")
    assert done.cosine >= 0.99999
    assert Embedder(tmp_path / "laid" / "onnx" / "model.onnx").spec.dim == spec.dim
