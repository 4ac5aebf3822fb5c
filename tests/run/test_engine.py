"""The engine as a caller of Embedder meets it: threads, pools, processes, streams, long texts, prompts kept or not."""

from __future__ import annotations

import multiprocessing
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import cache as remembered
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from featherbed.errors import EngineError, OptionError, TextError
from featherbed.run import embedder as room
from featherbed.run import heap
from featherbed.run import windows as windows_room
from featherbed.run.batches import LONG_TOKENS, Batch, collate
from featherbed.run.embedder import Embedder
from featherbed.run.session import Memory
from tests.conftest import NAMES, upstream

Vectors = npt.NDArray[np.float32]
Open = Callable[..., Embedder]

QWENS = NAMES[2:]
ROUNDING = 1e-5
DIM = 48
INSTRUCT = "Instruct: find what was asked\nQuery: "


def mixed_lengths(texts: int) -> list[str]:
    """Texts of 0 to 60 words, no two alike, in no order."""
    words = " ".join(upstream("bert-mean").texts).split()
    lengths = np.random.default_rng(7).permutation(texts)
    return [
        " ".join(words[(5 * i + k) % len(words)] for k in range(int(n) % 60)) + f" {i}" for i, n in enumerate(lengths)
    ]


TEXTS = mixed_lengths(90)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path], cache: Path) -> Open:
    """A fixture's variant over prepacked weights, where ``memory`` does not say otherwise."""

    @remembered
    def get(
        name: str, variant: str, threads: int | None = 2, pool_size: int | None = None, memory: Memory | None = None
    ) -> Embedder:
        memory = memory or Memory(cache=cache)
        return Embedder(folders[name], variant, threads=threads, pool_size=pool_size, memory=memory)

    return get


def difference(a: Vectors, b: Vectors) -> float:
    return float(np.abs(a - b).max())


def busy() -> set[threading.Thread]:
    return set(threading.enumerate())


@pytest.mark.parametrize("option", ["threads", "pool_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_fewer_than_one_thread_or_run_is_an_option_error(folders: dict[str, Path], option: str, value: int) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(OptionError, match=f"^{option}: expected at least 1, found {value}"):
        Embedder(folders["bert-mean"], "fp32", **options)


@pytest.mark.parametrize(("threads", "pool_size"), [(1, None), (4, None), (None, None), (2, 1), (2, 2), (3, 5), (1, 3)])
@pytest.mark.parametrize(("name", "variant"), [("qwen3-tied", "int8"), ("qwen3-biased", "fp32"), ("bert-mean", "int8")])
def test_threads_and_pools_change_no_vector(
    opened: Open, name: str, variant: str, threads: int | None, pool_size: int | None
) -> None:
    expected = opened(name, variant, 2).encode(TEXTS)
    assert difference(np.roll(expected, 1, axis=0), expected) > 1000 * ROUNDING
    assert difference(opened(name, variant, threads, pool_size).encode(TEXTS), expected) <= ROUNDING


@pytest.mark.parametrize("name", NAMES)
def test_in_int8_a_batch_has_the_same_bits_on_any_number_of_threads(opened: Open, name: str) -> None:
    """Integer sums do not depend on their order, and floating ones stand within a row."""
    rows = opened(name, "int8", 1).ids(TEXTS)
    batch = collate(rows, 0)
    expected = opened(name, "int8", 1).embed(batch)
    for threads in (2, 4):
        for alone in (True, False):
            assert np.array_equal(opened(name, "int8", threads).embed(batch, alone=alone), expected)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("bert-mean", "int8"),
        ("bert-cls", "int8"),
        ("qwen3-tied", "int8-block"),
        ("qwen3-tied", "q4"),
        ("qwen3-biased", "fp32"),
    ],
)
def test_a_text_alone_and_one_among_many_have_one_vector(opened: Open, name: str, variant: str) -> None:
    """Alone it takes all threads, among others one: sessions of their own."""
    embedder = opened(name, variant, 4)
    together = embedder.encode(TEXTS)
    alone = np.stack([embedder.encode(text) for text in TEXTS[::6]])
    assert difference(alone, together[::6]) <= ROUNDING


