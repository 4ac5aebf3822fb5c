"""Datasets: folders in BEIR's shape and files of pairs are read whole; what does not fit is named with its line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from featherbed.dataset import Layout, Pairs, Search, read_dataset
from featherbed.errors import DatasetError

Rows = Sequence[dict[str, Any]]
DOCUMENTS: list[dict[str, Any]] = [
    {"_id": "a", "title": "Oats", "text": "porridge in the morning"},
    {"_id": "b", "title": "", "text": "a tram to the harbour\u2028and back"},
    {"_id": 7, "text": "rain on a tin roof"},
]
QUERIES = [{"_id": "q1", "text": "breakfast"}, {"_id": "q2", "text": "weather"}, {"_id": "q3", "text": "nobody judged"}]
QRELS = ["query-id\tcorpus-id\tscore", "q1\ta\t2", "q1\tb\t0", "q2\t7\t1", "q2\ta\t1"]


def write(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", "utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "meals"
    write(root / "corpus.jsonl", DOCUMENTS)
    write(root / "queries.jsonl", QUERIES)
    (root / "qrels").mkdir()
    (root / "qrels" / "test.tsv").write_text("\n".join(QRELS) + "\n", "utf-8")
    return root


def searched(path: Path, layout: Layout | None = None) -> Search:
    found = read_dataset(path, layout)
    assert isinstance(found, Search)
    return found


def test_a_folder_is_read_with_titles_before_texts_and_only_judged_queries(folder: Path) -> None:
    found = searched(folder)
    assert found.name == "meals"
    assert found.documents == ("Oats porridge in the morning", DOCUMENTS[1]["text"], "rain on a tin roof")
    assert found.queries == ("breakfast", "weather")
    assert found.relevant == ({0: 2.0}, {2: 1.0, 0: 1.0})
    assert found.wholes.tolist() == [0, 1, 2]
    assert set(found.files_sha256) == {"corpus.jsonl", "queries.jsonl", "qrels/test.tsv"}


def test_titles_can_be_left_out(folder: Path) -> None:
    assert searched(folder, Layout(titles=False)).documents[0] == "porridge in the morning"


def test_other_files_of_a_folder_can_be_named_and_then_name_the_dataset(folder: Path) -> None:
    write(folder / "docs.de.jsonl", [{"_id": "a", "text": "Haferbrei"}, {"_id": "b", "text": "Bahn"},
                                     {"_id": "7", "text": "Regen"}])  # fmt: skip
    found = searched(folder, Layout(corpus="docs.de.jsonl"))
    assert found.documents[0] == "Haferbrei"
    assert found.name == "meals (docs.de.jsonl)"


def test_documents_can_be_pieces_of_a_whole_that_is_judged(folder: Path) -> None:
    write(folder / "corpus.jsonl", [{"_id": f"{n}", "page": p, "text": f"piece {n}"} for n, p in enumerate("aab7")])
    found = searched(folder, Layout(group="page"))
    assert found.wholes.tolist() == [0, 0, 1, 2]
    assert found.relevant == ({0: 2.0}, {2: 1.0, 0: 1.0})


def test_a_file_is_read_as_rated_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write(path, [{"sentence1": "x", "sentence2": "y", "score": 2}, {"sentence1": "x", "sentence2": "z", "score": 4.5}])
    found = read_dataset(path)
    assert isinstance(found, Pairs)
    assert (found.left, found.right, found.scores.tolist()) == (("x", "x"), ("y", "z"), [2.0, 4.5])


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def holding(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text, "utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("corpus.jsonl"), "corpus.jsonl or docs.jsonl.*--corpus"),
        (without("qrels/test.tsv"), "qrels/test.tsv or qrels.tsv.*--qrels"),
        (holding("corpus.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n'), "line 2 .*second time"),
        (holding("corpus.jsonl", '{"_id": "a", "text": 3}\n'), "line 1 .*'text' with a string"),
        (holding("corpus.jsonl", "[1]\n"), "line 1 .*a JSON object"),
        (holding("queries.jsonl", '{"_id": "q1"}\n'), "line 1 of .*queries.jsonl.*'text'"),
        (holding("qrels/test.tsv", "q1\ta\n"), "no such|documents, and queries|query, document and grade"),
        (holding("qrels/test.tsv", "query\tdocument\tscore\nq1\ta\n"), "line 2 .*query, document and grade"),
        (holding("qrels/test.tsv", "q9\ta\t1\n"), "unknown query 'q9'"),
        (holding("qrels/test.tsv", "q1\tz\t1\n"), "unknown document 'z'"),
        (holding("qrels/test.tsv", "q1\ta\t0\n"), "3 documents and 0 such queries"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, change: Callable[[Path], object], words: str) -> None:
    change(folder)
    with pytest.raises(DatasetError, match=words):
        read_dataset(folder)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"sentence1": "x", "sentence2": "y"}], "line 1 .*a score that is a number"),
        ([{"sentence1": "x", "sentence2": "y", "score": True}], "a score that is a number"),
        ([{"sentence1": "x", "score": 1}], "'sentence2'"),
        ([{"sentence1": "x", "sentence2": "y", "score": 1}], "two different scores"),
    ],
)
def test_pairs_that_cannot_be_judged_are_named(tmp_path: Path, rows: Rows, words: str) -> None:
    write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(DatasetError, match=words):
        read_dataset(tmp_path / "pairs.jsonl")


def test_options_of_folders_are_refused_for_a_file_and_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"a text file in UTF-8"):
        read_dataset(tmp_path / "nothing.jsonl")
    with pytest.raises(DatasetError, match="found nothing"):
        read_dataset(tmp_path / "nothing.jsonl", Layout(titles=False))
