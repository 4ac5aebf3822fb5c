"""A Hub id wherever a folder is taken: in this process, on the server of tests/test_pull.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

import featherbed
from featherbed.check.page import write_pages
from featherbed.folder import open_folder
from featherbed.hub.client import default_root
from featherbed.hub.links import leads_out
from featherbed.hub.store import Store
from featherbed.pipeline.build import build
from featherbed.pipeline.built import _move
from featherbed.pipeline.pull import pull
from featherbed.pipeline.ready import ready
from featherbed.pipeline.stage import Weights, staged
from featherbed.run import embedder
from featherbed.run.session import Memory
from tests.hub_server import COMMIT, Hub, Repository
from tests.test_pull import CHECKPOINT, MODEL, files_of, hub, shared, surrounded

__all__ = ["hub", "surrounded"]  # fixtures
TEXTS = ["a frog in the rain", "the roof"]


def test_a_folder_is_left_as_it_is(folders: dict[str, Path]) -> None:
    assert ready(folders["bert-cls"], "q4") == (folders["bert-cls"], "q4")
    assert ready("nothing/of/that/name") == ("nothing/of/that/name", "auto")


def test_ready_variants_are_used_as_they_are(hub: Hub, folders: dict[str, Path]) -> None:
    for variant in ("auto", "q4"):
        here = featherbed.Embedder(MODEL, variant)
        there = featherbed.Embedder(folders["qwen3-tied"], variant)
        assert here.variant == there.variant
        assert np.array_equal(here.encode(TEXTS), there.encode(TEXTS))
    assert "onnx/model.onnx" not in hub.served


def test_auto_is_the_best_of_all_that_are_published_whatever_is_here(hub: Hub) -> None:
    pull(MODEL, ["q4"])
    before = hub.served["onnx/model_int8.onnx"]
    assert featherbed.Embedder(MODEL).variant == "int8"
    assert hub.served["onnx/model_int8.onnx"] > before


@pytest.mark.usefixtures("hub")
def test_a_plain_checkpoint_is_built_once_and_further_variants_come_beside_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []

    def counted(source: str, out: Path, variants: list[str], **others: Any) -> Any:
        made.append(variants)
        return build(source, out, variants, **others)

    monkeypatch.setattr("featherbed.pipeline.built.build", counted)
    for variant in ("q4", "q4", "fp32", "int8-dynamic", "q4"):
        here = featherbed.Embedder(CHECKPOINT, variant)
        assert np.array_equal(here.encode(TEXTS), featherbed.Embedder(folders["qwen3-tied"], variant).encode(TEXTS))
    assert made == [["q4"], ["int8-dynamic"]]
    folder = Store(default_root()).built(CHECKPOINT, COMMIT)
    model = open_folder(folder)
    model.check_hashes()
    assert list(model.manifest.variants) == ["fp32", "q4", "int8-dynamic"]
    assert all(one.passed is not None for one in model.manifest.variants.values())
    assert "int8-dynamic" in (folder / "README.md").read_text("utf-8")
    assert (model.manifest.origin.base_model, model.manifest.origin.revision) == (CHECKPOINT, COMMIT)
    assert [path.name for path in folder.parent.iterdir() if ".tmp-" in path.name] == []


def test_a_variant_that_comes_beside_others_leaves_a_whole_folder_wherever_it_is_stopped(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = open_folder(folders["bert-mean"]).manifest.variants["q4"]
    replace = Path.replace
    for good in range(30):
        source, out = (
            Path(shutil.copytree(folders["bert-mean"], tmp_path / f"{end}{good}")) for end in ("source", "out")
        )
        write_pages(open_folder(out).without("q4"))
        left = [good]

        def stopped(path: Path, target: Path, left: list[int] = left) -> Any:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stopped)
            try:
                _move(open_folder(source), "q4", out)
            except KeyboardInterrupt:
                open_folder(out).check_hashes()
            else:
                break
    assert good > 4
    opened = open_folder(out)
    opened.check_hashes()
    assert opened.manifest.variants["q4"] == variant
    assert {"README.md", "report.html", "config.json"} < opened.manifest.files.keys()


@pytest.mark.parametrize("layout", ["links", "links to a shared store"])
@pytest.mark.parametrize("memory", [Memory(), Memory(cache=False)], ids=["prepacked", "as it is"])
def test_a_snapshot_of_huggingface_hub_is_a_folder_like_any_other(
    hub: Hub, folders: dict[str, Path], surrounded: Path, layout: str, memory: Memory
) -> None:
    place = surrounded / "beside"
    place.mkdir()
    staged(open_folder(folders["qwen3-tied"]), ["fp32", "q4"], Weights.BESIDE, place)
    hub.repositories[MODEL] = Repository(files_of(place))
    snapshot = Path(huggingface_hub.snapshot_download(MODEL, endpoint=hub.url))
    if layout != "links":
        shared(Path(constants.HF_HUB_CACHE))
    assert (snapshot / "onnx" / "model.onnx_data").is_symlink()
    assert leads_out(open_folder(snapshot)) == (layout != "links")
    for variant in ("fp32", "q4"):
        here = featherbed.Embedder(snapshot, variant, memory=memory)
        there = embedder.Embedder(place, variant, memory=memory)
        assert np.array_equal(here.encode(TEXTS), there.encode(TEXTS))
