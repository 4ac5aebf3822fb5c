"""eval on real folders: what a model finds, what words find, and what both find, kept in evidence and card."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import featherbed
from featherbed.check.evaluate import parse_modes
from featherbed.dataset import Layout
from featherbed.errors import DatasetError, MissingError, OptionError
from featherbed.folder import open_folder

WORDS = ["harbour", "rain", "matrix", "light", "boats", "morning", "feather", "quick"]  # of the fixtures' vocabularies


def spearman_of(a: list[float], b: list[float]) -> float:
    """1 − 6 Σ d² / (n (n² − 1)), for values without ties."""
    places = [[sorted(values).index(value) for value in values] for values in (a, b)]
    squares = sum((x - y) ** 2 for x, y in zip(*places, strict=True))
    return float(1 - 6 * squares / (len(a) * (len(a) ** 2 - 1)))


def first_of(folder: Path, variant: str, dataset: Path) -> float:
    """Share of queries whose most similar document is the one of the same number."""
    model = featherbed.Embedder(folder, variant)
    queries, documents = (
        [json.loads(line)["text"] for line in (dataset / name).read_text("utf-8").splitlines()]
        for name in ("queries.jsonl", "corpus.jsonl")
    )
    near = model.encode_query(queries) @ model.encode_document(documents).T
    return float((near.argmax(1) == np.arange(len(queries))).mean())


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Eight documents and a query each, which is the document itself: any model that works finds all."""
    folder = tmp_path / "things"
    (folder / "qrels").mkdir(parents=True)
    texts = [f"the {word} and nothing but the {word}, {word} again" for word in WORDS]
    rows = [json.dumps({"_id": f"d{n}", "text": text}) for n, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("\n".join(rows), "utf-8")
    rows = [json.dumps({"_id": f"q{n}", "text": text}) for n, text in enumerate(texts)]
    (folder / "queries.jsonl").write_text("\n".join(rows), "utf-8")
    judged = "\n".join(f"q{n}\td{n}\t1" for n in range(len(WORDS)))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}\n", "utf-8")
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"sentence1": f"the {a}", "sentence2": f"the {b}", "score": n} for n, (a, b) in
            enumerate(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


def test_every_way_to_search_is_measured(folders: dict[str, Path], dataset: Path) -> None:
    (found,) = featherbed.evaluate(folders["bert-mean"], [dataset], ["fp32"], modes=["hybrid", "lexical", "dense"])
    assert set(found.rows) == {("", "lexical"), ("fp32", "dense"), ("fp32", "hybrid")}
    by_words = found.rows["", "lexical"]  # every text holds a word that no other one has
    assert by_words["top_1"] == by_words["ndcg_at_10"] == by_words["mrr_at_10"] == by_words["recall_at_10"] == 1
    assert by_words["intervals"]["ndcg_at_10"] == [1, 1]
    near = found.rows["fp32", "dense"]
    assert near["top_1"] == first_of(folders["bert-mean"], "fp32", dataset)
    assert near["top_1"] <= near["mrr_at_10"] <= near["recall_at_10"] == 1  # eight documents are all among ten
    assert found.rows["fp32", "hybrid"]["mrr_at_10"] >= near["mrr_at_10"]  # words are always right here
    assert near["chunks_per_s"] > 0
    assert found.dataset["documents"] == found.dataset["queries"] == len(WORDS)


def test_pairs_are_judged_by_the_ranks_of_their_cosines(folders: dict[str, Path], pairs: Path) -> None:
    (found,) = featherbed.evaluate(folders["bert-cls"], [pairs], ["fp32"])
    model = featherbed.Embedder(folders["bert-cls"], "fp32")
    rows = [json.loads(line) for line in pairs.read_text("utf-8").splitlines()]
    left, right = (model.encode([row[side] for row in rows]) for side in ("sentence1", "sentence2"))
    expected = spearman_of((left * right).sum(1).tolist(), [row["score"] for row in rows])
    figures = found.rows["fp32", "dense"]
    assert figures["spearman"] == pytest.approx(expected)
    low, high = figures["intervals"]["spearman"]
    assert low <= figures["spearman"] <= high


def test_saved_figures_are_on_card_and_report_and_survive_verify(
    copied: Callable[[str], Path], dataset: Path, pairs: Path, tmp_path: Path
) -> None:
    folder = copied("bert-mean")
    featherbed.evaluate(folder, [dataset, pairs], ["fp32", "int8"], modes=["dense", "lexical"], save=True)
    probe = tmp_path / "texts.jsonl"
    probe.write_text("\n".join(json.dumps({"text": f"{word} soup"}) for word in WORDS), "utf-8")
    featherbed.verify(folder, ["int8"], probes=[probe], save=True)
    kept = json.loads((folder / "reports" / "int8.json").read_text("utf-8"))
    assert set(kept["eval"]) == {"things", f"{pairs.parent.name}/pairs.jsonl"}
    assert kept["eval"]["things"]["dense"]["top_1"] == first_of(folder, "int8", dataset)
    for page in ("README.md", "report.html"):
        text = (folder / page).read_text("utf-8")
        assert "things" in text
        assert text.count("lexical") == 1
    open_folder(folder).check_hashes()


def test_a_dataset_that_cannot_be_read_is_said_before_anything_is_embedded(
    folders: dict[str, Path], dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featherbed.check.evaluate.Embedder", None)
    with pytest.raises(DatasetError, match=r"nothing\.jsonl"):
        featherbed.evaluate(folders["bert-mean"], [dataset, dataset / "nothing.jsonl"])


def test_words_need_the_extra_and_say_so(
    folders: dict[str, Path], dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingError, match=r"featherbed\[eval\]"):
        featherbed.evaluate(folders["bert-mean"], [dataset], ["fp32"], modes=["lexical"])


def test_an_unknown_way_to_search_is_named() -> None:
    with pytest.raises(OptionError, match="sparse"):
        parse_modes(["dense", "sparse"])
    with pytest.raises(OptionError, match="none"):
        parse_modes([])


def test_verify_searches_a_dataset_too(folders: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    probe = tmp_path / "texts.jsonl"
    probe.write_text("\n".join(json.dumps({"text": f"{word} soup"}) for word in WORDS), "utf-8")
    report = featherbed.verify(
        folders["bert-mean"],
        ["int8"],
        probes=[probe],
        retrieval=dataset,
        gates=["retrieval_ndcg_at_10=0.1", "retrieval_mrr_at_10=1.5"],
    )
    metrics = report.metrics["int8"]
    (alone,) = featherbed.evaluate(folders["bert-mean"], [dataset], ["int8"])
    figures = alone.rows["int8", "dense"]
    assert metrics.retrieval_top_1 == figures["top_1"]
    assert metrics.retrieval_ndcg_at_10 == pytest.approx(figures["ndcg_at_10"])
    assert metrics.retrieval_mrr_at_10 == pytest.approx(figures["mrr_at_10"])
    assert list(metrics.intervals["retrieval_top_1"]) == figures["intervals"]["top_1"]
    assert report.probe["retrieval"]["queries"] == len(WORDS)
    assert {v.metric: v.passed for v in report.verdicts if v.metric.startswith("retrieval")} == {
        "retrieval_ndcg_at_10": True, "retrieval_mrr_at_10": False,
    }  # fmt: skip
    with pytest.raises(OptionError, match="--retrieval, which measures it"):
        featherbed.verify(folders["bert-mean"], ["int8"], probes=[probe], gates=["retrieval_top_1=0.5"])


def test_pairs_are_nothing_for_verify_to_search(folders: dict[str, Path], pairs: Path) -> None:
    with pytest.raises(OptionError, match="featherbed eval"):
        featherbed.verify(folders["bert-mean"], ["int8"], retrieval=pairs)


def test_titles_change_what_is_embedded(folders: dict[str, Path], dataset: Path) -> None:
    rows = [json.dumps({"_id": f"d{n}", "title": WORDS[-1 - n], "text": "the same"}) for n in range(len(WORDS))]
    (dataset / "corpus.jsonl").write_text("\n".join(rows), "utf-8")
    found = [
        featherbed.evaluate(folders["bert-mean"], [dataset], ["fp32"], layout=Layout(titles=titles))[0]
        for titles in (True, False)
    ]
    assert found[0].rows["fp32", "dense"]["mrr_at_10"] > 0
    assert found[1].rows["fp32", "dense"]["top_1"] == 0  # all the same: nobody is first
    assert np.isclose(found[1].rows["fp32", "dense"]["mrr_at_10"], 1 / len(WORDS))
