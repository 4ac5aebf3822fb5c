"""A01-A40 of the list of bad graphs: each by its number, on files of others and, where it differs, in our folders.

Every refusal is one typed line, before onnxruntime sees the file where it would read elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, StringStringEntryProto, TensorProto, helper, numpy_helper

import featherbed
from featherbed.errors import EngineError, FeatherbedError, ModelFolderError
from featherbed.folder import MANIFEST, file_record
from featherbed.run import sidecars, sound
from featherbed.run.embedder import Embedder
from featherbed.run.session import Memory, Session
from tests.foreign_files import DIM, TABLE, Export, means, repository
from tests.test_bad_inputs import LFS, PAGE

TEXTS = ["the old harbour", "rain"]
SECRET = 777.0
Change = Callable[[ModelProto], object]


def refused(act: Callable[[], object], kind: type[FeatherbedError] = FeatherbedError) -> str:
    with pytest.raises(kind) as caught:
        act()
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return repository(tmp_path / "theirs")


def written(folder: Path, content: bytes) -> Path:
    (folder / "model.onnx").write_bytes(content)
    return folder / "model.onnx"


def changed(folder: Path, change: Change) -> Path:
    model = Export().model()
    change(model)
    return written(folder, model.SerializeToString())


def table(model: ModelProto) -> TensorProto:
    found: TensorProto = next(w for w in model.graph.initializer if w.name == "table")
    return found


def outside(location: str, offset: object = 0, length: object = TABLE.nbytes, **others: str) -> Change:
    """The table in another file."""

    def change(model: ModelProto) -> None:
        tensor = table(model)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        said = {"location": location, "offset": str(offset), "length": str(length), **others}
        for key, value in said.items():
            if value != "None":
                tensor.external_data.append(StringStringEntryProto(key=key, value=value))

    return change


def weights(path: Path, value: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((TABLE if value is None else np.full_like(TABLE, value)).tobytes())
    return path


# files that are no graph


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "an empty file", id="A01"),
        pytest.param(np.random.default_rng(0).bytes(4096), "expected an ONNX model", id="A02"),
        pytest.param(LFS.encode(), "git lfs pull", id="A05"),
        pytest.param(PAGE.encode(), "a page of HTML", id="A06"),
    ],
)
def test_what_is_no_graph_is_named(theirs: Path, content: bytes, says: str) -> None:
    path = written(theirs, content)
    for act in (lambda: Embedder(theirs), lambda: Embedder(path), lambda: featherbed.inspect(path)):
        assert says in refused(act, ModelFolderError)


def test_a03_a_model_cut_anywhere_is_refused(theirs: Path) -> None:
    whole = Export().model().SerializeToString()
    for part in range(64):
        path = written(theirs, whole[: len(whole) * part // 64])
        refused(lambda path=path: sound.read(path), ModelFolderError)  # type: ignore[misc]
    refused(lambda: Embedder(theirs), ModelFolderError)


def test_a04_a_flipped_bit_is_an_error_in_a_folder_of_ours(copied: Callable[[str], Path]) -> None:
    folder = copied("bert-mean")
    path = folder / "onnx" / "model_int8.onnx"
    whole = path.read_bytes()
    rng = np.random.default_rng(4)
    for at in rng.integers(0, len(whole), 40):
        raw = bytearray(whole)
        raw[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(raw)
        assert "expected sha256" in refused(lambda: Embedder(folder, "int8"), ModelFolderError)


def test_a04_flipped_bits_of_a_foreign_file_never_crash(theirs: Path) -> None:
    """Nobody knows its hash: an error, or another vector; never more than that."""
    whole = Export().model().SerializeToString()
    rng = np.random.default_rng(5)
    heads = [n for n in range(len(whole)) if n < 600 or n > len(whole) - 3000]
    for at in rng.choice(heads, 1000):
        raw = bytearray(whole)
        raw[at] ^= 1 << int(rng.integers(8))
        with suppress(ModelFolderError):
            sound.read(written(theirs, bytes(raw)))


def test_a07_more_than_2_gib_in_one_file_points_to_a_sidecar(theirs: Path) -> None:
    with (theirs / "model.onnx").open("wb") as file:
        file.write(Export().model().SerializeToString())
        file.truncate(2**31)
    line = refused(lambda: Embedder(theirs), ModelFolderError)
    assert "expected less than 2 GiB" in line
    assert "sidecar (external data)" in line


# graphs that onnxruntime cannot run


def no_opset(model: ModelProto) -> None:
    del model.opset_import[:]


def other_opset(model: ModelProto) -> None:
    model.opset_import[0].domain = "their.own"


def custom(model: ModelProto) -> None:
    model.graph.node[0].op_type = "TheirGather"
    model.graph.node[0].domain = "their.own"
    model.opset_import.append(helper.make_opsetid("their.own", 1))


def cycle(model: ModelProto) -> None:
    model.graph.node[0].input[1] = "h"


def twice(model: ModelProto) -> None:
    model.graph.node.append(model.graph.node[0])


UNFIT: dict[str, tuple[Change, str]] = {
    "A08 opset 999": (lambda m: setattr(m.opset_import[0], "version", 999), "999"),
    "A08 no opset": (no_opset, "no version of ai.onnx's operators"),
    "A08 another domain only": (other_opset, "no version of ai.onnx's operators"),
    "A09": (custom, "TheirGather"),
    "A13 cycle": (cycle, "graph"),
    "A13 names twice": (twice, "graph"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_onnxruntime_cannot_run_is_a_typed_error(theirs: Path, name: str) -> None:
    change, says = UNFIT[name]
    changed(theirs, change)
    assert says in refused(lambda: Embedder(theirs))


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (("attention_mask",), "inputs attention_mask"),
        (("input_ids", "attention_mask", "pixel_values"), "inputs attention_mask, input_ids, pixel_values"),
    ],
    ids=["no ids", "one more"],
)
def test_a10_inputs_that_cannot_be_fed_are_listed(theirs: Path, inputs: tuple[str, ...], names: str) -> None:
    model = Export(("input_ids", "attention_mask", "pixel_values")).model()
    for port in [p for p in model.graph.input if p.name not in inputs]:
        model.graph.input.remove(port)
    if "input_ids" not in inputs:
        model.graph.node[0].input[1] = "attention_mask"
    written(theirs, model.SerializeToString())
    assert names in refused(lambda: Embedder(theirs), EngineError)


def test_a11_a_width_that_is_not_the_config_s_is_refused(theirs: Path) -> None:
    Export().write(theirs / "model.onnx")
    config = json.loads((theirs / "config.json").read_text("utf-8"))
    (theirs / "config.json").write_text(json.dumps({**config, "hidden_size": 768}), "utf-8")
    line = refused(lambda: Embedder(theirs), EngineError)
    assert "768" in line
    assert str(DIM) in line


def test_a11_an_axis_that_is_missing_is_refused_when_it_shows(theirs: Path) -> None:
    """The file says [texts, tokens, width] and gives [texts, width]."""

    def change(model: ModelProto) -> None:
        model.graph.node[-1].output[0] = "whole"
        model.graph.initializer.append(numpy_helper.from_array(np.array(0), "none"))
        model.graph.node.append(helper.make_node("Gather", ["whole", "none"], ["last_hidden_state"], axis=1))

    changed(theirs, change)
    refused(lambda: Embedder(theirs).encode(TEXTS), EngineError)


def test_a12_a_batch_of_1_is_looped_with_a_notice(theirs: Path) -> None:
    Export(batch=1).write(theirs / "model.onnx")
    embedder = Embedder(theirs)
    assert np.abs(embedder.encode(TEXTS) - means(embedder.ids(TEXTS))).max() <= 2e-6
    assert "takes 1 text at a time" in embedder.notices[0]


# sizes that lie


def axes(*dims: int) -> Change:
    def change(model: ModelProto) -> None:
        table(model).dims[:] = dims

    return change


def only(key: str, value: object) -> Change:
    return outside("w.bin", **{key: value})  # type: ignore[arg-type]


SIZES: dict[str, tuple[Change, str]] = {
    "A14 2^63 numbers": (axes(2**31, 2**32), "more numbers than any memory holds"),
    "A14 2^64 + 1": (axes(2**32 + 1, 2**32 + 1, 2**32 + 1), "more numbers than any memory holds"),
    "A15 a GiB of 73 KB": (axes(2**28), "where its axes"),
    "A15 a GiB, no bytes": (lambda m: (axes(2**28)(m), table(m).ClearField("raw_data")), "no bytes for its axes"),
    "A16 axis": (axes(-1, 48), "has the axes [-1, 48]"),
    "A16 offset": (only("offset", -8), "the offset '-8'"),
    "A16 length": (only("length", -8), "the length '-8'"),
    "A17 offset": (only("offset", "ten"), "the offset 'ten'"),
    "A17 length": (only("length", "0x10"), "the length '0x10'"),
    "A17 other digits": (only("length", "٧٣٧٢٨"), "the length"),
    "A18": (only("length", 2**50), "bytes where its axes"),
    "A18 with axes": (lambda m: (only("length", 2**50)(m), axes(2**48)(m)), "more numbers than any memory holds"),
    "A19 offset": (only("offset", 2**40), "a file of 73728 bytes"),
    "A19 length": (only("offset", 4), "a file of 73728 bytes"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_lie_are_refused(theirs: Path, name: str) -> None:
    change, says = SIZES[name]
    weights(theirs / "w.bin")
    path = changed(theirs, change)
    assert says in refused(lambda: Embedder(theirs), ModelFolderError)
    assert path.is_file()


def test_a14_a18_refusing_takes_no_memory(theirs: Path) -> None:
    """Peak memory of a process of its own that is refused all of them, against one that is refused nothing large."""
    weights(theirs / "w.bin")
    paths = []
    for at, (change, _) in enumerate(SIZES.values()):
        changed(theirs, change).rename(theirs / f"bad{at}.onnx")
        paths.append(str(theirs / f"bad{at}.onnx"))
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom featherbed.run.session import Session\n"
        "from featherbed.errors import ModelFolderError\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nbefore = peak()\n"
        "for path in sys.argv[1:]:\n    try:\n        Session(Path(path))\n        sys.exit(3)\n"
        "    except ModelFolderError:\n        pass\nprint(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 64 * 1024  # KiB


def test_a20_unknown_keys_are_ignored(theirs: Path) -> None:
    weights(theirs / "w.bin")
    changed(theirs, outside("w.bin", __class__="os.system", checksum="00", their="own"))
    embedder = Embedder(theirs)
    assert np.abs(embedder.encode(TEXTS) - means(embedder.ids(TEXTS))).max() <= 2e-6
    assert type(embedder._session._source.graph.outside[0]) is sound.Tensor


# sidecars that lead elsewhere

OUT = [
    pytest.param("../outside.bin", id="A21"),
    *(
        pytest.param(location, id=f"A22 {location}")
        for location in (
            "a/../../outside.bin", "./../outside.bin", ".//..//outside.bin", "a/./../../outside.bin", "..\\outside.bin",
            "a\\..\\..\\outside.bin", "%2e%2e/outside.bin", "%252e%252e/outside.bin", "..%2foutside.bin",
            "\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}/outside.bin", "\N{TWO DOT LEADER}/outside.bin",
            ".. /outside.bin", ".../outside.bin", "..", ".", "./", "",
        )
    ),
    *(
        pytest.param(location, id=f"A23 {location}")
        for location in (
            "/etc/passwd", "//etc/passwd", "C:\\x", "C:x", "c:/x", "\\\\server\\share", "file:///etc/passwd",
            "FILE:/etc/passwd", "http://example.org/x", "~/x", "~root/x",
        )
    ),
    pytest.param("*/_ORT_MEM_ADDR_/*", id="A30"),
    pytest.param("a/_ORT_MEM_ADDR_", id="A30 inside"),
    pytest.param("w\0.bin", id="a NUL"),
]  # fmt: skip


@pytest.mark.parametrize("location", OUT)
def test_names_that_lead_out_are_refused(theirs: Path, location: str) -> None:
    weights(theirs.parent / "outside.bin", SECRET)
    (theirs / "a").mkdir()
    changed(theirs, outside(location))
    line = refused(lambda: Embedder(theirs), ModelFolderError)
    assert "could leave it" in line or "has no name" in line


@pytest.mark.parametrize("location", ["w.bin", "./w.bin", "a/w.bin", "..w.bin", "w..bin", "w.bin..", "wörter.bin"])
def test_names_inside_are_taken(theirs: Path, location: str) -> None:
    weights(theirs / location)
    changed(theirs, outside(location))
    embedder = Embedder(theirs)
    assert np.abs(embedder.encode(TEXTS) - means(embedder.ids(TEXTS))).max() <= 2e-6


@pytest.mark.parametrize("spelling", ["{out}", "../elsewhere/outside.bin"])
def test_a24_a_link_that_leads_out_is_refused(theirs: Path, spelling: str) -> None:
    out = weights(theirs.parent / "elsewhere" / "outside.bin", SECRET)
    (theirs / "w.bin").symlink_to(spelling.format(out=out))
    changed(theirs, outside("w.bin"))
    assert "a link that leads to" in refused(lambda: Embedder(theirs), ModelFolderError)


def test_a24_a_link_that_stays_inside_is_taken(theirs: Path) -> None:
    weights(theirs / "real" / "w.bin")
    (theirs / "w.bin").symlink_to("real/w.bin")
    changed(theirs, outside("w.bin"))
    embedder = Embedder(theirs)
    assert np.abs(embedder.encode(TEXTS) - means(embedder.ids(TEXTS))).max() <= 2e-6


def test_a24_a_snapshot_may_not_lead_to_what_is_no_blob(tmp_path: Path) -> None:
    snapshot = repository(tmp_path / "models--they--theirs" / "snapshots" / ("a" * 40))
    (tmp_path / "models--they--theirs" / "blobs").mkdir()
    for out in (tmp_path / "secret", tmp_path / "models--others--x" / "blobs" / ("0" * 64)):
        weights(out, SECRET)
        (snapshot / "w.bin").unlink(missing_ok=True)
        (snapshot / "w.bin").symlink_to(out)
        changed(snapshot, outside("w.bin"))
        assert "a link that leads to" in refused(lambda: Embedder(snapshot), ModelFolderError)


def test_a25_a_folder_that_is_a_link_out_is_refused(theirs: Path) -> None:
    weights(theirs.parent / "elsewhere" / "w.bin", SECRET)
    (theirs / "sub").symlink_to(theirs.parent / "elsewhere")
    changed(theirs, outside("sub/w.bin"))
    assert "a link that leads to" in refused(lambda: Embedder(theirs), ModelFolderError)


def test_a26_a_hard_link_is_a_file_like_any_other(theirs: Path) -> None:
    """Documented: whoever made it could read it, and our own cache is made of them."""
    os.link(weights(theirs.parent / "outside.bin"), theirs / "w.bin")
    changed(theirs, outside("w.bin"))
    embedder = Embedder(theirs)
    assert np.abs(embedder.encode(TEXTS) - means(embedder.ids(TEXTS))).max() <= 2e-6


SWAP = """
import os, sys
place, bad = sys.argv[1:]
good, link = place + ".good", place + ".link"
while True:
    os.rename(place, good)
    os.symlink(bad, link)
    os.rename(link, place)
    os.unlink(place)
    os.rename(good, place)
