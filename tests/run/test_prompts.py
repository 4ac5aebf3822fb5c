"""Prompts a decoder has seen: the same vectors as without, kept from the second text on, a bounded number of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache as remembered
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherbed.run import prompts as room
from featherbed.run.embedder import Embedder
from featherbed.run.prompts import LEAST_TOKENS, MOST_PROMPTS, Past, Prompts, Seen, stable
from featherbed.run.session import Memory
from featherbed.run.tokens import Tokenizer
from featherbed.spec import read_spec
from tests.conftest import FIXTURES, NAMES, upstream

Vectors = npt.NDArray[np.float32]
BERTS, QWENS = NAMES[:2], NAMES[2:]
INSTRUCT = "Instruct: find what was asked\nQuery: "
PROMPTS = (INSTRUCT, "no space at the end", "中文的问题：")
TEXTS = [
    *upstream("qwen3-tied").texts,
    "",
    " ",
    "a",
    "s",
    "\n",
    "中文",
    "ß́",
    "👩‍👩‍👧",
    "<|endoftext|>",
    "rain " * 100,
]
ROUNDING = 1e-5
RECIPES = ("fp32", "int8", "int4")
WORDY = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)

Pair = tuple[Embedder, Embedder]
Open = Callable[[str, str], Pair]


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Open:
    """(with prompts kept, without) of a fixture's variant, both over the same prepacked weights."""
    cache = tmp_path_factory.mktemp("prompts")

    @remembered
    def get(name: str, variant: str) -> Pair:
        with_prompts, without = (
            Embedder(folders[name], variant, threads=1, memory=Memory(cache=cache, prompts=kept))
            for kept in (True, False)
        )
        return with_prompts, without

    return get


def kept(embedder: Embedder) -> Prompts:
    assert embedder._prompts is not None
    return embedder._prompts


@remembered
def tokenizer_of(name: str) -> Tokenizer:
    return Tokenizer(FIXTURES / name, read_spec(FIXTURES / name))


