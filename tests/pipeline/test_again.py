"""int8 once more under the name that others load by default: the same weights, counted once, known to the manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from featherbed.errors import ModelFolderError
from featherbed.folder import MANIFEST, Variant, open_folder
from featherbed.hub.fetch import restricted
from featherbed.make.write import write_again, write_graph
from featherbed.pipeline.stage import Weights, staged
from tests.conftest import made_by, upstream

FILE, AGAIN = "onnx/model_int8.onnx", "onnx/model_quantized.onnx"


def vectors(path: Path) -> npt.NDArray[np.float32]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    known = upstream("bert-mean")
    feeds = {"input_ids": known.ids, "attention_mask": known.mask, "token_type_ids": np.zeros_like(known.ids)}
    return np.asarray(session.run(["sentence_embedding"], feeds)[0])


def test_a_build_writes_it_as_the_same_file_and_counts_it_once(folders: dict[str, Path]) -> None:
    folder = open_folder(folders["bert-mean"])
    int8 = folder.variant("int8")
    assert (int8.files, int8.again) == ((FILE,), (AGAIN,))
    assert folder.manifest.files[FILE] == folder.manifest.files[AGAIN]
    assert (folder.path / FILE).read_bytes() == (folder.path / AGAIN).read_bytes()
    assert folder.manifest.size_bytes("int8") == (folder.path / FILE).stat().st_size
    assert all(not one.again for name, one in folder.manifest.variants.items() if name != "int8")


def test_a_copy_that_was_changed_is_noticed(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = staged(open_folder(folders["bert-mean"]), ["fp32", "int8"], Weights.AS_BUILT, tmp_path)
    data = (tmp_path / AGAIN).read_bytes()
    (tmp_path / AGAIN).unlink()
    (tmp_path / AGAIN).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ModelFolderError, match="model_quantized"):
        folder.check_hashes()


@pytest.mark.parametrize("weights", list(Weights))
def test_what_is_pushed_has_it_with_weights_where_the_others_are(
    folders: dict[str, Path], tmp_path: Path, weights: Weights
) -> None:
    folder = staged(open_folder(folders["bert-mean"]), ["fp32", "int8"], weights, tmp_path)
    folder.check_hashes()
    beside = ("", "_data") if weights is Weights.BESIDE else ("",)
    assert folder.variant("int8").again == tuple(AGAIN + end for end in beside)
    assert np.array_equal(vectors(tmp_path / AGAIN), vectors(tmp_path / FILE))
    assert {name for name in folder.manifest.files if "quantized" in name} == {AGAIN + end for end in beside}


def test_with_a_sidecar_it_has_one_of_its_own(tmp_path: Path) -> None:
    write_graph(made_by("bert-mean", "int8"), tmp_path / "model_int8.onnx", {}, inline_limit_bytes=0)
    records = write_again(tmp_path / "model_int8.onnx", tmp_path / "model_quantized.onnx")
    assert list(records) == ["model_quantized.onnx", "model_quantized.onnx_data"]
    expected = vectors(tmp_path / "model_int8.onnx")
    for name in ("model_int8.onnx", "model_int8.onnx_data"):
        (tmp_path / name).unlink()
    assert np.array_equal(vectors(tmp_path / "model_quantized.onnx"), expected)


def test_nothing_is_fetched_twice(folders: dict[str, Path]) -> None:
    manifest = open_folder(folders["bert-mean"]).manifest
    left = restricted(manifest, ["fp32", "int8"])
    assert AGAIN not in left.files
    assert left.variants["int8"].again == ()
    assert {FILE, "onnx/model.onnx"} <= left.files.keys()


def test_manifests_without_it_are_read_and_written_as_they_were(folders: dict[str, Path], tmp_path: Path) -> None:
    plain = json.loads((folders["bert-cls"] / MANIFEST).read_text("utf-8"))
    assert plain["variants"]["int8"].pop("again") == [AGAIN]
    del plain["files"][AGAIN]
    (tmp_path / MANIFEST).write_text(json.dumps(plain), "utf-8")
    manifest = open_folder(tmp_path).manifest
    assert manifest.variants["int8"].again == ()
    assert manifest.to_json() == plain
    plain["variants"]["int8"]["again"] = ["../outside"]
    (tmp_path / MANIFEST).write_text(json.dumps(plain), "utf-8")
    with pytest.raises(ModelFolderError, match="outside"):
        open_folder(tmp_path)


def test_a_variant_without_files_of_that_kind_says_nothing_of_them() -> None:
    one = Variant("q4", {}, ("onnx/model_q4.onnx",), "1.27")
    assert "again" not in one.to_json()
