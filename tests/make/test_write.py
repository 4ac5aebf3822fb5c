"""Graphs into files, with a sidecar or without: the same function, the same bytes, nothing left of a failure."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherbed.errors import OutputError
from featherbed.folder import FileRecord
from featherbed.make.ir import Graph, Node, Port, Weight, constant
from featherbed.make.write import AHEAD, write_graph
from featherbed.recipe import RECIPES
from tests.conftest import NAMES, made_by

Float = npt.NDArray[np.float32]
F32 = np.dtype(np.float32)
PAGE = 4096
HOW = pytest.mark.parametrize("limit", [2**40, 0], ids=["one file", "with a sidecar"])


def added(*weights: Weight) -> Graph:
    """y = x + w0 + w1 + …, for weights of one shape."""
    names = ["x", *(f"y{at}" for at in range(len(weights) - 1)), "y"]
    nodes = [
        Node("Add", (before, weight.name), (after,))
        for before, after, weight in zip(names, names[1:], weights, strict=False)
    ]
    shape = weights[0].shape
    port = Port("x", F32, shape), Port("y", F32, shape)
    return Graph("added", 21, tuple(nodes), {w.name: w for w in weights}, (port[0],), (port[1],))


def run(path: Path, feeds: dict[str, Any]) -> list[Float]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: feeds[name] for name in (port.name for port in session.get_inputs())}))


def external(path: Path) -> dict[str, dict[str, str]]:
    """Tensor → where its bytes lie, for those in the sidecar."""
    model = onnx.load(str(path), load_external_data=False)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }


# what is written


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", NAMES)
def test_a_sidecar_changes_where_weights_lie_and_nothing_else(tmp_path: Path, name: str, recipe: str) -> None:
    inline, split = tmp_path / "one" / "model.onnx", tmp_path / "two" / "model.onnx"
    for path, limit in ((inline, 2**40), (split, 0)):
        path.parent.mkdir()
        write_graph(made_by(name, recipe), path, {}, inline_limit_bytes=limit)
    assert [path.name for path in inline.parent.iterdir()] == ["model.onnx"]
    assert sorted(path.name for path in split.parent.iterdir()) == ["model.onnx", "model.onnx_data"]
    ids = np.random.default_rng(0).integers(1, 384, (3, 9))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    for one, two in zip(run(inline, feeds), run(split, feeds), strict=True):
        assert np.array_equal(one, two)
    whole = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(inline)).graph.initializer}
    apart = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(split)).graph.initializer}
    assert whole.keys() == apart.keys()
    assert all(np.array_equal(whole[key], apart[key]) for key in whole)


@HOW
@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", NAMES)
def test_writing_again_gives_the_same_bytes(tmp_path: Path, name: str, recipe: str, limit: int) -> None:
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write_graph(made_by(name, recipe), folder / "model.onnx", {"z": "1", "a": "2"}, inline_limit_bytes=limit)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]


@HOW
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_records_are_the_hashes_and_sizes_of_the_files(tmp_path: Path, recipe: str, limit: int) -> None:
    records = write_graph(made_by("qwen3-tied", recipe), tmp_path / "model_x.onnx", {}, inline_limit_bytes=limit)
    assert records.keys() == {path.name for path in tmp_path.iterdir()}
    assert len(records) == (2 if limit == 0 else 1)
    for name, record in records.items():
        raw = (tmp_path / name).read_bytes()
        assert record == FileRecord(hashlib.sha256(raw).hexdigest(), len(raw))


@pytest.mark.parametrize("name", ["model.onnx", "model_int8_block.onnx"])
def test_a_sidecar_is_named_by_the_graph_beside_it(tmp_path: Path, name: str) -> None:
    write_graph(made_by("bert-cls", "fp32"), tmp_path / name, {}, inline_limit_bytes=0)
    places = external(tmp_path / name)
    assert {place["location"] for place in places.values()} == {f"{name}_data"}
    assert (tmp_path / f"{name}_data").is_file()


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", NAMES)
def test_each_tensor_of_a_sidecar_begins_a_page_and_touches_no_other(tmp_path: Path, name: str, recipe: str) -> None:
    graph = made_by(name, recipe)
    write_graph(graph, tmp_path / "model.onnx", {}, inline_limit_bytes=0)
    places = external(tmp_path / "model.onnx")
    raw = (tmp_path / "model.onnx_data").read_bytes()
    end = 0
    for weight_name, place in sorted(places.items(), key=lambda item: int(item[1]["offset"])):
        offset, length = int(place["offset"]), int(place["length"])
        assert offset % PAGE == 0
        assert end <= offset < end + PAGE
        assert not any(raw[end:offset])
        assert raw[offset : offset + length] == graph.weights[weight_name].array().tobytes()
        end = offset + length
    assert end == len(raw)


def test_constants_that_shape_inference_needs_stay_in_the_graph(tmp_path: Path) -> None:
    graph = made_by("qwen3-tied", "int8")
    write_graph(graph, tmp_path / "model.onnx", {}, inline_limit_bytes=0)
    places = external(tmp_path / "model.onnx")
    assert places
    for name, weight in graph.weights.items():
        assert (name in places) == (weight.size_bytes >= 128)
    assert not [name for name in places if name.startswith("const_")]


@pytest.mark.parametrize(("limit", "files"), [(4000, 1), (3999, 2)])
def test_the_limit_is_what_decides_for_a_sidecar(tmp_path: Path, limit: int, files: int) -> None:
    graph = added(constant("w", np.ones(1000), F32))
    assert len(write_graph(graph, tmp_path / "model.onnx", {}, inline_limit_bytes=limit)) == files
    assert len(list(tmp_path.iterdir())) == files


@HOW
def test_metadata_is_in_the_file(tmp_path: Path, limit: int) -> None:
    metadata = {"featherbed.recipe": '{"name": "int8"}', "a": "ü 漢", "empty": ""}
    write_graph(made_by("bert-mean", "int8"), tmp_path / "model.onnx", metadata, inline_limit_bytes=limit)
    model = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    assert {entry.key: entry.value for entry in model.metadata_props} == metadata
    assert [entry.key for entry in model.metadata_props] == sorted(metadata)
    assert model.producer_name == "featherbed"


@pytest.mark.parametrize("name", NAMES)
def test_a_build_says_in_each_file_what_it_is(folders: dict[str, Path], name: str) -> None:
    for recipe in RECIPES.values():
        model = onnx.load(str(folders[name] / "onnx" / f"model{recipe.suffix}.onnx"), load_external_data=False)
        found = {entry.key: entry.value for entry in model.metadata_props}
        assert found.keys() == {"featherbed.version", "featherbed.recipe", "featherbed.spec"}
        assert f'"name": "{recipe.name}"' in found["featherbed.recipe"]


def test_the_microsoft_domain_is_declared_only_where_it_is_used(tmp_path: Path) -> None:
    write_graph(added(constant("w", [1.0], F32)), tmp_path / "plain.onnx", {})
    write_graph(made_by("bert-cls", "fp32"), tmp_path / "fused.onnx", {})
    plain, fused = (onnx.load(str(tmp_path / f"{name}.onnx")) for name in ("plain", "fused"))
    assert {entry.domain: entry.version for entry in plain.opset_import} == {"": 21}
    assert {entry.domain: entry.version for entry in fused.opset_import} == {"": 21, "com.microsoft": 1}


@HOW
def test_progress_counts_every_byte_of_the_large_file(tmp_path: Path, limit: int) -> None:
    told: list[int] = []
    records = write_graph(made_by("bert-cls", "q4"), tmp_path / "model.onnx", {}, told.append, inline_limit_bytes=limit)
    assert sum(told) == records["model.onnx_data" if limit == 0 else "model.onnx"].size_bytes


# blocks


def in_blocks(name: str, value: Float, sizes: list[int]) -> Weight:
    """A weight that comes in blocks of these many rows, and the rest."""

    def read() -> Iterator[Float]:
        start = 0
        for size in [*sizes, len(value)]:
            if start < len(value):
                yield np.ascontiguousarray(value[start : start + size])
                start += size

    return Weight(name, F32, value.shape, read)


@settings(max_examples=25, deadline=None)
@given(
    drawn=st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=4),
    rows=st.integers(1, 30),
    width=st.sampled_from([1, 3, 40]),
    split=st.booleans(),
)
def test_the_blocks_a_weight_comes_in_change_no_byte(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[list[int]], rows: int, width: int, split: bool
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    values = [np.random.default_rng(at).standard_normal((rows, width)).astype(np.float32) for at in range(len(drawn))]
    whole = added(*(constant(f"w{at}", value, F32) for at, value in enumerate(values)))
    parts = added(*(in_blocks(f"w{at}", values[at], sizes) for at, sizes in enumerate(drawn)))
    limit = 0 if split else 2**40
    for name, graph in (("whole", whole), ("parts", parts)):
        (folder / name).mkdir()
        write_graph(graph, folder / name / "model.onnx", {}, inline_limit_bytes=limit)
    for path in (folder / "whole").iterdir():
        assert path.read_bytes() == (folder / "parts" / path.name).read_bytes()


class Watched:
    """A lazy weight that knows how many of its blocks are alive whenever it makes the next one."""

    def __init__(self, name: str, blocks: int) -> None:
        self.most = self.made = self._alive = 0
        self.weight = Weight(name, F32, (blocks, 1024), self._read)
        self._blocks = blocks

    def _read(self) -> Iterator[Float]:
        for at in range(self._blocks):
            self.most = max(self.most, self._alive)
            yield self._block(at)

    def _block(self, at: int) -> Float:
        block = np.full((1, 1024), at, np.float32)
        self._alive, self.made = self._alive + 1, self.made + 1
        weakref.finalize(block, self._gone)
        return block

    def _gone(self) -> None:
        self._alive -= 1


def test_a_large_weight_is_never_held_but_for_a_few_blocks(tmp_path: Path) -> None:
    first, second = Watched("w0", 64), Watched("w1", 64)
    write_graph(added(first.weight, second.weight), tmp_path / "model.onnx", {}, inline_limit_bytes=0)
    # those that wait, the one being handed over, and two while the writer changes from one to the next
    for watched in (first, second):
        assert watched.made == 64
        assert 1 <= watched.most <= AHEAD + 3
    found = np.fromfile(tmp_path / "model.onnx_data", np.float32).reshape(2, 64, 1024)
    assert np.array_equal(found[0], found[1])
    assert found[0, :, 7].tolist() == list(range(64))


def test_a_weight_that_gives_less_than_its_shape_is_not_passed_over(tmp_path: Path) -> None:
    short = Weight("w", F32, (3, 100), lambda: iter([np.zeros((2, 100), np.float32)]))
    for limit in (0, 2**40):
        with pytest.raises((AssertionError, ValueError)):
            write_graph(added(short), tmp_path / "model.onnx", {}, inline_limit_bytes=limit)


# what fails


def nothing_left(folder: Path, act: Callable[[], object]) -> str:
    """The one line of the OutputError that ``act`` ends in; ``folder`` is as empty as it was."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(OutputError) as caught:
        act()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert ": expected " in text
    assert ", found " in text
    assert sorted(folder.rglob("*")) == before
    return text


