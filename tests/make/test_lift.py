"""Graphs of other exporters: what of them becomes ours, and that they compute the same."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import featherbed
from featherbed.errors import MissingError, UnknownArchitectureError
from featherbed.make.graph.lower import lower
from featherbed.make.ir import Graph
from featherbed.make.lift import lift
from featherbed.make.read import read_foreign, read_graph
from featherbed.make.transforms import rotate, smooth
from featherbed.make.write import write_graph
from featherbed.recipe import Explicit
from featherbed.spec import Pooling, Spec
from tests.conftest import ran

Ids = npt.NDArray[np.int64]
WIDTH, ROWS, MIDDLE = 16, 40, 24
SPEC = Spec("other", WIDTH, ROWS, 32, Pooling.MEAN, 0, None, False)
RNG = np.random.default_rng(5)
TENSORS = {
    "model.words": RNG.normal(0, 1, (ROWS, WIDTH)),
    "model.up.weight": RNG.normal(0, 0.3, (MIDDLE, WIDTH)),  # [N, K], turned by a node
    "model.bias": RNG.normal(0, 0.3, MIDDLE),
    "model.down": RNG.normal(0, 0.3, (MIDDLE, WIDTH)),  # [K, N], as MatMul reads it
    "model.gain": RNG.normal(1, 0.2, WIDTH),
    "model.shift": RNG.normal(0, 0.2, WIDTH),
    "model.side": RNG.normal(0, 0.3, (1, WIDTH)),
}


def foreign(path: Path, dynamic: bool = True) -> Path:
    """A small model with a mask, written as exporters do: products of three axes, constants as nodes."""
    node = helper.make_node
    sums = [
        node("Constant", [], ["axis"], value_ints=[2]),
        node("Constant", [], ["minus"], value=numpy_helper.from_array(np.array(0.5, np.float32))),
        node("Gather", ["model.words", "input_ids"], ["found"]),
        node("Identity", ["found"], ["same"]),
        node("Transpose", ["model.up.weight"], ["turned"], perm=[1, 0]),
        node("MatMul", ["same", "turned"], ["product"]),
        node("Add", ["model.bias", "product"], ["biased"]),
        node("Gelu", ["biased"], ["bent"]),
        node("MatMul", ["bent", "model.down"], ["back"]),
        node("Add", ["back", "same"], ["stream"]),
        node("LayerNormalization", ["stream", "model.gain", "model.shift"], ["normed"], axis=-1, epsilon=1e-5),
        node("Mul", ["normed", "minus"], ["half"]),
        node("MatMul", ["model.side", "turned"], ["aside"]),  # a second reader of the turned weight: no token
        node("ReduceSum", ["aside"], ["weight"], keepdims=0),
        # what each token takes from the others, by the mask
        node("Cast", ["attention_mask"], ["real"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["real", "axis"], ["column"]),
        node("Mul", ["half", "column"], ["kept"]),
        node("ReduceMean", ["kept", "one"], ["others"], keepdims=1),
        node("Mul", ["others", "weight"], ["weighed"]),
        node("Add", ["half", "weighed"], ["mixed"]),
        node("MatMul", ["mixed", "turned"], ["again"]),
        node("MatMul", ["again", "model.down"], ["last_hidden_state"]),
    ]
    axes: list[str | int] = ["b", "t"] if dynamic else [1, "t"]
    ports = [helper.make_tensor_value_info(n, TensorProto.INT64, axes) for n in ("input_ids", "attention_mask")]
    out = [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [*axes, WIDTH])]
    weights = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in TENSORS.items()]
    weights.append(numpy_helper.from_array(np.array([1]), "one"))
    graph = helper.make_graph(sums, "foreign", ports, out, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(
        onnx.shape_inference.infer_shapes(model), path, save_as_external_data=True, location="w.data", size_threshold=64
    )
    return path


@pytest.fixture(scope="module")
def lifted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path]:
    path = foreign(tmp_path_factory.mktemp("foreign") / "model.onnx")
    return lift(*read_foreign(path), SPEC), path


def batch() -> tuple[Ids, Ids]:
    ids = np.arange(1, 19).reshape(3, 6)
    mask = np.array([[1] * 6, [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    return ids, mask


def plain(path: Path, ids: Ids, mask: Ids) -> npt.NDArray[np.float32]:
    session: Any = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input_ids": ids, "attention_mask": mask})[0])


def test_products_with_constants_become_linear_layers_over_rows(lifted: tuple[Graph, Path]) -> None:
    graph, _ = lifted
    found = Counter(node.op for node in graph.nodes)
    assert found["Linear"] == 4
    assert found["Lookup"] == 1
    assert found["MatMul"] == 2  # the one aside, and the mean
    made = {out: node for node in graph.nodes for out in node.outputs}
    readers = [node for node in graph.nodes if node.op == "Linear"]
    assert [made[n.inputs[0]].op for n in readers] == ["Reshape", "Gelu", "Reshape", "Linear"]
    bias = next(n for n in graph.nodes if "bias" in n.inputs)
    assert made[bias.inputs[0]].op == "Linear"  # what is computed comes first
    assert {"words", "up.weight.own", "down.turned", "bias", "gain", "shift"} <= set(graph.weights)


def test_a_lifted_graph_computes_what_it_did(lifted: tuple[Graph, Path]) -> None:
    graph, path = lifted
    ids, mask = batch()
    hidden, vectors = ran(graph, ids, mask)
    for at in range(3):  # the foreign one by itself, without padding
        length = int(mask[at].sum())
        alone = ids[at : at + 1, :length]
        expected = plain(path, alone, np.ones_like(alone))[0]
        if length == 6:  # the model at hand divides by the padded length: only a whole text is as it is alone
            assert np.abs(hidden[at, :length] - expected).max() < 1e-5
    padded = plain(path, ids, mask)
    pooled = np.stack([padded[at][mask[at] > 0].mean(0) for at in range(3)])
    assert np.abs(vectors - pooled / np.linalg.norm(pooled, axis=1, keepdims=True)).max() < 1e-6


@pytest.mark.parametrize("side", ["left", "holes"])
def test_padding_may_be_anywhere_whatever_the_exporter_thought(lifted: tuple[Graph, Path], side: str) -> None:
    graph, _ = lifted
    ids, mask = batch()
    hidden, vectors = ran(graph, ids, mask)
    moved_ids, moved_mask = np.zeros_like(ids), np.zeros_like(mask)
    for at in range(3):
        length = int(mask[at].sum())
        places = np.arange(6 - length, 6) if side == "left" else np.arange(6)[:: 6 // length][:length]
        moved_ids[at, places], moved_mask[at, places] = ids[at, :length], 1
    moved_hidden, moved = ran(graph, moved_ids, moved_mask)
    assert np.array_equal(moved, vectors)
    for at in range(3):
        assert np.array_equal(moved_hidden[at][moved_mask[at] > 0], hidden[at][mask[at] > 0])


def test_a_weight_that_others_read_too_is_not_changed_for_them(lifted: tuple[Graph, Path]) -> None:
    graph, _ = lifted
    others = {name for node in graph.nodes if node.op not in ("Linear", "Lookup") for name in node.inputs}
    assert "up.weight" in others
    assert not others & set(graph.linear_names())


def test_steps_leave_the_function_of_a_lifted_graph_as_it_is(lifted: tuple[Graph, Path]) -> None:
    graph, _ = lifted
    assert rotate.apply(graph) is graph
    group = (graph.linear_names()[0],)
    seen = smooth.Peaks(np.linspace(0.1, 5, WIDTH, dtype=np.float32), np.ones(WIDTH, np.float32))
    changed = smooth.apply(graph, 0.5, Explicit.ANYWHERE, {group: seen})
    ids, mask = batch()
    assert np.abs(ran(changed, ids, mask)[1] - ran(graph, ids, mask)[1]).max() < 1e-6


def test_its_file_reads_back_as_any_reference_of_ours(lifted: tuple[Graph, Path], tmp_path: Path) -> None:
    graph, _ = lifted
    write_graph(lower(graph), tmp_path / "model.onnx", {})
    back = read_graph(tmp_path / "model.onnx")
    assert back.linear_names() == graph.linear_names()
    assert [n.inputs[1] for n in back.nodes if n.op == "Lookup"] == ["words"]
    ids, mask = batch()
    assert np.array_equal(ran(back, ids, mask)[1], ran(graph, ids, mask)[1])


def test_a_graph_of_one_text_only_has_no_rows_to_lift(tmp_path: Path) -> None:
    graph = lift(*read_foreign(foreign(tmp_path / "model.onnx", dynamic=False)), SPEC)
    assert not graph.linear_names()


def test_operators_with_graphs_inside_are_refused(tmp_path: Path) -> None:
    inner = helper.make_graph([], "inner", [], [])
    node = helper.make_node("If", ["input_ids"], ["last_hidden_state"], then_branch=inner, else_branch=inner)
    port = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b"]) for n in ("input_ids", "last_hidden_state")]
    onnx.save(helper.make_model(helper.make_graph([node], "g", port[:1], port[1:])), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="If with a graph"):
        read_foreign(tmp_path / "model.onnx")


# an architecture that is none of ours


@pytest.fixture
def other(checkpoint: Callable[[str], Path]) -> Path:
    folder = checkpoint("bert-mean")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "distilbert"}), "utf-8")
    return folder


def test_without_torch_the_extra_that_is_missing_is_named(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "featherbed.make.export", raising=False)
    with pytest.raises(MissingError) as caught:
        featherbed.build(other, tmp_path / "out", ["fp32"])
    assert caught.value.exit_code == 3
    assert "featherbed[reference]" in str(caught.value)
    assert "nomic_bert" in str(caught.value)  # those that need no torch
    assert str(caught.value).startswith("model_type 'distilbert' in ")
    assert not (tmp_path / "out").exists()


def test_nothing_that_no_family_and_no_torch_builds_is_published(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("bert-mean")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": ["bert"]}), "utf-8")
    with pytest.raises(UnknownArchitectureError):
        featherbed.build(folder, folder.parent / "out", ["fp32"])
    assert not (folder.parent / "out").exists()
