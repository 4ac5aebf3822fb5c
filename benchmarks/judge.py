"""Judge variants of a model folder against its fp32 on real text: similarity of sentences, retrieval of passages.

    python benchmarks/judge.py FOLDER --data DATA [--variants int8,int4] [--limit N] -o RESULT.json

DATA holds stsb_multi_mt/{en,de}.dev.jsonl and xquad/{docs,queries}.{en,de}.jsonl with xquad/qrels.tsv. Vectors of
fp32 are kept beside the result: a second variant does not pay for them again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from featherbed import Embedder
from featherbed.check.machine import machine
from featherbed.check.parity import cosines
from featherbed.check.statistics import INTERVAL_PERCENT, RESAMPLES, SEED, Floats, Places, bootstrap, spearman
from featherbed.folder import ModelFolder, file_record, open_folder
from featherbed.progress import Progress, bar, silent

Vectors = dict[str, npt.NDArray[np.float32]]  # kind → [N, D], in the order of Task.texts
T = TypeVar("T")

REFERENCE = "fp32"
LANGUAGES = ("en", "de")
PLAIN, QUERY, DOCUMENT = "plain", "query", "document"  # the kinds: which of the folder's prompts comes before a text
DEPTH = 10


@dataclass(frozen=True)
class Pairs:
    """P pairs of sentences, as places among the plain texts, and what people said of their similarity."""

    language: str
    left: Places  # [P]
    right: Places  # [P]
    score: Floats  # [P], 0 to 5


@dataclass(frozen=True)
class Search:
    """Q queries and D documents, as places among the texts of their kinds. One document answers a query."""

    language: str
    queries: Places  # [Q]
    documents: Places  # [D]
    relevant: Places  # [Q], places among ``documents``


@dataclass(frozen=True)
class Task:
    """All that is asked: the distinct texts of each kind, and who is compared with whom."""

    texts: dict[str, list[str]]
    pairs: list[Pairs]
    searches: list[Search]
    files_sha256: dict[str, str]


def read_task(data: Path, limit: int | None = None) -> Task:
    """The pairs and searches of ``data``.

    ``limit`` keeps that many pairs and queries a language, evenly spread, and only the documents that answer these.
    """
    places: dict[str, dict[str, int]] = {PLAIN: {}, QUERY: {}, DOCUMENT: {}}
    files: dict[str, str] = {}

    def lines(name: str) -> list[str]:
        files[name] = file_record(data / name).sha256
        text = (data / name).read_text("utf-8")
        return [line for line in text.split("\n") if line.strip()]  # not splitlines: texts may hold U+2028

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in lines(name)]

    def at(kind: str, texts: Iterable[str]) -> Places:
        known = places[kind]
        return np.asarray([known.setdefault(text, len(known)) for text in texts], np.int64)

    judged = [line.split("\t") for line in lines("xquad/qrels.tsv")[1:]]  # query, document, score; below a header
    answer_of = {query: document for query, document, _ in judged}
    if len(answer_of) < len(judged):
        raise SystemExit("judge: expected one document a query in xquad/qrels.tsv, found a query with several")
    pairs, searches = [], []
    for language in LANGUAGES:
        found = spread(rows(f"stsb_multi_mt/{language}.dev.jsonl"), limit)
        left, right = (at(PLAIN, (row[key] for row in found)) for key in ("sentence1", "sentence2"))
        pairs.append(Pairs(language, left, right, np.asarray([row["score"] for row in found], np.float64)))
        queries = spread(rows(f"xquad/queries.{language}.jsonl"), limit)
        wanted = {answer_of[row["_id"]] for row in queries}
        documents = [row for row in rows(f"xquad/docs.{language}.jsonl") if limit is None or row["_id"] in wanted]
        order = {row["_id"]: place for place, row in enumerate(documents)}
        relevant = np.asarray([order[answer_of[row["_id"]]] for row in queries], np.int64)
        asked, answers = at(QUERY, (row["text"] for row in queries)), at(DOCUMENT, (row["text"] for row in documents))
        searches.append(Search(language, asked, answers, relevant))
    return Task({kind: list(known) for kind, known in places.items()}, pairs, searches, files)


def spread(rows: list[T], limit: int | None) -> list[T]:
    """``limit`` of the rows, evenly spread: files are sorted by where their rows come from."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[place * len(rows) // limit] for place in range(limit)]


