"""featherbed tune, on a checkpoint small enough to search in seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import featherbed
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import Variant, open_folder
from featherbed.make.write import write_graph
from featherbed.pipeline import tune as tuning
from featherbed.pipeline import variants as variants_room
from featherbed.pipeline.tune import tune
from featherbed.pipeline.variants import added
from tests.conftest import FIXTURES

TEXTS = ["a cat sits", "two dogs run in the park", "rain falls on the old town", "who is there?", "numbers 1 2 3 4 5"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "few.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return featherbed.build(FIXTURES / "bert-mean", tmp_path / "model", ["fp32"], check=False).folder


@pytest.fixture(autouse=True)
def benches_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed has tests of its own; here a larger file is a faster one."""
    monkeypatch.setattr(
        tuning, "bench_file", lambda path, _: {"tokens_per_s": path.stat().st_size / 1e3, "rss_mib": 50.0}
    )


@pytest.mark.parametrize("target", [{"operators": "standard"}, {"static": "1x16"}], ids=str)
def test_a_folder_for_another_engine_is_not_tuned(tmp_path: Path, target: dict[str, str]) -> None:
    operators, static = target.get("operators", "fused"), target.get("static", "")
    made = featherbed.build(
        FIXTURES / "bert-mean", tmp_path / "model", ["fp32"], check=False, operators=operators, static=static
    )
    with pytest.raises(OptionError, match="built for another engine"):
        tune(made.folder)


def test_the_winner_is_the_smallest_within_the_bounds_and_becomes_a_variant(folder: Path, few: Path) -> None:
    stale = {"variant": "tuned", "bench": {"tokens_per_s": 1}, "eval": {"x": {}}}  # of an earlier winner's files
    (folder / "reports").mkdir(exist_ok=True)
    (folder / "reports" / "tuned.json").write_text(json.dumps(stale), "utf-8")
    found = tune(folder, minimum=["cos_min=0.9"], trials=5, calibration=few, probes=[few])
    assert found.winner is not None
    held = {key: f["size_mb"] for key, f in found.trials.items() if f["cos_min"] >= 0.9}
    assert held[found.winner] == min(held.values())
    assert found.report is not None
    opened = open_folder(folder)
    opened.check_hashes()
    variant = opened.variant("tuned")
    assert [s["step"] for s in variant.recipe["steps"]] == ["Rotate", "Smooth", "MixedLinear", "BlockwiseTable"]
    assert variant.recipe["calibration"]["name"] == few.name
    assert not (folder / "tune.work").exists()
    assert found.picture.is_file()
    assert not {"bench", "eval"} & json.loads((folder / "reports" / "tuned.json").read_text("utf-8")).keys()
    evidence = json.loads((folder / "reports" / "tune.json").read_text("utf-8"))
    assert evidence["winner"] == found.winner
    assert evidence["front"] == found.front
    assert featherbed.Embedder(folder, "tuned").encode("a cat").shape == (opened.manifest.spec.dim,)
    assert "| `tuned` |" in (folder / "README.md").read_text("utf-8")