@HOW
def test_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "nowhere" / "model.onnx"
    line = nothing_left(tmp_path, lambda: write_graph(made_by("bert-cls", "fp32"), path, {}, inline_limit_bytes=limit))
    assert os.strerror(errno.ENOENT) in line


@HOW
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failing_sync_leaves_no_file_on_the_disk_and_none_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, number: int
) -> None:
    opened: list[Any] = []

    def watched(path: Path, mode: str = "r", *rest: Any) -> Any:
        opened.append(io.open(path, mode, *rest))  # noqa: SIM115, UP020 - Path.open itself is replaced
        return opened[-1]

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    graph = added(constant("w", np.ones((40, 64)), F32))
    monkeypatch.setattr(Path, "open", watched)
    monkeypatch.setattr(os, "fsync", fail)
    line = nothing_left(tmp_path, lambda: write_graph(graph, tmp_path / "model.onnx", {}, inline_limit_bytes=limit))
    left_open = [file.name for file in opened if not file.closed]
    for file in opened:
        file.close()
    assert os.strerror(number) in line
    assert len(opened) == 1
    assert left_open == []


@HOW
@pytest.mark.parametrize("good", [0, 1, 5])
def test_a_weight_that_cannot_be_read_leaves_no_file(tmp_path: Path, limit: int, good: int) -> None:
    def read() -> Iterator[Float]:
        for _ in range(good):
            yield np.zeros((1, 2048), np.float32)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fine = constant("w0", np.ones((8, 2048)), F32)
    line = nothing_left(
        tmp_path,
        lambda: write_graph(
            added(fine, Weight("w1", F32, (8, 2048), read)), tmp_path / "model.onnx", {}, inline_limit_bytes=limit
        ),
    )
    assert os.strerror(errno.ENOSPC) in line


