"""A foreign folder, mended: every rule that repair answers for holds, weights and vectors are as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import external_data_helper, numpy_helper

from featherbed.check.conform import conform
from featherbed.errors import OptionError, OutputError
from featherbed.folder import open_folder
from featherbed.pipeline import repair as room
from featherbed.pipeline.repair import repair
from featherbed.run.embedder import Embedder
from tests.foreign_folder import edit, foreign, hashes, with_sidecar

Copy = Callable[[str], Path]
INT8 = "onnx/model_int8.onnx"


def broken(folder: Path) -> set[str]:
    return {f.rule.id for f in conform(folder).findings if f.rule.mends and f.rule.fails}


def tensors(path: Path) -> dict[str, bytes]:
    """Bytes of every initializer; not by onnx.load, which refuses a sidecar with several hard links."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        said = {entry.key: entry.value for entry in tensor.external_data}
        if said:
            data = path.with_name(said["location"]).read_bytes()[int(said.get("offset", 0)) :]
            found[tensor.name] = data[: int(said["length"])]
        else:
            found[tensor.name] = numpy_helper.to_array(tensor).tobytes()
    return found


@pytest.mark.parametrize("name", ["bert-mean", "qwen3-tied"])
def test_a_foreign_folder_conforms_after_repair_and_gives_the_same_vectors(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    source = foreign(folders[name], tmp_path / "theirs")
    before, out = hashes(source), tmp_path / "mended"
    assert {"sidecar-name", "max-length", "padding", "modules", "special-tokens"} <= broken(source)
    done = repair(source, out)
    assert broken(out) == set()
    assert hashes(source) == before
    assert {change.file for change in done.changes} >= {
        "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json", INT8,
        "special_tokens_map.json", "sentence_bert_config.json",
    }  # fmt: skip
    assert all(change.why for change in done.changes)
    assert tensors(out / INT8) == tensors(source / INT8)
    assert (out / "onnx" / "model.onnx").stat().st_ino == (source / "onnx" / "model.onnx").stat().st_ino
    for file, variant in (("model.onnx", "fp32"), ("model_int8.onnx", "int8")):
        texts = ["rain", "a much longer text than nine tokens, to see that nothing cuts it any more"]
        expected = Embedder(folders[name], variant).encode(texts)
        assert np.abs(Embedder(out / "onnx" / file).encode(texts) - expected).max() <= 1e-6


def test_a_second_repair_changes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    source = foreign(folders["qwen3-tied"], tmp_path / "theirs")
    out = tmp_path / "mended"
    repair(source, out)
    before = hashes(out)
    assert repair(out, in_place=True).changes == ()
    assert repair(out, dry_run=True).changes == ()
    assert hashes(out) == before
    repair(out, tmp_path / "again")
    assert hashes(tmp_path / "again") == before


def test_what_we_build_needs_no_repair_but_the_architecture_of_these_checkpoints(folders: dict[str, Path]) -> None:
    for name in ("bert-mean", "bert-cls", "qwen3-tied", "qwen3-biased"):
        found = repair(folders[name], dry_run=True).changes
        assert [change.what.split()[0] for change in found] == ["architectures"], name


def test_a_dry_run_says_the_same_and_writes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    source = foreign(folders["bert-cls"], tmp_path / "theirs")
    before = hashes(tmp_path)
    told = repair(source, dry_run=True)
    assert told.folder is None
    assert hashes(tmp_path) == before
    assert repair(source, tmp_path / "mended").changes == told.changes


def test_in_place_is_whole_or_not_at_all(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = foreign(folders["bert-mean"], tmp_path / "theirs")
    before = hashes(source)
    moved = room._moved

    def fails(*_: object) -> tuple[str, ...]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "_moved", fails)
    with pytest.raises(OutputError, match="No space left"):
        repair(source, in_place=True)
    assert hashes(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    monkeypatch.setattr(room, "_moved", moved)
    repair(source, in_place=True)
    assert broken(source) == set()
    names = [path.name for path in (source / "onnx").iterdir()]
    onnx_files = {name for name in names if name.startswith("model_int8.onnx") or "data" in name}
    assert onnx_files == {"model_int8.onnx", "model_int8.onnx_data"}


def test_an_end_token_that_is_missing_is_appended(folders: dict[str, Path], tmp_path: Path) -> None:
    source = foreign(folders["qwen3-tied"], tmp_path / "theirs")
    edit(source / "tokenizer.json", lambda t: {**t, "post_processor": None})
    edit(
        source / "config.json", lambda c: {**c, "eos_token_id": open_folder(folders["qwen3-tied"]).manifest.spec.eos_id}
    )
    repair(source, tmp_path / "mended")
    ours = Embedder(folders["qwen3-tied"], "fp32").ids(["rain", ""])
    assert Embedder(tmp_path / "mended" / "onnx" / "model.onnx").ids(["rain", ""]) == ours
    import tokenizers  # what others read, without our own care for the end

    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "mended" / "tokenizer.json"))
    assert [theirs.encode(text).ids for text in ("rain", "")] == ours


def test_weights_in_several_files_come_into_one(folders: dict[str, Path], tmp_path: Path) -> None:
    source = foreign(folders["bert-mean"], tmp_path / "theirs")
    graph = source / "onnx" / "model.onnx"
    expected = tensors(graph)
    model = onnx.load(graph)
    external_data_helper.convert_model_to_external_data(model, all_tensors_to_one_file=False, size_threshold=128)
    onnx.save(model, graph)
    assert len(list(graph.parent.iterdir())) > 10
    repair(source, tmp_path / "mended")
    mended = tmp_path / "mended" / "onnx" / "model.onnx"
    assert tensors(mended) == expected
    said = {e.value for t in onnx.load(mended, load_external_data=False).graph.initializer for e in t.external_data
            if e.key == "location"}  # fmt: skip
    assert said == {"model.onnx_data"}
    config = json.loads((tmp_path / "mended" / "config.json").read_text("utf-8"))
    assert config["transformers.js_config"]["use_external_data_format"] == {
        "model.onnx": True, "model_int8.onnx": True,
    }  # fmt: skip


def test_a_manifest_of_ours_is_kept_true(copied: Copy, tmp_path: Path) -> None:
    source = copied("bert-mean")
    sidecar = with_sidecar(source, INT8, "int8.data")
    repair(source, tmp_path / "mended")
    model = open_folder(tmp_path / "mended")
    assert model.manifest.variants["int8"].files == (INT8, f"{INT8}_data")
    model.check_hashes()
    assert (tmp_path / "mended" / f"{INT8}_data").read_bytes() == sidecar.read_bytes()
    assert Embedder(tmp_path / "mended", "int8").encode("rain").shape == (48,)


def test_files_that_disagree_about_pooling_need_a_word(folders: dict[str, Path], tmp_path: Path) -> None:
    source = foreign(folders["bert-mean"], tmp_path / "theirs")
    edit(source / "1_Pooling" / "config.json", lambda _: {"pooling_mode": "mean", "pooling_mode_cls_token": True})
    done = repair(source, tmp_path / "mended")
    assert "pooling" in {finding.rule.id for finding in done.left}
    repair(source, tmp_path / "told", pooling="mean")
    assert broken(tmp_path / "told") == set()


def test_nowhere_and_two_places_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="one place"):
        repair(folders["bert-mean"])
    with pytest.raises(OptionError, match="one place"):
        repair(folders["bert-mean"], tmp_path / "x", in_place=True)
