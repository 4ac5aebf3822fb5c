"""The cache of prepacked weights: made once, believed only when whole and right, never in the way.

To prepack a fixture's file takes a tenth of a second, to start an interpreter for it ten times that: tests that are
not about the process run ``main`` in their own, once a file.
"""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherbed.recipe import RECIPES
from featherbed.run import prepack
from featherbed.run.batches import Batch, collate
from featherbed.run.session import Engine, Memory, Session
from tests.conftest import NAMES

Array = npt.NDArray[Any]

MODULE = "featherbed.run.prepack"
BERTS, QWENS = NAMES[:2], NAMES[2:]
ENCODER_FILES = ["engine.data", "engine.onnx", "entry.json"]
DECODER_FILES = ["behind.onnx", "engine.data", "engine.onnx", "entry.json", "keys.onnx", "long.onnx"]
ROUNDING = 1e-5


def a_batch() -> Batch:
    rows = np.random.default_rng(8).integers(1, 384, (6, 30))
    return collate([list(row[: 5 * at + 1]) for at, row in enumerate(rows)], 0)


BATCH = a_batch()


@pytest.fixture
def source(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A private copy of a decoder's int8 file."""
    return Path(shutil.copy(folders["qwen3-tied"] / "onnx" / "model_int8.onnx", tmp_path / "model.onnx"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def intercept(monkeypatch: pytest.MonkeyPatch, answer: Callable[[list[str]], tuple[int, str]]) -> list[str]:
    """Calls ``answer`` in place of the process that prepacks, and returns the list of sources it is called for.

    Others may start processes too: platform asks uname.
    """
    asked: list[str] = []
    real = subprocess.run

    def run(words: Sequence[str], *args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        if MODULE not in words:
            return real(words, *args, **kwargs)
        at = list(words).index(MODULE)
        asked.append(words[at + 1])
        code, error = answer(list(words[at + 1 :]))
        return subprocess.CompletedProcess(words, code, "", error)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], tuple[int, str]]:
    """``main`` in this process, called once for each file and copied from then on."""
    kept = tmp_path_factory.mktemp("kept")
    codes: dict[str, int] = {}
    lock = threading.Lock()

    def answer(words: list[str]) -> tuple[int, str]:
        source, out = words
        name = prepack.key(Path(source))
        with lock:
            if name not in codes:
                (kept / name).mkdir()
                codes[name] = prepack.main(source, str(kept / name))
        shutil.copytree(kept / name, out, dirs_exist_ok=True)
        return codes[name], ""

    return answer


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, results: Callable[[list[str]], tuple[int, str]]) -> list[str]:
    """Prepacks in this process; the sources, as often as they are prepacked."""
    return intercept(monkeypatch, results)


def contents(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def found(path: Path, cache: Path) -> Path:
    """The folder of the entry for ``path``, which must be there."""
    entry = prepack.prepacked(path, cache)
    assert entry is not None
    return entry.folder


def vectors(path: Path, memory: Memory) -> Array:
    return Session(path, Engine(threads=1, memory=memory)).vectors(BATCH)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_an_entry_is_made_once_by_a_process_of_its_own_and_found_again(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = found(source, cache)
    assert contents(folder) == DECODER_FILES
    assert contents(cache) == [folder.name]
    asked = intercept(monkeypatch, lambda _: pytest.fail("a second process"))
    assert found(source, cache) == folder
    assert asked == []


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_vectors_from_the_cache_are_the_file_s(
    folders: dict[str, Path], cache: Path, made: list[str], name: str, recipe: str
) -> None:
    path = folders[name] / "onnx" / f"model{RECIPES[recipe].suffix}.onnx"
    session = Session(path, Engine(threads=1, memory=Memory(cache=cache)))
    assert made == [str(path)]
    plain = vectors(path, Memory(cache=False))
    rounding = 1e-3 if RECIPES[recipe].half else ROUNDING  # onnxruntime leaves out casts that no output needs
    assert np.abs(session.vectors(BATCH) - plain).max() <= rounding
    assert np.abs(np.roll(plain, 1, axis=0) - plain).max() > 100 * ROUNDING
    if recipe in ("fp32", "int8"):  # what onnxruntime packs for other recipes is right in some versions only
        assert session.prepacked is not None
        assert contents(session.prepacked.folder) == (DECODER_FILES if name in QWENS else ENCODER_FILES)


def test_an_entry_needs_nothing_of_the_file_it_was_made_of(source: Path, cache: Path, made: list[str]) -> None:
    expected = vectors(source, Memory(cache=False))
    folder = found(source, cache)
    source.unlink()
    assert made
    assert np.abs(vectors(folder / "engine.onnx", Memory(cache=False)) - expected).max() <= ROUNDING


def beside(source: Path, end: str) -> Path:
    """The weights of ``source`` moved into a sidecar."""
    sidecar = source.with_name(source.name + end)
    onnx.save(onnx.load(source), source, save_as_external_data=True, location=sidecar.name, size_threshold=64)
    assert sidecar.stat().st_size > 10 * source.stat().st_size / 9
    return sidecar


@pytest.mark.parametrize("end", ["_data", ".data"])
def test_weights_in_a_sidecar_are_prepacked_too(source: Path, cache: Path, made: list[str], end: str) -> None:
    expected = vectors(source, Memory(cache=False))
    sidecar = beside(source, end)
    assert np.abs(vectors(source, Memory(cache=cache)) - expected).max() <= ROUNDING
    folder = found(source, cache)
    assert len(made) == 1
    sidecar.unlink()
    assert np.abs(vectors(folder / "engine.onnx", Memory(cache=False)) - expected).max() <= ROUNDING


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_files_that_are_links_as_in_the_hub_s_cache_are_prepacked_too(
    source: Path, cache: Path, made: list[str]
) -> None:
    """A snapshot's files are links to blobs named by their hashes, in another folder."""
    expected = vectors(source, Memory(cache=False))
    snapshot, blobs = source.parent / "snapshot", source.parent / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir()
    for at, file in enumerate((beside(source, "_data"), source)):
        (snapshot / file.name).symlink_to(file.rename(blobs / f"0123{at}"))
    link = snapshot / source.name
    assert np.array_equal(vectors(link, Memory(cache=False)), expected)
    session = Session(link, Engine(threads=1, memory=Memory(cache=cache)))
    assert made
    assert session.prepacked is not None
    assert np.abs(session.vectors(BATCH) - expected).max() <= ROUNDING


def test_a_key_belongs_to_the_bytes_and_not_to_the_place(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    assert prepack.key(Path(shutil.copy(source, tmp_path / "elsewhere" / "other.onnx"))) == prepack.key(source)


@pytest.mark.parametrize("at", [0, 5000, -1])
def test_a_key_changes_with_every_byte_of_the_graph(source: Path, at: int) -> None:
    before = prepack.key(source)
    flip(source, at)
    assert prepack.key(source) != before


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("end", ["_data", ".data"])
def test_a_key_changes_with_the_sidecar(source: Path, end: str) -> None:
    sidecar = beside(source, end)
    stamp = sidecar.stat().st_mtime_ns
    keys = [prepack.key(source)]
    flip(sidecar, 10)
    os.utime(sidecar, ns=(stamp, stamp))  # other bytes, same size and time
    keys.append(prepack.key(source))
    os.utime(sidecar, ns=(stamp, stamp + 1))  # same bytes and size, other time
    keys.append(prepack.key(source))
    sidecar.write_bytes(sidecar.read_bytes() + b"\0")
    os.utime(sidecar, ns=(stamp, stamp))  # another size
    keys.append(prepack.key(source))
    sidecar.unlink()
    keys.append(prepack.key(source))
    assert len(set(keys)) == len(keys)


def test_a_key_changes_with_onnxruntime_and_with_the_cpu(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [prepack.key(source)]
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "__version__", "9.9.9")
        keys.append(prepack.key(source))
    for name, flags in (("a cpu", {"avx2"}), ("a cpu", {"avx2", "avx512_vnni"}), ("another cpu", {"avx2"})):
        with monkeypatch.context() as patch:
            patch.setattr(prepack, "cpu", lambda name=name, flags=flags: (name, frozenset(flags)))
            keys.append(prepack.key(source))
    assert len(set(keys)) == len(keys)


def test_a_key_does_not_depend_on_the_order_of_flags(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for flags in (["a", "b", "c"], ["c", "b", "a"]):
        monkeypatch.setattr(prepack, "cpu", lambda flags=flags: ("a cpu", flags))
        keys.add(prepack.key(source))
    assert len(keys) == 1


@given(content=st.binary(min_size=1, max_size=9000), place=st.integers(0, 8999), bit=st.integers(0, 7))
def test_a_sample_of_a_small_file_sees_every_bit(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, place: int, bit: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "sampled"
    path.write_bytes(content)
    before = prepack.sample(path)
    assert prepack.sample(path) == before
    other = bytearray(content)
    other[place % len(content)] ^= 1 << bit
    path.write_bytes(other)
    assert prepack.sample(path) != before
    path.write_bytes(content + b"\0")
    assert prepack.sample(path) != before


def test_a_sample_of_a_large_file_sees_its_ends_and_its_size(tmp_path: Path) -> None:
    content = bytes(3_000_001)
    others = [b"\1" + content[1:], content[:-1] + b"\1", content[:-1], content + b"\0"]
    samples = set()
    for at, variant in enumerate([content, *others]):
        (tmp_path / str(at)).write_bytes(variant)
        samples.add(prepack.sample(tmp_path / str(at)))
    assert len(samples) == 1 + len(others)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def first_bit(path: Path) -> None:
    flip(path, 0)


def last_bit(path: Path) -> None:
    flip(path, -1)


@pytest.mark.parametrize("damage", [cut, grow, empty, first_bit, last_bit, Path.unlink])
@pytest.mark.parametrize("file", [name for name in DECODER_FILES if name != "entry.json"])
def test_an_entry_with_a_damaged_file_is_made_anew(
    source: Path, cache: Path, made: list[str], file: str, damage: Callable[[Path], None]
) -> None:
    folder = found(source, cache)
    whole = (folder / file).read_bytes()
    damage(folder / file)
    for _ in range(2):
        assert found(source, cache) == folder
        assert len(made) == 2
        assert (folder / file).read_bytes() == whole
        assert contents(folder) == DECODER_FILES
        assert contents(cache) == [folder.name]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"null",
        b"7",
        b"\xff\xfe",
        b'{"files": {}}',
        b'{"files": [1]}',
        b'{"files": "engine.onnx"}',
        b'{"files": {"engine.onnx": null}}',
        b'{"files": {"absent.onnx": "0"}}',
        b'{"files": {"": "0"}}',
    ],
)
def test_an_entry_that_does_not_say_what_it_holds_is_made_anew(
    source: Path, cache: Path, made: list[str], content: bytes
) -> None:
    folder = found(source, cache)
    whole = (folder / "entry.json").read_bytes()
    (folder / "entry.json").write_bytes(content)
    assert found(source, cache) == folder
    assert (folder / "entry.json").read_bytes() == whole
    assert len(made) == 2


def test_an_entry_without_its_list_is_made_anew(source: Path, cache: Path, made: list[str]) -> None:
    """What a crash between two files would leave, were entries not renamed when whole."""
    folder = found(source, cache)
    (folder / "entry.json").unlink()
    assert found(source, cache) == folder
    assert contents(folder) == DECODER_FILES
    assert len(made) == 2


def test_a_damaged_entry_of_another_file_disturbs_nobody(source: Path, cache: Path, made: list[str]) -> None:
    for at, content in enumerate((b"", b"[]", b'{"source": 7}', b"\xff")):
        (cache / f"other{at}").mkdir(parents=True)
        (cache / f"other{at}" / "entry.json").write_bytes(content)
    assert contents(found(source, cache)) == DECODER_FILES
    assert len(made) == 1
    assert len(contents(cache)) == 5


def test_an_older_entry_of_the_same_file_goes_and_those_of_others_stay(
    folders: dict[str, Path], source: Path, cache: Path, made: list[str]
) -> None:
    other = found(folders["qwen3-tied"] / "onnx" / "model.onnx", cache)
    old = found(source, cache)
    shutil.copy(folders["qwen3-tied"] / "onnx" / "model_q4.onnx", source)
    new = found(source, cache)
    assert len(made) == 3
    assert old != new
    assert contents(cache) == sorted([other.name, new.name])
    assert contents(other) == DECODER_FILES


def blocked(cache: Path, _: pytest.MonkeyPatch) -> None:
    cache.write_text("a file in its place")


def read_only(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)  # chmod does not stop root, who runs tests in containers


def full(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))


@pytest.mark.parametrize("obstacle", [blocked, read_only, full])
def test_a_cache_that_cannot_be_written_warns_once_and_the_file_itself_is_used(
    source: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: list[str],
    caplog: pytest.LogCaptureFixture,
    obstacle: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    expected = vectors(source, Memory(cache=False))
    obstacle(cache, monkeypatch)
    session = Session(source, Engine(threads=1, memory=Memory(cache=cache)))
    assert session.prepacked is None
    assert not session.keeps_past
    assert np.array_equal(session.vectors(BATCH), expected)
    (warning,) = warnings(caplog)
    assert warning.startswith(f"weights of {source} are not prepacked, loading takes longer and more memory: ")
    assert made == []
    assert not cache.is_dir() or contents(cache) == []


def test_room_is_wanted_for_both_layouts(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    beside(source, "_data")
    needed = 5 * prepack.size_bytes(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    assert prepack.prepacked(source, cache) is None
    assert made == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert prepack.prepacked(source, cache) is not None


def test_a_sound_entry_is_used_where_nothing_can_be_written(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    folder = found(source, cache)
    read_only(cache, monkeypatch)
    full(cache, monkeypatch)
    assert found(source, cache) == folder
    assert len(made) == 1


@pytest.mark.parametrize("recipe", ["int8", "fp32"])
def test_a_file_and_its_sidecars_are_what_size_bytes_counts(
    folders: dict[str, Path], tmp_path: Path, recipe: str
) -> None:
    path = Path(shutil.copy(folders["bert-mean"] / "onnx" / f"model{RECIPES[recipe].suffix}.onnx", tmp_path / "a.onnx"))
    whole = path.stat().st_size
    assert prepack.size_bytes(path) == whole
    for end, size in (("_data", 1000), (".data", 500), ("_more", 7)):
        path.with_name(path.name + end).write_bytes(bytes(size))
    assert prepack.size_bytes(path) == whole + 1500


def script(path: Path, *lines: str) -> str:
    """A program in place of the interpreter; $out is its last word, the folder to write into."""
    path.write_text("\n".join(("#!/bin/sh", "for out; do :; done", *lines, "")))
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="the programs are shell scripts")
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ['echo half > "$out/engine.onnx"', 'echo half > "$out/engine.data"', "kill -9 $$"],
            "the process ended with -9",
        ),
        (["echo first >&2; echo last words >&2; exit 1"], "last words"),
        (["exit 3"], "the process ended with 3"),
        (["exit 0"], "the process ended with 0"),
        (["exec sleep 600"], "timed out"),
    ],
    ids=["killed", "with a traceback", "silent", "without a result", "hanging"],
)
def test_a_process_that_fails_warns_and_leaves_the_file_itself(
    source: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lines: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "executable", script(tmp_path / "python", *lines))
    if said == "timed out":
        monkeypatch.setattr(prepack, "TIMEOUT_S", 0.05)
    expected = vectors(source, Memory(cache=False))
    assert np.array_equal(vectors(source, Memory(cache=cache)), expected)
    (warning,) = warnings(caplog)
    assert warning.startswith(f"weights of {source} are not prepacked")
    assert said in warning
    assert contents(cache) == []


def test_a_failure_is_forgotten_and_the_next_session_tries_again(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, results: Callable[[list[str]], tuple[int, str]]
) -> None:
    with monkeypatch.context() as patch:
        intercept(patch, lambda _: (1, "out of memory"))
        assert prepack.prepacked(source, cache) is None
    asked = intercept(monkeypatch, results)
    assert contents(found(source, cache)) == DECODER_FILES
    assert len(asked) == 1


def test_a_program_that_is_not_there_warns(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert prepack.prepacked(source, cache) is None
    assert "/no/such/python" in warnings(caplog)[0]
    assert contents(cache) == []


def test_modules_in_the_working_folder_are_not_taken_for_libraries(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "desk").mkdir()
    (tmp_path / "desk" / "onnx.py").write_text("raise SystemExit('the wrong onnx')")
    monkeypatch.chdir(tmp_path / "desk")
    assert contents(found(source, cache)) == DECODER_FILES


def run_main(source: Path, out: Path) -> tuple[int, list[str]]:
    """The exit code, and the files that are there afterwards."""
    out.mkdir()
    return prepack.main(str(source), str(out)), contents(out)


def test_weights_that_are_saved_wrongly_are_unfit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As onnxruntime 1.31 does with the weights of some products."""
    real = prepack._session

    def saved_wrongly(graph: bytes | str, entries: dict[str, str], save: Path | None = None) -> Any:
        session = real(graph, entries, save)
        if save is not None:
            content = np.fromfile(save.with_name("engine.data"), np.uint8)
            content[len(content) // 4 : len(content) // 2] ^= 0x55
            content.tofile(save.with_name("engine.data"))
        return session

    assert run_main(source, tmp_path / "sound")[0] == 0
    monkeypatch.setattr(prepack, "_session", saved_wrongly)
    assert run_main(source, tmp_path / "wrong")[0] == prepack.UNFIT


def test_rounding_is_not_unfit_and_a_wrong_vector_is() -> None:
    unit = {"sentence_embedding": np.eye(2, 48, dtype=np.float32)}
    noise = np.random.default_rng(0).normal(size=(2, 48))
    noise /= np.linalg.norm(noise)
    for size, same in ((1e-3, True), (0.1, False), (1, False)):
        assert prepack._same(unit, {"sentence_embedding": unit["sentence_embedding"] + size * noise}) is same
    assert not prepack._same(unit, {"sentence_embedding": np.full((2, 48), np.nan)})


FORM_RUNS = {
    "keys.onnx": ["behind.onnx", "keys.onnx"],
    "behind.onnx": ["behind.onnx", "keys.onnx"],
    "long.onnx": ["long.onnx"],
}


@pytest.mark.parametrize("form", FORM_RUNS)
def test_a_form_that_gives_other_vectors_is_left_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    real_session, real_run = prepack._session, prepack._run
    wrong: list[Any] = []

    def session(graph: bytes | str, entries: dict[str, str], save: Path | None = None) -> Any:
        opened = real_session(graph, entries, save)
        if isinstance(graph, str) and graph.endswith(form):
            wrong.append(opened)
        return opened

    def run(opened: Any, ids: Array, past: dict[str, Array] | None = None) -> dict[str, Array]:
        result = real_run(opened, ids, past)
        return {name: value[..., ::-1] for name, value in result.items()} if opened in wrong else result

    monkeypatch.setattr(prepack, "_session", session)
    monkeypatch.setattr(prepack, "_run", run)
    code, files = run_main(source, tmp_path / "out")
    assert code == 0
    assert files == [name for name in DECODER_FILES if name not in (*FORM_RUNS[form], "entry.json")]
    assert len(wrong) == 1


def test_a_model_without_a_usable_form_is_served_whole(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_forms(words: list[str]) -> tuple[int, str]:
        code = prepack.main(*words)
        for name in ("keys.onnx", "behind.onnx", "long.onnx"):
            (Path(words[1]) / name).unlink()
        return code, ""

    intercept(monkeypatch, without_forms)
    session = Session(source, Engine(threads=1, memory=Memory(cache=cache)))
    assert session.prepacked is not None
    assert not session.keeps_past
    assert session.prepacked.graph("engine.onnx") == session.prepacked.folder / "engine.onnx"
    assert session.prepacked.graph("long.onnx") is None
    long = collate([[5] * 800], 0)
    assert (
        np.abs(session.vectors(long) - Session(source, Engine(memory=Memory(cache=False))).vectors(long)).max()
        <= ROUNDING
    )


def unfit(words: list[str]) -> tuple[int, str]:
    (Path(words[1]) / "engine.onnx").write_bytes(b"what the process leaves")
    return prepack.UNFIT, ""


def test_a_file_found_unfit_is_remembered_and_not_tried_again(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = intercept(monkeypatch, unfit)
    expected = vectors(source, Memory(cache=False))
    for _ in range(3):
        session = Session(source, Engine(threads=1, memory=Memory(cache=cache)))
        assert session.prepacked is None
        assert np.array_equal(session.vectors(BATCH), expected)
    assert len(asked) == 1
    assert warnings(caplog) == []
    (entry,) = cache.iterdir()
    assert contents(entry) == ["entry.json"]
    said = json.loads((entry / "entry.json").read_text("utf-8"))
    assert said["source"] == str(source)
    assert onnxruntime.__version__ in said["unfit"]


def test_another_file_in_the_place_of_an_unfit_one_is_tried(
    folders: dict[str, Path],
    source: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    results: Callable[[list[str]], tuple[int, str]],
) -> None:
    with monkeypatch.context() as patch:
        intercept(patch, unfit)
        assert prepack.prepacked(source, cache) is None
    shutil.copy(folders["qwen3-tied"] / "onnx" / "model.onnx", source)
    asked = intercept(monkeypatch, results)
    folder = found(source, cache)
    assert contents(cache) == [folder.name]
    assert len(asked) == 1


def opened_by_another(source: Path, cache: Path) -> Path:
    """An entry that somebody else made and has in use; returns a file that goes when the entry is removed."""
    mark = found(source, cache) / "in use"
    mark.touch()
    return mark


def test_another_process_that_was_faster_wins(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, results: Callable[[list[str]], tuple[int, str]]
) -> None:
    marks: list[Path] = []

    def overtaken(words: list[str]) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            intercept(patch, results)
            marks.append(opened_by_another(source, cache))
        return results(words)

    intercept(monkeypatch, overtaken)
    folder = found(source, cache)
    assert marks == [folder / "in use"]
    assert marks[0].is_file()
    assert contents(cache) == [folder.name]


def test_an_entry_that_was_finished_while_this_process_looked_is_not_removed(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    marks: list[Path] = []
    real = prepack._unfit

    def meanwhile(folder: Path) -> str:
        if not marks:
            monkeypatch.setattr(prepack, "_unfit", real)
            marks.append(opened_by_another(source, cache))
        return real(folder)

    monkeypatch.setattr(prepack, "_unfit", meanwhile)
    folder = found(source, cache)
    assert marks == [folder / "in use"]
    assert marks[0].is_file()
    assert contents(cache) == [folder.name]
    assert made


def begin(barrier: Any) -> None:
    barrier.wait(60)


def make_and_run(path: Path, cache: Path) -> tuple[str, Array]:
    session = Session(path, Engine(threads=1, memory=Memory(cache=cache)))
    assert session.prepacked is not None
    return session.prepacked.folder.name, session.vectors(BATCH)


def test_two_processes_at_once_leave_one_sound_entry(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, begin, (context.Barrier(2),)) as pool:
        answers = [job.result() for job in [pool.submit(make_and_run, source, cache) for _ in range(2)]]
    (name,) = {name for name, _ in answers}
    assert contents(cache) == [name]
    assert contents(cache / name) == DECODER_FILES
    intercept(monkeypatch, lambda _: pytest.fail("the entry is not sound"))
    expected = vectors(source, Memory(cache=False))
    for found_vectors in (*(v for _, v in answers), vectors(source, Memory(cache=cache))):
        assert np.abs(found_vectors - expected).max() <= ROUNDING


def test_two_threads_at_once_leave_one_sound_entry(source: Path, cache: Path, made: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        entries = set(pool.map(lambda _: found(source, cache), range(8)))
    assert 1 <= len(made) <= 4
    assert contents(cache) == [folder.name for folder in entries]
    assert contents(entries.pop()) == DECODER_FILES


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and an environment that says nothing of caches."""
    for name in ("FEATHERBED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    return tmp_path / "home"


def test_the_user_s_cache_is_where_the_environment_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepack.default_cache() == home / ".cache" / "featherbed" / "prepacked"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert prepack.default_cache() == Path("/xdg/featherbed/prepacked")
    monkeypatch.setenv("FEATHERBED_CACHE", "/own")
    assert prepack.default_cache() == Path("/own/prepacked")
    for name in ("FEATHERBED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # set, and empty: as if not set
    assert prepack.default_cache() == home / ".cache" / "featherbed" / "prepacked"


def test_a_user_without_a_home_names_a_cache_or_does_without(
    source: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    """As in a container that runs under a number."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    assert not home.exists()
    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setattr(prepack, "LEAST_BYTES", 1)
    assert Session(source, Engine(threads=1)).prepacked is None
    monkeypatch.setenv("FEATHERBED_CACHE", str(tmp_path / "own"))
    assert Session(source, Engine(threads=1)).prepacked is not None
    assert len(made) == 1


def test_small_files_are_not_prepacked_unless_a_cache_is_named(
    source: Path, home: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    assert Session(source).prepacked is None
    monkeypatch.setattr(prepack, "LEAST_BYTES", source.stat().st_size + 1)
    assert Session(source).prepacked is None
    assert not home.exists()
    assert Session(source, Engine(memory=Memory(cache=cache))).prepacked is not None
    assert not home.exists()
    monkeypatch.setattr(prepack, "LEAST_BYTES", source.stat().st_size)
    session = Session(source)
    assert session.prepacked is not None
    assert session.prepacked.folder.parent == home / ".cache" / "featherbed" / "prepacked"
    assert len(made) == 2


@pytest.mark.parametrize("memory", [Memory(cache=False), Memory(prepack=False)])
def test_who_wants_no_prepacked_weights_gets_none(
    source: Path, home: Path, monkeypatch: pytest.MonkeyPatch, made: list[str], memory: Memory
) -> None:
    monkeypatch.setattr(prepack, "LEAST_BYTES", 1)
    assert Session(source, Engine(memory=memory)).prepacked is None
    assert made == []
    assert not home.exists()


def test_a_session_on_another_provider_is_not_prepacked(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    assert Session(source, Engine(threads=1, memory=Memory(cache=cache))).prepacked is None  # "auto" goes for CUDA
    assert made == []


def test_a_graph_without_a_sentence_embedding_still_gives_its_hidden_states(
    folders: dict[str, Path], tmp_path: Path, cache: Path, made: list[str]
) -> None:
    model = onnx.load(folders["bert-mean"] / "onnx" / "model.onnx")
    del model.graph.output[1]
    onnx.save(model, tmp_path / "foreign.onnx")
    memories = (Memory(cache=cache), Memory(cache=False))
    found_hidden, plain = (Session(tmp_path / "foreign.onnx", Engine(1, memory=m)).hidden(BATCH) for m in memories)
    assert np.abs(found_hidden - plain).max() <= ROUNDING * np.abs(plain).max()
    assert len(made) <= 1


def the_entry(cache: Path) -> prepack.Entry:
    """The only entry of a cache, as it lies there."""
    (entry,) = prepack.entries(cache)
    return entry


def test_entries_say_of_which_file_how_large_and_when_last_used(
    folders: dict[str, Path], source: Path, cache: Path, tmp_path: Path, made: list[str]
) -> None:
    other = Path(shutil.copy(folders["bert-cls"] / "onnx" / "model_int8.onnx", tmp_path / "other.onnx"))
    expected = {found(path, cache): path for path in (source, other)}
    assert len(made) == 2
    entries = list(prepack.entries(cache))
    assert [entry.folder for entry in entries] == sorted(expected)
    for entry in entries:
        assert (entry.source, entry.fault) == (str(expected[entry.folder]), "")
        assert entry.size_bytes == sum(path.stat().st_size for path in entry.folder.iterdir())
        assert entry.used == (entry.folder / "entry.json").stat().st_mtime


def test_an_entry_was_last_used_when_a_session_found_it(source: Path, cache: Path, made: list[str]) -> None:
    folder = found(source, cache)
    os.utime(folder / "entry.json", (10**9, 10**9))
    assert the_entry(cache).used == 10**9
    assert found(source, cache) == folder
    assert the_entry(cache).used > 10**9
    assert len(made) == 1


def test_a_cache_that_cannot_be_noted_in_is_used_all_the_same(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    """As one that is another user's."""
    folder = found(source, cache)

    def refused(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "utime", refused)
    assert found(source, cache) == folder
    assert len(made) == 1


def test_there_are_no_entries_in_an_empty_cache_or_in_none(cache: Path) -> None:
    assert list(prepack.entries(cache)) == []
    cache.mkdir()
    (cache / "notes.txt").write_text("mine")
    (cache / ".new-1").mkdir()  # somebody is making one
    assert list(prepack.entries(cache)) == []


@pytest.mark.usefixtures("made")
def test_an_entry_whose_file_is_gone_is_useless(source: Path, cache: Path) -> None:
    found(source, cache)
    source.unlink()
    entry = the_entry(cache)
    assert (entry.source, entry.fault) == (str(source), "its model is gone")


@pytest.mark.usefixtures("made")
def test_an_entry_of_another_onnxruntime_or_cpu_is_useless(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found(source, cache)
    for name, value in (
        ("ort", SimpleNamespace(__version__="1.30.9")),
        ("cpu", lambda: ("another one", frozenset({"avx2"}))),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(prepack, name, value)
            assert the_entry(cache).fault == "another onnxruntime or CPU made it"
    assert the_entry(cache).fault == ""
    source.unlink()
    monkeypatch.setattr(prepack, "cpu", lambda: ("another one", frozenset({"avx2"})))
    assert the_entry(cache).fault == "another onnxruntime or CPU made it"


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("damage", ["a byte", "a cut", "a file that is gone", "a file list that is none"])
def test_an_entry_whose_files_are_others_is_damaged(source: Path, cache: Path, damage: str) -> None:
    folder = found(source, cache)
    path = folder / "engine.data"
    raw = path.read_bytes()
    if damage == "a byte":
        path.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    elif damage == "a cut":
        path.write_bytes(raw[:-1])
    elif damage == "a file that is gone":
        path.unlink()
    else:
        entry = json.loads((folder / "entry.json").read_text("utf-8"))
        (folder / "entry.json").write_text(json.dumps(entry | {"files": ["engine.data"]}))
    entry_there = the_entry(cache)
    assert (entry_there.source, entry_there.fault) == (str(source), prepack.DAMAGED)
    assert found(source, cache) == folder  # made anew
    assert the_entry(cache).fault == ""


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "null", "3", '"entry"', "{}", '{"source": "model.onnx"}', "\x00\x01"]
)
def test_an_entry_that_does_not_say_what_it_is_of_is_useless(source: Path, cache: Path, text: str | None) -> None:
    folder = found(source, cache)
    if text is None:
        (folder / "entry.json").unlink()
    else:
        (folder / "entry.json").write_text(text)
    entry = the_entry(cache)
    assert (entry.folder, entry.source) == (folder, "")
    assert entry.fault not in ("", prepack.DAMAGED)  # nothing is wrong with it, it only is of no use
    assert entry.size_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert entry.used == folder.stat().st_mtime


def test_an_entry_that_remembers_an_unfit_file_is_no_fault(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intercept(monkeypatch, unfit)
    assert prepack.prepacked(source, cache) is None
    entry = the_entry(cache)
    assert (entry.source, entry.fault) == (str(source), "")
    source.unlink()
    assert the_entry(cache).fault == "its model is gone"
