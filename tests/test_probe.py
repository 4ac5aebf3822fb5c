"""Probes: the one that ships, and files of texts whose bad lines are named."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherbed.errors import ProbeError
from featherbed.probe import SHIPPED, read_probe, shipped

LANGUAGES = {"en", "de", "fr", "es", "zh", "code"}


def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in SHIPPED.read_text("utf-8").splitlines()]


def refused(*paths: Path) -> str:
    """The one line of the ProbeError that reading ends in."""
    with pytest.raises(ProbeError) as caught:
        read_probe(paths)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert ": expected " in text
    assert ", found " in text
    assert caught.value.exit_code == 2
    return text


# the one that ships


def test_the_shipped_probe_is_large_enough_to_judge_by() -> None:
    probe = shipped()
    assert len(probe.texts) >= 500
    assert len(probe.triplets) >= 200


def test_texts_and_triplets_of_the_shipped_probe_are_distinct() -> None:
    probe = shipped()
    assert len(set(probe.texts)) == len(probe.texts)
    assert len({" ".join(text.lower().split()) for text in probe.texts}) == len(probe.texts)
    assert len(set(probe.triplets)) == len(probe.triplets)
    for triplet in probe.triplets:
        assert len(set(triplet)) == 3
        assert all(0 <= at < len(probe.texts) for at in triplet)
    ids = [row["id"] for row in rows()]
    assert len(set(ids)) == len(ids)


def test_the_shipped_probe_speaks_five_languages_and_code() -> None:
    counted = Counter(row["lang"] for row in rows() if "anchor" in row)
    assert set(counted) >= LANGUAGES
    assert all(counted[language] >= 20 for language in LANGUAGES)


def test_texts_are_in_the_language_they_are_filed_under() -> None:
    words = {"en": {"the"}, "de": {"der", "die", "das"}, "fr": {"le", "la", "les"}, "es": {"el", "la", "los"}}
    for language, articles in words.items():
        texts = [row["positive"] for row in rows() if row["lang"] == language and "positive" in row]
        with_article = sum(bool(articles & set(text.lower().split())) for text in texts)
        assert with_article >= len(texts) * 0.5, language
    chinese = [row["positive"] for row in rows() if row["lang"] == "zh" and "positive" in row]
    assert all(any("一" <= sign <= "鿿" for sign in text) for text in chinese)


def test_the_shipped_probe_has_short_texts_and_long_ones_and_no_empty_one() -> None:
    lengths = sorted(len(text) for text in shipped().texts)
    assert lengths[0] >= 1
    assert lengths[len(lengths) // 2] < 200
    assert lengths[-1] > 500
    assert all(text.strip() for text in shipped().texts)


def test_a_triplet_is_the_anchor_positive_and_negative_of_its_line() -> None:
    probe = shipped()
    lines = [row for row in rows() if "anchor" in row]
    assert len(lines) == len(probe.triplets)
    for row, triplet in zip(lines, probe.triplets, strict=True):
        assert [probe.texts[at] for at in triplet] == [row["anchor"], row["positive"], row["negative"]]


def test_a_probe_is_known_by_name_version_and_hash() -> None:
    probe = shipped()
    assert probe.to_json() == {
        "name": "everyday",
        "version": "1",
        "sha256": hashlib.sha256(SHIPPED.read_bytes()).hexdigest(),
        "texts": len(probe.texts),
        "triplets": len(probe.triplets),
    }


# files


def test_every_kind_of_line_is_read_and_equal_texts_are_one(tmp_path: Path) -> None:
    lines = [
        {"text": "a"},
        {"sentence1": "b", "sentence2": "a", "score": 3},
        {"anchor": "c", "positive": "a", "negative": "d", "lang": "en"},
        {"text": "e", "anchor": "c", "positive": "b", "negative": "a"},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n  \n", "utf-8")
    probe = read_probe([tmp_path / "x.jsonl"])
    assert probe.texts == ("a", "b", "c", "d", "e")
    assert probe.triplets == ((2, 0, 3), (2, 1, 0))
    assert probe.name == "x.jsonl"


def test_several_files_make_one_probe(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"anchor": "p", "positive": "q", "negative": "a"}', "utf-8")
    (tmp_path / "y.jsonl").write_text('{"anchor": "a", "positive": "b", "negative": "q"}\r\n', "utf-8")
    probe = read_probe([tmp_path / "x.jsonl", tmp_path / "y.jsonl"])
    assert probe.texts == ("a", "p", "q", "b")
    assert probe.triplets == ((1, 2, 0), (0, 3, 2))
    assert probe.name == "x.jsonl+y.jsonl"
    both = (tmp_path / "x.jsonl").read_bytes() + (tmp_path / "y.jsonl").read_bytes()
    assert probe.sha256 == hashlib.sha256(both).hexdigest()


@given(texts=st.lists(st.text(), min_size=1, max_size=8))
def test_any_text_comes_through(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("probe") / "p.jsonl"
    path.write_bytes("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode())
    assert read_probe([path]).texts == tuple(dict.fromkeys(texts))


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "{",
        "[]",
        "null",
        "7",
        '"text"',
        "{}",
        '{"texts": "a"}',
        '{"text": 7}',
        '{"text": null}',
        '{"text": ["a"]}',
        '{"anchor": "a"}',
        '{"anchor": "a", "positive": "b"}',
        '{"text": "a", "negative": "b"}',
        '{"anchor": "a", "positive": "b", "negative": 3}',
        "[" * 100_000,
        "\ufeff{}",
    ],
    ids=lambda line: line[:40],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n', "utf-8")
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n', "utf-8")
    assert refused(tmp_path / "good.jsonl", path).startswith(f"line 3 of {path}: ")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xfc"}')
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("missing.jsonl", "latin.jsonl", "folder.jsonl"):
        assert str(tmp_path / name) in refused(tmp_path / name)


def test_a_probe_without_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n", "utf-8")
    assert "at least one text" in refused(tmp_path / "empty.jsonl")