def spy(monkeypatch: pytest.MonkeyPatch, embedder: Embedder, meeting: int) -> tuple[list[bool], list[int]]:
    """(``alone`` of every run, runs going on as each begins); the first ``meeting`` of them wait for each other."""
    lanes: list[bool] = []
    going: list[int] = []
    real, lock, barrier = embedder._session.vectors, threading.Lock(), threading.Barrier(meeting)
    now = [0]

    def vectors(batch: Batch, alone: bool = True) -> Vectors:
        with lock:
            now[0] += 1
            lanes.append(alone)
            going.append(now[0])
            waits = len(lanes) <= meeting
        if waits:
            barrier.wait(60)
        try:
            return real(batch, alone)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(embedder._session, "vectors", vectors)
    return lanes, going


@pytest.mark.parametrize(
    ("threads", "pool_size", "runs"), [(1, None, 1), (2, None, 2), (4, None, 4), (2, 1, 1), (1, 3, 3)]
)
def test_as_many_batches_run_at_a_time_as_there_are_lanes(
    opened: Open, monkeypatch: pytest.MonkeyPatch, threads: int, pool_size: int | None, runs: int
) -> None:
    embedder = opened("bert-cls", "int8", threads, pool_size)
    assert embedder._session.runs == runs
    lanes, going = spy(monkeypatch, embedder, runs)
    embedder.encode(TEXTS * 4)
    assert max(going) == runs
    assert len(lanes) >= 2 * runs or runs == 1
    assert set(lanes) == {runs == 1}


def test_a_batch_alone_takes_all_threads(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = opened("bert-cls", "int8", 4)
    lanes, _ = spy(monkeypatch, embedder, 1)
    embedder.encode("rain")
    embedder.encode(["rain", "a fox", "the harbour"])
    assert lanes == [True, True]


@pytest.mark.parametrize(("name", "variant"), [("bert-mean", "int8"), ("qwen3-tied", "int8"), ("qwen3-tied", "q4")])
def test_many_callers_at_once_get_the_vectors_of_one(opened: Open, name: str, variant: str) -> None:
    embedder = opened(name, variant, 2)
    expected = embedder.encode(TEXTS)
    orders = [np.random.default_rng(turn).permutation(len(TEXTS))[: 1 + 3 * turn] for turn in range(24)]

    def ask(turn: int) -> float:
        order = orders[turn]
        rows = [TEXTS[i] for i in order]
        found = np.concatenate(list(embedder.stream(rows))) if turn % 3 == 0 else embedder.encode(rows)
        return difference(found, expected[order])

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(ask, range(len(orders)))) <= ROUNDING


def in_a_process(folder: Path, cache: Path, texts: list[str]) -> tuple[bool, Vectors]:
    embedder = Embedder(folder, "int8", threads=1, memory=Memory(cache=cache))
    return embedder._session.prepacked is not None, embedder.encode(texts, prompt=INSTRUCT)


def test_processes_over_one_cached_entry_give_the_vectors_of_one(
    folders: dict[str, Path], opened: Open, cache: Path
) -> None:
    expected = opened("qwen3-tied", "int8").encode(TEXTS, prompt=INSTRUCT)
    before = sorted(cache.rglob("*"))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(in_a_process, folders["qwen3-tied"], cache, TEXTS[at::3]) for at in range(3)]
        for at, job in enumerate(jobs):
            prepacked, vectors = job.result()
            assert prepacked
            assert difference(vectors, expected[at::3]) <= ROUNDING
    assert sorted(cache.rglob("*")) == before


@pytest.mark.parametrize("window", [1, 7, 89, 90, 91, 8192])
@pytest.mark.parametrize(("prompt_name", "dim"), [(None, None), ("query", 5)])
def test_a_stream_gives_what_encode_gives_in_its_order(
    opened: Open, monkeypatch: pytest.MonkeyPatch, window: int, prompt_name: str | None, dim: int | None
) -> None:
    embedder = opened("qwen3-tied", "fp32")
    expected = embedder.encode(TEXTS, prompt_name, truncate_dim=dim)
    monkeypatch.setattr(windows_room, "WINDOW_TEXTS", window)
    told: list[tuple[str, int, int]] = []
    pieces = list(embedder.stream(iter(TEXTS), prompt_name, truncate_dim=dim, progress=lambda *said: told.append(said)))
    assert [len(piece) for piece in pieces[:-1]] == [window] * (len(pieces) - 1)
    assert difference(np.concatenate(pieces), expected) <= ROUNDING
    assert told == sorted(set(told))
    assert told[-1] == ("embed", len(TEXTS), 0)  # nobody knows how many there will be


