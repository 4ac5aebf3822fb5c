"""Sessions: graphs small enough to work out by hand, lanes and weights, and every way a file can be refused."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from featherbed.errors import EngineError, ModelFolderError, OptionError
from featherbed.run import session as room
from featherbed.run.batches import LONG_TOKENS, collate
from featherbed.run.session import MOST_RUNS, SMALL_NUMBERS, WIDTH, Engine, Memory, Session, require

TOKENS, DIM = 8, 3
TABLE = np.arange(TOKENS * DIM, dtype=np.float32).reshape(TOKENS, DIM)
BATCH = collate([[1, 2, 3], [7]], 0)
TEXTS = collate([list(range(1, 40)), [7, 8], [9]], 0)  # for the fixtures' models
ROUNDING = 1e-5

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sketch:
    """A graph that looks ids up in TABLE, adds ``added`` inputs to them, and gives ``output``."""

    inputs: Sequence[str] = ("input_ids", "attention_mask")
    added: Sequence[str] = ()
    output: str = "last_hidden_state"
    batch: str | int = "batch"

    def write(self, path: Path) -> Path:
        axes = [self.batch, "tokens"]
        nodes, last = [], "input_ids"
        for name in self.added:
            nodes.append(helper.make_node("Add", [last, name], [f"{last}+{name}"]))
            last = f"{last}+{name}"
        nodes.append(helper.make_node("Gather", ["table", last], [self.output]))
        graph = helper.make_graph(
            nodes,
            "sketch",
            [helper.make_tensor_value_info(name, TensorProto.INT64, axes) for name in self.inputs],
            [helper.make_tensor_value_info(self.output, TensorProto.FLOAT, [*axes, DIM])],
            [numpy_helper.from_array(TABLE, "table")],
        )
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        return path


def plain(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    return np.array([[TABLE[i] for i in row] for row in ids], np.float32)


def test_hidden_states_are_what_the_graph_says(tmp_path: Path) -> None:
    session = Session(Sketch().write(tmp_path / "a.onnx"))
    assert np.array_equal(session.hidden(BATCH), plain(BATCH.ids))
    assert not session.pools


def test_a_graph_with_a_sentence_embedding_pools(tmp_path: Path) -> None:
    session = Session(Sketch(output="sentence_embedding").write(tmp_path / "a.onnx"))
    assert session.pools
    assert np.array_equal(session.vectors(BATCH), plain(BATCH.ids))


def test_only_declared_inputs_are_fed(tmp_path: Path) -> None:
    session = Session(Sketch(inputs=("input_ids",)).write(tmp_path / "a.onnx"))
    assert np.array_equal(session.hidden(BATCH), plain(BATCH.ids))


def test_token_types_are_zeros_and_the_mask_is_the_mask(tmp_path: Path) -> None:
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    session = Session(Sketch(inputs, added=inputs[1:]).write(tmp_path / "a.onnx"))
    batch = collate([[1, 2, 3], [6]], 0)
    assert np.array_equal(session.hidden(batch), plain(batch.ids + batch.mask))


@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_threads_and_prepacking_change_no_result(tmp_path: Path, threads: int | None, prepack: bool) -> None:
    engine = Engine(threads, memory=Memory(prepack=prepack))
    session = Session(Sketch().write(tmp_path / "a.onnx"), engine)
    assert np.array_equal(session.hidden(BATCH), plain(BATCH.ids))


@pytest.mark.parametrize(
    ("threads", "pool_size", "cores", "lanes"),
    [
        (None, None, 1, (1, 1, 1)),
        (None, None, 2, (2, 1, 2)),
        (None, None, 4, (4, 1, 4)),
        (None, None, 5, (5, 1, 4)),
        (None, None, 6, (6, 2, 3)),
        (None, None, 7, (7, 2, 3)),
        (None, None, 8, (8, 2, 4)),
        (None, None, 10, (10, 5, 2)),
        (None, None, 64, (64, 16, 4)),
        (1, None, 8, (1, 1, 1)),
        (3, None, 8, (3, 1, 3)),
        (16, None, 2, (16, 4, 4)),
        (None, 1, 8, (8, 8, 1)),
        (None, 2, 8, (4, 4, 2)),
        (None, 3, 8, (2, 2, 3)),
        (None, 8, 8, (1, 1, 8)),
        (None, 20, 8, (1, 1, 20)),
        (6, 2, 64, (3, 3, 2)),
        (1, 1, 64, (1, 1, 1)),
        (2, 5, 64, (1, 1, 5)),
    ],
)
def test_lanes_worked_out_by_hand(
    monkeypatch: pytest.MonkeyPatch, threads: int | None, pool_size: int | None, cores: int, lanes: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(room, "cores", lambda: cores)
    assert Engine(threads, pool_size).lanes() == lanes


@pytest.mark.parametrize("threads", range(1, 70))
def test_runs_side_by_side_take_no_more_threads_than_there_are(threads: int) -> None:
    alone, among, runs = Engine(threads).lanes()
    assert alone == threads
    assert among >= 1
    assert among * runs <= threads
    assert runs <= MOST_RUNS
    for pool_size in range(1, threads + 1):
        alone, among, runs = Engine(threads, pool_size).lanes()
        assert (alone, runs) == (among, pool_size)
        assert among * runs <= threads


@pytest.mark.parametrize("value", [0, -1, -64])
@pytest.mark.parametrize("name", ["threads", "pool_size"])
def test_fewer_than_one_thread_or_run_is_an_option_error(name: str, value: int) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(OptionError, match=f"^{name}: expected at least 1, found {value}"):
        Engine(**options)


def in_use(session: Session) -> list[tuple[str, int]]:
    """File and threads of all that a session has loaded."""
    return sorted((path.name, threads) for path, threads in session._opened)


def test_a_run_alone_and_runs_side_by_side_have_sessions_of_their_own(tmp_path: Path) -> None:
    session = Session(Sketch(output="sentence_embedding").write(tmp_path / "a.onnx"), Engine(6))
    assert (session.runs, in_use(session)) == (3, [("a.onnx", 6)])
    for alone, threads in ((True, [6]), (False, [2, 6]), (True, [2, 6])):
        assert np.array_equal(session.vectors(BATCH, alone), plain(BATCH.ids))
        assert in_use(session) == [("a.onnx", n) for n in threads]


def test_threads_that_come_at_once_load_a_lane_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(Sketch(output="sentence_embedding").write(tmp_path / "a.onnx"), Engine(4))
    loaded: list[int] = []
    real, start = session._load, threading.Barrier(8)

    def load(graph: Path, threads: int) -> onnxruntime.InferenceSession:
        loaded.append(threads)
        return real(graph, threads)

    def vectors(_: int) -> Vectors:
        start.wait(60)
        return session.vectors(BATCH, alone=False)

    monkeypatch.setattr(session, "_load", load)
    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(found, plain(BATCH.ids)) for found in pool.map(vectors, range(8)))
    assert loaded == [1]


@pytest.mark.parametrize("pool_size", [None, 3])
def test_a_large_file_is_not_loaded_twice_for_runs_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool_size: int | None
) -> None:
    path = Sketch(output="sentence_embedding").write(tmp_path / "a.onnx")
    monkeypatch.setattr(room, "SHARED_BYTES", path.stat().st_size - 1)
    session = Session(path, Engine(6, pool_size))
    assert session.runs == (pool_size or 1)  # runs of one kind share their session
    session.vectors(BATCH, alone=False)
    session.vectors(BATCH)
    assert len(in_use(session)) == 1


def test_prepacked_weights_are_shared_whatever_their_size(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "SHARED_BYTES", 0)
    path = folders["bert-mean"] / "onnx" / "model_int8.onnx"
    assert Session(path, Engine(4, memory=Memory(cache=False))).runs == 1
    session = Session(path, Engine(4, memory=Memory(cache=tmp_path)))
    assert session.runs == 4
    alone, among = session.vectors(TEXTS), session.vectors(TEXTS, alone=False)
    assert np.abs(alone - among).max() <= ROUNDING
    assert in_use(session) == [("engine.onnx", 1), ("engine.onnx", 4)]


@pytest.mark.parametrize(("pool_size", "said"), [(None, []), (1, ["0"]), (4, ["0"])])
def test_threads_among_many_callers_do_not_wait_in_circles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool_size: int | None, said: list[str]
) -> None:
    found: list[str] = []

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def add_session_config_entry(self, key: str, value: str) -> None:
            found.extend([value] if key == "session.intra_op.allow_spinning" else [])
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    Session(Sketch().write(tmp_path / "a.onnx"), Engine(2, pool_size))
    assert found == said


@pytest.mark.parametrize(
    ("numbers", "alone", "given_back"),
    [(0, True, False), (1, True, True), (0, False, False), (1, False, True)],
)
def test_only_a_small_run_keeps_what_it_took_for_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: int, alone: bool, given_back: bool
) -> None:
    said: list[str] = []

    class Options(onnxruntime.RunOptions):  # type: ignore[misc]
        def add_run_config_entry(self, key: str, value: str) -> None:
            said.append(f"{key}={value}")
            super().add_run_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "RunOptions", Options)
    path = Sketch(output="sentence_embedding").write(tmp_path / "a.onnx")
    session = Session(path)
    batch = collate([[1] * (SMALL_NUMBERS // WIDTH + numbers)], 0)
    assert np.array_equal(session.vectors(batch, alone), plain(batch.ids))
    assert said == (["memory.enable_memory_arena_shrinkage=cpu:0"] if given_back else [])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def decoder(folders: dict[str, Path], cache: Path) -> Session:
    """A decoder's float weights, prepacked."""
    return Session(folders["qwen3-tied"] / "onnx" / "model.onnx", Engine(2, memory=Memory(cache=cache)))