"""


@pytest.mark.parametrize("what", ["the file", "its folder"])
def test_a27_what_is_put_in_place_while_it_is_opened_is_never_read(theirs: Path, what: str) -> None:
    """A process swaps the file, or its folder, for a link to a secret and back; several hundred tries."""
    weights(theirs / "in" / "w.bin")
    weights(theirs.parent / "out" / "w.bin", SECRET)
    path = changed(theirs, outside("in/w.bin"))
    place, bad = (theirs / "in" / "w.bin", theirs.parent / "out" / "w.bin") if what == "the file" else (
        theirs / "in", theirs.parent / "out")  # fmt: skip
    swapping = subprocess.Popen([sys.executable, "-c", SWAP, str(place), str(bad)])
    seen = {True: 0, False: 0}
    try:
        graph = sound.read(path)
        for tries in range(100_000):
            if tries >= 600 and all(seen.values()):
                break
            try:
                view = sidecars.open_all(graph)["in/w.bin"].view
            except ModelFolderError as error:
                seen[False] += "a link that leads to" in str(error)
                continue
            assert bytes(view[:4]) == TABLE.tobytes()[:4]
            seen[True] += 1
        for _ in range(5):
            with suppress(FeatherbedError):
                session = Embedder(path)
                assert np.abs(session.encode(TEXTS) - means(session.ids(TEXTS))).max() <= 2e-6
    finally:
        swapping.kill()
        swapping.wait()
    assert all(seen.values()), seen  # both were met: the race is one


def inner(model: ModelProto, tensor: TensorProto) -> None:
    """An If whose branch has the tensor as a constant."""
    output = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Constant", [], ["inner"], value=tensor)], "b", [], [output])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["unused"], then_branch=branch, else_branch=branch))


def hidden_tensor(where: str) -> Change:
    def change(model: ModelProto) -> None:
        tensor = TensorProto(name="evil", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "w.bin"), ("offset", "0"), ("length", "16")):
            tensor.external_data.append(StringStringEntryProto(key=key, value=value))
        places = TensorProto(name="places", data_type=TensorProto.INT64, dims=[4], int64_data=[0, 1, 2, 3])
        sparse = onnx.SparseTensorProto(values=tensor, indices=places, dims=[4])
        if where == "sparse initializer":
            model.graph.sparse_initializer.append(sparse)
        elif where == "sparse constant":
            model.graph.node.append(helper.make_node("Constant", [], ["evil"], sparse_value=sparse))
        elif where == "constant":
            model.graph.node.append(helper.make_node("Constant", [], ["evil"], value=tensor))
        elif where == "subgraph":
            inner(model, tensor)
        elif where == "function":
            node = helper.make_node("Constant", [], ["out"], value=tensor)
            model.functions.append(
                helper.make_function("their", "F", [], ["out"], [node], [helper.make_opsetid("", 17)])
            )

    return change


@pytest.mark.parametrize("where", ["sparse initializer", "sparse constant", "constant", "subgraph", "function"])
def test_a28_tensors_elsewhere_lie_in_no_other_file(theirs: Path, where: str) -> None:
    weights(theirs / "w.bin", SECRET)
    changed(theirs, hidden_tensor(where))
    line = refused(lambda: Embedder(theirs), ModelFolderError)
    assert "a tensor outside the list of weights, 'evil', in another file, 'w.bin'" in line


def test_a28_graphs_inside_each_other_have_an_end(theirs: Path) -> None:
    def deep(model: ModelProto) -> None:
        node = helper.make_node("Constant", [], ["inner"], value_int=1)
        for _ in range(30):
            graph = helper.make_graph(
                [node], "g", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)]
            )
            node = helper.make_node("Loop", ["", ""], ["inner"], body=graph)
        model.graph.node.append(node)

    changed(theirs, deep)
    assert "graphs inside each other" in refused(lambda: Embedder(theirs), ModelFolderError)


def test_a29_a_graph_loaded_from_its_bytes_reads_no_file_but_its_own(
    theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign graph with sidecars is handed over as bytes: with nothing behind its names but what we opened."""
    weights(theirs.parent / "outside.bin", SECRET)
    (theirs / "sub").mkdir()
    monkeypatch.chdir(theirs / "sub")  # where "../outside.bin" of bytes would be looked for
    changed(theirs, outside("../outside.bin"))
    refused(lambda: Embedder(theirs), ModelFolderError)
    weights(theirs / "w.bin")
    weights(theirs / "sub" / "w.bin", SECRET)
    changed(theirs, outside("w.bin"))
    embedder = Embedder(theirs)
    assert isinstance(embedder._session._source.loading().model, bytes)
    assert np.abs(embedder.encode(TEXTS) - means(embedder.ids(TEXTS))).max() <= 2e-6