def places_of(similarities: Floats, relevant: Places) -> Places:
    """From 0, where the relevant document [Q] stands among all [Q, D].

    Behind those it ties with, and last where something is NaN: vectors that are all the same find nothing.
    """
    own = np.take_along_axis(similarities, relevant[:, None], -1)
    return np.asarray((~(similarities < own)).sum(axis=-1) - 1, np.int64)


def ndcg_at_10(places: Places) -> Floats:
    """nDCG of each query that has one relevant document, which stands at ``places`` from 0."""
    return np.where(places < DEPTH, 1 / np.log2(places + 2), 0.0)


def rounded(value: float | np.floating[Any], digits: int) -> float | None:
    """For JSON, which has no NaN."""
    return round(float(value), digits) if math.isfinite(value) else None


@dataclass(frozen=True)
class Score:
    """What one measure says of each of N things, or, for a rank correlation, what it correlates.

    With ``gold`` the score is the Spearman correlation of ``values`` with it, without it their mean.
    """

    values: Floats  # [N]
    gold: Floats | None = None

    def of(self, at: Places) -> Floats:
        """Points of samples [..., N]."""
        if self.gold is None:
            return np.asarray(100 * self.values[at].mean(axis=-1))
        return 100 * spearman(self.values[at], self.gold[at])

    @property
    def points(self) -> float:
        """Of all."""
        return float(self.of(np.arange(len(self.values))))


def scores(task: Task, vectors: Vectors) -> dict[str, Score]:
    """Every score of one variant, by name."""
    found: dict[str, Score] = {}
    plain = vectors[PLAIN]
    similar = [cosines(plain[p.left], plain[p.right]) for p in task.pairs]
    found["sts_spearman"] = Score(np.concatenate(similar), np.concatenate([p.score for p in task.pairs]))
    for pairs, values in zip(task.pairs, similar, strict=True):
        found[f"sts_spearman_{pairs.language}"] = Score(values, pairs.score)
    for one in task.searches:
        queries, documents = vectors[QUERY][one.queries], vectors[DOCUMENT][one.documents]
        places = places_of(queries.astype(np.float64) @ documents.astype(np.float64).T, one.relevant)
        found[f"xquad_{one.language}_top_1"] = Score((places == 0).astype(np.float64))
        found[f"xquad_{one.language}_ndcg_at_{DEPTH}"] = Score(ndcg_at_10(places))
    return found


def compared(score: Score, reference: Score) -> dict[str, Any]:
    """A score beside the reference's on the same things, and the interval of their difference."""
    count = len(score.values)
    low, high = bootstrap(lambda at: score.of(at) - reference.of(at), count)
    return {
        "count": count,
        "points": rounded(score.points, 3),
        "fp32_points": rounded(reference.points, 3),
        "difference_points": rounded(score.points - reference.points, 3),
        "difference_low_points": rounded(low, 3),
        "difference_high_points": rounded(high, 3),
    }


def agreement(vectors: Vectors, reference: Vectors, kinds: Sequence[str]) -> dict[str, Any]:
    """Cosines of texts with their fp32."""
    found = np.concatenate([cosines(vectors[kind], reference[kind]) for kind in kinds])
    return {
        "texts": len(found),
        "mean": rounded(found.mean(), 7),
        "percentile_1": rounded(np.percentile(found, 1), 7),
        "worst": rounded(found.min(), 7),
    }


