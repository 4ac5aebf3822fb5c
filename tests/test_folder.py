"""Model folders: published whole or not at all, and every file in them the one of the manifest."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherbed.errors import FeatherbedError, ModelFolderError, OptionError, OutputError, SpecError
from featherbed.folder import (
    FORMAT,
    MANIFEST,
    FileRecord,
    Manifest,
    ModelFolder,
    Variant,
    dump,
    file_record,
    graph_name,
    open_folder,
    publish,
    sidecar_name,
    write_text,
)
from featherbed.recipe import RECIPES
from featherbed.spec import read_spec
from tests.conftest import FIXTURES, NAMES

Copied = Callable[[str], Path]


def refused(kind: type[FeatherbedError], act: Callable[[], object]) -> str:
    """The one line of the error that ``act`` ends in."""
    with pytest.raises(FeatherbedError) as caught:
        act()
    assert type(caught.value) is kind
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert ": expected " in text
    assert ", found " in text
    assert caught.value.exit_code == 2
    return text


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path under a folder, files with what they hold."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def model(folder: Path, mark: str) -> None:
    """Something that counts as a model folder."""
    (folder / "onnx").mkdir(parents=True)
    (folder / MANIFEST).write_text(mark, "utf-8")
    (folder / "onnx" / f"{mark}.onnx").write_text(mark, "utf-8")


# publishing


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "not" / "yet" / "m"
    with publish(out) as folder:
        model(folder, "new")
        assert not out.exists()
    assert tree(out) == {MANIFEST: b"new", "onnx": None, "onnx/new.onnx": b"new"}
    assert list(out.parent.iterdir()) == [out]


def test_an_old_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "m"
    model(out, "old")
    with publish(out) as folder:
        model(folder, "new")
        assert tree(out) == {MANIFEST: b"old", "onnx": None, "onnx/old.onnx": b"old"}
    assert tree(out) == {MANIFEST: b"new", "onnx": None, "onnx/new.onnx": b"new"}
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with publish(tmp_path / "m") as folder:
        model(folder, "new")
    assert (tmp_path / "m" / MANIFEST).is_file()


@pytest.mark.parametrize("foreign", ["a folder with other files", "a file", "a folder with only folders"])
def test_what_is_not_ours_is_refused_and_untouched(tmp_path: Path, foreign: str) -> None:
    out = tmp_path / "m"
    if foreign == "a file":
        out.write_text("thesis", "utf-8")
    else:
        (out / "chapters").mkdir(parents=True)
        if foreign == "a folder with other files":
            (out / "thesis.tex").write_text("thesis", "utf-8")
    before = tree(tmp_path)

    def act() -> None:
        with publish(out):
            pytest.fail("entered")

    assert "a model folder to replace" in refused(OptionError, act)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), KeyboardInterrupt(), SystemExit(3), OptionError("a", expected="b", found="c", remedy="d")],
)
@pytest.mark.parametrize("old", [True, False])
def test_nothing_is_left_of_a_block_that_ends_badly(tmp_path: Path, old: bool, error: BaseException) -> None:
    out = tmp_path / "m"
    if old:
        model(out, "old")
    before = tree(tmp_path)

    def act() -> None:
        with publish(out) as folder:
            model(folder, "new")
            raise error

    with pytest.raises(type(error)) as caught:
        act()
    assert caught.value is error
    assert tree(tmp_path) == before


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_a_disk_that_fails_inside_the_block_is_an_output_error(tmp_path: Path, old: bool, number: int) -> None:
    out = tmp_path / "m"
    if old:
        model(out, "old")
    before = tree(tmp_path)

    def act() -> None:
        with publish(out) as folder:
            model(folder, "new")
            raise OSError(number, os.strerror(number))

    assert os.strerror(number) in refused(OutputError, act)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("parent", ["a file", "under a file"])
def test_a_parent_that_cannot_hold_a_folder_is_an_output_error(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("thesis", "utf-8")
    out = tmp_path / "file" / "m" if parent == "a file" else tmp_path / "file" / "a" / "m"

    def act() -> None:
        with publish(out):
            pytest.fail("entered")

    refused(OutputError, act)
    assert tree(tmp_path) == {"file": b"thesis"}


@pytest.mark.parametrize("length", [252, 255, 300])
@pytest.mark.parametrize("place", ["the folder", "its parent"])
def test_a_name_too_long_for_the_disk_is_an_output_error(tmp_path: Path, place: str, length: int) -> None:
    long = "m" * (length if place == "the folder" else 300)
    out = tmp_path / long if place == "the folder" else tmp_path / long / "m"

    def act() -> None:
        with publish(out) as folder:
            model(folder, "new")

    refused(OutputError, act)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("which", [1, 2])
def test_a_failure_between_the_two_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int, error: BaseException
) -> None:
    out = tmp_path / "m"
    model(out, "old")
    before = tree(tmp_path)
    rename, count = Path.rename, 0

    def failing(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == which:
            raise error
        return rename(path, target)

    def act() -> None:
        with publish(out) as folder:
            model(folder, "new")

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        act()
    monkeypatch.undo()
    assert tree(tmp_path) == before


def test_what_a_killed_build_left_does_not_stop_the_next_one(tmp_path: Path) -> None:
    out = tmp_path / "m"
    model(tmp_path / "m.tmp-1", "half")
    model(tmp_path / "m.old-1", "old")
    with publish(out) as folder:
        model(folder, "new")
    assert (out / MANIFEST).read_text("utf-8") == "new"


# small files


@given(text=st.text(st.characters(codec="utf-8")))
def test_a_small_file_holds_the_bytes_it_was_given(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "a.json"
    path.write_text("old", "utf-8")
    write_text(path, text)
    assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_small_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old", "utf-8")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if place == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    assert os.strerror(errno.ENOSPC) in refused(OutputError, lambda: write_text(path, "new"))
    assert tree(tmp_path) == {"a.json": b"old"}


def test_a_text_that_utf8_cannot_carry_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old", "utf-8")
    with pytest.raises((FeatherbedError, UnicodeEncodeError)):
        write_text(path, "\ud800")
    assert tree(tmp_path) == {"a.json": b"old"}


def test_json_is_readable_stable_and_without_nan() -> None:
    assert dump({"b": "ü", "a": [1]}) == '{\n  "b": "ü",\n  "a": [\n    1\n  ]\n}\n'
    with pytest.raises(ValueError, match="Out of range"):
        dump({"a": float("nan")})


def test_names_follow_what_transformers_js_looks_for() -> None:
    assert [graph_name(r.suffix) for r in RECIPES.values()][:3] == [
        "onnx/model.onnx",
        "onnx/model_int8.onnx",
        "onnx/model_int8_block.onnx",
    ]
    assert sidecar_name("model_q4.onnx") == "model_q4.onnx_data"


# the manifest


def manifest() -> Manifest:
    return Manifest(
        name="m",
        version="0.1.0",
        source={"model.safetensors": "0" * 64},
        spec=read_spec(FIXTURES / "qwen3-tied"),
        variants={
            "fp32": Variant("fp32", RECIPES["fp32"].to_json(), ("onnx/model.onnx",), "1.27", True),
            "q4": Variant("q4", RECIPES["q4"].to_json(), ("onnx/model_q4.onnx", "onnx/model_q4.onnx_data"), "1.27"),
        },
        files={
            name: FileRecord("ab" * 32, size)
            for name, size in [("onnx/model.onnx", 7), ("onnx/model_q4.onnx", 3), ("onnx/model_q4.onnx_data", 40)]
        },
    )


def put(folder: Path, values: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(values if isinstance(values, str) else json.dumps(values), "utf-8")
    return folder


def test_a_manifest_goes_to_the_disk_and_back(tmp_path: Path) -> None:
    folder = put(tmp_path / "m", dump(manifest().to_json()))
    found = open_folder(folder)
    assert found == ModelFolder(folder, manifest())
    assert json.loads(dump(found.manifest.to_json())) == manifest().to_json()
    assert found.manifest.size_bytes("q4") == 43


@pytest.mark.parametrize("name", NAMES)
def test_a_built_manifest_goes_to_the_disk_and_back(folders: dict[str, Path], name: str) -> None:
    found = open_folder(folders[name])
    assert dump(found.manifest.to_json()) == (folders[name] / MANIFEST).read_text("utf-8")
    assert set(found.manifest.variants) == set(RECIPES)
    on_disk = {path.relative_to(folders[name]).as_posix() for path in folders[name].rglob("*") if path.is_file()}
    assert set(found.manifest.files) == on_disk - {MANIFEST}
    found.check_hashes()


@pytest.mark.parametrize("version", [2, 99, 0, "1", None, [1]], ids=repr)
def test_a_format_of_the_future_is_refused(tmp_path: Path, version: object) -> None:
    folder = put(tmp_path / "m", {**manifest().to_json(), "format": version})
    line = refused(ModelFolderError, lambda: open_folder(folder))
    assert f"format {version!r}, where this version reads {FORMAT}" in line


@pytest.mark.parametrize(
    "path",
    [
        "../outside.onnx",
        "onnx/../../outside.onnx",
        "..",
        "/etc/passwd",
        "//server/share",
        "C:\\x.onnx",
        "C:/x.onnx",
        "onnx\\..\\..\\x.onnx",
        "file:///etc/passwd",
        "",
    ],
)
@pytest.mark.parametrize("place", ["files", "variants"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str, place: str) -> None:
    values = manifest().to_json()
    if place == "files":
        values["files"][path] = {"sha256": "0" * 64, "size_bytes": 1}
    else:
        values["variants"]["fp32"]["files"] = [path]
    line = refused(ModelFolderError, lambda: open_folder(put(tmp_path / "m", values)))
    assert "leaves the folder" in line


@pytest.mark.parametrize("name", ["../../x", "..\\x", "a/../../../x"])
def test_a_variant_whose_report_would_leave_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    values = manifest().to_json()
    values["variants"][name] = values["variants"].pop("fp32")
    assert "leaves the folder" in refused(ModelFolderError, lambda: open_folder(put(tmp_path / "m", values)))


def without(*keys: str) -> dict[str, Any]:
    """The manifest's values without one of them, by the way to it."""
    values = manifest().to_json()
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return values


