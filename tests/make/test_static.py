"""Fixed shapes: every value's is known, and the numbers are the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from featherbed.make.graph.static import static
from featherbed.make.ir import Graph, Node
from featherbed.make.variant import finished
from featherbed.make.write import model_bytes
from featherbed.recipe import RECIPES
from featherbed.steps import Standard, Static
from tests.conftest import NAMES, made_by, ran

BATCH, TOKENS = 3, 10
SOME = ["fp32", "int8", "int4-small", "int8-dynamic", "q4f16"]


def texts() -> tuple[np.ndarray[tuple[int, int], np.dtype[np.int64]], np.ndarray[tuple[int, int], np.dtype[np.int64]]]:
    ids = np.random.default_rng(5).integers(5, 300, (BATCH, TOKENS))
    mask = (np.arange(TOKENS) < np.array([[10], [4], [1]])).astype(np.int64)
    return ids, mask


def inferred(graph: Graph) -> dict[str, list[int]]:
    """Shapes that onnx finds by itself, without the ones that we wrote down; of those whole."""
    model = onnx.load_from_string(model_bytes(replace(graph, values=())))
    found = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True).graph
    values = {v.name: v.type.tensor_type.shape.dim for v in (*found.value_info, *found.output)}
    return {name: [d.dim_value for d in dims] for name, dims in values.items() if all(d.dim_value for d in dims)}


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "bnb4"])
@pytest.mark.parametrize("name", NAMES)
def test_of_standard_operators_onnx_knows_every_shape(name: str, recipe: str) -> None:
    graph = static(finished(made_by(name, recipe), (Standard(),)), BATCH, TOKENS)
    shapes = inferred(graph)
    for node in graph.nodes:
        assert set(node.outputs) <= set(shapes), node
    assert {p.name: list(p.axes) for p in graph.values}.items() <= shapes.items()
    assert not {n.op for n in graph.nodes} & {"Shape", "Range", "Cos", "Sin", "Expand"}


@pytest.mark.parametrize("recipe", SOME)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_graph_with_free_shapes(name: str, recipe: str) -> None:
    free = made_by(name, recipe)
    fixed = static(free, BATCH, TOKENS)
    made = {out for node in fixed.nodes for out in node.outputs}
    ends = {p.name for p in fixed.outputs}
    assert {p.name for p in fixed.values} == made - ends  # of onnxruntime's own operators too
    assert {p.axes for p in fixed.inputs} == {(BATCH, TOKENS)}
    assert [p.axes[0] for p in fixed.outputs] == [BATCH, BATCH]
    ids, mask = texts()
    for found, expected in zip(ran(fixed, ids, mask), ran(free, ids, mask), strict=True):
        assert np.abs(found - expected).max() <= 1e-5
    model = onnx.load_from_string(model_bytes(fixed))
    said = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    assert said == {p.name: list(p.axes) for p in fixed.values}


def test_weights_are_not_computed_with() -> None:
    graph = static(finished(made_by("qwen3-tied", "q4"), (Standard(),)), 1, 8)
    assert sum(n.op == "DequantizeLinear" for n in graph.nodes) == 14 + 4
    assert {w.packed for w in graph.weights.values()} == {"", "INT4"}


def test_what_an_unknown_operator_gives_is_not_made_up() -> None:
    graph = made_by("bert-cls", "fp32")
    node = Node("Unheard", ("last_hidden_state",), ("more",), "com.microsoft")
    fixed = static(replace(graph, nodes=(*graph.nodes, node)), 1, 8)
    assert fixed.nodes[-1] == node
    assert "more" not in {p.name for p in fixed.values}


def test_a_static_step_is_the_last() -> None:
    graph = finished(made_by("bert-mean", "fp32"), (Static(2, 8), Standard()))
    assert {p.axes for p in graph.inputs} == {(2, 8)}
    assert not [n for n in graph.nodes if n.domain]