class Disk:
    """Lets a number of writes through, then is full, for every file opened to be written."""

    def __init__(self, writes: int) -> None:
        self.left = writes

    def opened(self, path: Path, mode: str = "r", *rest: Any) -> Any:
        file = io.open(path, mode, *rest)  # noqa: SIM115, UP020 - Path.open itself is replaced
        return File(file, self) if "w" in mode else file


class File:
    """A file on a ``Disk``."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> int:
        self._disk.left -= 1
        if self._disk.left < 0:
            self._file.write(bytes(data[: len(data) // 2]))  # a full disk takes what fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data))

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@HOW
def test_a_disk_that_is_full_at_any_write_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    graph = added(*(in_blocks(f"w{at}", np.ones((40, 64), np.float32), [8, 8]) for at in range(3)))
    failed = 0
    for writes in range(100):
        disk = Disk(writes)
        monkeypatch.setattr(Path, "open", lambda path, *rest, disk=disk: disk.opened(path, *rest))
        try:
            records, text = write_graph(graph, tmp_path / "model.onnx", {}, inline_limit_bytes=limit), ""
        except OutputError as error:
            records, text = {}, str(error)
        if records:
            break
        assert os.strerror(errno.ENOSPC) in text
        assert list(tmp_path.iterdir()) == []
        failed += 1
    monkeypatch.undo()
    assert failed >= (10 if limit == 0 else 1)
    assert sorted(records) == sorted(path.name for path in tmp_path.iterdir())
    assert np.array_equal(
        run(tmp_path / "model.onnx", {"x": np.zeros((40, 64), np.float32)})[0], np.full((40, 64), 3.0)
    )
