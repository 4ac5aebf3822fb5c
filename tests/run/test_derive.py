"""Derived graphs: the file's own vectors bit for bit, less work, and texts that go on behind others.

Graphs of a few nodes are worked out by hand; the fixtures' graphs are held against a plain twin in numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from featherbed.recipe import RECIPES
from featherbed.run import derive
from tests.conftest import NAMES

Array = npt.NDArray[Any]
Form = Callable[[ModelProto], ModelProto]

BERTS, QWENS = NAMES[:2], NAMES[2:]
FLOAT = ("fp32", "int4", "int4-small", "q4")  # nothing is rounded to 8 bits on the way
BITS8 = ("int8", "int8-block")
ROUNDING = 1e-5
FLIP = 1e-3  # in 1 − cos: float rounding that tips one 8-bit code, in a model 48 numbers wide
VOCABULARY = 384
FORMS: tuple[Form, ...] = (derive.engine_graph, derive.keys_and_values, derive.behind_past, derive.for_long)


def model_of(folders: dict[str, Path], name: str, recipe: str) -> ModelProto:
    return onnx.load(folders[name] / "onnx" / f"model{RECIPES[recipe].suffix}.onnx")


def opened(model: ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, feeds: dict[str, Array]) -> dict[str, Array]:
    names = [o.name for o in session.get_outputs()]
    wanted = {i.name for i in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True))


def tokens(ids: Array, mask: Array | None = None) -> dict[str, Array]:
    """Feeds of ids [B, T], each of them a real token unless ``mask`` says otherwise."""
    mask = np.ones_like(ids) if mask is None else mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def random_ids(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).integers(1, VOCABULARY, shape)


def batches() -> Iterator[dict[str, Array]]:
    """One token, one text, and batches with padding right, left and with holes."""
    for texts, length in ((1, 1), (1, 2), (1, 23), (7, 1), (6, 17), (3, 64)):
        ids, mask = random_ids(length, texts, length), np.ones((texts, length), np.int64)
        yield tokens(ids)
        if texts > 2 and length > 4:
            mask[0, length // 2 :] = 0
            mask[1, :-1] = 0
            mask[2, 1::2] = 0
            yield tokens(ids, mask)


def drift(a: Array, b: Array) -> float:
    """The largest 1 − cos of the rows of a and b, in float64."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float((1 - (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))).max())


def renamed(kept: dict[str, Array]) -> dict[str, Array]:
    """What ``keys_and_values`` gives, as ``behind_past`` takes it."""
    return {name.replace("present.", "past_key_values."): value for name, value in kept.items()}


