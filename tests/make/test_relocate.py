"""Weights from a graph's file into a sidecar and back: the files that write_graph makes, and not a byte else."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from featherbed.errors import ModelFolderError, OptionError, OutputError
from featherbed.folder import FileRecord
from featherbed.make import relocate as room
from featherbed.make.relocate import relocate
from featherbed.make.write import Sink, write_graph
from featherbed.recipe import RECIPES
from tests.conftest import NAMES, made_by

SAID = {"featherbed.recipe": "{}", "z": "ü"}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors(path: Path) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Name → type, shape and bytes of every weight of a graph."""
    model = onnx.load(str(path))
    return {w.name: (w.data_type, tuple(w.dims), w.raw_data) for w in model.graph.initializer}


def forms(folder: Path, name: str, recipe: str) -> tuple[Path, Path]:
    """A graph as write_graph writes it: in one file, and with a sidecar."""
    found = folder / "one" / "model_x.onnx", folder / "two" / "model_x.onnx"
    for path, limit in zip(found, (2**40, 0), strict=True):
        path.parent.mkdir(parents=True)
        write_graph(made_by(name, recipe), path, SAID, inline_limit_bytes=limit)
    return found


def small(path: Path, *weights: TensorProto) -> Path:
    """y = x, and weights that nobody reads."""
    port = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", port[:1], port[1:], list(weights))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def weight(name: str, size: int) -> TensorProto:
    return numpy_helper.from_array(np.arange(size, dtype=np.uint8), name)


# what is written


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", NAMES)
def test_weights_that_moved_lie_as_if_they_had_been_written_there(tmp_path: Path, name: str, recipe: str) -> None:
    one, two = forms(tmp_path, name, recipe)
    for source, expected, beside in ((one, two, True), (two, one, False)):
        before, target = files(source.parent), tmp_path / f"{beside}" / source.name
        target.parent.mkdir()
        records = relocate(source, target, beside)
        assert files(target.parent) == files(expected.parent)
        assert records is not None
        assert list(records) == [path.name for path in sorted(expected.parent.iterdir())]
        for file, raw in files(target.parent).items():
            assert records[file] == FileRecord(hashlib.sha256(raw).hexdigest(), len(raw))
        assert files(source.parent) == before
        assert tensors(target) == tensors(source)


@pytest.mark.parametrize("name", NAMES)
def test_out_and_back_again_every_byte_is_as_it_was(tmp_path: Path, name: str) -> None:
    built, _ = forms(tmp_path, name, "int8")
    out, back = tmp_path / "out" / built.name, tmp_path / "back" / built.name
    for source, target, beside in ((built, out, True), (out, back, False)):
        target.parent.mkdir()
        relocate(source, target, beside)
    assert tensors(built) == tensors(out) == tensors(back)
    assert back.read_bytes() == built.read_bytes()


def test_weights_that_lie_right_are_left_alone(tmp_path: Path) -> None:
    one, two = forms(tmp_path, "bert-cls", "q4")
    tiny = small(tmp_path / "tiny" / "model.onnx", weight("a", 127), weight("b", 0))
    bare = small(tmp_path / "bare" / "model.onnx")
    (tmp_path / "new").mkdir()
    for source, beside in ((one, False), (two, True), (tiny, True), (tiny, False), (bare, True), (bare, False)):
        assert relocate(source, tmp_path / "new" / "model.onnx", beside) is None
    assert files(tmp_path / "new") == {}


def test_weights_of_both_kinds_end_in_one_place(tmp_path: Path) -> None:
    model = onnx.load(str(small(tmp_path / "a" / "model.onnx", weight("out", 300), weight("in", 200), weight("no", 9))))
    listed = helper.make_tensor("listed", TensorProto.FLOAT, [64], np.ones(64, np.float32).tolist())  # no raw bytes
    model.graph.initializer.append(listed)
    raw = model.graph.initializer[0].raw_data
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    for key, value in (("location", "other.bin"), ("offset", "5"), ("length", "300")):
        model.graph.initializer[0].external_data.add(key=key, value=value)
    (tmp_path / "a" / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "a" / "other.bin").write_bytes(b"12345" + raw + b"end")
    expected = tensors(tmp_path / "a" / "model.onnx")
    assert expected["out"][2] == raw
    for name, beside in (("beside", True), ("inside", False)):
        (tmp_path / name).mkdir()
        assert relocate(tmp_path / "a" / "model.onnx", tmp_path / name / "model_q.onnx", beside)
        assert tensors(tmp_path / name / "model_q.onnx") == expected
        assert set(files(tmp_path / name)) == {"model_q.onnx", *(["model_q.onnx_data"] if beside else [])}
    bare = onnx.load(str(tmp_path / "beside" / "model_q.onnx"), load_external_data=False)
    places = [{e.key: e.value for e in w.external_data} for w in bare.graph.initializer]
    there = {"location": "model_q.onnx_data"}
    assert places == [
        there | {"offset": "0", "length": "300"}, there | {"offset": "4096", "length": "200"}, {}, {},
    ]  # fmt: skip
    assert list(bare.graph.initializer[3].float_data) == [1.0] * 64