@pytest.fixture
def from_file(folders: dict[str, Path]) -> Session:
    """The same, from the file itself."""
    return Session(folders["qwen3-tied"] / "onnx" / "model.onnx", Engine(2, memory=Memory(cache=False)))


def test_a_session_over_prepacked_weights_gives_the_file_s_vectors(decoder: Session, from_file: Session) -> None:
    assert decoder.prepacked is not None
    assert from_file.prepacked is None
    assert decoder.pools
    assert np.abs(decoder.vectors(TEXTS) - from_file.vectors(TEXTS)).max() <= ROUNDING


def test_hidden_states_come_from_the_file_itself(decoder: Session, from_file: Session) -> None:
    assert list(decoder.outputs) == ["sentence_embedding"]
    found, expected = decoder.hidden(TEXTS), from_file.hidden(TEXTS)
    assert found.shape == (*TEXTS.ids.shape, 48)
    assert np.abs(found - expected).max() <= ROUNDING * np.abs(expected).max()
    assert in_use(decoder) == [("engine.onnx", 2), ("model.onnx", 2)]


def test_a_file_without_hidden_states_says_so(tmp_path: Path) -> None:
    session = Session(Sketch(output="sentence_embedding").write(tmp_path / "a.onnx"))
    with pytest.raises(EngineError, match=r"a\.onnx: expected the output last_hidden_state.*found sentence_embedding"):
        session.hidden(BATCH)


