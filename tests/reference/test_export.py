"""Architectures without a builder, through torch: upstream's function at every shape, and recipes on top of it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import featherbed
from featherbed.errors import CheckpointError, UnknownArchitectureError
from featherbed.folder import graph_name
from featherbed.make.checkpoint import open_checkpoint
from featherbed.make.export import exported
from featherbed.make.read import read_graph
from featherbed.spec import read_spec
from tests.conftest import CALIBRATION
from tests.reference.test_upstream import BOUND, random_checkpoint

Ids = npt.NDArray[np.int64]
SIZES: dict[str, Any] = {"vocab_size": 384, "max_position_embeddings": 64, "initializer_range": 0.2}
CONFIGS: dict[str, tuple[Any, str]] = {
    "distilbert": (
        transformers.DistilBertConfig(**SIZES, dim=48, n_layers=2, n_heads=3, hidden_dim=72), "bert-mean",
    ),
    "deberta-v2": (  # relative positions, whose keys share their weights with the tokens'
        transformers.DebertaV2Config(
            **SIZES, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=72,
            relative_attention=True, position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True,
            pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
        ), "bert-mean",
    ),
}  # fmt: skip
RECIPES = ("fp32", "int8", "int8-dynamic", "q4")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter warns of itself


@pytest.fixture(scope="module", params=CONFIGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(checkpoint, outcome of building it) of an architecture that is none of ours."""
    config, like = CONFIGS[request.param]
    root = tmp_path_factory.mktemp("export")
    checkpoint = random_checkpoint(root / "checkpoint", config, like)
    return checkpoint, featherbed.build(checkpoint, root / "out", RECIPES, calibration=CALIBRATION)


def hidden_by_torch(checkpoint: Path, ids: Ids, mask: Ids) -> npt.NDArray[np.float32]:
    model = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        out = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
    return np.asarray(out.last_hidden_state.numpy())


def test_recipes_stand_on_what_was_exported(made: tuple[Path, Any]) -> None:
    checkpoint, outcome = made
    metrics = outcome.report.metrics
    assert metrics["fp32"].reference_max_error <= BOUND
    assert metrics["int8"].cos_min > 0.99
    assert metrics["int8-dynamic"].cos_min > 0.99
    assert metrics["q4"].cos_min > 0.8
    for recipe in ("fp32", "int8", "q4"):
        assert metrics[recipe].invariance_max <= 1e-5
    failed = {v.variant for v in outcome.report.verdicts if not v.passed}
    assert failed <= {"int8-dynamic"}  # a scale for the whole batch
    layers = open_checkpoint(checkpoint).config.get("num_hidden_layers", 2)
    assert len(read_graph(outcome.folder / graph_name("")).linear_names()) == 6 * layers


@pytest.mark.parametrize(("batch", "width"), [(1, 1), (1, 6), (4, 1), (2, 9), (5, 64)])
def test_no_size_of_the_sample_is_baked_in(made: tuple[Path, Any], batch: int, width: int) -> None:
    checkpoint, outcome = made
    session: Any = ort.InferenceSession(str(outcome.folder / graph_name("")), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(batch * width)
    lengths = rng.integers(1, width + 1, batch)
    lengths[0] = width
    mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(4, 384, (batch, width)) * mask
    hidden, vectors = session.run(None, {"input_ids": ids, "attention_mask": mask})
    expected = hidden_by_torch(checkpoint, ids, mask)
    assert np.abs(hidden - expected)[mask > 0].max() <= 1e-4
    pooled = (expected * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    assert np.abs(vectors - pooled / np.linalg.norm(pooled, axis=1, keepdims=True)).max() <= BOUND
    left = np.stack([np.roll(row, width - n) for row, n in zip(ids, lengths, strict=True)])
    left_mask = np.stack([np.roll(row, width - n) for row, n in zip(mask, lengths, strict=True)])
    assert np.abs(session.run(None, {"input_ids": left, "attention_mask": left_mask})[1] - vectors).max() <= 1e-6
    if lengths.min() < width:  # the mask is not dropped
        whole = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(mask)})[1]
        assert np.abs(whole - vectors).max() > 1e-3


def test_the_log_says_that_torch_is_asked(
    made: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UnknownArchitectureError("x", expected="y", found="z", remedy="w")

    monkeypatch.setattr("featherbed.make.export.exported", refuse)
    with caplog.at_level(logging.WARNING, "featherbed"), pytest.raises(UnknownArchitectureError):
        featherbed.build(made[0], tmp_path / "out", ["fp32"])
    assert "exported through torch" in caplog.text


def test_weights_that_are_missing_are_not_made_up(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made[0], tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "layer.1." in name and name.endswith("weight"))
    save_file({name: value for name, value in tensors.items() if name != gone}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 missing") as caught:
        exported(open_checkpoint(folder), read_spec(folder, any_family=True), tmp_path)
    assert gone in str(caught.value)


def test_what_transformers_does_not_know_is_refused(made: tuple[Path, Any], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(made[0])
    config = made[0] / "config.json"
    text = config.read_text("utf-8")
    kind = read_spec(made[0], any_family=True).family
    try:
        config.write_text(text.replace(f'"{kind}"', '"nobody_s"'), "utf-8")
        with pytest.raises(UnknownArchitectureError, match="a checkpoint that transformers loads"):
            exported(checkpoint, read_spec(made[0], any_family=True), tmp_path)
    finally:
        config.write_text(text, "utf-8")