def test_a_window_of_long_texts_holds_fewer(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are taken until there are enough characters: one of any length is a window."""
    monkeypatch.setattr(windows_room, "WINDOW_TEXTS", 4)
    monkeypatch.setattr(windows_room, "WINDOW_CHARACTERS", 20)
    texts = ["a" * 10, "b" * 9, "c" * 100, "", "d", "e", "f", "g", "h" * 20, "i"]
    embedder = opened("bert-mean", "int8")
    pieces = list(embedder.stream(texts))
    assert [len(piece) for piece in pieces] == [3, 4, 2, 1]
    assert difference(np.concatenate(pieces), embedder.encode(texts)) <= ROUNDING


def test_memory_is_handed_back_after_much_work_and_not_after_a_short_text(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder, given_back = opened("bert-mean", "int8"), list[bool]()
    monkeypatch.setattr(room, "SMALL_NUMBERS", 10 * embedder.spec.dim)
    monkeypatch.setattr(heap, "give_back", lambda: given_back.append(True))
    embedder.encode("rain")
    assert given_back == []
    embedder.encode(TEXTS)
    assert len(given_back) == 1
    stream: Any = embedder.stream(TEXTS)
    next(stream)
    stream.close()
    assert len(given_back) == 2


def test_a_stream_of_nothing_gives_nothing(opened: Open) -> None:
    assert list(opened("bert-mean", "int8").stream([])) == []


def test_a_stream_without_end_is_read_one_window_ahead(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_room, "WINDOW_TEXTS", 5)
    embedder, read = opened("bert-mean", "int8"), list[int]()

    def endless() -> Iterator[str]:
        for at in count():
            read.append(at)
            yield f"text {at}"

    stream: Any = embedder.stream(endless())
    assert read == []
    for turn, vectors in enumerate(islice(stream, 6), 1):
        expected = embedder.encode([f"text {at}" for at in range(5 * turn - 5, 5 * turn)])
        assert difference(vectors, expected) <= ROUNDING
        assert 5 * turn <= len(read) <= 5 * (turn + 1)
    stream.close()


@pytest.mark.parametrize("bad", [None, b"rain", "\ud800"])
@pytest.mark.parametrize("place", [0, 8, 11])
def test_a_bad_text_late_in_a_stream_is_named_by_its_place_and_what_came_before_is_given(
    opened: Open, monkeypatch: pytest.MonkeyPatch, bad: Any, place: int
) -> None:
    monkeypatch.setattr(windows_room, "WINDOW_TEXTS", 4)
    embedder, before = opened("bert-mean", "int8"), busy()
    stream = embedder.stream([*TEXTS[:place], bad, *TEXTS[:9]])
    given: list[Vectors] = []
    with pytest.raises(TextError, match=f"^text {place}: "):
        given.extend(stream)
    assert sum(map(len, given)) == place // 4 * 4
    if given:
        assert difference(np.concatenate(given), embedder.encode(TEXTS[: place // 4 * 4])) <= ROUNDING
    assert list(stream) == []
    assert busy() <= before


@pytest.mark.parametrize("texts", ["rain", 7, None])
def test_a_stream_of_what_is_not_several_texts_is_a_text_error(opened: Open, texts: Any) -> None:
    """A string is texts of one letter to Python, and to nobody else."""
    with pytest.raises(TextError):
        list(opened("bert-mean", "int8").stream(texts))


def test_an_error_of_the_source_comes_through(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_room, "WINDOW_TEXTS", 3)
    before = busy()

    def broken() -> Iterator[str]:
        yield from ["rain", "a fox", "the harbour", "all night"]
        raise ConnectionError("the source is gone")

    stream = opened("bert-mean", "int8").stream(broken())
    assert len(next(stream)) == 3
    with pytest.raises(ConnectionError, match="the source is gone"):
        next(stream)
    assert busy() <= before


def test_a_stream_closed_early_leaves_no_thread(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_room, "WINDOW_TEXTS", 4)
    embedder, before = opened("qwen3-tied", "int8"), busy()
    for _ in range(3):
        stream: Any = embedder.stream(TEXTS)
        assert len(next(stream)) == 4
        stream.close()
        assert list(stream) == []
    unread = embedder.stream(TEXTS)
    next(unread)
    del unread
    assert busy() <= before
    assert embedder.encode(TEXTS[:3]).shape == (3, DIM)


def test_a_run_that_fails_among_others_is_one_error_and_leaves_no_thread(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder, before = opened("bert-cls", "int8", 4), busy()
    expected = embedder.encode(TEXTS)
    real, turns = embedder._session.vectors, count()

    def vectors(batch: Batch, alone: bool = True) -> Vectors:
        if next(turns) == 1:
            raise EngineError("a run", expected="memory", found="none", remedy="buy some")
        return real(batch, alone)

    with monkeypatch.context() as patch:
        patch.setattr(embedder._session, "vectors", vectors)
        with pytest.raises(EngineError, match="buy some"):
            embedder.encode(TEXTS * 4)
    assert busy() <= before
    assert difference(embedder.encode(TEXTS), expected) <= ROUNDING


@pytest.mark.parametrize("name", NAMES)
def test_ids_give_the_vectors_of_their_texts(opened: Open, name: str) -> None:
    embedder = opened(name, "int8")
    assert difference(embedder.embed_ids(embedder.ids(TEXTS)), embedder.encode(TEXTS)) <= ROUNDING
    assert embedder.embed_ids([]).shape == embedder.encode([]).shape


@pytest.mark.parametrize("name", NAMES)
def test_a_text_of_the_most_tokens_a_model_takes_has_one_vector_everywhere(opened: Open, name: str) -> None:
    embedder = opened(name, "int8")
    text = " ".join(TEXTS)
    (row,) = embedder.ids([text])
    assert len(row) == embedder.spec.max_length
    alone = embedder.encode(text)
    plain = opened(name, "int8", memory=Memory(cache=False))
    for vectors in (embedder.encode([text, *TEXTS])[0], plain.encode(text), embedder.embed_ids([row])[0]):
        assert difference(vectors, alone) <= ROUNDING


def lengthened(embedder: Embedder, max_length: int) -> Embedder:
    """The same weights with more tokens a text: a decoder's positions have no table that ends."""
    embedder.spec = replace(embedder.spec, max_length=max_length)
    embedder._tokenizer._tokenizer.enable_truncation(max_length - embedder._tokenizer.appends)
    return embedder


@pytest.mark.parametrize("name", QWENS)
def test_very_long_texts_have_the_vectors_of_the_plain_file(folders: dict[str, Path], cache: Path, name: str) -> None:
    memories = (Memory(cache=cache), Memory(cache=False))
    embedder, plain = (lengthened(Embedder(folders[name], "fp32", threads=2, memory=m), 1500) for m in memories)
    long = " ".join(TEXTS)
    texts = [long, TEXTS[0], long[: len(long) // 5], "", long[5:]]
    lengths = [len(row) for row in embedder.ids(texts)]
    assert sorted(length > LONG_TOKENS for length in lengths) == [False, False, True, True, True]
    assert max(lengths) == 1500
    found, expected = embedder.encode(texts), plain.encode(texts)
    assert difference(found, expected) <= ROUNDING
    assert difference(np.stack([embedder.encode(text) for text in texts]), found) <= ROUNDING
    assert difference(found[0], found[4]) > 100 * ROUNDING
    assert "long.onnx" in {path.name for path, _ in embedder._session._opened}


def test_a_long_text_is_computed_by_the_graph_for_long_ones_behind_a_kept_prompt_too(
    folders: dict[str, Path], cache: Path
) -> None:
    """The kernel behind a past takes memory in proportion to T²: 6000 tokens of this little model 1.8 GB."""
    memories = (Memory(cache=cache), Memory(cache=False))
    embedder, plain = (lengthened(Embedder(folders["qwen3-tied"], "fp32", threads=2, memory=m), 1500) for m in memories)
    long = " ".join(TEXTS)
    for text in (TEXTS[0], TEXTS[1], long):
        found = embedder.encode(text, prompt=INSTRUCT)
        assert difference(found, plain.encode(text, prompt=INSTRUCT)) <= ROUNDING
    used = {path.name for path, _ in embedder._session._opened}
    assert "behind.onnx" in used
    assert "long.onnx" in used


@pytest.mark.parametrize(("name", "variant"), [*((name, "int8") for name in NAMES), ("qwen3-tied", "fp32")])
def test_vectors_that_are_not_normalised_come_from_the_file_itself(opened: Open, name: str, variant: str) -> None:
    embedder, plain = opened(name, variant), opened(name, variant, memory=Memory(cache=False))
    assert embedder._session.prepacked is not None
    found, expected = (e.encode(TEXTS, normalize_embeddings=False) for e in (embedder, plain))
    lengths = np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(lengths - 1).min() > 0.01
    assert (np.abs(found - expected) / lengths).max() <= ROUNDING
    assert difference(found / lengths, embedder.encode(TEXTS)) <= ROUNDING


@pytest.mark.parametrize("name", QWENS)
def test_queries_one_by_one_have_the_vectors_of_all_at_once(opened: Open, name: str) -> None:
    """One by one they go on behind a kept prompt; long ones of many are computed whole."""
    embedder = opened(name, "int8")
    plain = opened(name, "int8", memory=Memory(cache=False))
    expected = plain.encode(TEXTS, prompt=INSTRUCT)
    assert difference(embedder.encode(TEXTS, prompt=INSTRUCT), expected) <= ROUNDING
    alone = np.stack([embedder.encode(text, prompt=INSTRUCT) for text in TEXTS[:20]])
    assert difference(alone, expected[:20]) <= ROUNDING


def test_a_kept_prompt_and_a_narrow_vector_go_together(opened: Open) -> None:
    embedder, plain = opened("qwen3-tied", "fp32"), opened("qwen3-tied", "fp32", memory=Memory(cache=False))
    for texts in (TEXTS[0], TEXTS[:5]):
        found, expected = (e.encode(texts, prompt=INSTRUCT, truncate_dim=9) for e in (embedder, plain))
        assert difference(found, expected) <= ROUNDING
        assert np.abs(np.linalg.norm(found, axis=-1) - 1).max() <= 1e-6


def several(embedder: Embedder) -> Vectors:
    return embedder.encode(TEXTS)


def behind_a_prompt(embedder: Embedder) -> Vectors:
    return embedder.encode(TEXTS[:9], prompt=INSTRUCT)


@pytest.mark.parametrize("ask", [several, behind_a_prompt])
def test_an_embedder_outlives_the_cache_it_was_opened_from(
    folders: dict[str, Path], cache: Path, tmp_path: Path, opened: Open, ask: Callable[[Embedder], Vectors]
) -> None:
    expected = ask(opened("qwen3-tied", "int8"))
    copied = shutil.copytree(cache, tmp_path / "cache")
    embedder = Embedder(folders["qwen3-tied"], "int8", threads=2, memory=Memory(cache=copied))
    assert embedder._session.keeps_past
    shutil.rmtree(copied)
    assert difference(ask(embedder), expected) <= ROUNDING


@pytest.mark.parametrize("budget", [1, 100, 1000])
def test_runs_side_by_side_share_the_token_budget(
    folders: dict[str, Path], opened: Open, cache: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    embedder = Embedder(folders["bert-mean"], "int8", threads=4, batch_tokens=budget, memory=Memory(cache=cache))
    shapes: list[Sequence[int]] = []
    real = embedder._session.vectors

    def vectors(batch: Batch, alone: bool = True) -> Vectors:
        shapes.append(batch.ids.shape)
        return real(batch, alone)

    monkeypatch.setattr(embedder._session, "vectors", vectors)
    assert difference(embedder.encode(TEXTS), opened("bert-mean", "int8").encode(TEXTS)) <= ROUNDING
    assert all(rows == 1 or rows * tokens <= budget // 4 for rows, tokens in shapes)
    assert sum(rows for rows, _ in shapes) == len(TEXTS)