@pytest.mark.parametrize(("length", "graph"), [(LONG_TOKENS, "engine.onnx"), (LONG_TOKENS + 1, "long.onnx")])
def test_long_texts_take_the_graph_made_for_them(
    decoder: Session, from_file: Session, monkeypatch: pytest.MonkeyPatch, length: int, graph: str
) -> None:
    used: list[str] = []
    real = decoder._open

    def opened(path: Path, threads: int) -> onnxruntime.InferenceSession:
        used.append(path.name)
        return real(path, threads)

    monkeypatch.setattr(decoder, "_open", opened)
    batch = collate([[at % 380 + 1 for at in range(length)], [5, 6, 7]], 0)
    assert np.abs(decoder.vectors(batch) - from_file.vectors(batch)).max() <= ROUNDING
    assert used == [graph]


def test_tokens_behind_a_past_have_the_vector_of_the_whole(decoder: Session, from_file: Session) -> None:
    ids = [int(i) for i in np.random.default_rng(1).integers(1, 384, 20)]
    assert decoder.keeps_past
    past = decoder.past(ids[:12])
    assert sorted(past) == [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    expected = from_file.vectors(collate([ids], 0))
    for alone in (True, False):
        assert np.abs(decoder.behind(past, ids[12:], alone) - expected).max() <= ROUNDING
    assert ("keys.onnx", 2) not in in_use(decoder)  # used once a prompt, then let go


@pytest.mark.parametrize(
    ("name", "memory"),
    [("qwen3-tied", Memory(cache=False)), ("qwen3-tied", Memory(prompts=False)), ("bert-cls", Memory())],
)
def test_not_every_session_keeps_a_past(folders: dict[str, Path], cache: Path, name: str, memory: Memory) -> None:
    memory = memory if memory.cache is False else Memory(cache, memory.prepack, memory.prompts)
    assert not Session(folders[name] / "onnx" / "model.onnx", Engine(1, memory=memory)).keeps_past


def one_after_the_other(session: Session) -> Vectors:
    return session.vectors(TEXTS)


def side_by_side(session: Session) -> Vectors:
    return session.vectors(TEXTS, alone=False)


def long_ones(session: Session) -> Vectors:
    return session.vectors(collate([[5] * (LONG_TOKENS + 8)], 0))


def behind_others(session: Session) -> Vectors:
    ids = [int(i) for i in TEXTS.ids[0]]
    return session.behind(session.past(ids[:9]), ids[9:]) if session.keeps_past else session.vectors(TEXTS)[:1]


@pytest.mark.parametrize("ask", [one_after_the_other, side_by_side, long_ones, behind_others])
def test_a_session_outlives_the_cache_it_was_opened_from(
    folders: dict[str, Path],
    cache: Path,
    tmp_path: Path,
    decoder: Session,
    from_file: Session,
    ask: Callable[[Session], Vectors],
) -> None:
    """A user may empty the cache, another process replace an entry: what is open goes on."""
    assert decoder.prepacked is not None
    copied = shutil.copytree(cache, tmp_path / "cache")
    session = Session(folders["qwen3-tied"] / "onnx" / "model.onnx", Engine(2, memory=Memory(cache=copied)))
    assert session.prepacked is not None
    assert session.prepacked.folder.parent == copied
    shutil.rmtree(copied)
    assert np.abs(ask(session) - ask(from_file)).max() <= ROUNDING


def test_a_missing_file_is_a_model_folder_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"absent\.onnx: expected an \.onnx file, found no such file"):
        Session(tmp_path / "absent.onnx")