def sketch(
    nodes: Sequence[NodeProto], weights: dict[str, Array], inputs: dict[str, int], outputs: Sequence[str]
) -> ModelProto:
    """A model of a few nodes; ``inputs`` by name and element type, all [N, ·]."""
    graph = helper.make_graph(
        list(nodes),
        "sketch",
        [helper.make_tensor_value_info(name, kind, ["rows", f"{name}.width"]) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_engine_graph_gives_the_file_s_vectors_bit_for_bit(
    folders: dict[str, Path], name: str, recipe: str
) -> None:
    model = model_of(folders, name, recipe)
    file, engine = opened(model), opened(derive.engine_graph(model))
    for feeds in batches():
        found, expected = (run(session, feeds)["sentence_embedding"] for session in (engine, file))
        if RECIPES[recipe].half:  # of two casts in a row, onnxruntime leaves out those that no output needs
            assert np.nanmax(np.abs(found - expected)) <= 1e-3
        else:
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_engine_graph_has_one_output_and_the_file_s_inputs(
    folders: dict[str, Path], name: str, recipe: str
) -> None:
    model = model_of(folders, name, recipe)
    engine = derive.engine_graph(model)
    codes = ["sentence_embedding_quantized"] if recipe == "uint8-out" else []
    assert [o.name for o in model.graph.output] == ["last_hidden_state", "sentence_embedding", *codes]
    assert [o.name for o in engine.graph.output] == ["sentence_embedding"]
    assert list(engine.graph.input) == list(model.graph.input)


def needed_for(graph: GraphProto, output: str) -> set[str]:
    """Names of all values that ``output`` is made of: a walk from value to value."""
    makers = {name: node for node in graph.node for name in node.output if name}
    seen, waiting = set[str](), [output]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [x for x in (makers[name].input if name in makers else ()) if x]
    return seen


@pytest.mark.parametrize("recipe", ["fp32", "int8-block", "q4"])
@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_nodes_and_weights_stay_that_the_vector_is_made_of(
    folders: dict[str, Path], name: str, recipe: str
) -> None:
    model = model_of(folders, name, recipe)
    needed = needed_for(model.graph, "sentence_embedding")
    engine = derive.engine_graph(model)
    assert list(engine.graph.node) == [n for n in model.graph.node if needed & set(n.output)]
    assert list(engine.graph.initializer) == [w for w in model.graph.initializer if w.name in needed]
    assert len(engine.graph.node) < len(model.graph.node)


@pytest.mark.parametrize(("name", "products"), [("bert-cls", 3), ("qwen3-tied", 4), ("qwen3-biased", 4)])
def test_the_last_layer_s_tail_is_computed_for_one_row_a_text_only(
    folders: dict[str, Path], name: str, products: int
) -> None:
    """Attention's output and the feed-forward stand in the file twice: for all rows, and for one a text."""
    model = model_of(folders, name, "int8")
    count = [
        sum(n.op_type == "MatMulIntegerToFloat" for n in m.graph.node) for m in (model, derive.engine_graph(model))
    ]
    assert count[0] - count[1] == products


def test_weights_that_only_hidden_states_need_are_dropped() -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    model = sketch(
        [
            helper.make_node("Add", ["x", "near"], ["both"]),
            helper.make_node("MatMul", ["both", "far"], ["last_hidden_state"]),
            helper.make_node("Neg", ["both"], ["sentence_embedding"]),
            helper.make_node("Neg", ["both"], ["nobody"]),
        ],
        {"near": table[:1], "far": table.T, "unread": table},
        {"x": TensorProto.FLOAT},
        ["last_hidden_state", "sentence_embedding"],
    )
    engine = derive.engine_graph(model)
    assert [n.op_type for n in engine.graph.node] == ["Add", "Neg"]
    assert [w.name for w in engine.graph.initializer] == ["near"]
    assert np.array_equal(run(opened(engine), {"x": table})["sentence_embedding"], -(table + table[:1]))


def by_column(graph: GraphProto) -> int:
    """How many products are multiplied by their rows' scales afterwards."""
    products = {n.output[0] for n in graph.node if n.op_type == "MatMulIntegerToFloat"}
    return sum(
        n.op_type == "Mul" and n.input[0] in products and n.input[1].endswith((".scale", ".whole")) for n in graph.node
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_product_s_output_is_multiplied_by_its_rows_scales_any_more(folders: dict[str, Path], name: str) -> None:
    model = model_of(folders, name, "int8")
    engine = derive.engine_graph(model)
    taken = [n for n in engine.graph.node if n.op_type == "MatMulIntegerToFloat" and n.input[2] != "row.one"]
    assert by_column(model.graph) >= len(taken) > 0
    assert by_column(engine.graph) == 0
    assert all(n.input[2].endswith((".scale", ".whole")) for n in taken)


U8 = np.array([[0, 128, 255, 7], [130, 90, 128, 200], [128, 128, 128, 128]], np.uint8)
S8 = np.array([[1, -2], [127, 3], [-127, 0], [5, 9]], np.int8)
COLUMNS = np.array([0.25, 3.0], np.float32)
ROWS = np.array([[0.5], [2.0], [0.125]], np.float32)
PRODUCT = ((U8.astype(np.float64) - 128) @ S8) * COLUMNS


def product(
    *after: NodeProto,
    left: float = 1,
    outputs: Sequence[str] = ("sentence_embedding",),
    bias: Sequence[float] | None = None,
) -> ModelProto:
    """u8 rows times s8 weights, a scale a column, then ``after``; ``x.scale`` is an input computed in between."""
    one = "row.one" if left == 1 else "left"  # as make/quantize/per_token.py calls it
    weights: dict[str, Array] = {
        "w": S8,
        "columns": COLUMNS,
        one: np.array(left, np.float32),
        "zero": np.array(128, np.uint8),
        "two": np.array(2, np.float32),
    }
    words = ["u8", "w", one, "columns", "zero"]
    if bias is not None:
        weights["bias"] = np.asarray(bias, np.float32)
        words += ["", "bias"]
    nodes = [
        helper.make_node("MatMulIntegerToFloat", words, ["product"], domain="com.microsoft"),
        helper.make_node("Mul", ["half", "two"], ["x.scale"]),
        *after,
    ]
    return sketch(nodes, weights, {"u8": TensorProto.UINT8, "half": TensorProto.FLOAT}, outputs)


SCALED = helper.make_node("Mul", ["product", "x.scale"], ["sentence_embedding"])


def check_product(model: ModelProto, muls: int, expected: Array) -> None:
    """The engine graph of ``model`` has ``muls`` Muls and gives ``expected``, worked out by hand."""
    engine = derive.engine_graph(model)
    found = run(opened(engine), {"u8": U8, "half": ROWS / 2})["sentence_embedding"]
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    assert sum(n.op_type == "Mul" for n in engine.graph.node) == muls


def test_a_product_takes_the_scales_of_its_rows() -> None:
    check_product(product(SCALED), 1, PRODUCT * ROWS)


def test_a_product_that_somebody_else_reads_stays_as_it_is() -> None:
    scaled = helper.make_node("Mul", ["product", "x.scale"], ["scaled"])
    both = helper.make_node("Add", ["product", "scaled"], ["sentence_embedding"])
    check_product(product(scaled, both), 2, PRODUCT + PRODUCT * ROWS)


def test_a_product_that_is_an_output_itself_stays_as_it_is() -> None:
    after = helper.make_node("Mul", ["sentence_embedding", "x.scale"], ["scaled"])
    model = product(after)
    model.graph.node[0].output[0] = "sentence_embedding"
    model.graph.output.append(helper.make_tensor_value_info("scaled", TensorProto.FLOAT, None))
    check_product(model, 2, PRODUCT)


def test_a_product_times_something_else_stays_as_it_is() -> None:
    check_product(product(helper.make_node("Mul", ["product", "two"], ["sentence_embedding"])), 1, 2 * PRODUCT)


def test_a_product_with_a_left_scale_of_its_own_keeps_it() -> None:
    """Other people's graphs may call a value "x.scale" too."""
    check_product(product(SCALED, left=0.5), 2, 0.5 * PRODUCT * ROWS)


def test_a_product_with_a_bias_is_scaled_together_with_it() -> None:
    check_product(product(SCALED, bias=[10, -10]), 1, (PRODUCT + np.array([10, -10])) * ROWS)


@pytest.mark.parametrize("form", FORMS)
def test_the_model_handed_in_is_not_changed(folders: dict[str, Path], form: Form) -> None:
    for recipe in ("fp32", "int8"):
        model = model_of(folders, "qwen3-tied", recipe)
        if form is not derive.engine_graph:
            model = derive.engine_graph(model)
        before = model.SerializeToString(deterministic=True)
        derived = form(model)
        assert model.SerializeToString(deterministic=True) == before
        assert derived.SerializeToString(deterministic=True) != before


def test_a_graph_without_a_sentence_embedding_comes_back_as_it_is() -> None:
    model = sketch(
        [helper.make_node("Neg", ["x"], ["last_hidden_state"]), helper.make_node("Abs", ["x"], ["unread"])],
        {"unread too": np.ones(3, np.float32)},
        {"x": TensorProto.FLOAT},
        ["last_hidden_state"],
    )
    engine = derive.engine_graph(model)
    assert engine is not model
    assert engine.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def branch(name: str, *nodes: NodeProto) -> GraphProto:
    """A subgraph without inputs: what it reads is captured from the graph around it."""
    last = nodes[-1].output[0]
    return helper.make_graph(list(nodes), name, [], [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)])


def choice(out: str, then: NodeProto, other: NodeProto) -> NodeProto:
    return helper.make_node(
        "If",
        ["yes"],
        [out],
        then_branch=branch(f"{out}.then", then),
        else_branch=branch(f"{out}.else", other),
    )


@pytest.mark.parametrize("nested", [False, True], ids=["a subgraph", "a subgraph in a subgraph"])
def test_names_that_subgraphs_read_are_kept(nested: bool) -> None:
    inner = choice(
        "inner",
        helper.make_node("Mul", ["made", "three"], ["then"]),
        helper.make_node("Add", ["made", "five"], ["else"]),
    )
    outer = choice("sentence_embedding", inner, helper.make_node("Neg", ["x"], ["otherwise"])) if nested else inner
    if not nested:
        outer.output[0] = "sentence_embedding"
    model = sketch(
        [helper.make_node("Abs", ["x"], ["made"]), helper.make_node("Neg", ["x"], ["last_hidden_state"]), outer],
        {
            "yes": np.array(True),
            **{name: np.array([i], np.float32) for name, i in (("three", 3), ("five", 5), ("unread", 7))},
        },
        {"x": TensorProto.FLOAT},
        ["last_hidden_state", "sentence_embedding"],
    )
    engine = derive.engine_graph(model)
    assert {w.name for w in engine.graph.initializer} == {"three", "five", "yes"}
    x = np.array([[-2, 4]], np.float32)
    assert run(opened(engine), {"x": x})["sentence_embedding"].tolist() == [[6, 12]]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_decoders_have_a_past_and_encoders_have_none(folders: dict[str, Path], name: str, recipe: str) -> None:
    model = model_of(folders, name, recipe)
    fused = name in QWENS and not RECIPES[recipe].half  # in standard operators there is no attention to give a past to
    assert derive.has_past(model) is derive.has_past(derive.engine_graph(model)) is fused


LAYERS, HEADS, SIZE = 2, {"qwen3-tied": 2, "qwen3-biased": 1}, {"qwen3-tied": 32, "qwen3-biased": 16}


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("recipe", [name for name, found in RECIPES.items() if not found.half])
@pytest.mark.parametrize("name", QWENS)
def test_keys_and_values_are_one_of_each_a_layer_head_and_token(
    folders: dict[str, Path], name: str, recipe: str, texts: int
) -> None:
    engine = derive.engine_graph(model_of(folders, name, recipe))
    kept = run(opened(derive.keys_and_values(engine)), tokens(random_ids(1, texts, 11)))
    assert list(kept) == [f"present.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    assert {value.shape for value in kept.values()} == {(texts, HEADS[name], 11, SIZE[name])}


def first_layer(model: ModelProto, name: str, ids: Sequence[int]) -> tuple[Array, Array]:
    """Keys and values [heads, T, size] of the first layer, in float64 and one token after the other."""
    weights = {w.name: numpy_helper.to_array(w).astype(np.float64) for w in model.graph.initializer}
    heads, size = HEADS[name], SIZE[name]
    half = size // 2
    keys, values = np.empty((heads, len(ids), size)), np.empty((heads, len(ids), size))

    def norm(x: Array, gain: str) -> Array:
        return np.asarray(x / np.sqrt(np.mean(x * x) + 1e-6) * weights[gain])

    def project(x: Array, layer: str) -> Array:
        return np.asarray(weights[f"{layer}.weight"] @ x + weights.get(f"{layer}.bias", 0))

    for at, token in enumerate(ids):
        x = norm(weights["embed_tokens.weight"][token], "layers.0.input_layernorm.weight")
        k, v = (project(x, f"layers.0.self_attn.{kind}_proj").reshape(heads, size) for kind in "kv")
        angles = [at / 10_000 ** (2 * i / size) for i in range(half)]
        for head in range(heads):
            a, b = np.split(norm(k[head], "layers.0.self_attn.k_norm.weight"), 2)
            keys[head, at, :half] = a * np.cos(angles) - b * np.sin(angles)
            keys[head, at, half:] = b * np.cos(angles) + a * np.sin(angles)
        values[:, at] = v
    return keys, values


@pytest.mark.parametrize("name", QWENS)
def test_keys_and_values_are_those_of_a_plain_twin(folders: dict[str, Path], name: str) -> None:
    model = model_of(folders, name, "fp32")
    ids = random_ids(2, 1, 29)
    kept = run(opened(derive.keys_and_values(derive.engine_graph(model))), tokens(ids))
    twin = first_layer(model, name, ids[0].tolist())
    for kind, expected in zip(("key", "value"), twin, strict=True):
        found = kept[f"present.0.{kind}"][0]
        assert np.abs(found - expected).max() <= ROUNDING * np.abs(expected).max()


def behind(model: ModelProto, lengths: Sequence[tuple[int, int]]) -> Iterator[tuple[Array, Array]]:
    """(whole [1, D], the same text's tail behind its first ``prompt`` tokens [1, D]) for (prompt, tail) lengths."""
    engine = derive.engine_graph(model)
    whole, keys, tail = (opened(m) for m in (engine, derive.keys_and_values(engine), derive.behind_past(engine)))
    for at, (first, last) in enumerate(lengths):
        ids = random_ids(at, 1, first + last)
        past = renamed(run(keys, tokens(ids[:, :first])))
        found = run(tail, {**tokens(ids[:, first:]), **past})
        assert list(found) == ["sentence_embedding"]
        yield run(whole, tokens(ids))["sentence_embedding"], found["sentence_embedding"]


# two tokens of text at least: the kernel for a single one rounds otherwise
LENGTHS = [(first, last) for first in (1, 2, 4, 9, 30) for last in (2, 3, 5, 16, 34)]


@pytest.mark.parametrize("recipe", [*FLOAT, *BITS8])
@pytest.mark.parametrize("name", QWENS)
def test_a_text_behind_its_prompt_has_the_vector_of_the_whole(folders: dict[str, Path], name: str, recipe: str) -> None:
    pairs = list(behind(model_of(folders, name, recipe), LENGTHS))
    assert max(float(np.abs(a - b).max()) for a, b in pairs) <= ROUNDING
    assert min(float(np.abs(a - b).max()) for (a, _), (_, b) in pairwise(pairs)) > 1000 * ROUNDING


def test_a_past_at_the_wrong_places_would_be_seen(folders: dict[str, Path]) -> None:
    engine = derive.engine_graph(model_of(folders, "qwen3-tied", "fp32"))
    ids = random_ids(3, 1, 12)
    kept = run(opened(derive.keys_and_values(engine)), tokens(ids[:, :8]))
    tail, whole = opened(derive.behind_past(engine)), run(opened(engine), tokens(ids))["sentence_embedding"]
    for wrong in (
        {name: value[:, :, 1:] for name, value in kept.items()},
        {name: value[:, :, ::-1].copy() for name, value in kept.items() if "key" in name}
        | {name: value for name, value in kept.items() if "value" in name},
    ):
        found = run(tail, {**tokens(ids[:, 8:]), **renamed(wrong)})["sentence_embedding"]
        assert drift(found, whole) > 100 * ROUNDING


def test_a_past_s_axes_say_what_they_are(folders: dict[str, Path]) -> None:
    tail = opened(derive.behind_past(derive.engine_graph(model_of(folders, "qwen3-tied", "int8"))))
    ports = {i.name: i.shape for i in tail.get_inputs() if "past" in i.name}
    assert list(ports) == [f"past_key_values.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    assert {tuple(shape) for shape in ports.values()} == {("batch_size", 2, "past_length", 32)}


def long_drift(model: ModelProto) -> float:
    engine = derive.engine_graph(model)
    plain, long = opened(engine), opened(derive.for_long(engine))
    pairs = [[run(s, feeds)["sentence_embedding"] for s in (plain, long)] for feeds in batches()]
    # 300 tokens: more than one block of keys
    wide = [run(s, tokens(random_ids(9, 2, 300)))["sentence_embedding"] for s in (plain, long)]
    return max(drift(*pair) for pair in (*pairs, wide))


@pytest.mark.parametrize("recipe", FLOAT)
@pytest.mark.parametrize("name", QWENS)
def test_the_form_for_long_texts_gives_the_same_vectors(folders: dict[str, Path], name: str, recipe: str) -> None:
    assert long_drift(model_of(folders, name, recipe)) <= ROUNDING


@pytest.mark.parametrize("recipe", BITS8)
@pytest.mark.parametrize("name", QWENS)
def test_in_8_bits_the_form_for_long_texts_is_a_flipped_code_away_at_most(
    folders: dict[str, Path], name: str, recipe: str
) -> None:
    assert long_drift(model_of(folders, name, recipe)) <= FLIP


@pytest.mark.parametrize("form", [derive.behind_past, derive.for_long, derive.keys_and_values])
def test_further_forms_share_the_engine_graph_s_weights(folders: dict[str, Path], form: Form) -> None:
    """They are saved over one file of weights: each names what the engine graph holds, and adds scalars at most."""
    engine = derive.engine_graph(model_of(folders, "qwen3-biased", "int8"))
    held = {w.name: w for w in engine.graph.initializer}
    for weight in form(engine).graph.initializer:
        assert held.get(weight.name) == weight or np.prod(weight.dims) == 1
