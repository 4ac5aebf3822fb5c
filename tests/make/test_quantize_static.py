"""int8-static against onnxruntime's quantize_static, and its ranges against onnxruntime's calibrators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
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
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import HistogramCollector, MinMaxCalibrater

from featherbed.make.calibrate.ranges import BINS, CODES, by_entropy, by_percentile, ranges, span
from featherbed.make.calibrate.texts import Calibration
from featherbed.make.graph.lower import lower
from featherbed.make.ir import LINEAR, OURS, Graph, Node, Port, constant
from featherbed.make.quantize.static import apply, round_layer
from featherbed.make.quantize.unsigned import grid
from featherbed.make.write import write_graph
from featherbed.run.batches import Batch
from featherbed.spec import Pooling, read_spec
from featherbed.steps import Range, StaticLinear
from tests.conftest import FIXTURES, NAMES, made_by, ran, reference_of, texts_for, upstream

Float = npt.NDArray[np.float32]
F32 = np.dtype(np.float32)
EPSILON = float(np.finfo(np.float32).eps)


def gaussian(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Rows(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Parts of one input, for onnxruntime's calibrators."""

    def __init__(self, parts: list[Float]) -> None:
        self._left = iter(parts)

    def get_next(self) -> dict[str, Float] | None:
        part = next(self._left, None)
        return None if part is None else {"x": part}


