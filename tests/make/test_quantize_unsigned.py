"""int8-full and uint8 against what onnxruntime's own quantize_dynamic makes of the same tables and layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from featherbed.make.graph.lower import lower
from featherbed.make.ir import LINEAR, LOOKUP, OURS, Graph, Node, Port, Weight, constant
from featherbed.make.quantize import apply
from featherbed.make.quantize.unsigned import matrix_weights, round_matrix, table_weights
from featherbed.make.write import write_graph
from featherbed.recipe import RECIPES
from featherbed.steps import UnsignedLinear, UnsignedTable
from tests.conftest import FIXTURES, NAMES, reference_of

Float = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]
F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
EPSILON = float(np.finfo(np.float32).eps)
WORDS = "embeddings.word_embeddings.weight"


def gaussian(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ours(folder: Path, table: Float, matrix: Float) -> Path:
    """ids → rows of ``table`` → · matrixᵀ, through our two steps."""
    ports = (Port("ids", I64, ("n",)),), (Port("y", F32, ("n", len(matrix))),)
    nodes = (Node(LOOKUP, ("ids", "t"), ("rows",), OURS), Node("Neg", ("rows",), ("x",)))
    weights = {"t": constant("t", table, F32), "w": constant("w", matrix, F32)}
    graph = Graph("both", 21, (*nodes, Node(LINEAR, ("x", "w"), ("y",), OURS)), weights, *ports)
    for step in RECIPES["uint8"].steps:
        assert isinstance(step, UnsignedLinear | UnsignedTable)
        graph = apply(graph, step)
    write_graph(lower(graph), folder / "ours.onnx", {})
    return folder / "ours.onnx"


def theirs(folder: Path, table: Float, matrix: Float, weight_type: QuantType = QuantType.QUInt8) -> Path:
    """The same as Gather and MatMul, through onnxruntime's quantizer with all that it knows of."""
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["t", "ids"], ["rows"], axis=0),
            helper.make_node("Neg", ["rows"], ["x"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        "both",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", len(matrix)])],
        [numpy_helper.from_array(table, "t"), numpy_helper.from_array(np.ascontiguousarray(matrix.T), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(folder / "float.onnx"))
    signed = weight_type is QuantType.QInt8
    quantize_dynamic(folder / "float.onnx", folder / "theirs.onnx", per_channel=signed, weight_type=weight_type)
    return folder / "theirs.onnx"


def constants(path: Path) -> Arrays:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}


def run(path: Path, ids: npt.NDArray[np.int64]) -> Float:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"ids": ids})[0], np.float32)


def matrices() -> dict[str, Float]:
    return {
        "gaussian": gaussian(24, 64, seed=1),
        "odd width": gaussian(5, 33, seed=2),
        "one row": gaussian(1, 16, seed=3),
        "all above zero": np.abs(gaussian(6, 20, seed=4)) + 1,
        "all below zero": -np.abs(gaussian(6, 20, seed=5)) - 1,
        "zeros": np.zeros((4, 8), np.float32),
        "ties": np.tile(np.array([-1.5, -0.5, 0, 0.5, 1, 2.5, 253.5, 126.5], np.float32), (3, 2)),
        "tiny": gaussian(4, 16, seed=6) * np.float32(1e-20),
    }


@pytest.mark.parametrize("name", list(matrices()))
def test_codes_scales_and_zero_points_are_those_of_quantize_dynamic(tmp_path: Path, name: str) -> None:
    matrix, table = matrices()[name], matrices()[name].T.copy()
    expected, found = constants(theirs(tmp_path, table, matrix)), constants(ours(tmp_path, table, matrix))
    for weight in ("w", "t"):
        for mine, other in (("u8", "quantized"), ("scale", "scale"), ("zero", "zero_point")):
            a, b = found[f"{weight}.{mine}"], expected[f"{weight}_{other}"]
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert np.array_equal(a, b)


@pytest.mark.parametrize("name", list(matrices()))
def test_outputs_are_those_of_quantize_dynamic(tmp_path: Path, name: str) -> None:
    matrix, table = matrices()[name], gaussian(9, matrices()[name].shape[1], seed=7)
    ids = np.array([3, 0, 8, 3], np.int64)
    expected, found = (run(make(tmp_path, table, matrix), ids) for make in (theirs, ours))
    # the same integers; a_scale · b_scale may be multiplied in another order
    assert np.all(np.abs(found - expected) <= 2 * EPSILON * np.abs(expected))


