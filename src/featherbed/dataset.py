"""Datasets to judge a model by: folders in BEIR's shape (documents, queries, who answers whom), files of rated pairs.

A folder has ``corpus.jsonl`` with lines of _id, title and text, ``queries.jsonl`` with _id and text, and
``qrels/test.tsv`` with query, document and grade below one line of names (Thakur et al. 2021). A file of pairs has
lines of sentence1, sentence2 and score.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherbed.errors import DatasetError

CORPUS, QUERIES, QRELS = ("corpus.jsonl", "docs.jsonl"), ("queries.jsonl",), ("qrels/test.tsv", "qrels.tsv")


@dataclass(frozen=True)
class Layout:
    """Where in a folder things are: files by name, None for the usual ones; the field of a document that says which
    whole it is a piece of, so that wholes are judged by their best piece; whether a title comes before its text."""

    corpus: str | None = None
    queries: str | None = None
    qrels: str | None = None
    group: str | None = None
    titles: bool = True


@dataclass(frozen=True)
class Search:
    """Documents, queries that somebody judged, and each query's relevant wholes with their grades, as places.

    ``wholes`` [D] is which whole a document belongs to, from 0 in the order of the file: its own number where documents
    are whole. ``relevant`` has, of each query, {whole: grade above 0}.
    """

    name: str
    files_sha256: dict[str, str]
    documents: tuple[str, ...]
    queries: tuple[str, ...]
    wholes: npt.NDArray[np.int64]
    relevant: tuple[dict[int, float], ...]


@dataclass(frozen=True)
class Pairs:
    """Pairs of sentences and how alike people found them, ``scores`` [P] in any unit."""

    name: str
    files_sha256: dict[str, str]
    left: tuple[str, ...]
    right: tuple[str, ...]
    scores: npt.NDArray[np.float64]


def read_dataset(path: Path, layout: Layout | None = None) -> Search | Pairs:
    """A folder as a Search, a file as Pairs. Raises DatasetError, naming file and line, on anything else."""
    layout = layout or Layout()
    if path.is_dir():
        return _search(path, layout)
    if layout != Layout():
        raise DatasetError(
            f"{path}",
            expected="a folder, for only there corpus, queries, qrels, group and titles mean something",
            found="a file" if path.exists() else "nothing",
            remedy="leave these options out for a file of pairs",
        )
    return _pairs(path)


def _search(folder: Path, layout: Layout) -> Search:
    digests: dict[str, str] = {}
    corpus = _located(folder, layout.corpus, CORPUS, "--corpus")
    ids: dict[str, int] = {}
    groups: dict[str, int] = {}
    documents, wholes = [], []
    for number, row in _rows(corpus, digests, folder):
        name, text = _field(row, "_id", corpus, number), _field(row, "text", corpus, number)
        if name in ids:
            raise _wrong(corpus, number, "a document of its own", f"the _id {name!r} a second time")
        ids[name] = len(ids)
        title = row.get("title") if layout.titles else None
        documents.append(f"{title} {text}".strip() if isinstance(title, str) and title else text)
        whole = name if layout.group is None else _field(row, layout.group, corpus, number)
        wholes.append(groups.setdefault(whole, len(groups)))
    asked = _located(folder, layout.queries, QUERIES, "--queries")
    texts = {_field(row, "_id", asked, n): _field(row, "text", asked, n) for n, row in _rows(asked, digests, folder)}
    relevant = _judged(_located(folder, layout.qrels, QRELS, "--qrels"), texts, groups, digests, folder)
    queries = tuple(texts[name] for name in relevant)
    if not documents or not queries:
        raise DatasetError(
            f"{folder}",
            expected="documents, and queries with at least one relevant document",
            found=f"{len(documents)} documents and {len(queries)} such queries",
            remedy="check the files, or name others with --corpus, --queries and --qrels",
        )
    chosen = [name for name in (layout.queries, layout.corpus) if name is not None]
    name = folder.resolve().name + (f" ({', '.join(chosen)})" if chosen else "")
    return Search(
        name, digests, tuple(documents), queries, np.asarray(wholes, np.int64),
        tuple(relevant.values()),
    )  # fmt: skip


def _judged(
    path: Path, queries: dict[str, str], wholes: dict[str, int], digests: dict[str, str], folder: Path
) -> dict[str, dict[int, float]]:
    """Each judged query's relevant wholes, in the order of the file."""
    relevant: dict[str, dict[int, float]] = {}
    for number, line in _lines(path, digests, folder):
        query, document, grade, *more = (*line.split("\t"), "", "")
        try:
            value = float(grade)
        except ValueError:
            value = math.nan
        if number == 1 and math.isnan(value):
            continue  # the line of names
        if not math.isfinite(value) or any(more[:-2]):
            raise _wrong(path, number, "query, document and grade between tabs", line[:60])
        for kind, name, known in (("query", query, queries), ("document", document, wholes)):
            if name not in known:
                raise _wrong(path, number, f"a {kind} of the {kind} file", f"the unknown {kind} {name!r}")
        if value > 0:
            relevant.setdefault(query, {})[wholes[document]] = value
    return relevant


def _pairs(path: Path) -> Pairs:
    digests: dict[str, str] = {}
    left, right, scores = [], [], []
    for number, row in _rows(path, digests, path.parent):
        score = row.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise _wrong(path, number, "a score that is a number", f"{score!r}"[:60])
        left.append(_field(row, "sentence1", path, number))
        right.append(_field(row, "sentence2", path, number))
        scores.append(float(score))
    if len(set(scores)) < 2:
        raise DatasetError(
            f"{path}",
            expected="pairs with at least two different scores",
            found=f"{len(scores)} pairs with {len(set(scores))}",
            remedy="write lines with sentence1, sentence2 and score",
        )
    return Pairs(
        f"{path.resolve().parent.name}/{path.name}", digests, tuple(left), tuple(right), np.asarray(scores, np.float64)
    )


def _located(folder: Path, named: str | None, usual: Sequence[str], option: str) -> Path:
    names = usual if named is None else (named,)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    there = sorted(p.relative_to(folder).as_posix() for p in folder.iterdir() if p.suffix in (".jsonl", ".tsv"))
    raise DatasetError(
        f"{folder}",
        expected=" or ".join(names),
        found=", ".join(there[:8]) or "no .jsonl and no .tsv",
        remedy=f"name the file with {option}",
    )


def _lines(path: Path, digests: dict[str, str], folder: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file, empty ones left out, its hash noted."""
    try:
        raw = path.read_bytes()
        lines = raw.decode("utf-8").split("\n")  # not splitlines: texts may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{path}", expected="a text file in UTF-8", found=str(error), remedy="check the path"
        ) from error
    digests[path.relative_to(folder).as_posix()] = hashlib.sha256(raw).hexdigest()
    yield from ((number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip())


def _rows(path: Path, digests: dict[str, str], folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path, digests, folder):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise _wrong(path, number, "a JSON object", line[:60])
        yield number, row


def _field(row: dict[str, Any], key: str, path: Path, number: int) -> str:
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and key != "text":
        value = str(value)  # ids are numbers in some files
    if not isinstance(value, str):
        raise _wrong(path, number, f"the field {key!r} with a string", f"{sorted(row)}"[:60])
    return value


def _wrong(path: Path, number: int, expected: str, found: str) -> DatasetError:
    return DatasetError(f"line {number} of {path}", expected=expected, found=found, remedy="mend or remove the line")
