"""eval and report as a user types them: tables, one JSON document, errors in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_cli import Run, run

__all__ = ["run"]  # the fixture


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "weather"
    folder.mkdir()
    texts = ["rain over the harbour", "morning light", "boats in the water"]
    rows = [json.dumps({"_id": f"{n}", "text": text}) for n, text in enumerate(texts)]
    (folder / "docs.jsonl").write_text("\n".join(rows), "utf-8")
    (folder / "queries.jsonl").write_text("\n".join(rows), "utf-8")
    (folder / "qrels.tsv").write_text("q\td\ts\n0\t0\t1\n1\t1\t1\n2\t2\t1\n", "utf-8")
    return folder


def test_eval_prints_a_row_for_each_variant_and_way(run: Run, folders: dict[str, Path], dataset: Path) -> None:
    outcome = run("eval", folders["bert-cls"], dataset, "--variants", "fp32,int8", "--modes", "dense,lexical,hybrid")
    assert outcome.code == 0
    assert "weather: 3 queries, 3 documents" in outcome.out
    rows = [line.split("│")[1:-1] for line in outcome.out.splitlines() if line.startswith("│")]
    assert [tuple(cell.strip() for cell in row[:2]) for row in rows] == [
        ("–", "lexical"), ("fp32", "dense"), ("fp32", "hybrid"), ("int8", "dense"), ("int8", "hybrid"),
    ]  # fmt: skip
    assert rows[0][2].strip() == "1.0000"


def test_eval_of_pairs_prints_their_correlation(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"sentence1": "rain", "sentence2": word, "score": n} for n, word in enumerate(("boats", "light", "water"))]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    outcome = run("eval", folders["bert-cls"], path, "--variants", "fp32")
    assert outcome.code == 0
    assert "/pairs.jsonl: 3 pairs" in outcome.out
    assert "Spearman" in outcome.out
    assert "nan" not in outcome.out
    (row,) = run("eval", folders["bert-cls"], path, "--variants", "fp32", "--json").document["evaluations"][0][
        "results"
    ]
    assert row["intervals"]["spearman"] == [None, None]  # three pairs: some resample is one pair thrice


def test_eval_for_machines_is_one_document(run: Run, folders: dict[str, Path], dataset: Path) -> None:
    outcome = run("eval", folders["bert-cls"], dataset, "--variants", "fp32", "--json")
    (evaluation,) = outcome.document["evaluations"]
    assert evaluation["dataset"]["files_sha256"].keys() == {"docs.jsonl", "queries.jsonl", "qrels.tsv"}
    (row,) = evaluation["results"]
    assert (row["variant"], row["mode"], row["queries"]) == ("fp32", "dense", 3)
    assert set(row["intervals"]) == {"top_1", "ndcg_at_10", "mrr_at_10", "recall_at_10", "recall_at_100"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--modes", "dense,sparse"), "--modes sparse"),
        (("--corpus", "corpus.de.jsonl"), "corpus.de.jsonl"),
        (("--group", "page"), "'page'"),
    ],
)
def test_eval_says_in_a_line_what_is_wrong(
    run: Run, folders: dict[str, Path], dataset: Path, words: tuple[str, str], found: str
) -> None:
    outcome = run("eval", folders["bert-cls"], dataset, *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert found in outcome.err
    assert outcome.err.count("\n") == 1


def test_report_writes_the_page_and_says_where(run: Run, copied: Callable[[str], Path]) -> None:
    folder = copied("bert-cls")
    (folder / "report.html").unlink()
    assert run("report", folder, "--json").document == {"report": str(folder / "report.html")}
    assert (folder / "report.html").is_file()
    assert f"wrote {folder / 'report.html'}" in run("report", folder).out


def test_verify_writes_what_was_found_on_a_dataset(run: Run, folders: dict[str, Path], dataset: Path) -> None:
    outcome = run("verify", folders["bert-cls"], "--variants", "fp32", "--retrieval", dataset)
    assert outcome.code == 0
    assert "fp32 on weather: top-1" in outcome.out
