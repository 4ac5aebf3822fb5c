"""The card's snippets for others, run in their own libraries on real weights: the same vectors as ours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featherbed

MINILM = Path(os.environ.get("MINILM", ".cache/all-MiniLM-L6-v2"))
NODE = Path(os.environ.get("NODE_PEERS", ".cache/node-peers"))
FEW = Path(__file__).parents[1] / "fixtures" / "calibration.jsonl"
CLOSE = 0.999  # other tokenizers' padding and other kernels: not the same bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert (MINILM / "model.safetensors").is_file(), f"expected MiniLM's weights in {MINILM}; run make peers"
    out = tmp_path_factory.mktemp("peers") / "minilm-onnx"
    featherbed.build(MINILM, out, ["fp32", "int8"], check=False, calibration=FEW)
    return out


@pytest.fixture(scope="module")
def snippets(folder: Path) -> dict[str, str]:
    card = (folder / "README.md").read_text("utf-8")
    places = {
        "PATH/TO/THIS/FOLDER": folder,
        "PATH/ABOVE/THIS/FOLDER": folder.parent,
        "NAME-OF-THIS-FOLDER": folder.name,
    }
    for said, meant in places.items():
        card = card.replace(said, str(meant))
    return dict(re.findall(r"### ([^\n]+)\n\n```\w+\n(.*?)```", card, re.S))


@pytest.fixture(scope="module")
def expected(snippets: dict[str, str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """featherbed's own query and document [2, D]."""
    scope: dict[str, Any] = {}
    exec(compile(snippets["featherbed"], "card", "exec"), scope)
    return np.concatenate([scope["queries"], scope["documents"]])


def cosines(a: Any, b: Any) -> Any:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


@pytest.mark.parametrize("library", ["sentence-transformers", "fastembed"])
def test_a_python_snippet_gives_our_vectors(snippets: dict[str, str], expected: Any, library: str) -> None:
    scope: dict[str, Any] = {}
    exec(compile(snippets[library], "card", "exec"), scope)
    found = np.concatenate([np.asarray(scope["queries"]), np.asarray(scope["documents"])])
    assert found.shape == expected.shape
    assert cosines(found, expected).min() > CLOSE


def test_the_javascript_snippet_gives_our_vectors(snippets: dict[str, str], expected: Any) -> None:
    assert (NODE / "node_modules").is_dir(), f"expected @huggingface/transformers in {NODE}; run make peers"
    script = NODE / "snippet.mjs"
    vectors = "sentence_embedding.tolist()"
    script.write_text(snippets["transformers.js"].replace(vectors, f"JSON.stringify({vectors})"), "utf-8")
    done = subprocess.run(["node", script.name], cwd=NODE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.asarray(json.loads(done.stdout.strip().splitlines()[-1]))
    assert found.shape == expected.shape
    assert cosines(found, expected).min() > CLOSE


def test_mteb_evaluates_a_variant(folder: Path, tmp_path: Path) -> None:
    import datasets
    import mteb
    from mteb.abstasks.task_metadata import TaskMetadata

    from featherbed.check.mteb import MtebModel

    class Pairs(mteb.abstasks.AbsTaskSTS):  # type: ignore[misc]  # mteb is untyped here
        """Six pairs of our own, so that nothing is fetched."""

        metadata = TaskMetadata(
            name="OwnPairs", description="pairs of our own", dataset={"path": "own/pairs", "revision": "1"}, type="STS",
            category="t2t", eval_splits=["test"], eval_langs=["eng-Latn"], main_score="cosine_spearman",
        )  # fmt: skip
        min_score, max_score = 0, 5

        def load_data(self, *_: object, **__: object) -> None:
            rows = [
                ("A cat sleeps on the sofa.", "A cat is asleep on the couch.", 4.8),
                ("The train is late again.", "The train was delayed once more.", 4.5),
                ("He plays the violin.", "She plays the piano.", 2.5),
                ("Rain fell all night.", "It rained until the morning.", 4.2),
                ("The soup is too salty.", "The stock market fell.", 0.1),
                ("A child reads a book.", "A plane lands in the fog.", 0.2),
            ]
            left, right, score = zip(*rows, strict=True)
            columns = {"sentence1": left, "sentence2": right, "score": score}
            self.dataset = datasets.DatasetDict(test=datasets.Dataset.from_dict(columns))
            self.data_loaded = True

    model = MtebModel(folder, "int8")
    result = mteb.evaluate(model, Pairs(), cache=mteb.ResultCache(tmp_path))
    (scores,) = result.task_results[0].scores["test"]
    assert scores["cosine_spearman"] > 0.8
    assert model.mteb_model_meta.framework == ["ONNX"]


def test_these_are_the_peers_that_the_card_was_tried_with() -> None:
    from importlib.metadata import version

    assert version("sentence-transformers").startswith("5.")
    assert version("fastembed") >= "0.9"
    assert sys.version_info >= (3, 11)