def embedded(folder: Path, variant: str, task: Task, progress: Progress) -> Vectors:
    """Vectors of all texts, each once a kind."""
    embedder = Embedder(folder, variant)
    encode = {PLAIN: embedder.encode, QUERY: embedder.encode_query, DOCUMENT: embedder.encode_document}

    def report(kind: str) -> Progress:
        return lambda _, done, total: progress(f"{variant}: {kind}", done, total)

    return {kind: encode[kind](texts, progress=report(kind)) for kind, texts in task.texts.items()}


def key(folder: ModelFolder, task: Task) -> str:
    """Names all that fp32's vectors depend on: files, prompts, texts, machine and onnxruntime."""
    names = [*folder.variant(REFERENCE).files, "tokenizer.json"]
    files = [file_record(folder.path / name).sha256 for name in names]
    known = [files, folder.manifest.spec.to_json(), folder.manifest.version, task.texts, machine()]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def reference_vectors(folder: ModelFolder, task: Task, progress: Progress, keep: Path | None) -> Vectors:
    """Vectors of fp32, from the folder ``keep`` where they are there; left there where not."""
    path = keep / f"{REFERENCE}-{key(folder, task)}.npz" if keep else None
    if path and path.is_file():
        with np.load(path) as file:
            return {kind: file[kind] for kind in task.texts}
    vectors = embedded(folder.path, REFERENCE, task, progress)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, plain=vectors[PLAIN], query=vectors[QUERY], document=vectors[DOCUMENT])
        temporary.replace(path)  # whole or not at all
    return vectors


def judge(
    folder: Path,
    variants: Sequence[str],
    data: Path,
    limit: int | None = None,
    progress: Progress = silent,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Each variant against fp32. ``keep`` is a folder for fp32's vectors.

    Raises OptionError on an unknown variant, before anything is embedded.
    """
    opened, task = open_folder(folder), read_task(data, limit)
    sizes = {name: opened.manifest.size_bytes(opened.variant(name).name) for name in (REFERENCE, *variants)}
    reference = reference_vectors(opened, task, progress, keep)
    expected = scores(task, reference)
    judged: dict[str, Any] = {}
    for name in variants:
        vectors = reference if name == REFERENCE else embedded(folder, name, task, progress)
        found = scores(task, vectors)
        judged[name] = {
            "size_bytes": sizes[name],
            "recipe": opened.variant(name).recipe,
            "cosine_to_fp32": agreement(vectors, reference, list(task.texts)),
            "cosine_to_fp32_sts_sentences": agreement(vectors, reference, [PLAIN]),
            "scores": {measure: compared(score, expected[measure]) for measure, score in found.items()},
        }
    return {
        "machine": machine(),
        "folder": opened.manifest.name,
        "source_sha256": opened.manifest.source,
        "data": described(task, limit),
        "bootstrap": {"resamples": RESAMPLES, "interval_percent": INTERVAL_PERCENT, "seed": SEED},
        REFERENCE: {
            "size_bytes": sizes[REFERENCE],
            "scores": {measure: {"points": rounded(score.points, 3)} for measure, score in expected.items()},
        },
        "variants": judged,
    }


def described(task: Task, limit: int | None) -> dict[str, Any]:
    """What was asked, and of which files."""
    return {
        "files_sha256": task.files_sha256,
        "limit": limit,
        "distinct_texts": {kind: len(texts) for kind, texts in task.texts.items()},
        "sts_pairs": {p.language: len(p.score) for p in task.pairs},
        "xquad_queries": {s.language: len(s.queries) for s in task.searches},
        "xquad_documents": {s.language: len(s.documents) for s in task.searches},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model folder with fp32")
    parser.add_argument("--data", type=Path, required=True, help="holds stsb_multi_mt/ and xquad/")
    parser.add_argument("--variants", help="e.g. int8,int4; all but fp32 otherwise")
    parser.add_argument("--limit", type=int, help="pairs, and queries, a language: to try it out")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the result, JSON")
    options = parser.parse_args()
    present = [name for name in open_folder(options.folder).manifest.variants if name != REFERENCE]
    variants = options.variants.split(",") if options.variants else present
    with bar() as progress:
        result = judge(options.folder, variants, options.data, options.limit, progress, options.out.parent)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