class Asked:
    """Stands for a decoder: keys and values with the tokens in them, and how often it was asked for which."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def __call__(self, ids: list[int]) -> Past:
        self.rows.append(ids)
        return {
            "past_key_values.0.key": np.asarray([ids], np.float32),
            "past_key_values.0.value": np.ones(3, np.float32),
        }


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def prompts(asked: Asked) -> Prompts:
    return Prompts(tokenizer_of("qwen3-tied"), asked)


@pytest.mark.parametrize(
    ("recipe", "prompt"), [*((recipe, INSTRUCT) for recipe in RECIPES), ("int8", PROMPTS[1]), ("fp32", PROMPTS[2])]
)
@pytest.mark.parametrize("name", QWENS)
def test_texts_behind_a_kept_prompt_have_the_vectors_of_the_whole(
    opened: Open, name: str, recipe: str, prompt: str
) -> None:
    embedder, without = opened(name, recipe)
    embedder.encode(TEXTS[:2], prompt=prompt)
    for text in TEXTS:
        error = np.abs(embedder.encode(text, prompt=prompt) - without.encode(text, prompt=prompt))
        assert error.max() <= ROUNDING
    together = embedder.encode(TEXTS, prompt=prompt)
    assert np.abs(together - without.encode(TEXTS, prompt=prompt)).max() <= ROUNDING
    assert np.abs(together - without.encode(TEXTS)).max() > 1000 * ROUNDING


@settings(max_examples=40)
@given(prompt=st.text("find :\n中é", min_size=4, max_size=12), text=WORDY)
def test_any_text_behind_any_prompt_has_the_vector_of_the_whole(opened: Open, prompt: str, text: str) -> None:
    embedder, without = opened("qwen3-tied", "fp32")
    for _ in range(2):
        assert np.abs(embedder.encode(text, prompt=prompt) - without.encode(text, prompt=prompt)).max() <= ROUNDING


def spy(monkeypatch: pytest.MonkeyPatch, embedder: Embedder) -> list[int]:
    """Token counts of the texts that are computed behind a prompt from now on."""
    lengths: list[int] = []
    real = embedder._session.behind

    def behind(past: Past, ids: list[int], alone: bool = True) -> Vectors:
        lengths.append(len(ids))
        return real(past, ids, alone)

    monkeypatch.setattr(embedder._session, "behind", behind)
    return lengths


@pytest.mark.parametrize("name", QWENS)
def test_only_what_stands_behind_the_prompt_is_computed(
    opened: Open, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    embedder, _ = opened(name, "fp32")
    embedder.encode(["a", "b"], prompt=INSTRUCT)
    lengths = spy(monkeypatch, embedder)
    embedder.encode("rain on the harbour", prompt=INSTRUCT)
    tokenizer = tokenizer_of(name)
    assert lengths == [tokenizer.count(INSTRUCT + "rain on the harbour") - len(stable(tokenizer, INSTRUCT))]
    embedder.encode("rain on the harbour")
    embedder.encode("rain on the harbour", prompt=INSTRUCT, normalize_embeddings=False)
    assert len(lengths) == 1


def test_of_several_texts_the_short_ones_go_behind_and_the_long_ones_together(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder, without = opened("qwen3-tied", "fp32")
    first = len(stable(tokenizer_of("qwen3-tied"), INSTRUCT))
    texts = [" rain" * count for count in range(1, 60)]
    rows = [tokenizer_of("qwen3-tied").count(INSTRUCT + text) for text in texts]
    lengths = spy(monkeypatch, embedder)
    vectors = embedder.encode(texts, prompt=INSTRUCT)
    assert sorted(lengths) == sorted(row - first for row in rows if row <= 2 * first)
    assert 5 < len(lengths) < len(texts) - 5
    assert np.abs(vectors - without.encode(texts, prompt=INSTRUCT)).max() <= ROUNDING


def test_a_text_of_one_token_behind_the_prompt_is_computed_whole(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for a single token rounds otherwise; '' leaves the end token alone."""
    embedder, without = opened("qwen3-biased", "fp32")
    prompt = "find the old harbour:中"  # its tokens melt with nothing
    first = stable(tokenizer_of("qwen3-biased"), prompt)
    assert tokenizer_of("qwen3-biased").count(prompt) == len(first) + 1
    lengths = spy(monkeypatch, embedder)
    for _ in range(3):
        assert np.abs(embedder.encode("", prompt=prompt) - without.encode("", prompt=prompt)).max() <= ROUNDING
    assert lengths == []
    embedder.encode("a", prompt=prompt)
    assert lengths == [2]


