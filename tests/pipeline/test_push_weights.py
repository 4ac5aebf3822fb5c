"""push --weights: every pushed variant in one file, or with a sidecar, and nothing said that is not of these files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import featherbed
from featherbed.check.bench import Load
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import MANIFEST, ModelFolder, open_folder
from featherbed.make import relocate as relocate_room
from featherbed.pipeline.push import push
from featherbed.pipeline.stage import Weights, parse_weights, staged
from featherbed.recipe import RECIPES
from tests.cli.test_cli import Run, run
from tests.conftest import upstream

__all__ = ["run"]  # the fixture

NAME = "owner/small-onnx"
VERIFIED = ("fp32", "int8", "int8-block")
TEXTS = [*upstream("bert-mean").texts, "rain " * 30]
Stage = Callable[..., ModelFolder]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors(path: Path) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Name → type, shape and bytes of every weight of a graph."""
    return {w.name: (w.data_type, tuple(w.dims), w.raw_data) for w in onnx.load(str(path)).graph.initializer}


def sidecars(folder: Path) -> dict[str, bool]:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return dict(config.get("transformers.js_config", {}).get("use_external_data_format", {}))


def evidence(folder: ModelFolder, name: str) -> dict[str, Any]:
    return dict(json.loads(folder.report_path(name).read_text("utf-8")))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """Stages one after the other, each in a folder of its own."""

    def call(model: ModelFolder, weights: Weights, names: tuple[str, ...] = ()) -> ModelFolder:
        place = tmp_path / f"stage-{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        return staged(model, names or tuple(model.manifest.variants), weights, place)

    return call


