"""W8A8 with an activation scale a token, held against the same arithmetic in plain loops."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
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
from featherbed.make.quantize import apply, per_token
from featherbed.make.quantize.columns import column_weights, round_columns
from featherbed.make.quantize.per_token import GELU_ZERO
from featherbed.make.write import write_graph
from featherbed.recipe import DynamicLinear, LinearStep, PerTokenLinear
from featherbed.spec import read_spec
from tests.conftest import FIXTURES, NAMES, upstream

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


def runner(folder: Path, step: LinearStep, *matrices: Float) -> Any:
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
    again = 3 * (name != "bert-mean")  # the last tail a second time, for the pooled token
    stepped = apply(graph, PerTokenLinear())
    ops = Counter(node.op for node in stepped.nodes)
    assert len(inputs) == 4 * layers + again  # before q, k, v; before o; before gate and up; before down
    assert ops["QuantizeLinear"] == 4 * layers + again
    assert ops["MatMulIntegerToFloat"] == len(graph.linear_names())
    assert stepped.linear_names() == ()
    quantized = [node for node in stepped.nodes if node.op == "QuantizeLinear"]
    assert all(dict(node.attributes)["axis"] == 0 for node in quantized)
    assert len({node.inputs[0] for node in quantized}) == len(quantized)


# graphs of more than one layer


WIDTH, HEADS = 48, (-1, 3, 16)
GAIN = np.linspace(1, 2, HEADS[-1])
EPSILON_NORM = 1e-6
NORM_NODE = Node(
    "SimplifiedLayerNormalization",
    ("b", "gain"),
    ("c",),
    "",
    (("axis", -1), ("epsilon", EPSILON_NORM), ("stash_type", 1)),
)


def chain(nodes: tuple[Node, ...], *matrices: Float, rank: int = 2) -> Graph:
    """x [n, K] through ``nodes``, which read w0, w1, … and end in y."""
    weights = {f"w{at}": constant(f"w{at}", matrix, F32) for at, matrix in enumerate(matrices)}
    weights |= {"gain": constant("gain", GAIN, F32), "heads": constant("heads", HEADS, np.int64)}
    ports = (Port("x", F32, ("n", WIDTH)),), (Port("y", F32, ("n", "h", "m")[:rank]),)
    return Graph("chain", 21, (), {}, *ports).replaced(list(nodes), weights)


def linear_node(x: str, weight: str, out: str) -> Node:
    return Node(LINEAR, (x, weight), (out,), OURS)


# rows behind a GELU, whose range is read once


def behind_gelu(matrix: Float) -> Graph:
    nodes = (Node("Gelu", ("x",), ("a",)), linear_node("a", "w0", "y"))
    return apply(chain(nodes, matrix), PerTokenLinear())


def test_the_least_value_of_a_gelu_is_not_looked_for() -> None:
    ops = Counter(node.op for node in behind_gelu(tame(8, WIDTH, seed=1)).nodes)
    assert (ops["ReduceMax"], ops["ReduceMin"]) == (1, 0)
    plain = apply(chain((linear_node("x", "w0", "y"),), tame(8, WIDTH, seed=1)), PerTokenLinear())
    assert Counter(node.op for node in plain.nodes)["ReduceMin"] == 1


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
def test_codes_behind_a_gelu_have_their_zero_at_20_and_reach_down_to_its_least_value(
    tmp_path: Path, size: float, shift: float
) -> None:
    graph = behind_gelu(tame(8, WIDTH, seed=1))
    product = next(node for node in graph.nodes if node.op == "MatMulIntegerToFloat")
    assert graph.weights[product.inputs[4]].array().tolist() == [GELU_ZERO] == [20]
    seen = replace(graph, outputs=(Port("a.u8", np.dtype(np.uint8), ("n", WIDTH)), Port("a", F32, ("n", WIDTH))))
    x = (gaussian(12, WIDTH, seed=2) + np.float32(shift)) * np.float32(size)
    x[:, 0] = -0.7517916  # where GELU is least
    write_graph(lower(seen), tmp_path / "model.onnx", {})
    session: Any = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    codes, values = session.run(["a.u8", "a"], {"x": x})
    for row, of_row in zip(values.tolist(), codes.tolist(), strict=True):
        step = max(*row, 0.17 / 20 * 235) / 235
        for value, code in zip(row, of_row, strict=True):
            assert 0 <= value / step + 20 <= 255 + 1e-4  # nothing is clipped
            assert abs(code - 20 - value / step) <= 0.5 + 1e-4


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
def test_a_product_behind_a_gelu_errs_by_half_a_step_of_its_row_and_of_the_least_range(
    tmp_path: Path, size: float, shift: float
) -> None:
    matrix = tame(24, WIDTH, seed=1)
    x = (gaussian(12, WIDTH, seed=2) + np.float32(shift)) * np.float32(size)
    x[0] = -0.7517916  # where GELU is least: every code of this row is the lowest
    exact = np.array([[v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in row] for row in x.tolist()])
    steps = np.maximum(exact.max(axis=1, keepdims=True) / (255 - GELU_ZERO), 0.17 / GELU_ZERO)  # 20 codes below zero
    scales = np.abs(matrix).max(axis=1, keepdims=True).astype(np.float64) / 127
    limit = steps / 2 @ np.abs(matrix).sum(axis=1, keepdims=True).T
    limit += (np.abs(exact).sum(axis=1, keepdims=True) + WIDTH * steps / 2) @ scales.T / 2
    found = outputs_of(behind_gelu(matrix), tmp_path, x)
    assert np.all(np.abs(found - exact @ matrix.T.astype(np.float64)) <= limit * 1.01)


# row scales that are left out


CHAINS = {  # every way past a row scale there is
    "a layer": (linear_node("x", "w0", "a"), linear_node("a", "w1", "y")),
    "three layers": (linear_node("x", "w0", "a"), linear_node("a", "w2", "b"), linear_node("b", "w1", "y")),
    "a gate": (
        linear_node("x", "w0", "a"),
        linear_node("x", "w2", "b"),
        Node("QuickGelu", ("b",), ("c",), "com.microsoft", (("alpha", 1.0),)),
        Node("Mul", ("c", "a"), ("d",)),
        linear_node("d", "w1", "y"),
    ),
}


def scaled_in_place(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> Graph:
    """``graph`` in 8 bits with every row scale behind its own product."""
    with monkeypatch.context() as patch:
        patch.setattr(per_token, "_late_scales", lambda *_: set())
        return apply(graph, PerTokenLinear())


def outputs_of(graph: Graph, folder: Path, x: Float) -> Float:
    write_graph(lower(graph), folder / "model.onnx", {})
    return np.asarray(
        ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"]).run(["y"], {"x": x})[0]
    )


def left_out(graph: Graph) -> set[str]:
    """Weights whose product is not followed by its row scale."""
    products = [node for node in graph.nodes if node.op == "MatMulIntegerToFloat"]
    scaled = {
        x
        for node in graph.nodes
        if node.op == "Mul" and node.inputs[1].endswith((".scale", ".whole"))
        for x in node.inputs
    }
    return {node.inputs[1].removesuffix(".s8") for node in products if node.outputs[0] not in scaled}


@pytest.mark.parametrize("name", CHAINS)
def test_a_row_scale_that_float_can_move_exactly_is_left_out_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    turned = [np.eye(WIDTH, dtype=np.float32)[np.random.default_rng(at).permutation(WIDTH)] for at in range(2)]
    graph = chain(CHAINS[name], turned[0], tame(WIDTH, WIDTH, seed=2), turned[1])
    x = np.random.default_rng(1).integers(-126, 127, (9, WIDTH)).astype(np.float32)
    x[:, 7] = 127
    x *= np.exp2(np.arange(-4, 5, dtype=np.float32))[:, None]  # a scale of 2^k a row
    late, early = apply(graph, PerTokenLinear()), scaled_in_place(graph, monkeypatch)
    assert "w0" in left_out(late)
    assert "w0" not in left_out(early)
    assert np.array_equal(outputs_of(late, tmp_path, x), outputs_of(early, tmp_path, x))


def test_two_layers_with_one_scale_left_out_are_those_of_plain_loops(tmp_path: Path) -> None:
    graph = chain(CHAINS["a layer"], tame(WIDTH, WIDTH, seed=1), second := tame(20, WIDTH, seed=2))
    x = gaussian(9, WIDTH, seed=3) * np.exp(gaussian(9, 1, seed=4))
    inner = plain_linear(x, tame(WIDTH, WIDTH, seed=1)).astype(np.float32)
    step = np.abs(inner).max(axis=1, keepdims=True) / 127
    ties = np.abs(np.abs(inner / step) % 1 - 0.5) < 1e-4  # these may be rounded either way
    plain = plain_linear(inner, second)
    bound = (ties * step) @ np.abs(second).T * 1.01 + 8 * EPSILON * (np.abs(inner) + step) @ np.abs(second).T
    assert ties.mean() < 0.01
    assert np.all(np.abs(outputs_of(apply(graph, PerTokenLinear()), tmp_path, x) - plain) <= bound)


@pytest.mark.parametrize("size", [1e-2, 1, 1e3])
def test_a_norm_behind_a_product_sees_the_row_scale_in_its_epsilon_only(tmp_path: Path, size: float) -> None:
    nodes = (linear_node("x", "w0", "a"), Node("Reshape", ("a", "heads"), ("b",)), NORM_NODE)
    plain = chain((*nodes, Node("Identity", ("c",), ("y",))), tame(WIDTH, WIDTH, seed=1), rank=3)
    graph = apply(plain, PerTokenLinear())
    assert left_out(graph) == {"w0"}
    x = gaussian(9, WIDTH, seed=3) * np.float32(size)
    product = plain_linear(x, tame(WIDTH, WIDTH, seed=1)).reshape(HEADS)
    square = (product**2).mean(axis=2, keepdims=True)
    expected = product / np.sqrt(square + EPSILON_NORM) * GAIN
    scale = np.abs(x).max(axis=1)[:, None, None] / 127
    bound = (8 * EPSILON + EPSILON_NORM * np.maximum(1, scale**2) / square) * np.abs(expected)
    assert np.all(np.abs(outputs_of(graph, tmp_path, x) - expected) <= bound)


SEEING = {  # readers of a product that see its row scale
    "a sum": (Node("Add", ("a", "x"), ("b",)), linear_node("b", "w1", "y")),
    "a gate's own product": (
        Node("Sigmoid", ("a",), ("b",)),
        Node("Mul", ("b", "x"), ("c",)),
        linear_node("c", "w1", "y"),
    ),
    "a square": (Node("Mul", ("a", "a"), ("b",)), linear_node("b", "w1", "y")),
    "the caller": (Node("Identity", ("a",), ("y",)),),
    "a layer and a sum": (linear_node("a", "w1", "b"), Node("Add", ("a", "b"), ("y",))),
    "a shape that a sum reads": (
        Node("Reshape", ("a", "heads"), ("b",)),
        Node("Add", ("b", "gain"), ("y",)),
    ),
}


@pytest.mark.parametrize("name", SEEING)
def test_a_row_scale_that_a_reader_sees_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    matrices = (tame(WIDTH, WIDTH, seed=1), tame(WIDTH, WIDTH, seed=2))
    rank = 3 if name == "a shape that a sum reads" else 2
    graph = chain((linear_node("x", "w0", "a"), *SEEING[name]), *matrices, rank=rank)
    x = gaussian(9, WIDTH, seed=3) * np.float32(40)
    late, early = apply(graph, PerTokenLinear()), scaled_in_place(graph, monkeypatch)
    assert "w0" not in left_out(late)
    assert np.array_equal(outputs_of(late, tmp_path, x), outputs_of(early, tmp_path, x))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("qwen3-tied", {"self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"}),
        ("qwen3-biased", {"mlp.up_proj"}),  # a bias is added to a product as large as it is
        ("bert-cls", set()),
        ("bert-mean", set()),
    ],
)
def test_the_scales_left_out_of_a_family_are_these(name: str, parts: set[str]) -> None:
    graph = reference_graph(open_checkpoint(FIXTURES / name), read_spec(FIXTURES / name))
    layers = open_checkpoint(FIXTURES / name).config["num_hidden_layers"]
    expected = {f"layers.{layer}.{part}.weight" for layer in range(layers) for part in parts}
    assert left_out(apply(graph, PerTokenLinear())) == expected


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-biased"])
def test_a_models_vectors_are_those_with_every_scale_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    known = upstream(name)
    graph = reference_graph(open_checkpoint(FIXTURES / name), read_spec(FIXTURES / name))
    vectors = []
    for stepped in (apply(graph, PerTokenLinear()), scaled_in_place(graph, monkeypatch)):
        write_graph(lower(stepped), tmp_path / "model.onnx", {})
        session: Any = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        feeds = {"input_ids": known.ids, "attention_mask": known.mask}
        vectors.append(session.run(["sentence_embedding"], feeds)[0].astype(np.float64))
    assert (1 - (vectors[0] * vectors[1]).sum(axis=1)).max() <= 1e-5


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
