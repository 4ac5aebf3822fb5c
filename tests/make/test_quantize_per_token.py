"""W8A8 with an activation scale a token, held against the same arithmetic in plain loops."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from featherbed.make.checkpoint import open_checkpoint
from featherbed.make.graph import reference_graph
from featherbed.make.graph.lower import lower
from featherbed.make.ir import LINEAR, OURS, Graph, Node, Port, constant
from featherbed.make.quantize import apply
from featherbed.make.quantize.columns import column_weights, round_columns
from featherbed.make.write import write_graph
from featherbed.recipe import DynamicLinear, PerTokenLinear, Step
from featherbed.spec import read_spec
from tests.conftest import FIXTURES, NAMES

Float = npt.NDArray[np.float32]
F32 = np.dtype(np.float32)
EPSILON = float(np.finfo(np.float32).eps)


def linears(*matrices: Float) -> Graph:
    """x [n, K] → y0, y1, … [n, N], one for each matrix [N, K]; all read the same x."""
    names = [f"w{at}" for at in range(len(matrices))]
    return Graph(
        "linears",
        21,
        tuple(Node(LINEAR, ("x", name), (f"y{at}",), OURS) for at, name in enumerate(names)),
        {name: constant(name, matrix, F32) for name, matrix in zip(names, matrices, strict=True)},
        (Port("x", F32, ("n", matrices[0].shape[1])),),
        tuple(Port(f"y{at}", F32, ("n", matrix.shape[0])) for at, matrix in enumerate(matrices)),
    )


def runner(folder: Path, step: Step, *matrices: Float) -> Any:
    """A session of ``linears`` after ``step``, as it is written to a file."""
    write_graph(lower(apply(linears(*matrices), step)), folder / "model.onnx", {})
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def run(session: Any, x: Float) -> Float:
    return np.asarray(session.run(["y0"], {"x": x})[0])


def gaussian(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tame(outputs: int, width: int, seed: int) -> Float:
    """Weights [N, K] whose products with neighbouring u8 codes never pass 2^15.

    CPUs without VNNI add such pairs in 16 bits and saturate; here every CPU is exact.
    """
    matrix = np.clip(gaussian(outputs, width, seed=seed) / 6, -0.49, 0.49)
    matrix[:, :2] = 0
    matrix[:, 0] = np.where(np.arange(outputs) % 2, -1, 1)  # the peak of each row, with a zero beside it
    return matrix.astype(np.float32)


def plain_columns(matrix: Float) -> tuple[list[list[int]], list[float]]:
    """codes [N][K] and scales [N], one weight at a time."""
    codes, scales = [], []
    for row in matrix:
        peak = max(abs(float(value)) for value in row)
        scale = np.float32(peak) / np.float32(127) if peak else np.float32(1)
        scales.append(float(scale))
        codes.append([round(float(value / scale)) for value in row])  # half to even
    return codes, scales


def plain_linear(x: Float, matrix: Float) -> npt.NDArray[np.float64]:
    """x [n, K] times matrixᵀ in 8 bits by 8 bits, one product at a time."""
    codes, scales = plain_columns(matrix)
    result = np.zeros((len(x), len(matrix)))
    for n, row in enumerate(x):
        peak = max(abs(float(value)) for value in row)
        step = np.float32(max(peak, 1e-30)) * np.float32(1 / 127)
        rounded = [min(max(round(float(value / step)), -128), 127) for value in row]
        for m, (column, scale) in enumerate(zip(codes, scales, strict=True)):
            total = sum(a * b for a, b in zip(rounded, column, strict=True))
            result[n, m] = total * scale * float(step)
    return result


def bound(x: Float, matrix: Float) -> npt.NDArray[np.float64]:
    """The most that rounding x and the matrix to half a step each can move a product [n, N]."""
    steps = np.abs(x).max(axis=1, keepdims=True).astype(np.float64) / 127  # [n, 1]
    scales = np.abs(matrix).max(axis=1, keepdims=True).astype(np.float64) / 127  # [N, 1]
    by_weight = np.abs(x).astype(np.float64).sum(axis=1, keepdims=True) @ (scales.T / 2)
    by_input = (steps / 2) @ np.abs(matrix).astype(np.float64).sum(axis=1, keepdims=True).T
    return np.asarray((by_weight + by_input + x.shape[1] * (steps / 2) @ (scales.T / 2)) * (1 + 1e-4))


@pytest.mark.parametrize(("tokens", "width", "outputs"), [(1, 1, 1), (1, 48, 5), (9, 33, 7), (5, 130, 64)])
def test_the_product_is_the_one_of_plain_loops(tmp_path: Path, tokens: int, width: int, outputs: int) -> None:
    x, matrix = gaussian(tokens, width, seed=1) * 3, tame(outputs, width, seed=2)
    found, plain = run(runner(tmp_path, PerTokenLinear(), matrix), x), plain_linear(x, matrix)
    assert found.dtype == np.float32
    # the integers are exact; what is left are three roundings of the scales
    assert np.all(np.abs(found - plain) <= 4 * EPSILON * np.abs(plain))


@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_the_error_to_the_float_product_stays_within_half_a_step_of_each_side(tmp_path: Path, tokens: int) -> None:
    x, matrix = gaussian(tokens, 96, seed=3), tame(24, 96, seed=4)
    x[0] *= 100
    x[:, 5] *= 30  # an outlier channel
    found = run(runner(tmp_path, PerTokenLinear(), matrix), x)
    exact = x.astype(np.float64) @ matrix.astype(np.float64).T
    assert np.all(np.abs(found - exact) <= bound(x, matrix))


def test_a_row_of_zeros_gives_zeros(tmp_path: Path) -> None:
    x, matrix = gaussian(4, 32), tame(8, 32, seed=5)
    x[1] = 0
    x[2] = -0.0
    found = run(runner(tmp_path, PerTokenLinear(), matrix), x)
    assert np.array_equal(found[1:3], np.zeros((2, 8), np.float32))
    assert np.all(np.abs(found[[0, 3]]).max(axis=1) > 0)


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-33, 1e-30, 1e30])
def test_rows_of_extreme_size_stay_finite(tmp_path: Path, size: float) -> None:
    x, matrix = gaussian(2, 32), tame(8, 32, seed=5)
    x[0] *= np.float32(size)
    found = run(runner(tmp_path, PerTokenLinear(), matrix), x)
    exact = x.astype(np.float64) @ matrix.astype(np.float64).T
    floor = 1e-30 / 127 * np.abs(matrix).sum(axis=1)  # below the least step a row is zeros
    assert np.all(np.isfinite(found))
    assert np.all(np.abs(found - exact) <= bound(x, matrix) + floor)


def test_a_weight_row_of_zeros_gives_zeros(tmp_path: Path) -> None:
    x, matrix = gaussian(4, 32), tame(8, 32, seed=5)
    matrix[3] = 0
    found = run(runner(tmp_path, PerTokenLinear(), matrix), x)
    assert not found[:, 3].any()
    assert found[:, 2].all()


@pytest.mark.parametrize("factor", [0.0, 1e-3, 1e3, 1e6])
def test_an_outlier_row_keeps_its_scale_to_itself(tmp_path: Path, factor: float) -> None:
    session = runner(tmp_path, PerTokenLinear(), tame(16, 64, seed=6))
    x = gaussian(12, 64, seed=7)
    before = run(session, x)
    x[3] *= np.float32(factor)
    after = run(session, x)
    others = np.arange(12) != 3
    assert np.array_equal(before[others], after[others])
    assert not np.array_equal(before[3], after[3])


def test_a_planted_outlier_row_does_move_the_others_under_a_scale_a_tensor(tmp_path: Path) -> None:
    session = runner(tmp_path, DynamicLinear(), tame(16, 64, seed=6))
    x = gaussian(12, 64, seed=7)
    before = run(session, x)
    x[3] *= np.float32(1e3)
    after = run(session, x)
    others = np.arange(12) != 3
    assert np.all(np.abs(before[others] - after[others]).max(axis=1) > 0.01)


def test_a_row_alone_is_bit_for_bit_the_row_in_company(tmp_path: Path) -> None:
    session = runner(tmp_path, PerTokenLinear(), tame(48, 72, seed=8))
    x = gaussian(37, 72, seed=9)
    together = run(session, x)
    for at in range(len(x)):
        assert np.array_equal(run(session, x[at : at + 1])[0], together[at])


def test_a_graph_of_layers_that_read_the_same_input_rounds_it_once(tmp_path: Path) -> None:
    matrices = [tame(rows, 32, seed=rows) for rows in (4, 8, 12)]
    graph = apply(linears(*matrices), PerTokenLinear())
    ops = Counter(node.op for node in graph.nodes)
    assert ops["QuantizeLinear"] == ops["ReduceMax"] == ops["ReduceMin"] == 1
    assert ops["MatMulIntegerToFloat"] == 3
    x = gaussian(5, 32, seed=1)
    shared = runner(tmp_path, PerTokenLinear(), *matrices).run(None, {"x": x})
    for matrix, found in zip(matrices, shared, strict=True):
        assert np.array_equal(found, run(runner(tmp_path, PerTokenLinear(), matrix), x))


@pytest.mark.parametrize("name", NAMES)
def test_query_key_and_value_share_one_rounding_of_their_input(name: str) -> None:
    graph = reference_graph(open_checkpoint(FIXTURES / name), read_spec(FIXTURES / name))
    inputs = {node.inputs[0] for node in graph.nodes if (node.domain, node.op) == (OURS, LINEAR)}
    layers = open_checkpoint(FIXTURES / name).config["num_hidden_layers"]
    stepped = apply(graph, PerTokenLinear())
    ops = Counter(node.op for node in stepped.nodes)
    assert len(inputs) == 4 * layers  # before q, k, v; before o; before gate and up; before down
    assert ops["QuantizeLinear"] == 4 * layers
    assert ops["MatMulIntegerToFloat"] == len(graph.linear_names())
    assert stepped.linear_names() == ()
    quantized = [node for node in stepped.nodes if node.op == "QuantizeLinear"]
    assert all(dict(node.attributes)["axis"] == 0 for node in quantized)
    assert len({node.inputs[0] for node in quantized}) == len(quantized)


# the weights


def reasonable(dtype: type[np.float32] = np.float32) -> st.SearchStrategy[Float]:
    values = st.floats(-1e4, 1e4, width=32).map(lambda v: v if abs(v) > 1e-20 else 0.0)
    return arrays(dtype, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=values)


@given(matrix=reasonable())
@example(matrix=np.zeros((2, 3), np.float32))
@example(matrix=np.array([[127, 0.5, 1.5, -0.5, -1.5, 126.5, -126.5]], np.float32))  # ties
@example(matrix=np.array([[-127, 0.5, 2.5]], np.float32))
def test_rounding_a_weight_moves_it_by_half_a_step_at_most(matrix: Float) -> None:
    codes, scales = round_columns(matrix, 127)
    assert codes.dtype == np.int8
    assert scales.dtype == np.float32
    assert codes.min() >= -127
    error = np.abs(codes.astype(np.float64) * scales[:, None] - matrix)
    # beyond the half step: one rounding of value / scale, of at most 127
    assert np.all(error <= scales[:, None].astype(np.float64) * (0.5 + 127 * EPSILON))


@given(matrix=reasonable())
@example(matrix=np.array([[127, 0.5, 1.5, -0.5, -1.5, 126.5, -126.5]], np.float32))
def test_codes_and_scales_are_the_ones_of_plain_loops(matrix: Float) -> None:
    codes, scales = round_columns(matrix, 127)
    plain_codes, plain_scales = plain_columns(matrix)
    assert codes.tolist() == plain_codes
    assert scales.tolist() == plain_scales


@pytest.mark.parametrize("size", [1e-45, 4e-45, 2.4e-43, 1e-40, 1e-38])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_row_too_small_for_a_normal_scale_is_rounded_quietly(size: float, sign: int) -> None:
    matrix = np.array([[sign * size, 0, size / 2], [1, 2, 3]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        codes, scales = round_columns(matrix, 127)
    assert np.all(np.isfinite(scales))
    assert codes[0, 0] * sign >= 0
    error = np.abs(codes.astype(np.float64) * scales[:, None] - matrix)
    assert np.all(error[0] <= max(size / 127, 1e-36))
    assert np.all(error[1] <= 3 / 127)


def test_seven_bits_leave_room_for_cpus_that_saturate() -> None:
    codes, scales = round_columns(gaussian(6, 40), 63)
    assert np.abs(codes).max(axis=1).tolist() == [63] * 6
    small, of_small = column_weights(constant("w", gaussian(6, 40), F32), 7)
    assert np.array_equal(small.array(), codes.T)
    assert np.array_equal(of_small.array(), scales)


def test_weights_are_written_as_the_integer_product_reads_them() -> None:
    matrix = gaussian(5, 12)
    codes, scales = column_weights(constant("w", matrix, F32), 8)
    assert codes.dtype == np.int8
    assert codes.shape == (12, 5)
    assert scales.dtype == np.float32
    assert scales.shape == (5,)
    assert codes.array().flags.c_contiguous
    expected, by_row = round_columns(matrix, 127)
    for _ in range(2):  # the rounding is kept for the scales and then forgotten: again must give the same
        assert np.array_equal(codes.array(), expected.T)
        assert np.array_equal(scales.array(), by_row)
    assert np.array_equal(scales.array(), by_row)
