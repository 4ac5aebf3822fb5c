"""Token ids: upstream's own, one end token, nothing of a text taken for a special token."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from featherbed.errors import TextError, TokenizerError
from featherbed.folder import open_folder
from featherbed.run.tokens import Tokenizer
from featherbed.spec import Spec, read_spec
from tests.conftest import FIXTURES, NAMES, upstream

QWENS = ("qwen3-tied", "qwen3-biased")
BERTS = ("bert-mean", "bert-cls")
CLS, SEP, EOS = 2, 3, 0
LONG = "word " * 200
WORDY = st.text(st.characters(exclude_categories=["Cs"]), max_size=120)


@cache
def spec_of(name: str) -> Spec:
    return read_spec(FIXTURES / name)


@cache
def opened(name: str) -> Tokenizer:
    return Tokenizer(FIXTURES / name, spec_of(name))


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_upstreams(name: str) -> None:
    known = upstream(name)
    tokens = opened(name).encode(known.texts)
    assert tokens.ids == known.rows
    assert tokens.truncated == 0


@pytest.mark.parametrize("name", BERTS)
def test_padding_and_truncation_left_in_the_file_are_reset(name: str) -> None:
    raw = json.loads((FIXTURES / name / "tokenizer.json").read_text("utf-8"))
    assert raw["padding"]["strategy"] == {"Fixed": 16}
    assert raw["truncation"]["max_length"] == 16
    short, long = opened(name).encode(["rain", "rain " * 40]).ids
    assert len(short) < 16 < len(long)


def test_truncation_from_the_left_left_in_the_file_is_reset(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("qwen3-tied")
    rewrite(folder, truncation={"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0})
    text = "rain " + LONG
    assert Tokenizer(folder, spec_of("qwen3-tied")).encode([text]).ids == opened("qwen3-tied").encode([text]).ids
    assert opened("qwen3-tied").encode([text]).ids[0][:1] == opened("qwen3-tied").encode(["rain"]).ids[0][:1]


@pytest.mark.parametrize(("name", "end"), [(n, SEP) for n in BERTS] + [(n, EOS) for n in QWENS])
def test_a_text_that_is_too_long_keeps_its_end_token(name: str, end: int) -> None:
    tokens = opened(name).encode([LONG, "rain", LONG])
    assert [len(row) for row in tokens.ids][::2] == [64, 64]
    assert all(row[-1] == end and row.count(end) == 1 for row in tokens.ids)
    assert tokens.truncated == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [4, 5, 17])
def test_max_length_of_the_spec_is_kept_to_the_token(name: str, length: int) -> None:
    tokenizer = Tokenizer(FIXTURES / name, replace(spec_of(name), max_length=length))
    whole = opened(name).encode([LONG]).ids[0]
    cut = tokenizer.encode([LONG]).ids[0]
    assert cut == [*whole[: length - 1], whole[-1]]
    assert tokenizer.count(LONG) == length


@pytest.mark.parametrize("name", NAMES)
def test_a_text_of_exactly_max_length_is_not_cut(name: str) -> None:
    text = "Rain fell on the old harbour all night"
    length = opened(name).count(text)
    exact = Tokenizer(FIXTURES / name, replace(spec_of(name), max_length=length)).encode([text])
    assert exact.ids == opened(name).encode([text]).ids
    assert exact.truncated == 0
    assert Tokenizer(FIXTURES / name, replace(spec_of(name), max_length=length - 1)).encode([text]).truncated == 1


@pytest.mark.parametrize(("name", "ids"), [(n, [CLS, SEP]) for n in BERTS] + [(n, [EOS]) for n in QWENS])
def test_an_empty_text_has_its_special_tokens_and_nothing_else(name: str, ids: list[int]) -> None:
    assert opened(name).encode([""]).ids == [ids]


def test_no_texts_have_no_ids() -> None:
    assert opened("bert-mean").encode([]).ids == []


def test_one_fixture_appends_the_end_token_and_the_other_leaves_it_to_us() -> None:
    heads = [json.loads((FIXTURES / n / "tokenizer.json").read_text("utf-8"))["post_processor"] for n in QWENS]
    assert heads[0]["single"][-1]["SpecialToken"]["id"] == "<|endoftext|>"
    assert heads[1] is None


@settings(deadline=None)
@given(text=WORDY)
@pytest.mark.parametrize("name", QWENS)
def test_any_text_ends_with_exactly_one_end_token(name: str, text: str) -> None:
    ids = opened(name).encode([text]).ids[0]
    assert ids[-1] == EOS
    assert ids.count(EOS) == 1
    assert len(ids) <= 64
    assert opened(name).count(text) == len(ids)


@settings(deadline=None)
@given(text=WORDY)
@pytest.mark.parametrize("name", BERTS)
def test_any_text_is_framed_by_exactly_one_cls_and_one_sep(name: str, text: str) -> None:
    ids = opened(name).encode([text]).ids[0]
    assert (ids[0], ids[-1]) == (CLS, SEP)
    assert (ids.count(CLS), ids.count(SEP)) == (1, 1)
    assert len(ids) <= 64


@settings(deadline=None)
@given(texts=st.lists(WORDY, max_size=6))
@pytest.mark.parametrize("name", NAMES)
def test_ids_of_a_text_do_not_depend_on_its_company(name: str, texts: list[str]) -> None:
    assert opened(name).encode(texts).ids == [opened(name).encode([text]).ids[0] for text in texts]


@pytest.mark.parametrize(
    ("name", "special", "ids"),
    [(n, word, {EOS, 1}) for n in QWENS for word in ("<|endoftext|>", "<|im_end|>")]
    + [(n, word, {CLS, SEP, EOS}) for n in BERTS for word in ("[SEP]", "[CLS]", "[PAD]")],
)
@pytest.mark.parametrize("frame", ["{}", "rain {} rain", "rain{}"])
def test_a_special_token_spelled_in_a_text_is_text(name: str, special: str, ids: set[int], frame: str) -> None:
    row = opened(name).encode([frame.format(special)]).ids[0]
    inner = row[1:-1] if name in BERTS else row[:-1]
    assert len(inner) > 2
    assert not ids & set(inner)


def test_a_special_token_spelled_in_a_prompt_is_text() -> None:
    row = opened("qwen3-biased").encode(["rain"], "<|endoftext|>").ids[0]
    assert row.index(EOS) == len(row) - 1


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_bytes_before_the_text(name: str) -> None:
    assert opened(name).encode(["rain"], "find: ").ids == opened(name).encode(["find: rain"]).ids


def test_the_white_space_of_a_prompt_is_kept() -> None:
    assert opened("qwen3-tied").encode(["rain"], "find:").ids != opened("qwen3-tied").encode(["rain"], "find: ").ids


@settings(deadline=None)
@given(text=st.text(st.sampled_from("aeéöüñçåÅﬁかがḍ̇가"), max_size=20))
@pytest.mark.parametrize("name", QWENS)
def test_composed_and_decomposed_spellings_have_the_same_ids(name: str, text: str) -> None:
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert opened(name).encode([composed]).ids == opened(name).encode([decomposed]).ids


@pytest.mark.parametrize("item", [None, 1, 1.5, True, b"rain", ["rain"], {"text": "rain"}])
def test_an_item_that_is_no_string_is_named_by_its_place(item: Any) -> None:
    with pytest.raises(TextError, match=f"^text 2: expected a string, found {type(item).__name__}"):
        opened("bert-mean").encode(["a", "b", item, "c"])


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc"])
def test_a_lone_surrogate_is_named_by_its_place(text: str) -> None:
    at = next(i for i, c in enumerate(text) if unicodedata.category(c) == "Cs")
    with pytest.raises(TextError, match=f"^text 1: .*lone surrogate at character {at}"):
        opened("qwen3-tied").encode(["a", text])
    with pytest.raises(TextError, match=f"^prompt: .*lone surrogate at character {at}"):
        opened("qwen3-tied").encode(["a"], text)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_leaves_no_room_is_an_error(name: str) -> None:
    with pytest.raises(TextError, match=r"^prompt: expected fewer than"):
        opened(name).encode(["rain"], LONG)


@pytest.mark.parametrize("name", NAMES)
def test_the_longest_prompt_still_leaves_room_for_a_token_of_the_text(name: str) -> None:
    special = opened(name).count("")
    prompt = " ".join("a" * 10)
    length = opened(name).count(prompt) - special
    with pytest.raises(TextError, match=r"^prompt: "):
        Tokenizer(FIXTURES / name, replace(spec_of(name), max_length=length + special)).encode(["b"], prompt)
    roomy = Tokenizer(FIXTURES / name, replace(spec_of(name), max_length=length + special + 1))
    rain, add = roomy.encode([" rain", " add"], prompt).ids
    assert rain != add


def test_a_tokenizer_with_more_tokens_than_the_table_is_refused() -> None:
    spec = spec_of("qwen3-tied")
    size = len(json.loads((FIXTURES / "qwen3-tied" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"])
    Tokenizer(FIXTURES / "qwen3-tied", replace(spec, vocab_size=size))
    with pytest.raises(TokenizerError, match=f"expected ids below {size - 1},.*found the id {size - 1}"):
        Tokenizer(FIXTURES / "qwen3-tied", replace(spec, vocab_size=size - 1))


def test_a_token_whose_id_is_beyond_the_table_is_refused(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("bert-mean")
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    model["vocab"]["rain"] = 5000
    rewrite(folder, model=model)
    tokenizer = Tokenizer(folder, spec_of("bert-mean"))
    with pytest.raises(TokenizerError, match="5000"):
        tokenizer.check_table()
    with pytest.raises(TokenizerError, match="5000"):
        tokenizer.encode(["the sun", "the rain"])
    assert tokenizer.encode(["the sun"]).ids


@pytest.mark.parametrize(
    "content", [b"", b"{", b"<html>404</html>", b"[]", b"{}", b'{"version":"1.0","model":3}', b"\xff"]
)
def test_a_broken_tokenizer_file_is_refused_in_one_line(checkpoint: Callable[[str], Path], content: bytes) -> None:
    folder = checkpoint("bert-mean")
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: expected a tokenizer") as caught:
        Tokenizer(folder, spec_of("bert-mean"))
    assert "\n" not in str(caught.value)


def test_a_cut_tokenizer_file_is_refused_at_every_length(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("bert-mean")
    whole = (folder / "tokenizer.json").read_bytes()
    for part in range(64):
        (folder / "tokenizer.json").write_bytes(whole[: len(whole) * part // 64])
        with pytest.raises(TokenizerError):
            Tokenizer(folder, spec_of("bert-mean"))


def test_a_missing_tokenizer_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such file"):
        Tokenizer(tmp_path, spec_of("bert-mean"))


@pytest.mark.parametrize(("name", "special"), [("bert-mean", 2), ("qwen3-biased", 1)])
def test_special_tokens_that_fill_the_length_are_refused(name: str, special: int) -> None:
    with pytest.raises(TokenizerError, match=f"fewer than {special} special tokens"):
        Tokenizer(FIXTURES / name, replace(spec_of(name), max_length=special))


def test_a_tokenizer_without_any_special_token_is_refused(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("bert-mean")
    rewrite(folder, post_processor=None)
    with pytest.raises(TokenizerError, match="special tokens around a text, found 0"):
        Tokenizer(folder, spec_of("bert-mean"))


def test_the_tokenizer_s_own_end_token_wins_over_the_config(checkpoint: Callable[[str], Path]) -> None:
    """Qwen3's configs name the token that ends a chat's turn; the tokenizer appends the one that ends a text."""
    folder = checkpoint("qwen3-tied")
    spec = replace(read_spec(folder), eos_id=1)
    tokenizer = Tokenizer(folder, spec)
    assert not tokenizer.appends
    assert tokenizer.eos_id == 0
    assert tokenizer.encode(["rain", ""]).ids[0][-2:] != [0, 1]
    assert all(row[-1] == 0 and row.count(0) == 1 for row in tokenizer.encode(["rain", ""]).ids)


def test_a_decoder_without_any_end_token_is_refused(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("qwen3-biased")
    with pytest.raises(TokenizerError, match="eos_token_id"):
        Tokenizer(folder, replace(read_spec(folder), eos_id=None))


@pytest.mark.parametrize("name", NAMES)
def test_the_built_folder_s_tokenizer_gives_our_ids_to_everyone(folders: dict[str, Path], name: str) -> None:
    plain = tokenizers.Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    known = upstream(name)
    assert [plain.encode(text).ids for text in known.texts] == known.rows
    assert not Tokenizer(folders[name], open_folder(folders[name]).manifest.spec).appends
