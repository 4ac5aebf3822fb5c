"""build() and the texts it calibrates on: whose they were is written down, and bad ones leave nothing behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import featherbed
from featherbed.errors import ProbeError
from featherbed.probe import shipped_calibration
from featherbed.recipe import RECIPES
from tests.conftest import CALIBRATION, FIXTURES, NAMES

CALIBRATED = [name for name, found in RECIPES.items() if found.calibrated]


def recipes_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says was done to each variant."""
    manifest = json.loads((folder / "featherbed.json").read_text("utf-8"))
    return {name: row["recipe"] for name, row in manifest["variants"].items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_says_on_which_texts_a_variant_was_calibrated(folders: dict[str, Path], name: str) -> None:
    for variant, recipe in recipes_of(folders[name]).items():
        if variant not in CALIBRATED:
            assert "calibration" not in recipe
            continue
        seen = recipe["calibration"]
        assert seen["name"] == CALIBRATION.name
        assert seen["sha256"] == hashlib.sha256(CALIBRATION.read_bytes()).hexdigest()
        assert seen["texts"] == len(CALIBRATION.read_text("utf-8").splitlines())
        assert seen["tokens"] > seen["texts"]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_chosen_stands_in_the_manifest_and_in_the_file(folders: dict[str, Path], name: str) -> None:
    for variant, recipe in recipes_of(folders[name]).items():
        smooth = [step for step in recipe["steps"] if step["step"] == "Smooth"]
        assert all(isinstance(step["alpha"], float) for step in smooth)
        path = folders[name] / "onnx" / f"model{RECIPES[variant].suffix}.onnx"
        model = onnx.load(str(path), load_external_data=False)
        said = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(said["featherbed.recipe"]) == recipe


def test_without_a_file_the_shipped_texts_are_taken_and_another_file_makes_another_variant(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    out = featherbed.build(FIXTURES / "bert-cls", tmp_path / "m", ["int8", "q4"], check=False).folder
    probe = shipped_calibration()
    seen = recipes_of(out)["int8"]["calibration"]
    assert (seen["name"], seen["version"], seen["sha256"]) == (probe.name, probe.version, probe.sha256)
    graphs = [folder / "onnx" / "model_int8.onnx" for folder in (out, folders["bert-cls"])]
    assert graphs[0].read_bytes() != graphs[1].read_bytes()
    for same in ("model.onnx", "model_q4.onnx"):
        assert (out / "onnx" / same).read_bytes() == (folders["bert-cls"] / "onnx" / same).read_bytes()


def test_building_again_gives_the_same_bytes(tmp_path: Path, folders: dict[str, Path]) -> None:
    variants = ["int8", "int8-block", "int4", "int8-smooth"]
    out = featherbed.build(FIXTURES / "bert-cls", tmp_path / "m", variants, check=False, calibration=CALIBRATION).folder
    for path in (out / "onnx").iterdir():
        assert path.read_bytes() == (folders["bert-cls"] / "onnx" / path.name).read_bytes(), path.name


def test_stages_of_progress_name_the_variant_they_belong_to(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    featherbed.build(
        FIXTURES / "bert-cls",
        tmp_path / "m",
        ["int8", "q4"],
        check=False,
        calibration=CALIBRATION,
        progress=lambda *row: told.append(row),
    )
    stages = {stage for stage, _, _ in told}
    assert {"int8: look at activations", "int8: reference", "int8: try α 0.6", "int8: calibrate"} <= stages
    assert {"write fp32", "write int8", "write q4"} <= stages
    assert not [stage for stage in stages if stage.startswith(("q4:", "fp32:"))]
    for stage in stages:
        last = [(done, total) for name, done, total in told if name == stage][-1]
        assert last[0] == last[1], stage


def absent(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def bad_line(path: Path) -> None:
    path.write_text('{"text": "rain"}\nrain\n', "utf-8")


def empty(path: Path) -> None:
    path.write_text("\n", "utf-8")


def not_utf8(path: Path) -> None:
    path.write_bytes(b'{"text": "\xff"}')


@pytest.mark.parametrize("damage", [absent, a_folder, bad_line, empty, not_utf8])
def test_texts_that_cannot_be_read_are_one_line_and_nothing_is_written(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_bytes(CALIBRATION.read_bytes())
    damage(texts)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ProbeError) as caught:
        featherbed.build(FIXTURES / "bert-cls", tmp_path / "m", ["int8"], check=False, calibration=texts)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_an_older_folder_outlives_texts_that_cannot_be_read(tmp_path: Path) -> None:
    out = featherbed.build(FIXTURES / "bert-cls", tmp_path / "m", ["fp32"], check=False).folder
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ProbeError):
        featherbed.build(FIXTURES / "bert-cls", out, ["int8"], check=False, calibration=tmp_path / "none.jsonl")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_variant_that_looks_at_no_activations_needs_no_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featherbed.probe.CALIBRATION", tmp_path / "none.jsonl")
    featherbed.build(FIXTURES / "bert-cls", tmp_path / "m", ["q4", "int8-dynamic"], check=False)
    with pytest.raises(ProbeError):
        featherbed.build(FIXTURES / "bert-cls", tmp_path / "n", ["int8"], check=False)


def test_what_a_checkpoints_config_says_of_its_own_graphs_is_not_said_of_ours(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint("bert-cls")
    config = json.loads((source / "config.json").read_text("utf-8"))
    said = {"transformers.js_config": {"use_external_data_format": True}}
    (source / "config.json").write_text(json.dumps(config | said), "utf-8")
    folder = featherbed.build(source, tmp_path / "m", ["fp32", "q4"], check=False).folder
    found = json.loads((folder / "config.json").read_text("utf-8"))
    assert found["transformers.js_config"]["use_external_data_format"] == {}