def test_a_text_that_melts_with_the_prompt_is_computed_whole(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENDINGS cannot foresee every text: a row that does not begin with the prompt's tokens is left alone."""
    embedder, without = opened("qwen3-tied", "fp32")
    tokenizer = tokenizer_of("qwen3-tied")
    monkeypatch.setattr(room, "ENDINGS", ("\n",))  # as if it had been the only way a text can begin
    melted = 0
    for prompt in ("find the fo", "find the r", "find the old harb", "of the ra"):
        embedder.encode(["a", "b"], prompt=prompt)
        first = stable(tokenizer, prompt)
        for text in ("x", "ain", "our", "in", "s"):
            melted += tokenizer.encode([text], prompt).ids[0][: len(first)] != first
            error = np.abs(embedder.encode(text, prompt=prompt) - without.encode(text, prompt=prompt))
            assert error.max() <= ROUNDING
    assert melted > 0


@given(prompt=st.text("find the:\n 中éo", max_size=20), text=WORDY)
def test_stable_tokens_begin_whatever_a_space_sets_apart(prompt: str, text: str) -> None:
    for name in QWENS:
        tokenizer = tokenizer_of(name)
        first = stable(tokenizer, f"{prompt}:")
        bare, behind = tokenizer.encode([f"{prompt}:", f"{prompt}: {text}"]).ids
        assert bare[: len(first)] == behind[: len(first)] == first
        assert len(first) < len(bare)  # the end token never belongs to it


def test_a_space_that_melts_with_the_text_is_not_stable() -> None:
    tokenizer = tokenizer_of("qwen3-tied")
    assert tokenizer.encode(["find the fox "]).ids[0][:-1] != stable(tokenizer, "find the fox ")
    assert tokenizer.encode(["find the fox"]).ids[0][:-1] == stable(tokenizer, "find the fox ")
    assert stable(tokenizer, "") == []


def test_a_first_text_alone_is_computed_whole_and_the_second_behind_the_prompt(prompts: Prompts, asked: Asked) -> None:
    assert prompts.get(INSTRUCT, 1) is None
    assert asked.rows == []
    seen = prompts.get(INSTRUCT, 1)
    assert seen is not None
    assert asked.rows == [seen.ids] == [stable(tokenizer_of("qwen3-tied"), INSTRUCT)]
    assert prompts.get(INSTRUCT, 1) is prompts.get(INSTRUCT, 50) is seen
    assert len(asked.rows) == 1


def test_several_texts_at_once_are_worth_the_prompt(prompts: Prompts, asked: Asked) -> None:
    assert prompts.get(INSTRUCT, 2) is not None
    assert len(asked.rows) == 1


def test_the_second_text_behind_another_prompt_is_no_second_text(prompts: Prompts, asked: Asked) -> None:
    assert prompts.get(INSTRUCT, 1) is None
    assert prompts.get(f"{INSTRUCT} ", 1) is None
    assert asked.rows == []


def test_short_prompts_are_not_worth_a_run(prompts: Prompts, asked: Asked) -> None:
    tokenizer = tokenizer_of("qwen3-tied")
    lengths = {prompt: len(stable(tokenizer, prompt)) for prompt in ("a:", "中", "ab:", "qxz:", "qxzj:", INSTRUCT)}
    assert min(lengths.values()) < LEAST_TOKENS <= max(lengths.values())
    assert LEAST_TOKENS in lengths.values()
    for prompt, length in lengths.items():
        for _ in range(3):
            assert (prompts.get(prompt, 5) is None) == (length < LEAST_TOKENS)
    assert sorted(map(len, asked.rows)) == sorted(length for length in lengths.values() if length >= LEAST_TOKENS)


def many(count: int) -> list[str]:
    return [f"{INSTRUCT}number {at}: " for at in range(count)]


def test_the_last_prompts_used_are_kept(prompts: Prompts, asked: Asked) -> None:
    names = many(MOST_PROMPTS + 3)
    first, *others = names
    for prompt in others[:MOST_PROMPTS]:
        prompts.get(first, 2)  # used again and again
        prompts.get(prompt, 2)
    computed = len(asked.rows)
    assert computed == 1 + MOST_PROMPTS
    prompts.get(first, 2)
    for prompt in others[1:MOST_PROMPTS]:
        prompts.get(prompt, 2)
    assert len(asked.rows) == computed
    prompts.get(others[0], 2)
    assert len(asked.rows) == computed + 1


def test_a_prompt_that_was_dropped_starts_anew(prompts: Prompts, asked: Asked) -> None:
    for _ in range(2):
        assert prompts.get(INSTRUCT, 1) is None
        assert prompts.get(INSTRUCT, 1) is not None
        for prompt in many(MOST_PROMPTS):
            prompts.get(prompt, 2)
    assert len(asked.rows) == 2 * (1 + MOST_PROMPTS)


def test_memory_is_that_of_the_keys_and_values_kept(prompts: Prompts) -> None:
    assert prompts.size_bytes == 0
    expected = []
    for prompt in (*many(MOST_PROMPTS + 2), "a:"):
        prompts.get(prompt, 2)
        ids = stable(tokenizer_of("qwen3-tied"), prompt)
        expected.append(4 * len(ids) + 12 if len(ids) >= LEAST_TOKENS else 0)
        assert prompts.size_bytes == sum(expected[-MOST_PROMPTS:])
    assert expected[-1] == 0


def test_memory_of_a_prompt_is_two_numbers_a_layer_head_token_and_component(opened: Open) -> None:
    embedder, _ = opened("qwen3-tied", "fp32")
    seen = kept(embedder).get(INSTRUCT, 2)
    assert isinstance(seen, Seen)
    assert seen.size_bytes == 2 * 2 * 2 * len(seen.ids) * 32 * 4  # k and v, layers, heads, tokens, size, float32
    assert kept(embedder).size_bytes >= seen.size_bytes


def test_prompts_of_single_texts_are_not_remembered_without_end(prompts: Prompts) -> None:
    """A server may see a prompt of its own with every text."""
    for prompt in many(20 * MOST_PROMPTS):
        prompts.get(prompt, 1)
    held = sum(len(value) for value in vars(prompts).values() if isinstance(value, (set, dict, list)))
    assert held <= 4 * MOST_PROMPTS


def test_threads_that_ask_at_once_compute_a_prompt_once(asked: Asked) -> None:
    started = threading.Barrier(8)

    def slowly(ids: list[int]) -> Past:
        waiting.wait(0.05)
        return asked(ids)

    waiting, prompts = threading.Event(), Prompts(tokenizer_of("qwen3-tied"), slowly)

    def get(at: int) -> list[Seen | None]:
        started.wait(60)
        return [prompts.get(prompt, 2) for prompt in (many(3) if at % 2 else many(3)[::-1])]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(get, range(8)))
    assert len(asked.rows) == 3
    assert len({id(seen) for row in answers for seen in row}) == 3


