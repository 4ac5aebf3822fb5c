"""The graphs of both families: what they consist of, and that padding, batch and length change no vector."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from featherbed.check.inspect import inspect_file
from featherbed.errors import CheckpointError, UnknownArchitectureError
from featherbed.folder import graph_name
from featherbed.make.checkpoint import open_checkpoint
from featherbed.make.graph import reference_graph
from featherbed.make.graph.lower import lower
from featherbed.make.ir import LINEAR, LOOKUP, MICROSOFT, OURS, Graph, Node
from featherbed.make.variant import made
from featherbed.make.write import write_graph
from featherbed.recipe import RECIPES, Rotate
from featherbed.spec import Pooling, read_spec
from featherbed.steps import UnsignedTable
from tests.conftest import FIXTURES, NAMES, made_by, reference_of, texts_for, upstream

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
LAYERS = {"bert-mean": 2, "bert-cls": 1, "qwen3-tied": 2, "qwen3-biased": 2}
# what follows the last attention stands there twice where one token is pooled: for all rows, and for that one
TAILS = {name: layers + (name != "bert-mean") for name, layers in LAYERS.items()}
DYNAMIC = {"int8-dynamic", "int8-smooth", "int8-full", "uint8"}  # these have a scale for the whole batch
PER_ROW = [name for name in RECIPES if name not in DYNAMIC]
VOCABULARY = 384


def built(name: str) -> Graph:
    """The reference graph of a fixture."""
    return reference_of(FIXTURES / name)


def census(graph: Graph) -> Counter[str]:
    return Counter(f"{node.domain}.{node.op}".removeprefix(".") for node in graph.nodes)


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def sessions(folders: dict[str, Path]) -> Callable[[str, str], Any]:
    """onnxruntime's session of a fixture's variant, opened once."""
    opened: dict[tuple[str, str], Any] = {}

    def get(name: str, recipe: str) -> Any:
        if (name, recipe) not in opened:
            opened[name, recipe] = session(folders[name] / graph_name(RECIPES[recipe].suffix))
        return opened[name, recipe]

    return get


def run(opened: Any, ids: Ids, mask: Ids) -> tuple[Vectors, Vectors]:
    """(last_hidden_state [B, T, D], sentence_embedding [B, D])."""
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    declared = {port.name for port in opened.get_inputs()}
    names = ["last_hidden_state", "sentence_embedding"]
    hidden, vectors = opened.run(names, {name: value for name, value in feeds.items() if name in declared})
    return hidden, vectors


def padded(rows: list[list[int]], width: int, side: str) -> tuple[Ids, Ids]:
    """Ids and mask [B, T] of token rows, padding left, right, or scattered among the tokens."""
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    rng = np.random.default_rng(len(rows) * width)
    for at, row in enumerate(rows):
        places = {
            "left": np.arange(width - len(row), width),
            "right": np.arange(len(row)),
            "holes": np.sort(rng.choice(width, len(row), replace=False)),
        }[side]
        ids[at, places], mask[at, places] = row, 1
    return ids, mask


# what a graph consists of


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-biased"])
def test_a_qwen3_graph_has_these_operators_and_no_more(name: str) -> None:
    layers, tails, found = LAYERS[name], TAILS[name], census(built(name))
    assert found["featherbed.Linear"] == 3 * layers + 4 * tails  # q, k, v; o, gate, up, down
    assert found["featherbed.Lookup"] == 1
    assert found["com.microsoft.GroupQueryAttention"] == layers
    # q and k of each layer; before the first; behind attention and feed-forward, which are added to the stream
    assert found["SimplifiedLayerNormalization"] == 2 * layers + 1 + 2 * tails
    assert found["com.microsoft.QuickGelu"] == tails
    gates = {node.outputs[0] for node in built(name).nodes if node.op == "QuickGelu"}
    assert sum(node.op == "Mul" and node.inputs[0] in gates for node in built(name).nodes) == tails
    assert not {op for op in found if op in {"MatMul", "Gemm", "Softmax", "Transpose", "Loop", "If", "Sigmoid"}}
    assert not [op for op in found if "Skip" in op or "Bias" in op]  # fused with a sum they are slower


@pytest.mark.parametrize("name", ["bert-mean", "bert-cls"])
def test_a_bert_graph_has_these_operators_and_no_more(name: str) -> None:
    layers, tails, found = LAYERS[name], TAILS[name], census(built(name))
    assert found["featherbed.Linear"] == layers + 3 * tails  # q, k and v as one; o, both of the feed-forward
    assert found["featherbed.Lookup"] == 1
    assert found["com.microsoft.GroupQueryAttention"] == layers
    assert found["LayerNormalization"] == 1 + 2 * tails
    assert found["Gelu"] == tails
    assert found["MatMul"] == (name == "bert-mean")  # the mean itself
    assert not {op for op in found if op in {"Gemm", "Softmax", "Transpose", "Loop", "If", "Erf"}}
    assert not [op for op in found if "Skip" in op or "Bias" in op]  # fused with a sum they are slower


def test_biases_of_attention_are_added_only_where_the_config_has_them() -> None:
    plain, biased = census(built("qwen3-tied")), census(built("qwen3-biased"))
    assert biased["Add"] - plain["Add"] == 3 * LAYERS["qwen3-biased"] + TAILS["qwen3-biased"]
    assert sum(name.endswith(".bias") for name in built("qwen3-biased").weights) == 4 * LAYERS["qwen3-biased"]


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", NAMES)
def test_attention_has_one_output_so_that_keys_and_values_are_not_kept(name: str, recipe: str) -> None:
    nodes = [node for node in made_by(name, recipe).nodes if node.op == "GroupQueryAttention"]
    assert len(nodes) == (0 if RECIPES[recipe].half else LAYERS[name])  # products and a softmax there
    for node in nodes:
        assert len(node.outputs) == 1
        assert dict(node.attributes).get("causal") == (0 if name.startswith("bert") else None)


def weights_read(graph: Graph, ops: set[str]) -> list[tuple[Node, str]]:
    """Matrices in float that nodes of these operators read."""
    return [
        (node, name)
        for node in graph.nodes
        if node.op in ops
        for name in node.inputs
        if name in graph.weights and len(graph.weights[name].shape) == 2 and graph.weights[name].dtype == np.float32
    ]


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", NAMES)
def test_no_operator_of_ours_and_no_linear_layer_in_float_is_left(name: str, recipe: str) -> None:
    linears = census(built(name))["featherbed.Linear"]
    graph = made_by(name, recipe)
    found = census(graph)
    assert {node.domain for node in graph.nodes} <= {"", MICROSOFT}
    assert not {LINEAR, LOOKUP} & {node.op for node in graph.nodes}
    in_float = [weight for _, weight in weights_read(graph, {"MatMul", "Gemm"})]
    turned_back = in_float.count("norm.weight.back")  # at the end of a rotated stream, once a tail
    rotated = Rotate() in RECIPES[recipe].steps and name.startswith("qwen3")
    assert turned_back == (2 if rotated else 0)
    assert len(in_float) - turned_back == (linears if recipe == "fp32" else 0)
    expected = {
        "fp32": None,
        "int8-static": None,  # Gemm and MatMul, of what DequantizeLinear gives
        "bnb4": "com.microsoft.MatMulBnb4",
        **dict.fromkeys(("int8", "uint8-out"), "com.microsoft.MatMulIntegerToFloat"),
        **dict.fromkeys(DYNAMIC, "com.microsoft.MatMulIntegerToFloat"),
        **dict.fromkeys(("int8-block", "int4", "int4-small", "q4", "q4f16"), "com.microsoft.MatMulNBits"),
        "fp16": "Gemm",
    }[recipe]
    assert expected is None or found[expected] == linears


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_the_bits_the_recipe_says(name: str, recipe: str) -> None:
    graph = made_by(name, recipe)
    lookups = [node for node in graph.nodes if node.op in {"Gather", "GatherBlockQuantized"}]
    bits = [dict(node.attributes)["bits"] for node in lookups if node.op == "GatherBlockQuantized"]
    bits += [8 for node in lookups if node.inputs[0].endswith(".q8")]
    blockwise = {"int8": [8], "int8-block": [8], "int4": [8], "int4-small": [4], "uint8-out": [8]}
    assert bits == blockwise.get(recipe, [])
    unsigned = UnsignedTable() in RECIPES[recipe].steps
    table = f"{'word_embeddings' if name.startswith('bert') else 'embed_tokens'}.weight"
    table += ".f16" if RECIPES[recipe].half else ""
    assert any(name.endswith(table) for node in lookups for name in node.inputs) == (not bits and not unsigned)
    assert any(name.endswith(f"{table}.u8") for node in lookups for name in node.inputs) == unsigned


@pytest.mark.parametrize("name", NAMES)
def test_the_vector_of_a_pooled_token_needs_no_other_row_of_the_last_tail(name: str) -> None:
    graph = built(name)
    makers = {out: node for node in graph.nodes for out in node.outputs if out}
    needed, waiting = set[str](), ["sentence_embedding"]
    while waiting:
        value = waiting.pop()
        if value in makers and value not in needed:
            needed.add(value)
            waiting += makers[value].inputs
    left = [node for node in graph.nodes if node.op == LINEAR and node.outputs[0] in needed]
    per_tail = 3 if name.startswith("bert") else 4
    assert len(left) == census(graph)["featherbed.Linear"] - per_tail * (TAILS[name] - LAYERS[name])
    assert len({node.inputs[1] for node in left}) == len(left)  # each weight once: the shared tail is out


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_made_once_and_before_it_is_read(name: str, recipe: str) -> None:
    graph = made_by(name, recipe)
    known = {port.name for port in graph.inputs} | set(graph.weights) | {""}
    for node in graph.nodes:
        assert set(node.inputs) <= known, node
        made_here = [out for out in node.outputs if out]
        assert not set(made_here) & known, node
        known |= set(made_here)
    assert {port.name for port in graph.outputs} <= known
    read = {name for node in graph.nodes for name in node.inputs}
    assert set(graph.weights) <= read


@pytest.mark.parametrize("name", NAMES)
def test_a_step_leaves_the_graph_it_was_given_as_it_was(name: str) -> None:
    graph = built(name)
    nodes, weights = graph.nodes, dict(graph.weights)
    for recipe in RECIPES.values():
        made(graph, recipe.steps, texts_for(FIXTURES / name))
        assert graph.nodes == nodes
        assert graph.weights == weights
    assert graph.linear_names() == tuple(node.inputs[1] for node in nodes if (node.domain, node.op) == (OURS, LINEAR))


# what a file says of itself


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", NAMES)
def test_inputs_and_outputs_are_the_ones_optimum_reads(
    sessions: Callable[[str, str], Any], name: str, recipe: str
) -> None:
    opened = sessions(name, recipe)
    width = read_spec(FIXTURES / name).dim
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if name.startswith("bert") else [])
    axes = ["batch_size", "sequence_length"]
    assert [(i.name, i.type, i.shape) for i in opened.get_inputs()] == [(n, "tensor(int64)", axes) for n in names]
    assert [(o.name, o.type, o.shape) for o in opened.get_outputs()] == [
        ("last_hidden_state", "tensor(float)", [*axes, width]),
        ("sentence_embedding", "tensor(float)", ["batch_size", width]),
        *([("sentence_embedding_quantized", "tensor(uint8)", ["batch_size", width])] if recipe == "uint8-out" else []),
    ]


CONTRIBUTED = {"SimplifiedLayerNormalization"}  # onnxruntime registers it in the standard domain


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", NAMES)
def test_standard_operators_pass_the_checker(folders: dict[str, Path], name: str, recipe: str) -> None:
    model = onnx.load(str(folders[name] / graph_name(RECIPES[recipe].suffix)))
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {entry.domain: entry.version for entry in model.opset_import}
    standard = [node for node in model.graph.node if node.domain == "" and node.op_type not in CONTRIBUTED]
    assert len(standard) > 10
    for node in standard:
        onnx.checker.check_node(node, context)
    for tensor in model.graph.initializer:
        onnx.checker.check_tensor(tensor, context)
    if name.startswith("bert"):
        onnx.checker.check_model(model)  # nothing that is not standard but in a domain of its own


def test_the_passes_of_the_checker_would_notice_a_wrong_attribute(folders: dict[str, Path]) -> None:
    model = onnx.load(str(folders["bert-mean"] / "onnx" / "model.onnx"))
    node = next(node for node in model.graph.node if node.op_type == "Gather")
    node.attribute.append(onnx.helper.make_attribute("no_such_attribute", 1))
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(model)


@pytest.mark.parametrize("name", NAMES)
def test_inspect_counts_what_was_made(folders: dict[str, Path], name: str) -> None:
    for recipe in RECIPES.values():
        found = inspect_file(folders[name] / graph_name(recipe.suffix))
        assert found.operators == dict(sorted(census(made_by(name, recipe.name)).items()))
        assert not found.static_batch
        assert found.kv_inputs == 0


# what a graph computes


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_gives_upstreams_vectors(sessions: Callable[[str, str], Any], name: str) -> None:
    known = upstream(name)
    _, vectors = run(sessions(name, "fp32"), known.ids, known.mask)
    assert np.abs(vectors - known.unit).max() <= 2e-5


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("side", ["left", "holes"])
@pytest.mark.parametrize("name", NAMES)
def test_the_side_of_the_padding_changes_nothing(
    sessions: Callable[[str, str], Any], name: str, side: str, recipe: str
) -> None:
    rows = upstream(name).rows
    width = max(map(len, rows)) + 3
    ids, mask = padded(rows, width, "right")
    expected_hidden, expected = run(sessions(name, recipe), ids, mask)
    ids, mask = padded(rows, width, side)
    hidden, vectors = run(sessions(name, recipe), ids, mask)
    assert np.array_equal(vectors, expected)
    for at, row in enumerate(rows):
        assert np.array_equal(hidden[at][mask[at] > 0], expected_hidden[at][: len(row)])


@settings(max_examples=40, deadline=None)
@given(drawn=st.data(), name=st.sampled_from(NAMES), recipe=st.sampled_from(PER_ROW))
def test_whatever_the_mask_the_real_tokens_decide_alone(
    sessions: Callable[[str, str], Any], drawn: st.DataObject, name: str, recipe: str
) -> None:
    batch, width = drawn.draw(st.integers(1, 4)), drawn.draw(st.integers(1, 9))
    rng = np.random.default_rng(drawn.draw(st.integers(0, 2**32)))
    mask = rng.integers(0, 2, (batch, width))
    mask[np.arange(batch), rng.integers(0, width, batch)] = 1
    ids = rng.integers(0, VOCABULARY, (batch, width))  # padding too has ids of its own
    hidden, vectors = run(sessions(name, recipe), ids, mask)
    rows = [ids[at][mask[at] > 0].tolist() for at in range(batch)]
    expected_hidden, expected = run(sessions(name, recipe), *padded(rows, width, "right"))
    assert np.abs(vectors - expected).max() <= 1e-6
    for at, row in enumerate(rows):
        assert np.abs(hidden[at][mask[at] > 0] - expected_hidden[at][: len(row)]).max() <= 1e-5


@pytest.mark.parametrize("recipe", PER_ROW)
@pytest.mark.parametrize("name", NAMES)
def test_a_text_alone_has_the_vector_it_has_in_company(
    sessions: Callable[[str, str], Any], name: str, recipe: str
) -> None:
    known = upstream(name)
    _, together = run(sessions(name, recipe), known.ids, known.mask)
    for at, row in enumerate(known.rows):
        hidden, alone = run(sessions(name, recipe), np.array([row]), np.ones((1, len(row)), np.int64))
        assert hidden.shape == (1, len(row), read_spec(FIXTURES / name).dim)
        assert 1 - float(alone[0] @ together[at]) <= 1e-6


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "width"), [(1, 1), (1, 5), (3, 1)])
def test_one_text_and_one_token_are_enough(
    sessions: Callable[[str, str], Any], name: str, recipe: str, batch: int, width: int
) -> None:
    ids = np.arange(batch * width, dtype=np.int64).reshape(batch, width) + 5
    hidden, vectors = run(sessions(name, recipe), ids, np.ones_like(ids))
    dim = read_spec(FIXTURES / name).dim
    assert hidden.shape == (batch, width, dim)
    assert vectors.shape == (batch, dim)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_vector_is_the_pooled_hidden_state_of_the_same_run(sessions: Callable[[str, str], Any], name: str) -> None:
    rows = upstream(name).rows
    ids, mask = padded(rows, max(map(len, rows)) + 2, "holes")
    hidden, vectors = run(sessions(name, "fp32"), ids, mask)
    pooling = read_spec(FIXTURES / name).pooling
    for at in range(len(rows)):
        real = [hidden[at, t].astype(np.float64) for t in range(ids.shape[1]) if mask[at, t]]
        pooled = {Pooling.MEAN: sum(real) / len(real), Pooling.CLS: real[0], Pooling.LAST: real[-1]}[pooling]
        assert np.abs(pooled / np.linalg.norm(pooled) - vectors[at]).max() <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_tokens_matters(sessions: Callable[[str, str], Any], name: str) -> None:
    ids = np.array([[7, 20, 30, 40, 9], [7, 40, 30, 20, 9]])
    _, vectors = run(sessions(name, "fp32"), ids, np.ones_like(ids))
    assert float(vectors[0] @ vectors[1]) < 0.9999


@pytest.mark.parametrize("recipe", PER_ROW)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_tokens_is_nan_and_does_not_disturb_its_neighbours(
    sessions: Callable[[str, str], Any], name: str, recipe: str
) -> None:
    ids = np.array([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])
    mask = np.ones_like(ids)
    hidden, vectors = run(sessions(name, recipe), ids, mask)
    mask[1] = 0
    without_hidden, without = run(sessions(name, recipe), ids, mask)
    assert np.abs(vectors[[0, 2]] - without[[0, 2]]).max() <= 1e-6
    assert np.isnan(without[1]).all()  # nothing to pool: nobody shall take it for a vector
    assert np.abs(hidden[[0, 2]] - without_hidden[[0, 2]]).max() <= 1e-5


# other spellings of a checkpoint


def renamed(folder: Path, name_of: Callable[[str], str]) -> None:
    tensors = {name_of(key): value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")


def vectors_of(folder: Path, out: Path, ids: Ids) -> Vectors:
    graph = lower(reference_graph(open_checkpoint(folder), read_spec(folder)))
    write_graph(graph, out / "model.onnx", {})
    return run(session(out / "model.onnx"), ids, np.ones_like(ids))[1]


@pytest.mark.parametrize(
    "name_of",
    [
        lambda key: "bert." + key,
        lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    ],
    ids=["under bert.", "gamma and beta"],
)
def test_older_names_of_bert_tensors_are_known(
    checkpoint: Callable[[str], Path], tmp_path: Path, name_of: Callable[[str], str]
) -> None:
    ids = np.array([[2, 30, 31, 3]])
    folder = checkpoint("bert-cls")
    expected = vectors_of(folder, tmp_path, ids)
    renamed(folder, name_of)
    assert np.array_equal(vectors_of(folder, tmp_path, ids), expected)


def test_qwen3_tensors_under_model_are_known(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    ids = np.array([[30, 31, 0]])
    folder = checkpoint("qwen3-biased")
    expected = vectors_of(folder, tmp_path, ids)
    tensors: dict[str, npt.NDArray[Any]] = {}
    for part in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(part)
        part.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file({f"model.{key}": value for key, value in tensors.items()}, folder / "model.safetensors")
    assert np.array_equal(vectors_of(folder, tmp_path, ids), expected)


def test_the_rotary_base_is_read_in_both_places(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    ids = np.array([[30, 31, 32, 33, 0]])
    folder = checkpoint("qwen3-tied")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    plain = vectors_of(folder, tmp_path, ids)
    config["rope_parameters"]["rope_theta"] = 1_000_000
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    new = vectors_of(folder, tmp_path, ids)
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1_000_000}), "utf-8")
    assert np.array_equal(vectors_of(folder, tmp_path, ids), new)
    assert not np.array_equal(plain, new)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bert-cls", {"hidden_act": "relu"}),
        ("bert-cls", {"position_embedding_type": "relative_key"}),
        ("bert-cls", {"is_decoder": True}),
        ("qwen3-tied", {"hidden_act": "gelu"}),
        ("qwen3-tied", {"use_sliding_window": True}),
        ("qwen3-tied", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen3-tied", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
        ("qwen3-tied", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ],
    ids=str,
)
def test_a_setting_that_is_not_built_here_is_refused_not_ignored(
    checkpoint: Callable[[str], Path], name: str, change: dict[str, Any]
) -> None:
    folder = checkpoint(name)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **change}), "utf-8")
    with pytest.raises(UnknownArchitectureError) as caught:
        reference_graph(open_checkpoint(folder), read_spec(folder))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bert-cls", {"hidden_size": 96}),
        ("bert-cls", {"num_hidden_layers": 2}),
        ("bert-cls", {"intermediate_size": 95}),
        ("bert-cls", {"max_position_embeddings": 65}),
        ("qwen3-tied", {"num_hidden_layers": 3}),
        ("qwen3-tied", {"num_key_value_heads": 4}),
        ("qwen3-tied", {"head_dim": 16}),
        ("qwen3-tied", {"attention_bias": True}),
        ("qwen3-tied", {"vocab_size": 385}),
    ],
    ids=str,
)
def test_a_config_that_does_not_belong_to_the_weights_is_refused(
    checkpoint: Callable[[str], Path], name: str, change: dict[str, Any]
) -> None:
    folder = checkpoint(name)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **change}), "utf-8")
    with pytest.raises(CheckpointError) as caught:
        reference_graph(open_checkpoint(folder), read_spec(folder))
    assert "config.json belongs to these weights" in str(caught.value)