def test_a_search_goes_on_where_it_stopped(folder: Path, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = tuning._Search._embed

    def embed(self: Any, file: Path, stage: str) -> Any:
        calls.append(stage)
        if stage == "trial 3":
            raise KeyboardInterrupt
        return real(self, file, stage)

    monkeypatch.setattr(tuning._Search, "_embed", embed)
    with pytest.raises(KeyboardInterrupt):
        tune(folder, minimum=["cos_min=0.9"], trials=4, calibration=few, probes=[few])
    assert len(json.loads((folder / "tune.work" / "tune.json").read_text("utf-8"))["trials"]) == 2
    open_folder(folder).check_hashes()  # the folder is as it was
    monkeypatch.setattr(tuning._Search, "_embed", real)
    measured: list[Any] = []
    monkeypatch.setattr("featherbed.make.tune._harm", lambda *asked: measured.append(asked))
    found = tune(folder, minimum=["cos_min=0.9"], trials=4, calibration=few, probes=[few])
    assert len(found.trials) == 4
    assert not measured  # every harm was known


def test_a_search_stopped_while_its_winner_comes_or_is_verified_is_whole_after_the_next(
    folder: Path, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants_room, "write_graph", partial(write_graph, inline_limit_bytes=0))
    replace = Path.replace

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def killed(path: Path, target: Path) -> Any:
        replace(path, target)
        if target == folder / stop[0]:
            raise KeyboardInterrupt

    stop = ["reports/tune.json"]
    with monkeypatch.context() as patch:  # that of an earlier search gives way
        (folder / "reports").mkdir(exist_ok=True)
        (folder / "reports" / "tune.json").write_text("{}", "utf-8")
        open_folder(folder).with_evidence({})
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(folder, minimum=["cos_min=0.9"], trials=4, calibration=few, probes=[few])
        open_folder(folder).check_hashes()
    stop[:] = ["config.json"]
    for room, name, instead in ((Path, "replace", killed), (tuning, "verify", stopped)):
        with monkeypatch.context() as patch:
            patch.setattr(room, name, instead)
            with pytest.raises(KeyboardInterrupt):
                tune(folder, minimum=["cos_min=0.9"], trials=4, calibration=few, probes=[few])
        assert b"model_tuned.onnx" in (folder / "config.json").read_bytes()  # which has a sidecar now
        open_folder(folder).check_hashes()
    found = tune(folder, minimum=["cos_min=0.9"], trials=4, calibration=few, probes=[few])
    assert found.report is not None
    opened = open_folder(folder)
    opened.check_hashes()
    assert opened.graph_path("tuned").is_file()
    assert {"config.json", *opened.variant("tuned").files} < opened.manifest.files.keys()


def test_a_variant_that_comes_leaves_a_whole_folder_wherever_it_is_stopped(
    copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, folder = Path.replace, copied("bert-mean")
    for good in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        copied("bert-mean")
        for end in ("", "_data"):
            (folder / "onnx" / f"model_tuned.onnx{end}").write_bytes(b"graph")
        variant = Variant("tuned", {}, ("onnx/model_tuned.onnx", "onnx/model_tuned.onnx_data"), "1.30")
        left = [good]

        def stopped(path: Path, target: Path, left: list[int] = left) -> Any:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stopped)
            try:
                added(open_folder(folder), variant)
            except KeyboardInterrupt:
                assert "tuned" not in open_folder(folder).manifest.variants
            else:
                break
        open_folder(folder).check_hashes()  # the manifest names nothing that is another
        added(open_folder(folder), variant)
    assert good == 3  # the manifest without config.json, config.json, the manifest
    opened = open_folder(folder)
    opened.check_hashes()
    assert {"config.json", *variant.files} < opened.manifest.files.keys()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["transformers.js_config"]["use_external_data_format"] == {"model_tuned.onnx": True}


def test_when_nothing_is_within_the_bounds_the_folder_has_the_evidence_only(folder: Path, few: Path) -> None:
    found = tune(folder, minimum=["cos_min=0.9"], maximum=["size_mb=0.0001"], trials=4, calibration=few, probes=[few])
    assert (found.winner, found.report) == (None, None)
    opened = open_folder(folder)
    opened.check_hashes()
    assert list(opened.manifest.variants) == ["fp32"]
    assert "reports/tune.json" in opened.manifest.files


def test_other_goals_choose_other_winners(folder: Path, few: Path) -> None:
    found = {
        goal: tune(folder, goal=goal, trials=4, calibration=few, probes=[few]) for goal in ("size", "speed", "fidelity")
    }
    trials = found["size"].trials
    sizes = {key: f["size_mb"] for key, f in trials.items()}
    assert found["size"].winner == min(sizes, key=sizes.__getitem__)
    assert found["speed"].winner == max(trials, key=lambda key: trials[key]["tokens_per_s"])
    assert found["fidelity"].winner == max(trials, key=lambda key: trials[key]["cos_min"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"minimum": ["size_mb=3"]}, "--min 'size_mb=3'.*cos_min"),
        ({"maximum": ["cos_min=0.9"]}, "--max 'cos_min=0.9'.*size_mb"),
        ({"minimum": ["cos_min=high"]}, "the bound 'high'"),
        ({"goal": "beauty"}, "a goal of size, speed, fidelity"),
        ({"trials": 1}, "at least 4 trials"),
    ],
)
def test_what_cannot_be_asked_is_said(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        tune(folder, **options)


def test_a_folder_without_its_reference_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("bert-mean")
    open_folder(folder).without("fp32")
    with pytest.raises(ModelFolderError, match="fp32"):
        tune(folder)