@pytest.fixture(scope="module")
def judged(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder some of whose variants were verified and one benched, with the evidence kept."""
    folder = Path(shutil.copytree(folders["qwen3-tied"], tmp_path_factory.mktemp("judged") / "model"))
    probe = folder.with_name("texts.jsonl")
    probe.write_text("\n".join(json.dumps({"text": "rain " * n}) for n in range(1, 30)), "utf-8")
    featherbed.verify(folder, VERIFIED, probes=[probe], gates=["size_bytes=1500000"], save=True)
    featherbed.bench(folder, ["fp32", "int8"], Load(tokens=16, batch=2, rounds=1), save=True)
    return folder


# the files


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", ["qwen3-tied", "bert-mean"])
def test_where_weights_lie_changes_no_vector(folders: dict[str, Path], name: str, recipe: str, stage: Stage) -> None:
    built = open_folder(folders[name])
    names = tuple(dict.fromkeys(("fp32", recipe)))
    beside = stage(built, Weights.BESIDE, names)
    inside = stage(beside, Weights.INSIDE, names)
    expected = featherbed.Embedder(built.path, recipe).encode(TEXTS)
    for form, count in ((beside, 2), (inside, 1)):
        form.check_hashes()
        assert open_folder(form.path) == form
        assert set(form.manifest.files) == set(files(form.path)) - {MANIFEST}
        assert [len(one.files) for one in form.manifest.variants.values()] == [count] * len(names)
        assert np.array_equal(featherbed.Embedder(form.path, recipe).encode(TEXTS), expected)
        assert tensors(form.graph_path(recipe)) == tensors(built.graph_path(recipe))
        assert featherbed.inspect(form.path)["files"][-1]["size_bytes"] == form.manifest.size_bytes(recipe)
    assert inside.manifest.variants[recipe] == built.manifest.variants[recipe]
    for file in built.manifest.variants[recipe].files:
        assert inside.manifest.files[file] == built.manifest.files[file]


def test_a_folder_whose_weights_lie_right_is_linked_and_not_copied(folders: dict[str, Path], stage: Stage) -> None:
    built = open_folder(folders["bert-mean"])
    inside = stage(built, Weights.INSIDE)
    for one in built.manifest.variants.values():
        assert (inside.path / one.files[0]).samefile(built.path / one.files[0])
    beside = stage(built, Weights.BESIDE)
    again = stage(beside, Weights.BESIDE)
    for one in beside.manifest.variants.values():
        assert all((again.path / file).samefile(beside.path / file) for file in one.files)
    assert again.manifest == beside.manifest


@pytest.mark.parametrize("weights", list(Weights))
def test_the_folder_at_hand_stays_as_it_is(judged: Path, weights: Weights, stage: Stage) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in judged.rglob("*") if path.is_file()}
    stage(open_folder(judged), weights, VERIFIED)
    push(judged, NAME, VERIFIED, weights=weights, dry_run=True)
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in judged.rglob("*") if path.is_file()
    } == before
    assert sorted(path.name for path in judged.parent.iterdir()) == ["model", "texts.jsonl"]


# what is told of them


def test_transformers_js_is_told_of_the_sidecars_that_there_are(folders: dict[str, Path], stage: Stage) -> None:
    beside = stage(open_folder(folders["bert-cls"]), Weights.BESIDE)
    graphs = {Path(one.files[0]).name for one in beside.manifest.variants.values()}
    assert sidecars(beside.path) == dict.fromkeys((*graphs, "model_quantized.onnx"), True)
    few = stage(beside, Weights.AS_BUILT, ("fp32", "q4"))
    assert sidecars(few.path) == {"model.onnx": True, "model_q4.onnx": True}
    inside = stage(beside, Weights.INSIDE, ("fp32", "q4"))
    assert sidecars(inside.path) == {}
    for form in (few, inside):
        form.check_hashes()


@pytest.mark.parametrize("weights", [Weights.BESIDE, Weights.AS_BUILT])
def test_card_report_and_evidence_are_of_the_files_that_go(judged: Path, weights: Weights, stage: Stage) -> None:
    built = open_folder(judged)
    form = stage(built, weights, VERIFIED)
    moved = weights is Weights.BESIDE
    card, page = ((form.path / name).read_text("utf-8") for name in ("README.md", "report.html"))
    for name in VERIFIED:
        for file in form.manifest.variants[name].files:
            record = form.manifest.files[file]
            assert f"| `{file}` | {record.size_bytes} | `{record.sha256}` |" in card
            assert f"{record.size_bytes:,} bytes" in page
        size = form.manifest.size_bytes(name)
        assert (size != built.manifest.size_bytes(name)) is moved
        assert f"| `{name}` | {size / 1e6:.1f} | passed |" in card
        before, told = evidence(built, name), evidence(form, name)
        assert told["metrics"] == before["metrics"] | {"size_bytes": size}
        assert told["reference_sha256"] == form.manifest.files[form.manifest.variants["fp32"].files[-1]].sha256
        assert [g["value"] for g in told["gates"] if g["metric"] == "size_bytes"] == [size]
        assert [g for g in told["gates"] if g["metric"] != "size_bytes"] == [
            g for g in before["gates"] if g["metric"] != "size_bytes"
        ]
        assert ("bench" in told) is ("bench" in before and not moved)
    assert ("## Speed and memory" in card) is not moved
    if moved:  # nothing that goes names a file as it was before
        old = {built.manifest.files[file].sha256 for name in VERIFIED for file in built.manifest.variants[name].files}
        for file, raw in files(form.path).items():
            assert not re.search("|".join(sha[:12] for sha in old).encode(), raw), file
    report = featherbed.verify(form.path, ["fp32"], gates=["cos_min=0.99"])
    assert report.passed


def test_evidence_against_another_fp32_keeps_its_hash(judged: Path, stage: Stage, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(judged, tmp_path / "copy" / "model"))
    path = folder / "reports" / "int8.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"reference_sha256": "0" * 64}), "utf-8")
    form = stage(open_folder(folder), Weights.BESIDE, VERIFIED)
    assert evidence(form, "int8")["reference_sha256"] == "0" * 64


# what is refused


def test_a_variant_that_one_file_cannot_hold_is_refused_with_its_size(
    judged: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage
) -> None:
    built = open_folder(judged)
    beside = stage(built, Weights.BESIDE, ("fp32", "int8"))
    size = built.manifest.size_bytes("fp32")
    monkeypatch.setattr(relocate_room, "GRAPH_LIMIT_BYTES", size)
    for dry_run in (True, False):
        with pytest.raises(OptionError, match=rf"model\.onnx with its weights inside.*{size} bytes.*--weights beside"):
            push(beside.path, NAME, weights=Weights.INSIDE, dry_run=dry_run)
    assert not [path for path in beside.path.parent.iterdir() if "push-" in path.name]


def test_a_size_that_its_gate_does_not_allow_is_refused(judged: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(judged, tmp_path / "model"))
    path = folder / "reports" / "int8.json"
    document = json.loads(path.read_text("utf-8"))
    (gate,) = [one for one in document["gates"] if one["metric"] == "size_bytes"]
    gate["bound"] = gate["value"]
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(
        ModelFolderError, match=f"int8 with its weights moved: expected at most {gate['bound']:.0f} bytes"
    ):
        push(folder, NAME, VERIFIED, weights=Weights.BESIDE, dry_run=True)
    assert push(folder, NAME, VERIFIED, weights=Weights.INSIDE, dry_run=True).files


@pytest.mark.parametrize("file", ["onnx/model_int8.onnx", "config.json"])
def test_a_file_that_is_not_the_manifests_is_not_made_anew(judged: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(judged, tmp_path / "model"))
    raw = (folder / file).read_bytes()
    at = raw.rindex(b"0")
    (folder / file).write_bytes(raw[:at] + b"1" + raw[at + 1 :])
    for weights in Weights:
        with pytest.raises(ModelFolderError, match=f"{Path(file).name}: expected sha256"):
            push(folder, NAME, VERIFIED, weights=weights, dry_run=True)


def test_a_folder_whose_prune_was_stopped_is_refused(judged: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(judged, tmp_path / "model"))
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    del manifest["files"]["config.json"]
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(ModelFolderError, match="a prune was stopped; end it with `featherbed prune --keep fp32,"):
        push(folder, NAME, VERIFIED, dry_run=True)


def test_a_place_of_another_name_is_refused() -> None:
    assert [parse_weights(word) for word in ("as-built", "inside", "beside")] == list(Weights)
    with pytest.raises(OptionError, match="--weights out: expected as-built, inside, beside"):
        parse_weights("out")


# as a user types it


def test_the_files_that_would_go_are_listed_as_they_would_lie(judged: Path, run: Run) -> None:
    words = ("push", judged, NAME, "--variants", "int8", "--dry-run", "--json")
    listed = {place: set(run(*words, "--weights", place).document["files"]) for place in Weights}
    graphs = {"onnx/model.onnx", "onnx/model_int8.onnx", "onnx/model_quantized.onnx"}
    both = {*graphs, *(f"{graph}_data" for graph in graphs)}
    assert {place: {f for f in found if f.startswith("onnx/")} for place, found in listed.items()} == {
        Weights.AS_BUILT: graphs, Weights.INSIDE: graphs, Weights.BESIDE: both,
    }  # fmt: skip
    assert listed[Weights.AS_BUILT] == set(run(*words).document["files"])