@pytest.mark.parametrize(
    "keys",
    [
        ("format",),
        ("name",),
        ("featherbed",),
        ("source",),
        ("spec",),
        ("variants",),
        ("files",),
        ("variants", "fp32", "files"),
        ("variants", "fp32", "recipe"),
        ("variants", "fp32", "passed"),
        ("files", "onnx/model.onnx", "sha256"),
        ("files", "onnx/model.onnx", "size_bytes"),
    ],
)
def test_a_manifest_that_lacks_a_key_is_refused_by_that_key(tmp_path: Path, keys: tuple[str, ...]) -> None:
    line = refused(ModelFolderError, lambda: open_folder(put(tmp_path / "m", without(*keys))))
    assert MANIFEST in line
    assert repr(keys[-1]) in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", []),
        ("files", {"onnx/model.onnx": "7"}),
        ("files", {"onnx/model.onnx": {"sha256": "0", "size_bytes": "many"}}),
        ("files", {"onnx/model.onnx": {"sha256": "0", "size_bytes": float("inf")}}),
        ("variants", ["fp32"]),
        ("variants", {"fp32": None}),
        ("variants", {"fp32": {"recipe": {}, "files": [7], "least_onnxruntime": "1.27", "passed": None}}),
        ("source", 7),
    ],
    ids=str,
)
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, key: str, value: object) -> None:
    folder = put(tmp_path / "m", {**manifest().to_json(), key: value})
    assert MANIFEST in refused(ModelFolderError, lambda: open_folder(folder))