def float_model(path: Path, matrix: Float, bias: Float) -> Path:
    rows, width = matrix.shape
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", rows])],
        [numpy_helper.from_array(np.ascontiguousarray(matrix.T), "w"), numpy_helper.from_array(bias, "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    return path


def theirs(folder: Path, matrix: Float, bias: Float, parts: list[Float]) -> Path:
    quantize_static(
        float_model(folder / "float.onnx", matrix, bias),
        folder / "theirs.onnx",
        Rows(parts),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
    )
    return folder / "theirs.onnx"


def ours(folder: Path, matrix: Float, bias: Float | None, parts: list[Float]) -> Path:
    rows, width = matrix.shape
    nodes = [Node(LINEAR, ("x", "w"), ("y" if bias is None else "m",), OURS)]
    weights = {"w": constant("w", matrix, F32)}
    if bias is not None:
        nodes.append(Node("Add", ("m", "b"), ("y",)))
        weights["b"] = constant("b", bias, F32)
    ports = (Port("x", F32, ("n", width)),), (Port("y", F32, ("n", rows)),)
    graph = Graph("layer", 21, tuple(nodes), weights, *ports)
    step = StaticLinear(activations=Range.MIN_MAX)
    write_graph(lower(apply(graph, step, {"w": span(parts, step)})), folder / "ours.onnx", {})
    return folder / "ours.onnx"


def constants(path: Path) -> dict[str, npt.NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}


def session(path: Path, optimized: Path | None = None) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def layers() -> dict[str, tuple[Float, Float]]:
    zero_row = gaussian(6, 32, seed=4)
    zero_row[2] = 0
    return {
        "gaussian": (gaussian(24, 64, seed=1), gaussian(24, seed=11)),
        "odd width": (gaussian(5, 33, seed=2), gaussian(5, seed=12)),
        "rows of many sizes": (
            gaussian(12, 40, seed=5) * np.logspace(-4, 3, 12, dtype=np.float32)[:, None],
            gaussian(12, seed=13),
        ),
        "biases too large for their steps": (
            gaussian(4, 16, seed=6) * np.array([[1], [1e-7], [1e-9], [1]], np.float32),
            np.array([3, 30, 3000, 0], np.float32),
        ),
        "a row of zeros": (zero_row, np.array([1, 2, 0, 3, 4, 5], np.float32)),
    }


@pytest.mark.parametrize("name", list(layers()))
def test_codes_scales_and_biases_are_those_of_quantize_static(tmp_path: Path, name: str) -> None:
    matrix, bias = layers()[name]
    parts = [gaussian(9, matrix.shape[1], seed=20) + 1, gaussian(4, matrix.shape[1], seed=21) * 3]
    expected, found = (constants(make(tmp_path, matrix, bias, parts)) for make in (theirs, ours))
    assert (found["x.scale"], found["x.zero"]) == (expected["x_scale"], expected["x_zero_point"])
    assert np.array_equal(found["w.s8"], expected["w_quantized"])
    assert not expected["w_zero_point"].any()
    assert not found["w.zeros"].any()
    # their float32 arithmetic of too large biases goes another way: the last digit may differ
    exact = name != "biases too large for their steps"
    np.testing.assert_allclose(found["w.scales"], expected["w_scale"].ravel(), rtol=0 if exact else 4 * EPSILON)
    steps = expected["b_quantized_scale"].ravel()
    np.testing.assert_allclose(found["b.scales"], steps, rtol=0 if exact else 4 * EPSILON)
    close = np.abs(found["b.s32"].astype(np.int64) - expected["b_quantized"].astype(np.int64))
    assert close.max() <= (0 if exact else 2**10)  # of 2^31


@pytest.mark.parametrize("biased", [True, False], ids=["biased", "plain"])
def test_onnxruntime_multiplies_in_integers_and_gives_what_quantize_static_gives(tmp_path: Path, biased: bool) -> None:
    matrix, bias = layers()["gaussian"]
    parts = [gaussian(40, 64, seed=20)]
    bias = bias if biased else np.zeros_like(bias)
    expected = session(theirs(tmp_path, matrix, bias, parts)).run(None, {"x": parts[0]})[0]
    path = ours(tmp_path, matrix, bias if biased else None, parts)
    found = session(path, tmp_path / "fused.onnx").run(None, {"x": parts[0]})[0]
    assert np.abs(found - expected).max() < 1e-5
    operators = Counter(node.op_type for node in onnx.load(str(tmp_path / "fused.onnx")).graph.node)
    assert operators == {"QuantizeLinear": 1, "QGemm" if biased else "MatMulIntegerToFloat": 1}


def plain(x: Float, matrix: Float, bias: Float, low: float, high: float) -> list[list[float]]:
    """The layer, one number at a time."""
    scale, zero = grid(low, high)
    rows = []
    for row in x:
        codes = [min(max(round(float(v / scale)) + int(zero), 0), 255) - int(zero) for v in row]
        line = []
        for weights, b in zip(matrix, bias, strict=True):
            step = np.float32(max(abs(float(w)) for w in weights)) / np.float32(127)
            total = sum(c * round(float(w / step)) for c, w in zip(codes, weights, strict=True))
            line.append((total + round(float(b) / float(scale * step))) * float(scale * step))
        rows.append(line)
    return rows


def test_a_layer_is_what_plain_loops_say_and_what_is_beyond_the_range_is_clipped(tmp_path: Path) -> None:
    matrix, bias, x = gaussian(7, 18, seed=1), gaussian(7, seed=2), gaussian(5, 18, seed=3)
    found = session(ours(tmp_path, matrix, bias, [x])).run(None, {"x": 2 * x})[0]
    expected = plain(2 * x, matrix, bias, float(x.min()), float(x.max()))
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found, 2 * x @ matrix.T + bias, atol=0.5)


@given(st.integers(0, 2**32 - 1))
def test_a_bias_is_held_to_a_step_whatever_its_size(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = (random.standard_normal((3, 8)) * 10.0 ** random.uniform(-12, 3, (3, 1))).astype(np.float32)
    rows[0] *= seed % 3 > 0
    bias = (random.standard_normal(3) * 10.0 ** random.uniform(-3, 3, 3)).astype(np.float32)
    codes, scales, held, steps = round_layer(rows, bias, np.float32(0.02), 127)
    assert np.all(np.abs(held * steps.astype(np.float64) - bias) <= 0.5001 * steps + 1e-6 * np.abs(bias))
    assert np.all(np.abs(codes * scales[:, None] - rows) <= 0.5001 * scales[:, None])


# ranges


def spread(seed: int) -> list[Float]:
    """Parts with outliers, not the same on both sides."""
    parts = [gaussian(50, 40, seed=seed + at) + np.float32(0.2) for at in range(3)]
    parts[1][0, 0], parts[2][3, 3] = 21, -9
    return parts


def test_least_and_largest_are_onnxruntimes(tmp_path: Path) -> None:
    parts = spread(1)
    model = float_model(tmp_path / "float.onnx", gaussian(3, 40), gaussian(3))
    calibrator = MinMaxCalibrater(model, augmented_model_path=str(tmp_path / "more.onnx"))
    calibrator.augment_graph()
    calibrator.create_inference_session()
    calibrator.collect_data(Rows(parts))
    low, high = calibrator.compute_data()["x"].range_value
    assert span(parts, StaticLinear(activations=Range.MIN_MAX)) == (low.item(), high.item()) == (-9.0, 21.0)


@pytest.mark.parametrize("percentile", [99.999, 99.9, 99.0])
def test_percentiles_are_those_of_onnxruntimes_histogram(percentile: float) -> None:
    for seed in range(5):
        parts = spread(seed)
        theirs = HistogramCollector("percentile", False, BINS, CODES, percentile, "same")
        theirs.collect({"x": parts})
        low, high = theirs.compute_collection_result()["x"][:2]
        found = span(parts, StaticLinear(activations=Range.PERCENTILE, percentile=percentile))
        np.testing.assert_allclose(found, (float(low), float(high)), rtol=1e-6)
        values = np.concatenate(parts).ravel()
        cut, one, step = (100 - percentile) / 200, 1 / values.size, 2 * 21 / BINS
        low, high = found
        for edge, share in ((low, cut), (high, 1 - cut)):  # in whose bin the share is reached
            assert np.mean(values < edge) <= share + one
            assert np.mean(values < edge + step) >= share - one


def test_entropy_is_that_of_onnxruntimes_histogram() -> None:
    for seed in range(3):
        parts = spread(seed)
        theirs = HistogramCollector("entropy", False, 512, CODES, 0, "same")
        theirs.collect({"x": parts})
        low, high = theirs.compute_collection_result()["x"][:2]
        most = 21.0
        counts = sum(np.histogram(part, 512, range=(-most, most))[0] for part in parts)
        edges = np.linspace(-most, most, 513)
        found = by_entropy(np.asarray(counts, np.int64), edges)
        assert np.allclose((max(found[0], -9), min(found[1], 21)), (low, high), atol=1e-5)
        assert found[1] < most  # the outlier is given up


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=60), st.integers(1, 7))
def test_a_range_does_not_depend_on_how_values_are_cut_and_lies_within_them(values: list[float], cut: int) -> None:
    whole = np.asarray(values, np.float32)[:, None]
    for method in (Range.MIN_MAX, Range.PERCENTILE):
        step = StaticLinear(activations=method, percentile=90.0)
        low, high = span([whole], step)
        assert span(list(np.array_split(whole, cut)), step) == (low, high)
        assert whole.min() <= low <= high <= whole.max() or low == high


