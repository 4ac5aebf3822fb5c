"""int8-dynamic against what onnxruntime's own quantize_dynamic makes of the same layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from featherbed.make.checkpoint import open_checkpoint
from featherbed.make.graph import reference_graph
from featherbed.make.graph.lower import lower
from featherbed.make.ir import LINEAR, OURS, Graph, Node, Port, constant
from featherbed.make.quantize import apply
from featherbed.make.write import write_graph
from featherbed.recipe import DynamicLinear
from featherbed.spec import read_spec
from tests.conftest import FIXTURES, NAMES

Float = npt.NDArray[np.float32]
F32 = np.dtype(np.float32)
EPSILON = float(np.finfo(np.float32).eps)


def gaussian(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tame(outputs: int, width: int, seed: int) -> Float:
    """Weights [N, K] whose products with neighbouring u8 codes never pass 2^15, where CPUs without VNNI saturate."""
    matrix = np.clip(gaussian(outputs, width, seed=seed) / 6, -0.49, 0.49)
    matrix[:, :2] = 0
    matrix[:, 0] = np.where(np.arange(outputs) % 2, -1, 1)
    return matrix.astype(np.float32)


def linear(matrix: Float) -> Graph:
    """x [n, K] → y [n, N] for a matrix [N, K]."""
    outputs, width = matrix.shape
    return Graph(
        "linear",
        21,
        (Node(LINEAR, ("x", "w"), ("y",), OURS),),
        {"w": constant("w", matrix, F32)},
        (Port("x", F32, ("n", width)),),
        (Port("y", F32, ("n", outputs)),),
    )


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def theirs(folder: Path, matrix: Float) -> Path:
    """The same layer as a MatMul, through onnxruntime's quantizer."""
    outputs, width = matrix.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", outputs])],
        [numpy_helper.from_array(np.ascontiguousarray(matrix.T), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(folder / "float.onnx"))
    quantize_dynamic(folder / "float.onnx", folder / "theirs.onnx", per_channel=True, weight_type=QuantType.QInt8)
    return folder / "theirs.onnx"


def ours(folder: Path, matrix: Float) -> Path:
    write_graph(lower(apply(linear(matrix), DynamicLinear())), folder / "ours.onnx", {})
    return folder / "ours.onnx"


def constants(path: Path) -> dict[str, npt.NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}


def matrices() -> dict[str, Float]:
    zero_row = tame(6, 32, seed=4)
    zero_row[2] = 0
    ties = np.tile(np.array([127, 0, 0.5, 1.5, 2.5, -0.5, -1.5, 62.5], np.float32), (3, 2))
    uneven = tame(12, 40, seed=5) * np.logspace(-4, 3, 12, dtype=np.float32)[:, None]
    return {
        "gaussian": gaussian(24, 64, seed=1),
        "odd width": tame(5, 33, seed=2),
        "one output": tame(1, 16, seed=3),
        "a row of zeros": zero_row,
        "ties": ties,
        "rows of many sizes": uneven,
    }


@pytest.mark.parametrize("name", list(matrices()))
def test_codes_and_scales_are_those_of_quantize_dynamic(tmp_path: Path, name: str) -> None:
    matrix = matrices()[name]
    expected, found = constants(theirs(tmp_path, matrix)), constants(ours(tmp_path, matrix))
    assert found["w.s8"].dtype == expected["w_quantized"].dtype == np.int8
    assert np.array_equal(found["w.s8"], expected["w_quantized"])
    assert not expected["w_zero_point"].any()
    scales = expected["w_scale"].ravel()
    live = np.abs(matrix).max(axis=1) > 0  # a row of zeros may have any scale
    assert np.array_equal(found["w.scales"][live], scales[live])


@pytest.mark.parametrize("name", [name for name in matrices() if name != "gaussian"])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_outputs_are_those_of_quantize_dynamic(tmp_path: Path, name: str, tokens: int) -> None:
    matrix = matrices()[name]
    x = gaussian(tokens, matrix.shape[1], seed=tokens) + np.float32(0.3)
    expected = session(theirs(tmp_path, matrix)).run(None, {"x": x})[0]
    found = session(ours(tmp_path, matrix)).run(None, {"x": x})[0]
    # the same integers; a_scale · b_scale may be multiplied in another order
    assert np.all(np.abs(found - expected) <= 2 * EPSILON * np.abs(expected))


def plain(x: Float, matrix: Float) -> npt.NDArray[np.float64]:
    """DynamicQuantizeLinear and an integer product, one number at a time."""
    high, low = max(0.0, float(x.max())), min(0.0, float(x.min()))
    step = np.float32(np.float32(high) - np.float32(low)) / np.float32(255)
    zero = min(max(round(float(np.float32(0 - np.float32(low)) / step)), 0), 255)
    codes = [[min(max(round(float(value / step)) + zero, 0), 255) for value in row] for row in x]
    result = np.zeros((len(x), len(matrix)))
    for m, row in enumerate(matrix):
        scale = np.float32(max(abs(float(value)) for value in row)) / np.float32(127)
        column = [round(float(value / scale)) for value in row]
        for n, code in enumerate(codes):
            total = sum((u - zero) * s for u, s in zip(code, column, strict=True))
            result[n, m] = total * float(step) * float(scale)
    return result


@pytest.mark.parametrize("shift", [-2.0, 0.0, 2.0, 9.0])
def test_the_product_is_the_one_of_plain_loops(tmp_path: Path, shift: float) -> None:
    x, matrix = gaussian(7, 36, seed=8) + np.float32(shift), tame(9, 36, seed=9)
    found, expected = session(ours(tmp_path, matrix)).run(None, {"x": x})[0], plain(x, matrix)
    assert np.all(np.abs(found - expected) <= 4 * EPSILON * np.abs(expected))


def test_a_batch_of_zeros_gives_zeros(tmp_path: Path) -> None:
    opened = session(ours(tmp_path, tame(4, 16, seed=1)))
    assert not opened.run(None, {"x": np.zeros((3, 16), np.float32)})[0].any()
    assert opened.run(None, {"x": np.ones((3, 16), np.float32)})[0].any()


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_read_the_same_input_share_its_scale(name: str) -> None:
    checkpoint = open_checkpoint(FIXTURES / name)
    graph = apply(reference_graph(checkpoint, read_spec(FIXTURES / name)), DynamicLinear())
    ops = [node.op for node in graph.nodes]
    layers, again = checkpoint.config["num_hidden_layers"], name != "bert-mean"  # the last tail, for the pooled token
    assert ops.count("DynamicQuantizeLinear") == 4 * layers + 3 * again
    assert "QuantizeLinear" not in ops
    assert graph.linear_names() == ()
