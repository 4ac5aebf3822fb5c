"""float16: where it is, where it is not, and that nothing overflows, in true float16 by onnx's evaluator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, shape_inference
from onnx.reference import ReferenceEvaluator

from featherbed.errors import CheckpointError
from featherbed.make.graph.half import half, half_weight
from featherbed.make.graph.lower import lower
from featherbed.make.graph.standard import standard
from featherbed.make.ir import Array, Graph, Node, Port, Weight, constant
from featherbed.make.quantize import apply
from featherbed.make.write import model_bytes
from featherbed.recipe import RECIPES, BlockwiseLinear
from tests.conftest import FIXTURES, NAMES, cosines_of, made_by, ran, reference_of, upstream

Float = npt.NDArray[np.float32]
F32 = np.dtype(np.float32)
FULL = {"Softmax", "LayerNormalization", "LpNormalization", "ReduceMean", "Pow", "Sqrt", "Cos", "Sin", "ReduceMax"}
PRODUCTS = {"Gemm", "MatMulNBits"}


def kinds(graph: Graph) -> dict[str, int]:
    """Element types of all values, as onnx infers them."""
    model = onnx.load_from_string(model_bytes(graph))
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            model.graph.value_info.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT16, None))
    known = shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*known.value_info, *known.input, *known.output)}
    return found | {w.name: w.data_type for w in known.initializer}


@pytest.mark.parametrize("recipe", ["fp16", "q4f16"])
@pytest.mark.parametrize("name", NAMES)
def test_products_are_in_float16_and_sums_in_float32(name: str, recipe: str) -> None:
    graph = made_by(name, recipe)
    found = kinds(graph)
    for node in graph.nodes:
        if node.op in PRODUCTS:
            assert found[node.outputs[0]] == TensorProto.FLOAT16, node
        elif node.op in FULL:
            assert found[node.outputs[0]] == TensorProto.FLOAT, node
        elif node.op == "Add" and not set(node.inputs) & set(graph.weights):  # the residual stream, and scores' masks
            assert found[node.outputs[0]] != TensorProto.FLOAT16, node
    assert {p.dtype for p in graph.outputs} == {F32}
    pooling = [n for n in graph.nodes if n.op == "MatMul" and found[n.outputs[0]] == TensorProto.FLOAT]
    assert len(pooling) == (name == "bert-mean")
    assert not [n for n in graph.nodes if n.domain and n.op != "MatMulNBits"]
    assert any(n.domain for n in graph.nodes) == (recipe == "q4f16")
    matrices = [w for w in graph.weights.values() if len(w.shape) == 2 and w.shape[0] > 1 and w.dtype.kind == "f"]
    assert {w.dtype for w in matrices} <= {np.dtype(np.float16)}


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_half_of_fp32_s_size(name: str) -> None:
    def size(recipe: str) -> int:
        return sum(w.size_bytes for w in made_by(name, recipe).weights.values())

    assert 0.5 <= size("fp16") / size("fp32") <= 0.51  # norms' gains and constants are the rest


@pytest.mark.parametrize("name", NAMES)
def test_vectors_stay_where_they_were(name: str) -> None:
    known = upstream(name)
    for recipe, exact in (("fp16", "fp32"), ("q4f16", "q4")):
        hidden, vectors = ran(made_by(name, recipe), known.ids, known.mask)
        expected_hidden, expected = ran(made_by(name, exact), known.ids, known.mask)
        real = known.mask > 0
        assert cosines_of(vectors, expected).min() >= 0.9999
        assert cosines_of(hidden[real], expected_hidden[real]).min() >= 0.9999


def evaluated(graph: Graph, feeds: dict[str, Array]) -> list[Array]:
    """What onnx's evaluator gives: numpy, in the types that the graph says."""
    with np.errstate(all="ignore"):
        model = onnx.load_from_string(model_bytes(graph))
        for port, output in zip(graph.outputs, model.graph.output, strict=True):
            kind = helper.np_dtype_to_tensor_dtype(port.dtype)
            output.CopyFrom(helper.make_tensor_value_info(port.name, kind, port.axes))
        return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, feeds)]


@pytest.mark.parametrize("name", NAMES)
def test_in_true_float16_vectors_are_as_near(name: str) -> None:
    known = upstream(name)
    graph = made_by(name, "fp16")
    ids, mask = known.ids[:4], known.mask[:4]
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    hidden, vectors = evaluated(graph, {p.name: feeds[p.name] for p in graph.inputs})
    assert np.isfinite(hidden).all()
    assert cosines_of(vectors, known.unit[:4]).min() >= 0.9999


