"""The real weights of all-MiniLM-L6-v2: built as a user builds them, held against upstream's own vectors.

`make real` fetches them (demo/weights.py). The vectors in reference.safetensors were computed with transformers
on torch by tests/real/make_reference.py, for texts of the shipped probe.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import featherbed
from featherbed.check.inspect import inspect_file
from featherbed.pipeline.build import Outcome
from featherbed.probe import CALIBRATION, SHIPPED
from featherbed.run.batches import collate
from featherbed.run.embedder import Embedder
from featherbed.spec import Pooling

WEIGHTS = Path(__file__).parent.parent.parent / ".cache" / "all-MiniLM-L6-v2"
REFERENCE = Path(__file__).parent / "reference.safetensors"
VARIANTS = ("fp32", "int8", "int8-block", "int4", "int4-small", "int8-dynamic", "q4")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    assert (WEIGHTS / "model.safetensors").is_file(), "fetch the weights with: make real, or python demo/weights.py"
    root = tmp_path_factory.mktemp("real")
    # all of the texts that ship take minutes
    folder = featherbed.build(
        WEIGHTS, root / "minilm", VARIANTS, check=False, calibration=every(8, CALIBRATION, root / "few.jsonl")
    ).folder
    report = featherbed.verify(folder, probes=[every(3, SHIPPED, root / "probe.jsonl")], save=True)
    return Outcome(folder, report)


def every(step: int, texts: Path, copy: Path) -> Path:
    copy.write_text("\n".join(texts.read_text("utf-8").split("\n")[::step]), "utf-8")
    return copy


def test_ids_are_upstream_s_ids_and_vectors_its_vectors(built: Outcome) -> None:
    with safe_open(REFERENCE, "np") as file:
        texts = json.loads(file.metadata()["texts"])
        ids, mask, unit = (file.get_tensor(k) for k in ("input_ids", "attention_mask", "embeddings"))
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    embedder = Embedder(built.folder, "fp32")
    rows = [[int(i) for i in row[real > 0]] for row, real in zip(ids, mask, strict=True)]
    assert embedder.ids(texts) == rows
    assert np.abs(embedder.embed(collate(rows, 0)) - unit).max() <= 2e-5
    assert np.abs(embedder.encode(texts) - unit).max() <= 2e-5
    assert np.abs(np.concatenate(list(embedder.stream(texts))) - unit).max() <= 2e-5


def test_eight_bits_keep_the_embedding(built: Outcome) -> None:
    report = built.report
    assert report is not None
    assert report.metrics["int8"].cos_mean >= 0.9985
    assert report.metrics["int8"].cos_min >= 0.995
    assert report.metrics["int8-block"].cos_mean >= 0.9995
    assert report.metrics["int8-block"].cos_min >= 0.998


def test_searched_zero_points_keep_more_in_4_bits_than_symmetric_rounding(built: Outcome) -> None:
    report = built.report
    assert report is not None
    assert report.metrics["int4"].cos_mean > report.metrics["q4"].cos_mean
    assert report.metrics["int4"].cos_mean >= 0.989
    assert report.metrics["int4"].cos_min >= 0.968
    sizes = [report.metrics[name].size_bytes for name in ("int4-small", "int4", "int8", "fp32")]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("variant", ["fp32", "int8", "int8-block", "int4", "int4-small", "q4"])
def test_a_text_has_one_vector_whatever_its_company(built: Outcome, variant: str) -> None:
    assert built.report is not None
    assert built.report.metrics[variant].invariance_max <= 1e-5


def test_stock_recipes_fail_where_they_are_known_to_fail(built: Outcome) -> None:
    assert built.report is not None
    failed = {(v.variant, v.metric) for v in built.report.verdicts if not v.passed}
    assert ("int8-dynamic", "invariance_max") in failed
    assert ("q4", "cos_min") in failed
    assert not {variant for variant, _ in failed} & {"fp32", "int8", "int8-block"}


def test_spec_is_read_from_the_files_and_fixed_padding_is_gone(built: Outcome) -> None:
    embedder = Embedder(built.folder)
    assert embedder.variant == "int8"
    assert (embedder.spec.pooling, embedder.spec.max_length, embedder.spec.dim) == (Pooling.MEAN, 256, 384)
    assert len(embedder.ids(["rain"])[0]) == 3
    long = embedder.ids(["rain " * 1000])[0]
    assert len(long) == 256
    assert long[-1] == 102


def test_the_graph_is_fused_as_designed(built: Outcome) -> None:
    census = inspect_file(built.folder / "onnx" / "model_int8.onnx").operators
    assert census["com.microsoft.GroupQueryAttention"] == 6
    assert census["LayerNormalization"] == 13
    assert census["Gelu"] == 6
    assert census["com.microsoft.MatMulIntegerToFloat"] == 24
    assert census["QuantizeLinear"] == 24
    assert "Gemm" not in census


def test_a_question_finds_its_answer(built: Outcome) -> None:
    embedder = Embedder(built.folder, "int8")
    passages = ["The capital of China is Beijing.", "Gravity is a force that attracts two bodies towards each other."]
    scores = embedder.similarity(
        embedder.encode_query(["What is the capital of China?"]), embedder.encode_document(passages)
    )
    assert scores.argmax() == 0
    assert scores[0, 0] - scores[0, 1] > 0.5