@pytest.mark.parametrize("kind", ["pipe", "link to /dev/zero", "link to /dev/tty", "folder", "link to itself"])
def test_a31_what_is_no_file_is_refused_and_nobody_waits(theirs: Path, kind: str) -> None:
    place = theirs / "w.bin"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(place if kind == "link to itself" else kind.removeprefix("link to "))
    changed(theirs, outside("w.bin"))
    done: list[str] = []
    thread = threading.Thread(
        target=lambda: done.append(refused(lambda: Embedder(theirs), ModelFolderError)), daemon=True
    )
    thread.start()
    thread.join(30)
    assert done, "it waits"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a31_what_cannot_be_read_is_refused(theirs: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    weights(theirs / "w.bin")
    changed(theirs, outside("w.bin"))
    real = os.open

    def opened(path: Any, *rest: Any) -> int:
        if str(path).endswith("w.bin"):
            raise error
        return real(path, *rest)

    monkeypatch.setattr(os, "open", opened)
    assert str(error.strerror) in refused(lambda: Embedder(theirs), ModelFolderError)


def test_a33_a_missing_sidecar_is_named(theirs: Path) -> None:
    changed(theirs, outside("model.onnx.data"))
    line = refused(lambda: Embedder(theirs), ModelFolderError)
    assert "theirs/model.onnx.data: expected the weights of model.onnx" in line


def beside(folder: Path, file: str = "model.onnx") -> Path:
    """A file of ours with its weights in a sidecar, the manifest true again."""
    path = folder / "onnx" / file
    model = onnx.load(str(path))
    onnx.save(model, str(path), save_as_external_data=True, location=f"{file}_data", size_threshold=1024)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    for name in (f"onnx/{file}", f"onnx/{file}_data"):
        manifest["files"][name] = vars(file_record(folder / name))
    manifest["variants"]["fp32"]["files"] = [f"onnx/{file}", f"onnx/{file}_data"]
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    return path.with_name(f"{file}_data")


@pytest.mark.parametrize("memory", [Memory(), Memory(cache=False)], ids=["as usual", "as it is"])
def test_a34_a_sidecar_swapped_for_another_of_its_size_is_refused_by_its_hash(
    copied: Callable[[str], Path], memory: Memory
) -> None:
    folder = copied("bert-mean")
    data = beside(folder)
    expected = Embedder(folder, "fp32", memory=memory).encode(TEXTS)
    assert np.isfinite(expected).all()
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    assert "expected sha256" in refused(lambda: Embedder(folder, "fp32", memory=memory), ModelFolderError)


def test_a34_and_the_same_with_prepacked_weights(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("bert-mean")
    data = beside(folder)
    memory = Memory(cache=tmp_path / "cache")
    assert Embedder(folder, "fp32", memory=memory)._session.prepacked is not None
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    assert "expected sha256" in refused(lambda: Embedder(folder, "fp32", memory=memory), ModelFolderError)


def test_a35_weights_that_share_bytes_and_bytes_of_nobody_are_odd(theirs: Path) -> None:
    def change(model: ModelProto) -> None:
        outside("w.bin")(model)
        other = TensorProto(name="other", data_type=TensorProto.FLOAT, dims=[16], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "w.bin"), ("offset", "16"), ("length", "64")):
            other.external_data.append(StringStringEntryProto(key=key, value=value))
        model.graph.initializer.append(other)

    (theirs / "w.bin").write_bytes(TABLE.tobytes() + bytes(10**6))
    graph = sound.read(changed(theirs, change))
    sizes = {name: len(one.view) for name, one in sidecars.open_all(graph).items()}
    assert sidecars.oddities(graph.weights, sizes) == (
        "table and other share bytes of w.bin",
        "1000000 bytes of w.bin belong to no weight",
    )
    assert np.isfinite(Embedder(theirs).encode(TEXTS)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a36_weights_that_are_not_finite_give_no_vectors(theirs: Path, tmp_path: Path, value: float) -> None:
    wrong = TABLE.copy()
    wrong[:, 5] = value
    changed(theirs, lambda m: table(m).CopyFrom(numpy_helper.from_array(wrong, "table")))
    (tmp_path / "in.txt").write_text("rain\n", "utf-8")
    command = [sys.executable, "-m", "featherbed.cli", "embed", str(theirs), str(tmp_path / "in.txt")]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out.npy")], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert "expected finite numbers, found NaN or infinity" in " ".join(done.stderr.split())
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize(
    "name", ["mödel-模型.onnx", "a b.onnx", "new\nline.onnx", "'quotes\".onnx", "%41.onnx", "-o.onnx"]
)
def test_a38_odd_names_work(theirs: Path, name: str) -> None:
    Export().write(theirs / "onnx" / name)
    for model in (theirs, theirs / "onnx" / name):
        embedder = Embedder(model)
        assert np.abs(embedder.encode(TEXTS) - means(embedder.ids(TEXTS))).max() <= 2e-6
    (theirs / "onnx" / name).write_bytes(b"no graph")
    refused(lambda: Embedder(theirs), ModelFolderError)


def test_a38_a_path_that_is_too_long_is_refused(theirs: Path) -> None:
    for name in ("m" * 4096 + ".onnx", "nul\0.onnx"):
        refused(lambda name=name: Session(theirs / name), ModelFolderError)  # type: ignore[misc]


def test_a39_nothing_is_written_beside_a_model(theirs: Path, folders: dict[str, Path]) -> None:
    weights(theirs / "w.bin")
    changed(theirs, outside("w.bin"))
    for folder in (theirs, folders["bert-mean"]):
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        modes = {p: p.stat().st_mode for p in (folder, *folder.rglob("*"))}
        try:
            for path in modes:
                path.chmod(modes[path] & ~0o222)
            assert np.isfinite(Embedder(folder).encode(TEXTS)).all()
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_a40_a_foreign_model_replaced_while_it_is_open_goes_on_as_it_was(theirs: Path, where: str) -> None:
    if where == "beside":
        weights(theirs / "w.bin")
        changed(theirs, outside("w.bin"))
    else:
        Export().write(theirs / "model.onnx")
    embedder = Embedder(theirs, threads=2)
    new = repository(theirs.parent / "new")
    changed(new, lambda m: table(m).CopyFrom(numpy_helper.from_array(TABLE * 0 + 1, "table")))
    weights(new / "w.bin", SECRET)
    for name in ("w.bin", "model.onnx"):
        (new / name).replace(theirs / name)
    expected = means(embedder.ids(TEXTS))
    assert np.abs(embedder.encode(TEXTS) - expected).max() <= 2e-6
    batch = [embedder.ids(TEXTS)[0]] * 4
    for alone in (True, False):  # the second is loaded only now
        graph = embedder._session._open(embedder._session._path, 7 + alone)
        assert graph is not None
    assert np.abs(embedder.embed_ids(batch) - expected[0]).max() <= 2e-6
    shutil.rmtree(theirs)
    assert np.abs(embedder.encode(TEXTS) - expected).max() <= 2e-6


@pytest.mark.parametrize("prepacked", [True, False])
def test_a40_a_folder_of_ours_replaced_while_it_is_open_is_never_mixed(
    copied: Callable[[str], Path], folders: dict[str, Path], tmp_path: Path, prepacked: bool
) -> None:
    folder = copied("bert-mean")
    memory = Memory(cache=tmp_path / "cache" if prepacked else False)
    embedder = Embedder(folder, "fp32", memory=memory, threads=2)
    if prepacked:  # whoever finds an entry has not looked at the file
        embedder = Embedder(folder, "fp32", memory=memory, threads=2)
    expected = embedder.encode(TEXTS)
    shutil.rmtree(folder)
    shutil.copytree(folders["bert-cls"], folder)
    assert np.array_equal(embedder.encode(TEXTS), expected)
    assert np.abs(embedder.encode(TEXTS * 40)[:2] - expected).max() <= 1e-5
    if prepacked:  # hidden states are in the file, and that is another one
        line = refused(lambda: embedder.encode(TEXTS, normalize_embeddings=False), EngineError)
        assert "found another in its place; open the model again" in line
    else:
        plain = embedder.encode(TEXTS, normalize_embeddings=False)
        assert np.abs(plain / np.linalg.norm(plain, axis=1, keepdims=True) - expected).max() <= 1e-5


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "w.link", "missing.bin"])
def test_folders_of_ours_are_looked_at_as_well(copied: Callable[[str], Path], tmp_path: Path, location: str) -> None:
    """A manifest with true hashes vouches for bytes, not for whoever wrote them."""
    folder = copied("bert-mean")
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(str(path))
    tensor = max(model.graph.initializer, key=lambda w: len(w.raw_data))
    size = len(tensor.raw_data)
    weights(tmp_path / "secret.bin", SECRET)
    (folder / "onnx" / "w.link").symlink_to(tmp_path / "secret.bin")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
        tensor.external_data.append(StringStringEntryProto(key=key, value=value))
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    manifest["files"]["onnx/model.onnx"] = vars(file_record(path))
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    for memory in (Memory(cache=False), Memory(cache=tmp_path / "cache")):
        refused(lambda memory=memory: Embedder(folder, "fp32", memory=memory), ModelFolderError)  # type: ignore[misc]
    assert not list(tmp_path.glob("cache/*/*"))


ELSEWHERE = {
    "A32": "tests/run/test_foreign.py::test_a_snapshot_made_of_links_is_read_where_its_links_lead",
    "A37": "tests/check/test_bad_artifacts.py::test_a_bad_artifact_is_rejected_and_the_cause_is_named",
}


def test_every_row_of_the_list_has_its_test() -> None:
    text = Path(__file__).read_text("utf-8")
    missing = [f"A{n:02}" for n in range(1, 41) if f"a{n:02}_" not in text and f'"A{n:02}' not in text]
    rows = [row for row in missing if f"A22 {row}" not in text and row not in {"A22", "A23", *ELSEWHERE}]
    assert rows == []
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        assert f"def {name}(" in (Path(__file__).parent.parent / file).read_text("utf-8")
