"""build for other engines: what the folder says of it, and that its vectors are those of the usual folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import featherbed
from featherbed.check.inspect import inspect
from featherbed.errors import EngineError, OptionError
from featherbed.folder import open_folder
from featherbed.run.embedder import Embedder
from featherbed.run.session import Memory
from tests.conftest import CALIBRATION, FIXTURES, NAMES, upstream

VARIANTS = ["fp32", "int8", "q4f16"]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("static")
    return {
        name: featherbed.build(
            FIXTURES / name, root / name, VARIANTS, check=False, calibration=CALIBRATION, operators="standard",
            static="2x24",
        ).folder
        for name in NAMES
    }  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_static_folder_gives_the_vectors_of_the_dynamic_one(
    fixed: dict[str, Path], folders: dict[str, Path], name: str, variant: str
) -> None:
    texts = [text for text, row in zip(upstream(name).texts, upstream(name).rows, strict=True) if len(row) <= 24]
    assert len(texts) >= 5  # and an odd number, so that the last run is filled up
    found = Embedder(fixed[name], variant).encode(texts)
    expected = Embedder(folders[name], variant).encode(texts)
    assert (found * expected).sum(1).min() >= 0.99999
    plain = Embedder(fixed[name], variant).encode(texts, normalize_embeddings=False)
    assert (plain / np.linalg.norm(plain, axis=1, keepdims=True) * expected).sum(1).min() >= 0.99999


def test_longer_texts_are_cut_at_the_shape_and_every_config_says_so(
    fixed: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = fixed["bert-mean"]
    opened = Embedder(folder, "fp32")
    assert opened.spec.max_length == 24
    assert len(opened.encode(["feather " * 100])) == 1
    assert "more than 24 tokens" in caplog.text
    assert json.loads((folder / "sentence_bert_config.json").read_text("utf-8"))["max_seq_length"] == 24
    assert json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["model_max_length"] == 24
    with pytest.raises(EngineError, match="a text of 25 tokens: expected at most 24"):
        opened.embed_ids([[5] * 25])


def test_manifest_and_inspect_say_for_which_engine(fixed: dict[str, Path], folders: dict[str, Path]) -> None:
    manifest = open_folder(fixed["bert-mean"]).manifest
    for name in VARIANTS:
        assert manifest.variants[name].recipe["steps"][-2:] == [
            {"step": "Standard", "blocks": False}, {"step": "Static", "batch": 2, "tokens": 24},
        ]  # fmt: skip
        assert manifest.variants[name].least_onnxruntime == "1.20"
    for file in inspect(fixed["bert-mean"])["files"]:
        assert file["domains"] == {"ai.onnx": 21}
        assert file["static_batch"]
        model = onnx.load(str(fixed["bert-mean"] / "onnx" / file["file"]))
        onnx.checker.check_model(model, full_check=True)
    domains = {f["variant"]: set(f["domains"]) for f in inspect(folders["bert-mean"])["files"]}
    assert domains["fp32"] == domains["int8"] == {"ai.onnx", "com.microsoft"}
    assert domains["fp16"] == {"ai.onnx"}
    phrases = {f["variant"]: f["quantization"] for f in inspect(fixed["bert-mean"])["files"]}
    assert phrases["q4f16"] == ["DequantizeLinear int4, block 32", "float16"]


def test_a_static_file_is_prepacked_too(fixed: dict[str, Path], tmp_path: Path) -> None:
    texts = upstream("bert-cls").texts[:3]
    kept = Embedder(fixed["bert-cls"], "fp32", memory=Memory(cache=tmp_path))
    assert list(tmp_path.glob("*/engine.onnx"))
    plain = Embedder(fixed["bert-cls"], "fp32", memory=Memory(cache=False))
    assert np.abs(kept.encode(texts) - plain.encode(texts)).max() <= 1e-5


def test_a_decoder_in_standard_operators_is_opened_with_a_cache(tmp_path: Path) -> None:
    folder = featherbed.build(
        FIXTURES / "qwen3-tied", tmp_path / "out", ["fp32"], check=False, operators="standard"
    ).folder
    kept = Embedder(folder, "fp32", memory=Memory(cache=tmp_path / "cache"))
    assert list((tmp_path / "cache").glob("*/engine.onnx"))
    assert not list((tmp_path / "cache").glob("*/long.onnx"))  # forms of fused attention
    known = upstream("qwen3-tied")
    assert np.abs(kept.embed_ids(known.rows) - known.unit).max() <= 2e-5


@pytest.mark.parametrize(("operators", "static"), [("plain", ""), ("fused", "128"), ("fused", "1x100000")])
def test_words_that_are_none_are_refused_and_leave_nothing(tmp_path: Path, operators: str, static: str) -> None:
    with pytest.raises(OptionError):
        featherbed.build(FIXTURES / "bert-cls", tmp_path / "out", ["fp32"], operators=operators, static=static)
    assert not list(tmp_path.iterdir())
