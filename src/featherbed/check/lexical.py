"""Scores by words: BM25, by the library bm25s (extra ``eval``). What dense retrieval is held against."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from featherbed.check.statistics import Floats
from featherbed.errors import MissingError
from featherbed.progress import Progress, silent

# scripts without spaces between words, a character a word: kana, Han, Hangul, Thai
UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
WORDS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text in lower case, none left out and none stemmed: texts are of any language."""
    return WORDS.findall(text.lower())


def lexical(queries: Sequence[str], documents: Sequence[str], progress: Progress = silent) -> Iterator[Floats]:
    """BM25 scores [D] of each query (k1 1.5, b 0.75, Lucene's idf); −∞ for documents with none of its words.

    Raises MissingError without bm25s.
    """
    try:
        import bm25s  # an extra
    except ModuleNotFoundError as error:
        raise MissingError(
            "lexical and hybrid",
            expected="the library bm25s",
            found="none",
            remedy="pip install 'featherbed[eval]'",
        ) from error
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index([words(text) or [""] for text in documents], show_progress=False)
    known = index.vocab_dict
    for done, query in enumerate(queries, 1):
        asked = [word for word in words(query) if word in known]
        scores = np.asarray(index.get_scores(asked) if asked else np.zeros(len(documents)), np.float64)
        yield np.where(scores > 0, scores, -np.inf)
        progress("lexical", done, len(queries))