@given(
    sizes=st.lists(st.sampled_from([0, 1, 127, 128, 129, 4096, 4097, 70_000]), max_size=5),
    note=st.text(max_size=200),
)
def test_any_weights_go_out_and_come_back(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], note: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    source = small(folder / "a" / "m.onnx", *(weight(f"w{at}", size) for at, size in enumerate(sizes)))
    model = onnx.load(str(source))
    model.doc_string, model.graph.doc_string = note, note  # before and behind the weights, in one byte or two of length
    source.write_bytes(model.SerializeToString())
    (folder / "b").mkdir()
    (folder / "c").mkdir()
    if relocate(source, folder / "b" / "m.onnx", True) is None:
        assert max(sizes, default=0) < 128
        return
    relocate(folder / "b" / "m.onnx", folder / "c" / "m.onnx", False)
    assert tensors(folder / "b" / "m.onnx") == tensors(source)
    assert (folder / "c" / "m.onnx").read_bytes() == source.read_bytes()
    onnx.checker.check_model(str(folder / "b" / "m.onnx"))


# what is refused


def test_more_than_one_file_holds_is_refused_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = forms(tmp_path, "bert-cls", "fp32")
    size = one.stat().st_size
    (tmp_path / "new").mkdir()
    monkeypatch.setattr(room, "GRAPH_LIMIT_BYTES", size)
    with pytest.raises(OptionError, match=rf"model_x\.onnx.*found {size} bytes.*--weights beside"):
        relocate(two, tmp_path / "new" / "model_x.onnx", False)
    assert files(tmp_path / "new") == {}
    monkeypatch.setattr(room, "GRAPH_LIMIT_BYTES", size + 1)
    assert relocate(two, tmp_path / "new" / "model_x.onnx", False) is not None


def test_a_graph_that_is_cut_anywhere_is_said_so(tmp_path: Path) -> None:
    source = small(tmp_path / "a" / "m.onnx", weight("w", 500))
    model = onnx.load(str(source))
    whole = model.SerializeToString()
    model.ClearField("opset_import")  # the last field: what is cut just before it is a graph still
    (tmp_path / "new").mkdir()
    for size in set(range(len(whole))) - {len(model.SerializeToString())}:
        source.write_bytes(whole[:size])
        with pytest.raises(ModelFolderError, match="expected a graph as `featherbed build` writes it"):
            relocate(source, tmp_path / "new" / "m.onnx", True)
    assert files(tmp_path / "new") == {}


@pytest.mark.parametrize(
    "change",
    [
        {"location": "../model_x.onnx_data"},
        {"location": "absent"},
        {"offset": "-5"},
        {"offset": "99999999"},
        {"length": "many"},
        {"length": None},
        {"location": None},
    ],
    ids=str,
)
def test_weights_that_are_not_where_the_graph_says_are_refused(tmp_path: Path, change: dict[str, str | None]) -> None:
    _, two = forms(tmp_path, "bert-cls", "q4")
    model = onnx.load(str(two), load_external_data=False)
    tensor = next(w for w in model.graph.initializer if w.external_data)
    said = {e.key: e.value for e in tensor.external_data} | change
    del tensor.external_data[:]
    for key, value in said.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    two.write_bytes(model.SerializeToString())
    (tmp_path / "new").mkdir()
    with pytest.raises(ModelFolderError, match="with its weights, found"):
        relocate(two, tmp_path / "new" / "model_x.onnx", False)
    assert files(tmp_path / "new") == {}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("at", [1, 40])
def test_a_disk_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, beside: bool
) -> None:
    one, two = forms(tmp_path, "bert-cls", "fp32")
    (tmp_path / "new").mkdir()
    write, count = Sink.write, 0

    def failing(sink: Sink, data: bytes | memoryview) -> None:
        nonlocal count
        count += 1
        if count >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(sink, data)

    monkeypatch.setattr(Sink, "write", failing)
    with pytest.raises(OutputError, match=os.strerror(errno.ENOSPC)):
        relocate(one if beside else two, tmp_path / "new" / "model_x.onnx", beside)
    assert files(tmp_path / "new") == {}
