"""The arithmetic of benchmarks/judge.py against slow twins, and that benchmarks/plant.py changes no function."""

from __future__ import annotations

import json
import math
from pathlib import Path

import judge
import numpy as np
import plant
import pytest

import featherbed
from featherbed.check.parity import cosines
from featherbed.make.checkpoint import open_checkpoint
from tests.conftest import FIXTURES

TEXTS = ["A feather bed is soft.", "rain", "Wie drehe ich eine Matrix um neunzig Grad?", "def add(a, b): return a + b"]


def test_places_stand_behind_ties_and_nan_is_last() -> None:
    similarities = np.asarray([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.5, 0.5, 0.5], [np.nan, 0.2, 0.1]])
    assert judge.places_of(similarities, np.asarray([0, 2, 0, 0])).tolist() == [0, 2, 2, 2]


def test_ndcg_at_10_is_that_of_the_whole_formula() -> None:
    for place in range(12):
        gains = [1.0 if at == place else 0.0 for at in range(12)]
        dcg = sum(gain / math.log2(at + 2) for at, gain in enumerate(gains[:10]))
        assert judge.ndcg_at_10(np.asarray([place]))[0] == pytest.approx(dcg / (1 / math.log2(2)))


def test_a_score_compared_with_itself_differs_by_nothing() -> None:
    rng = np.random.default_rng(3)
    score = judge.Score(rng.standard_normal(50), rng.integers(0, 6, 50).astype(float))
    found = judge.compared(score, score)
    assert [found[f"difference{part}_points"] for part in ("", "_low", "_high")] == [0, 0, 0]


def small_task(root: Path) -> Path:
    """Two languages, three pairs, two queries; a sentence twice."""
    (root / "stsb_multi_mt").mkdir()
    (root / "xquad").mkdir()
    pairs = [("rain", "rain", 5.0), ("rain", "A feather bed is soft.", 1.0), ("soft", "bed", 2.0)]
    for language in judge.LANGUAGES:
        lines = [json.dumps({"sentence1": a, "sentence2": b, "score": s}) for a, b, s in pairs]
        (root / "stsb_multi_mt" / f"{language}.dev.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        for name, texts in (("queries", ["what falls?", "what is soft?"]), ("docs", ["a bed", "rain\u2028falls"])):
            lines = [
                json.dumps({"_id": f"{name[0]}{at}", "text": f"{language}: {text}"}, ensure_ascii=False)
                for at, text in enumerate(texts)
            ]
            (root / "xquad" / f"{name}.{language}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (root / "xquad" / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\nq1\td0\t1\n", "utf-8")
    return root


def test_a_task_has_each_text_once_a_kind(tmp_path: Path) -> None:
    task = judge.read_task(small_task(tmp_path))
    assert task.texts["plain"] == ["rain", "soft", "A feather bed is soft.", "bed"]
    assert len(task.texts["query"]) == len(task.texts["document"]) == 4
    assert task.pairs[1].left.tolist() == [0, 0, 1]
    assert task.searches[1].relevant.tolist() == [1, 0]
    assert task.searches[1].documents.tolist() == [2, 3]
    limited = judge.read_task(tmp_path, 1)
    assert limited.texts["document"] == ["en: rain\u2028falls", "de: rain\u2028falls"]


def test_fp32_judged_against_itself_is_perfect_and_its_vectors_are_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = small_task(tmp_path / "data")
    folder = featherbed.build(FIXTURES / "qwen3-tied", tmp_path / "model", ["fp32"], check=False).folder
    first = judge.judge(folder, ["fp32"], data, keep=tmp_path / "kept")
    assert first["variants"]["fp32"]["cosine_to_fp32"]["worst"] == pytest.approx(1)
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".npz"]
    stages: list[str] = []
    again = judge.judge(folder, ["fp32"], data, None, lambda s, *_: stages.append(s), tmp_path / "kept")
    assert (again, stages) == (first, [])


def test_readers_of_a_value_row_are_all_query_heads_of_its_group() -> None:
    # two key-value heads of size 3, four query heads: row 4 is place 1 of head 1, which query heads 2 and 3 share
    assert plant.readers_of(np.asarray([4]), 4, 2, 3).tolist() == [7, 10]
    assert plant.readers_of(np.asarray([0, 5]), 2, 2, 3).tolist() == [0, 5]


@pytest.mark.parametrize(("name", "where"), [("qwen3-tied", plant.WHERE), ("bert-mean", ("values",))])
def test_planted_outliers_change_the_weights_and_not_the_vectors(
    name: str, where: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "planted"
    plant.plant(FIXTURES / name, out, where, 30.0)
    vectors = [
        featherbed.Embedder(featherbed.build(source, tmp_path / f"{at}", ["fp32"], check=False).folder).encode(TEXTS)
        for at, source in enumerate((FIXTURES / name, out))
    ]
    assert cosines(*vectors).min() > 0.99999
    before, after = open_checkpoint(FIXTURES / name), open_checkpoint(out)
    assert list(before.entries) == list(after.entries)
    changed = set()
    for tensor, entry in before.entries.items():
        old, new = (one.weight(tensor, entry.shape).array() for one in (before, after))
        changed |= {tensor} if (old != new).any() else set()
    assert changed == {one.tensor for one in plant.scales(before, where, 30.0)}
    assert all(entry.dtype == "F32" for entry in after.entries.values())
    assert {p.name for p in out.iterdir()} == {p.name for p in (FIXTURES / name).iterdir()}


@pytest.mark.parametrize("where", ["norms", "down"])
def test_bert_takes_no_outliers_where_they_would_change_it(where: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"{where} cannot be planted in a bert checkpoint"):
        plant.plant(FIXTURES / "bert-mean", tmp_path / "out", [where], 30.0)
    assert not (tmp_path / "out").exists()