@pytest.mark.parametrize("weight_type", [QuantType.QInt8, QuantType.QUInt8], ids=["QInt8", "QUInt8"])
def test_a_table_is_rounded_the_same_whatever_the_type_of_the_weights(tmp_path: Path, weight_type: QuantType) -> None:
    table = gaussian(40, 24, seed=8)
    expected = constants(theirs(tmp_path, table, gaussian(4, 24), weight_type))
    codes, scale, zero = (weight.array() for weight in table_weights(constant("t", table, F32)))
    assert np.array_equal(codes, expected["t_quantized"])
    assert (scale, zero) == (expected["t_scale"], expected["t_zero_point"])


def plain(values: list[float]) -> list[float]:
    """Values rounded to u8 and back, one at a time."""
    high, low = max(0.0, *values), min(0.0, *values)
    step = (high - low) / 255
    if step < 2.0**-126:
        return [0.0 for _ in values]
    zero = round(-low / step)
    step32 = np.float32(step)
    return [float((min(max(round(float(np.float32(v) / step32)) + zero, 0), 255) - zero) * step32) for v in values]


FLOATS = st.floats(-1000, 1000, width=32)


@given(st.lists(FLOATS, min_size=2, max_size=30))
def test_a_matrix_is_rounded_as_plain_loops_do_and_loses_half_a_step_at_most(values: list[float]) -> None:
    rows = np.asarray([values], np.float32)
    codes, scale, zero = round_matrix(rows)
    back = (codes.astype(np.float32) - np.float32(zero)) * scale
    assert np.allclose(back[0], plain([float(v) for v in rows[0]]), rtol=2 * EPSILON, atol=0)
    # the zero point is rounded too: at the ends of the range up to a whole step is clipped
    assert np.abs(back - rows).max() <= 1.001 * scale + 1e-30
    assert np.all(back[rows == 0] == 0)


@given(st.lists(st.integers(1, 9), max_size=6))
def test_a_table_that_comes_in_blocks_is_rounded_as_whole(sizes: list[int]) -> None:
    table = gaussian(23, 12, seed=9)

    def read() -> Iterator[Float]:
        start = 0
        for size in [*sizes, len(table)]:
            if start < len(table):
                yield table[start : start + size]
                start += size

    weight = Weight("t", F32, table.shape, read)
    for found, expected in zip(table_weights(weight), round_matrix(table), strict=True):
        assert np.array_equal(found.array(), np.asarray(expected))


def test_parts_of_a_matrix_have_a_scale_each_as_if_they_were_apart() -> None:
    parts = [gaussian(rows, 16, seed=rows) * size for rows, size in ((4, 1), (6, 30), (2, 0.1))]
    whole = np.concatenate(parts)
    weight = Weight("w", F32, whole.shape, lambda: iter((whole,)), (4, 6, 2))
    codes, scales, zeros = (one.array() for one in matrix_weights(weight))
    start = 0
    for part in parts:
        expected, scale, zero = round_matrix(np.asarray(part, np.float32))
        end = start + len(part)
        assert np.array_equal(codes[:, start:end].T, expected)
        assert np.all(scales[start:end] == scale)
        assert np.all(zeros[start:end] == zero)
        start = end


@pytest.mark.parametrize("name", NAMES)
def test_every_table_of_the_checkpoint_is_in_8_bits(name: str) -> None:
    graph = apply(reference_of(FIXTURES / name), UnsignedTable())
    tables = [node for node in graph.nodes if node.op == "Gather" and node.inputs[0].endswith(".weight.u8")]
    assert len(tables) == (3 if name.startswith("bert") else 1)
    assert not any(weight.name.endswith("embeddings.weight") for weight in graph.weights.values())
    assert all(n.op != LOOKUP for n in graph.nodes)
    behind = {node.inputs[0] for node in graph.nodes if node.op == "DequantizeLinear"}
    assert behind == {node.outputs[0] for node in tables}
