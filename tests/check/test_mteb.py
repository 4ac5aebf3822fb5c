"""mteb's model object, without mteb: what the protocol hands over, and what must come back."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from featherbed import Embedder
from featherbed.check.mteb import MtebModel
from featherbed.errors import MissingError


class PromptType(Enum):
    """mteb's own, as far as it counts."""

    query = "query"
    document = "document"


BATCHES = [{"text": ["the old harbour", "rain"]}, {"text": ["a tram"]}]
TEXTS = ["the old harbour", "rain", "a tram"]


@pytest.mark.parametrize("kind", [PromptType.query, PromptType.document, None])
def test_texts_of_all_batches_get_the_prompt_of_their_kind(folders: dict[str, Path], kind: PromptType | None) -> None:
    model, embedder = MtebModel(folders["qwen3-tied"], "fp32"), Embedder(folders["qwen3-tied"], "fp32")
    encode = {PromptType.query: embedder.encode_query, PromptType.document: embedder.encode_document}
    expected = embedder.encode(TEXTS) if kind is None else encode[kind](TEXTS)
    found = model.encode(BATCHES, task_metadata=None, hf_split="test", hf_subset="en", prompt_type=kind, batch_size=32)
    assert np.allclose(found, expected, atol=1e-5)


def test_similarities_are_cosines(folders: dict[str, Path]) -> None:
    model = MtebModel(folders["bert-mean"], "fp32")
    a = np.asarray([[3, 4], [1, 0]], np.float32)
    assert np.allclose(model.similarity(a, a), [[1, 0.6], [0.6, 1]])
    assert np.allclose(model.similarity_pairwise(a, a[::-1]), [0.6, 0.6])


def test_its_meta_needs_mteb(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(MissingError, match="pip install mteb"):
        _ = MtebModel(folders["bert-mean"], "fp32").mteb_model_meta