def test_a_prompt_whose_run_fails_is_tried_again(asked: Asked) -> None:
    failing = [True]

    def at_first_not(ids: list[int]) -> Past:
        if failing:
            raise MemoryError(failing.pop())
        return asked(ids)

    prompts = Prompts(tokenizer_of("qwen3-tied"), at_first_not)
    with pytest.raises(MemoryError):
        prompts.get(INSTRUCT, 2)
    assert prompts.get(INSTRUCT, 2) is not None
    assert len(asked.rows) == 1


def test_threads_behind_many_prompts_get_the_vectors_of_one(opened: Open) -> None:
    embedder, without = opened("qwen3-biased", "int8")
    names = many(MOST_PROMPTS + 4)  # more than are kept: they push each other out
    texts = TEXTS[:6]
    expected = {prompt: without.encode(texts, prompt=prompt) for prompt in names}

    def encode(at: int) -> float:
        prompt = names[at % len(names)]
        alone = [embedder.encode(text, prompt=prompt) for text in texts[: at % 3]]
        found = np.stack(alone) if alone else embedder.encode(texts, prompt=prompt)
        return float(np.abs(found - expected[prompt][: len(found)]).max())

    with ThreadPoolExecutor(6) as pool:
        assert max(pool.map(encode, range(48))) <= ROUNDING


@pytest.mark.parametrize("name", BERTS)
def test_encoders_keep_no_prompts(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    embedder = Embedder(folders[name], "int8", threads=1, memory=Memory(cache=tmp_path))
    assert embedder._session.prepacked is not None
    assert embedder._prompts is None
    plain = Embedder(folders[name], "int8", threads=1, memory=Memory(cache=False))
    error = np.abs(embedder.encode(TEXTS, prompt=INSTRUCT) - plain.encode(TEXTS, prompt=INSTRUCT))
    assert error.max() <= ROUNDING


@pytest.mark.parametrize("memory", [Memory(cache=False), Memory(prepack=False), Memory()])
def test_without_prepacked_weights_there_are_no_prompts(folders: dict[str, Path], memory: Memory) -> None:
    assert Embedder(folders["qwen3-tied"], "int8", memory=memory)._prompts is None


def test_prompts_can_be_switched_off(opened: Open) -> None:
    embedder, without = opened("qwen3-tied", "int8")
    assert embedder._prompts is not None
    assert without._prompts is None
    assert without._session.prepacked == embedder._session.prepacked
