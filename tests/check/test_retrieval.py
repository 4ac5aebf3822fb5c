"""Places and measures of retrieval against slow plain twins; ties and NaN are never in a model's favour."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherbed.check.lexical import lexical, words
from featherbed.check.retrieval import FUSION, dense, found, fused, hits, measured, places
from featherbed.dataset import Search

SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan]), min_size=2, max_size=6)


def ranked(order: tuple[int, ...], wanted: dict[int, float]) -> dict[str, float]:
    """The measures of a ranking of all documents, as the textbook writes them."""
    gains = [wanted.get(document, 0.0) for document in order]
    ideal = sorted(wanted.values(), reverse=True)
    dcg, best = (sum(g / math.log2(at + 2) for at, g in enumerate(row[:10])) for row in (gains, ideal))
    first = next(at for at, gain in enumerate(gains) if gain)
    return {
        "top_1": float(first == 0),
        "ndcg_at_10": dcg / best,
        "mrr_at_10": 1 / (first + 1) if first < 10 else 0.0,
        "recall_at_10": sum(gain > 0 for gain in gains[:10]) / len(wanted),
        "recall_at_100": sum(gain > 0 for gain in gains[:100]) / len(wanted),
    }


@given(SCORES, st.data())
def test_measures_are_those_of_the_worst_ranking_that_the_scores_allow(
    scores: list[float], data: st.DataObject
) -> None:
    grades = st.sampled_from([1.0, 2.0, 3.0])
    wanted = data.draw(st.dictionaries(st.integers(0, len(scores) - 1), grades, min_size=1, max_size=3))
    level = [-math.inf if math.isnan(score) else score for score in scores]
    known = [at for at in wanted if not math.isnan(scores[at])]
    if len(known) < len(wanted):  # NaN of a wanted one puts it last; NaN of another stands before all
        return
    level = [math.inf if math.isnan(score) else score for score in scores]
    allowed = [
        order for order in permutations(range(len(scores)))
        if all(level[a] >= level[b] for a, b in pairwise(order))
    ]  # fmt: skip
    got = measured(places(np.asarray(scores), wanted), wanted)
    assert got["ndcg_at_10"] == pytest.approx(min(ranked(order, wanted)["ndcg_at_10"] for order in allowed))
    worst = min(allowed, key=lambda order: ranked(order, wanted)["ndcg_at_10"])
    assert got == pytest.approx(ranked(worst, wanted))


def test_a_wanted_document_without_a_score_stands_last() -> None:
    assert places(np.asarray([0.1, math.nan, 0.2]), {1: 1.0}) == [2]


def test_vectors_that_are_all_the_same_find_nothing() -> None:
    same = np.ones((3, 4), np.float32)
    search = Search("x", {}, ("a", "b", "c"), ("q", "r", "s"), np.arange(3), ({0: 1.0}, {1: 1.0}, {2: 1.0}))
    assert found(search, dense(same, same)).to_json()["top_1"] == 0


def test_far_down_counts_for_recall_at_100_and_for_nothing_else() -> None:
    assert measured([50], {0: 1.0}) == {
        "top_1": 0, "ndcg_at_10": 0, "mrr_at_10": 0, "recall_at_10": 0, "recall_at_100": 1,
    }  # fmt: skip


def test_a_whole_is_as_near_as_its_best_piece() -> None:
    wholes = np.asarray([0, 1, 0, 1])
    search = Search("x", {}, ("a", "b", "c", "d"), ("q",), wholes, ({0: 1.0},))
    for scores, first in (([0.1, 0.5, 0.9, 0.2], 1.0), ([0.1, 0.5, 0.4, 0.2], 0.0)):
        assert found(search, iter([np.asarray(scores)])).to_json()["top_1"] == first


def test_similarities_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    queries, documents = (rng.standard_normal((n, 8)).astype(np.float32) for n in (7, 5))
    whole = list(dense(queries, documents))
    monkeypatch.setattr("featherbed.check.retrieval.NUMBERS", 10)
    assert np.allclose(whole, list(dense(queries, documents)))
    assert np.allclose(whole, queries @ documents.T)


def test_fusion_adds_the_inverse_ranks_of_hits_only() -> None:
    near, said = np.asarray([0.9, 0.8, -0.1]), np.asarray([-np.inf, 3.0, -np.inf])
    assert hits(said).tolist() == [1]
    assert fused(3, hits(near), hits(said)).tolist() == pytest.approx(
        [1 / (FUSION + 1), 1 / (FUSION + 2) + 1 / (FUSION + 1), 1 / (FUSION + 3)]
    )


def test_fusion_looks_at_a_hundred_of_each() -> None:
    total = fused(150, hits(np.linspace(1, 0, 150)))
    assert (total > 0).sum() == 100
    assert hits(np.asarray([math.nan, 0.5, -0.5])).tolist() == [1, 2]


def plain_bm25(query: list[str], documents: list[list[str]]) -> list[float]:
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            holders = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
            count = document.count(word)
            score += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        scores.append(score if score > 0 else -math.inf)
    return scores


def test_lexical_scores_are_those_of_bm25() -> None:
    documents = ["The harbour lay full of rain.", "rain, rain and rain again", "Ein Haus am Hafen", "北京的雨很大"]
    queries = ["rain in the harbour", "雨", "nothing of it"]
    for query, scores in zip(queries, lexical(queries, documents), strict=True):
        expected = plain_bm25(words(query), [words(document) for document in documents])
        assert scores.tolist() == pytest.approx(expected, rel=1e-5), query


def test_words_of_scripts_without_spaces_are_their_characters() -> None:
    assert words("Mein iPhone手机 läuft") == ["mein", "iphone", "手", "机", "läuft"]