def gated(up: float, act: str = "Sigmoid") -> Graph:
    """x [N, 8] → x + down(silu(gate(x)) · up(x)), with an up projection ``up`` times as large as others."""
    rng = np.random.default_rng(3)

    def matrix(name: str, rows: int, columns: int, by: float = 1.0) -> Weight:
        return constant(name, rng.standard_normal((rows, columns)) * by / 4, F32)

    weights = [matrix("gate", 16, 8, 8), matrix("up", 16, 8, up), matrix("down", 8, 16)]
    nodes = (
        Node("Gemm", ("x", "gate"), ("g",), "", (("transB", 1),)),
        Node(act, ("g",), ("s",)),
        Node("Mul", ("g", "s"), ("silu",)),
        Node("Gemm", ("x", "up"), ("u",), "", (("transB", 1),)),
        Node("Mul", ("silu", "u"), ("p",)),
        Node("Gemm", ("p", "down"), ("d",), "", (("transB", 1),)),
        Node("Add", ("d", "x"), ("y",)),
    )
    return Graph(
        "mlp", 21, nodes, {w.name: w for w in weights}, (Port("x", F32, ("n", 8)),), (Port("y", F32, ("n", 8)),)
    )


@pytest.mark.parametrize("size", [1.0, 100.0, 30000.0])
def test_a_product_of_activations_beyond_65504_is_scaled_and_right(size: float) -> None:
    graph = gated(size)
    x = np.random.default_rng(4).standard_normal((5, 8)).astype(np.float32)
    x[1] = 0  # a row of zeros stays one
    x[2] *= 0.01  # a small row beside large ones
    (expected,) = evaluated(graph, {"x": x})
    (found,) = evaluated(half(graph), {"x": x})
    assert np.isfinite(found).all()
    assert not found[1].any()
    assert (np.linalg.norm(found - expected, axis=1) <= 4e-3 * np.linalg.norm(expected, axis=1)).all()
    assert (np.abs(expected).max() > 65504) == (size == 30000)  # that case is one


def test_a_bounded_factor_needs_no_scale() -> None:
    graph = gated(1.0)
    plain = replace(graph, nodes=(*graph.nodes[:3], replace(graph.nodes[5], inputs=("silu", "down")), graph.nodes[6]))
    assert not [n for n in half(plain).nodes if n.op == "ReduceMax"]
    assert [n.op for n in half(graph).nodes].count("ReduceMax") == 1


def test_a_weight_that_float16_cannot_hold_is_refused_when_it_is_read() -> None:
    weight = constant("w", [[1.0, -7e4]], F32)
    with pytest.raises(CheckpointError, match=r"w in float16: expected weights within ±65504, found 70000"):
        half_weight(weight).array()
    assert half_weight(constant("w", [[65504.0, 1e-9]], F32)).array().tolist() == [[65504.0, 0.0]]


def test_weights_are_cast_block_by_block_when_they_are_written() -> None:
    read: list[int] = []

    def blocks() -> Iterator[Array]:
        for at in range(3):
            read.append(at)
            yield np.full((2, 4), at, np.float32)

    cast = half_weight(Weight("w", F32, (6, 4), blocks))
    assert read == []
    each = cast.read()
    assert next(each).dtype == np.float16
    assert read == [0]
    assert cast.size_bytes == 48


def test_an_output_that_comes_out_in_float16_is_float32_again() -> None:
    weights = {"w": constant("w", np.eye(8), F32)}
    node = Node("Gemm", ("x", "w"), ("y",), "", (("transB", 1),))
    graph = Graph("one", 21, (node,), weights, (Port("x", F32, ("n", 8)),), (Port("y", F32, ("n", 8)),))
    done = half(graph)
    assert [n.op for n in done.nodes] == ["Cast", "Gemm", "Cast"]
    assert evaluated(done, {"x": np.ones((2, 8), np.float32)})[0].dtype == np.float32


def test_blocks_without_matmulnbits_are_in_float16_too() -> None:
    blocks = lower(apply(reference_of(FIXTURES / "qwen3-tied"), BlockwiseLinear(4, 32, None)))
    graph = half(standard(blocks))
    scales = [graph.weights[n.inputs[1]] for n in graph.nodes if n.op == "DequantizeLinear"]
    assert {w.dtype for w in scales} == {np.dtype(np.float16)}
    known = upstream("qwen3-tied")
    found = ran(graph, known.ids, known.mask)[1]
    assert cosines_of(found, ran(made_by("qwen3-tied", "q4"), known.ids, known.mask)[1]).min() >= 0.9999


def test_recipes_in_float16_say_so() -> None:
    assert {name for name, recipe in RECIPES.items() if recipe.half} == {"fp16", "q4f16"}
    values: Any = RECIPES["fp16"].to_json()["steps"]
    assert values == [{"step": "Half"}, {"step": "Standard", "blocks": False}]