def test_a_folder_in_place_of_the_file_is_a_model_folder_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no such file"):
        Session(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage " * 500, b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 99],
)
def test_a_file_that_is_no_graph_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"a\.onnx: expected a graph that onnxruntime \S+ loads") as caught:
        Session(path)
    assert "\n" not in str(caught.value)


def test_a_cut_graph_is_refused_at_every_length(tmp_path: Path) -> None:
    path = Sketch().write(tmp_path / "a.onnx")
    whole = path.read_bytes()
    for part in range(64):
        path.write_bytes(whole[: len(whole) * part // 64])
        with pytest.raises(EngineError):
            Session(path)


@pytest.mark.parametrize(
    "sketch",
    [
        Sketch(inputs=("input_ids", "attention_mask", "position_ids")),
        Sketch(inputs=("input_ids", "past_key_values.0.key")),
        Sketch(output="logits"),
    ],
    ids=["an input too many", "a cache", "another output"],
)
def test_ports_we_cannot_serve_are_listed(tmp_path: Path, sketch: Sketch) -> None:
    with pytest.raises(EngineError) as caught:
        Session(sketch.write(tmp_path / "a.onnx"))
    assert caught.value.found == f"inputs {', '.join(sorted(sketch.inputs))}; outputs {sketch.output}"
    assert "attention_mask, input_ids, token_type_ids" in caught.value.expected


def test_a_graph_without_token_ids_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["attention_mask"], ["last_hidden_state"], to=TensorProto.FLOAT)
    ports = [helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "tokens"])]
    outputs = [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "tokens"])]
    model = helper.make_model(
        helper.make_graph([node], "masks", ports, outputs), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    save(model, tmp_path / "a.onnx")
    with pytest.raises(EngineError, match="found inputs attention_mask;"):
        Session(tmp_path / "a.onnx")


def test_a_run_that_fails_says_what_was_run(tmp_path: Path) -> None:
    session = Session(Sketch().write(tmp_path / "a.onnx"))
    with pytest.raises(EngineError, match=r"^a run of 2 texts × 3 tokens: .*out of data bounds") as caught:
        session.hidden(collate([[1, 2, TOKENS], [7]], 0))
    assert "\n" not in str(caught.value)
    assert np.array_equal(session.hidden(BATCH), plain(BATCH.ids))


def test_a_run_that_fails_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    session = Session(Sketch().write(tmp_path / "a.onnx"))
    with pytest.raises(EngineError):
        session.hidden(collate([[TOKENS]], 0))
    assert capfd.readouterr() == ("", "")


def test_a_static_batch_says_which_sizes_do_not_fit(tmp_path: Path) -> None:
    path = Sketch(batch=1).write(tmp_path / "a.onnx")
    session = Session(path)
    single = collate([[1, 2]], 0)
    assert np.array_equal(session.hidden(single), plain(single.ids))
    with pytest.raises(EngineError, match=r"both dynamic, or both fixed.*found the shape \[1, 'tokens'\]"):
        Session(path, width=3)
    with pytest.raises(EngineError, match=r"^a run of 2 texts × 3 tokens: .*Got: 2 Expected: 1"):
        session.hidden(BATCH)


@pytest.mark.parametrize(
    ("installed", "least"), [("1.18.0", "1.30"), ("1.9.1", "1.30"), ("1.29.9", "1.30"), ("1.31.0", "2.0")]
)
def test_an_onnxruntime_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch, installed: str, least: str) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", installed)
    with pytest.raises(EngineError, match=f"^variant q4: expected onnxruntime {least} or newer.*found {installed}"):
        require(least, "variant q4")


@pytest.mark.parametrize(
    ("installed", "least"), [("1.30.0", "1.30"), ("1.31.1", "1.9"), ("2.0.0", "1.30"), ("1.30.2", "1.30.2")]
)
def test_an_onnxruntime_that_is_new_enough_is_taken(
    monkeypatch: pytest.MonkeyPatch, installed: str, least: str
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", installed)
    require(least, "variant q4")