@pytest.mark.parametrize("change", [{"pooling": "max"}, {"more": 1}])
def test_a_spec_in_the_manifest_that_is_not_ours_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    values = manifest().to_json()
    values["spec"] |= change
    refused(SpecError, lambda: open_folder(put(tmp_path / "m", values)))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "<html>\n</html>", "version https://git-lfs.github.com/spec/v1\nsize 3\n", "[" * 99_999],
)
def test_a_manifest_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    refused(ModelFolderError, lambda: open_folder(put(tmp_path / "m", text)))


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_manifest_is_no_model_folder(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "m").mkdir()
    line = refused(ModelFolderError, lambda: open_folder(tmp_path / "m"))
    assert ("no featherbed.json" if there else "no such folder") in line
    assert "featherbed build" in line


# its files


def test_a_flipped_bit_anywhere_is_found(copied: Copied) -> None:
    folder = open_folder(copied("bert-cls"))
    rng = np.random.default_rng(0)
    for name, record in folder.manifest.files.items():
        path = folder.path / name
        whole = path.read_bytes()
        for at in {0, record.size_bytes - 1, *rng.integers(0, record.size_bytes, 6).tolist()}:
            raw = bytearray(whole)
            raw[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(raw)
            line = refused(ModelFolderError, folder.check_hashes)
            assert line.startswith(f"{path}: expected sha256 {record.sha256[:12]}… as {MANIFEST} says")
        path.write_bytes(whole)
    folder.check_hashes()


def test_only_the_files_asked_for_are_read(copied: Copied) -> None:
    folder = open_folder(copied("bert-cls"))
    raw = bytearray((folder.path / "onnx" / "model_q4.onnx").read_bytes())
    raw[-1] ^= 1
    (folder.path / "onnx" / "model_q4.onnx").write_bytes(raw)
    folder.check_hashes(iter(folder.variant("int8").files))
    refused(ModelFolderError, lambda: folder.check_hashes(iter(folder.variant("q4").files)))


@pytest.mark.parametrize("part", range(0, 64, 7))
def test_a_cut_file_is_found_without_reading_it(copied: Copied, part: int) -> None:
    folder = open_folder(copied("bert-cls"))
    path = folder.graph_path("int8")
    assert path == folder.path / "onnx" / "model_int8.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * part // 64])
    line = refused(ModelFolderError, lambda: folder.graph_path("int8"))
    assert f"expected {len(whole)} bytes, found {len(whole) * part // 64} bytes" in line
    assert folder.graph_path("fp32").is_file()


def test_a_file_that_grew_or_went_is_found(copied: Copied) -> None:
    folder = open_folder(copied("bert-cls"))
    path = folder.path / "onnx" / "model.onnx"
    with path.open("ab") as file:
        file.write(b"\0")
    refused(ModelFolderError, lambda: folder.graph_path("fp32"))
    path.unlink()
    assert "no such file" in refused(ModelFolderError, lambda: folder.graph_path("fp32"))
    assert "no such file" in refused(ModelFolderError, folder.check_hashes)


def test_a_missing_sidecar_is_found_with_its_graph(tmp_path: Path) -> None:
    folder = open_folder(put(tmp_path / "m", manifest().to_json()))
    (folder.path / "onnx").mkdir()
    (folder.path / "onnx" / "model_q4.onnx").write_bytes(b"abc")
    assert "model_q4.onnx_data" in refused(ModelFolderError, lambda: folder.graph_path("q4"))
    (folder.path / "onnx" / "model_q4.onnx_data").write_bytes(bytes(40))
    assert folder.graph_path("q4") == folder.path / "onnx" / "model_q4.onnx"


def test_a_variants_file_without_a_record_is_refused(tmp_path: Path) -> None:
    values = manifest().to_json()
    del values["files"]["onnx/model.onnx"]
    folder = open_folder(put(tmp_path / "m", values))
    (folder.path / "onnx").mkdir()
    (folder.path / "onnx" / "model.onnx").write_bytes(b"planted")
    assert "a file of the manifest" in refused(ModelFolderError, lambda: folder.graph_path("fp32"))


def test_a_variant_without_files_is_refused(tmp_path: Path) -> None:
    values = manifest().to_json()
    values["variants"]["fp32"]["files"] = []
    refused(ModelFolderError, lambda: open_folder(put(tmp_path / "m", values)).graph_path("fp32"))


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    folder = open_folder(put(tmp_path / "m", manifest().to_json()))
    assert "one of fp32, q4" in refused(OptionError, lambda: folder.variant("int8"))


def test_evidence_sets_verdicts_and_records_its_files(copied: Copied) -> None:
    folder = open_folder(copied("bert-cls"))
    assert {v.passed for v in folder.manifest.variants.values()} == {None}
    folder.report_path("int8").parent.mkdir(exist_ok=True)
    folder.report_path("int8").write_text("{}\n", "utf-8")
    (folder.path / "README.md").write_text("# new\n", "utf-8")
    folder.with_evidence({"int8": True, "q4": False})
    again = open_folder(folder.path)
    passed = {name: variant.passed for name, variant in again.manifest.variants.items()}
    assert passed == {**dict.fromkeys(RECIPES), "int8": True, "q4": False}
    assert again.manifest.files["reports/int8.json"] == file_record(folder.report_path("int8"))
    again.check_hashes()
    assert again.with_evidence({}).manifest == again.manifest