def test_of_evenly_filled_bins_a_percentile_cuts_as_many_on_either_side() -> None:
    edges = np.linspace(-1, 1, 101)
    low, high = by_percentile(np.full(100, 10, np.int64), edges, 89.0)  # 5.5 bins go on either side
    assert np.allclose((low, high), (-0.9, 0.88))  # the lower edges of the bins in which it is reached


def padded(name: str) -> Calibration:
    """The calibration's batches with padding of another token behind them."""
    whole = texts_for(FIXTURES / name)

    def wider() -> Iterator[Batch]:
        for batch in whole.batches:
            more = ((0, 0), (0, 3))
            ids = np.pad(batch.ids, more, constant_values=7)
            yield replace(batch, ids=ids, mask=np.pad(batch.mask, more))

    return Calibration(whole.probe, tuple(wider()), whole.pooling)


@pytest.mark.parametrize("name", NAMES)
def test_ranges_are_of_real_tokens_and_of_every_layer(name: str) -> None:
    graph, step = reference_of(FIXTURES / name), StaticLinear()
    found = ranges(graph, step, texts_for(FIXTURES / name))
    assert found.keys() == set(graph.linear_names())
    for weight, (low, high) in ranges(graph, step, padded(name)).items():
        assert (low, high) == pytest.approx(found[weight], abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_both_outputs_agree_and_a_text_is_the_same_in_any_company(name: str) -> None:
    graph, known = made_by(name, "int8-static"), upstream(name)
    hidden, vectors = ran(graph, known.ids, known.mask)
    for at in range(len(known.ids)):
        alone = ran(graph, known.ids[at : at + 1], known.mask[at : at + 1])[1]
        assert np.abs(alone - vectors[at]).max() < 1e-5
    if read_spec(FIXTURES / name).pooling is Pooling.CLS:
        first = hidden[np.arange(len(hidden)), known.mask.argmax(axis=1)]
        assert np.allclose(first / np.linalg.norm(first, axis=1, keepdims=True), vectors, atol=1e-6)
    assert (np.sum(vectors * known.unit, axis=1)).min() > 0.99
    assert not any(node.domain == "featherbed" for node in graph.nodes)
