"""The compatible shelf's codes on layers of all-MiniLM-L6-v2, against onnxruntime's own quantizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from featherbed.make.checkpoint import open_checkpoint
from featherbed.make.graph import reference_graph
from featherbed.make.ir import Graph, constant
from featherbed.make.quantize.unsigned import matrix_weights, table_weights
from featherbed.spec import read_spec
from tests.make import test_quantize_bnb4 as bnb4
from tests.make import test_quantize_static as static
from tests.make import test_quantize_unsigned as unsigned
from tests.real.test_minilm import WEIGHTS


@pytest.fixture(scope="module")
def graph() -> Graph:
    return reference_graph(open_checkpoint(WEIGHTS), read_spec(WEIGHTS))


@pytest.mark.parametrize("name", ["attention.self.qkv", "intermediate.dense", "output.dense"])
def test_a_layer_of_minilm_is_rounded_as_onnxruntime_does(graph: Graph, name: str) -> None:
    matrix = np.asarray(graph.weights[f"encoder.layer.3.{name}.weight"].array(), np.float32)
    assert bnb4.same(bnb4.ours(matrix, 64), bnb4.theirs(matrix, 64))


def test_a_layer_of_minilm_is_that_of_quantize_static(graph: Graph, tmp_path: Path) -> None:
    layer = "encoder.layer.2.output.dense"
    matrix, bias = (np.asarray(graph.weights[f"{layer}.{part}"].array(), np.float32) for part in ("weight", "bias"))
    parts = [np.maximum(static.gaussian(40, matrix.shape[1], seed=3), np.float32(-0.17))]
    expected, found = (static.constants(make(tmp_path, matrix, bias, parts)) for make in (static.theirs, static.ours))
    for mine, other in (("w.s8", "w_quantized"), ("b.s32", "b_quantized"), ("w.scales", "w_scale")):
        assert np.array_equal(found[mine], expected[other].reshape(found[mine].shape))
    assert (found["x.scale"], found["x.zero"]) == (expected["x_scale"], expected["x_zero_point"])


def test_a_layer_and_the_table_of_minilm_are_those_of_quantize_dynamic(graph: Graph, tmp_path: Path) -> None:
    table = np.asarray(graph.weights[unsigned.WORDS].array(), np.float32)[:4000]
    qkv = graph.weights["encoder.layer.0.attention.self.qkv.weight"]
    assert qkv.parts == (384, 384, 384)  # as they are apart in others' files
    codes, scales, zeros = (weight.array() for weight in matrix_weights(qkv))
    for at, part in enumerate(np.split(np.asarray(qkv.array(), np.float32), 3)):
        expected = unsigned.constants(unsigned.theirs(tmp_path, table if at == 2 else table[:9], part))
        columns = slice(384 * at, 384 * (at + 1))
        assert np.array_equal(codes[:, columns], expected["w_quantized"])
        assert np.all(scales[columns] == expected["w_scale"])
        assert np.all(zeros[columns] == expected["w_zero_point"])
    for found, name in zip(
        table_weights(constant("t", table, unsigned.F32)), ("quantized", "scale", "zero_point"), strict=True
    ):
        assert np.array_equal(found.array(), expected[f"t_{name}"])
