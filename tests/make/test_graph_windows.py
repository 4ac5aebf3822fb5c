"""modernbert and gemma3_text: windows and rotary bases by kind of layer, every recipe, every padding, every refusal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import featherbed
from featherbed.errors import CheckpointError, FeatherbedError, SpecError, UnknownArchitectureError
from featherbed.folder import graph_name
from featherbed.make.checkpoint import open_checkpoint
from featherbed.make.graph import reference_graph
from featherbed.make.graph.blocks import Aligned, Blocks, attention
from featherbed.make.graph.windows import FULL, SLIDING, sights
from featherbed.make.ir import Graph, Port
from featherbed.make.read import read_graph
from featherbed.make.transforms import rotate
from featherbed.make.write import model_bytes
from featherbed.recipe import RECIPES
from featherbed.run import derive
from featherbed.run.embedder import Embedder
from featherbed.run.session import Engine, Memory, Piece, Session
from featherbed.spec import read_spec
from tests.conftest import CALIBRATION, FIXTURES, made_by, ran, reference_of, upstream

Checkpoint = Callable[[str], Path]
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
NAMES = ("modernbert", "gemma3")
TRIED = ("fp32", "int8", "int8-block", "int4", "q4")
LEAST_COS = {"fp32": 0.9999999, "int8": 0.99, "int8-block": 0.995, "int4": 0.93, "q4": 0.8}  # of random models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("windows")
    build = partial(featherbed.build, variants=TRIED, check=False, calibration=CALIBRATION)
    return {name: build(FIXTURES / name, root / name).folder for name in NAMES}


@cache
def opened(name: str, recipe: str) -> Piece:
    return Piece(model_bytes(made_by(name, recipe)))


def run(name: str, recipe: str, ids: Ids, mask: Ids) -> tuple[Floats, Floats]:
    """(last_hidden_state [B, T, D], sentence_embedding [B, M]) of a fixture's variant."""
    feeds = {"input_ids": ids, "attention_mask": mask}
    hidden, vectors = opened(name, recipe).run(["last_hidden_state", "sentence_embedding"], feeds)
    return hidden, vectors


def census(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


def build_changed(folder: Path, change: dict[str, Any]) -> Graph:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **change}), "utf-8")
    return reference_graph(open_checkpoint(folder), read_spec(folder))


# the window and the two bases


def plain_attention(qkv: Floats, lengths: list[int], heads: int, theta: float, reach: int | None) -> Floats:
    """Attention of packed rows [B, T, 3 · heads · size], one query at a time, in float64."""
    count, width, packed = qkv.shape
    size = packed // heads // 3
    parts = qkv.astype(np.float64).reshape(count, width, 3, heads, size)
    angles = np.arange(width)[:, None] / theta ** (np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]

    def turned(x: Any) -> Any:
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    q, k, v = turned(parts[:, :, 0]), turned(parts[:, :, 1]), parts[:, :, 2]
    seen = np.zeros((count, width, heads, size))
    for text in range(count):
        for at in range(lengths[text]):
            start = 0 if reach is None else max(0, at - reach)
            end = lengths[text] if reach is None else min(lengths[text], at + reach + 1)
            for head in range(heads):
                scores = k[text, start:end, head] @ q[text, at, head] / np.sqrt(size)
                shares = np.exp(scores - scores.max())
                seen[text, at, head] = shares / shares.sum() @ v[text, start:end, head]
    return np.asarray(seen.reshape(count, width, -1), np.float32)


@pytest.mark.parametrize("reach", [1, 4, 40])
@pytest.mark.parametrize("kind", [FULL, SLIDING])
@pytest.mark.parametrize("width", [1, 2, 5, 6, 23])
def test_a_layer_sees_its_window_and_nothing_else(width: int, kind: str, reach: int) -> None:
    heads, size, bases = 2, 16, {FULL: 90.0, SLIDING: 7.0}
    b = Blocks("piece")
    aligned = Aligned(b, "attention_mask")
    sight = sights(b, aligned, size, bases, reach, (kind,))[kind]
    shape = {"num_heads": heads, "kv_num_heads": heads, "causal": 0}
    attention(b, ("qkv", "", ""), aligned.seqlens(), sight.rotary, shape, sight.bias)
    ports = (
        Port("qkv", np.dtype(np.float32), ("B", "T", 3 * heads * size)),
        Port("attention_mask", np.dtype(np.int64), ("B", "T")),
    )
    out = next(node.outputs[0] for node in b.graph(ports, ()).nodes if node.op == "GroupQueryAttention")
    graph = b.graph(ports, (Port(out, np.dtype(np.float32), ()),))
    lengths = [width, max(1, width - 3)]
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    qkv = np.random.default_rng(width).standard_normal((2, width, 3 * heads * size)).astype(np.float32)
    found = Piece(model_bytes(graph)).run([out], {"qkv": qkv, "attention_mask": mask})[0]
    expected = plain_attention(qkv, lengths, heads, bases[kind], reach if kind == SLIDING else None)
    assert np.isfinite(found).all()  # of padding too: a mean would carry what is not finite
    assert np.abs(found[mask > 0] - expected[mask > 0]).max() < 5e-6


@pytest.mark.parametrize(("name", "key"), [("modernbert", "local_attention"), ("gemma3", "sliding_window")])
def test_a_window_counts_half_to_each_side_and_an_odd_one_is_rounded_down(
    checkpoint: Checkpoint, name: str, key: str
) -> None:
    known, folder = upstream(name), checkpoint(name)
    vectors = {wide: ran(build_changed(folder, {key: wide}), known.ids, known.mask)[1] for wide in (6, 8, 9, 1000)}
    assert np.array_equal(vectors[8], vectors[9])
    long = known.mask.sum(1) > 9
    assert np.abs(vectors[8] - vectors[6])[long].max() > 1e-3
    assert np.abs(vectors[8] - vectors[1000])[long].max() > 1e-3
    short = known.mask.sum(1) <= 4
    assert short.any()
    assert np.abs(vectors[6] - vectors[1000])[short].max() < 1e-6


OLD_KEYS: dict[
    str, dict[str, Any]
] = {  # as transformers 4 wrote them, with the values that the fixtures have under rope_parameters
    "modernbert": {"global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0},
    "gemma3": {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "rope_scaling": None},
}


@pytest.mark.parametrize("name", NAMES)
def test_bases_and_kinds_of_layers_are_read_where_transformers_4_wrote_them(checkpoint: Checkpoint, name: str) -> None:
    known = upstream(name)
    expected = ran(reference_of(FIXTURES / name), known.ids, known.mask)[1]
    folder = checkpoint(name)
    old = {"rope_parameters": None, "layer_types": None, **OLD_KEYS[name]}
    assert np.array_equal(ran(build_changed(folder, old), known.ids, known.mask)[1], expected)
    silent = dict.fromkeys(OLD_KEYS[name])
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in silent}), "utf-8")
    assert np.array_equal(ran(build_changed(folder, {}), known.ids, known.mask)[1], expected)  # the defaults
    for key in list(OLD_KEYS[name])[:2]:
        other = ran(build_changed(folder, {**OLD_KEYS[name], key: 77.0}), known.ids, known.mask)[1]
        assert np.abs(other - expected).max() > 1e-4, key


@pytest.mark.parametrize("name", NAMES)
def test_each_kind_of_layer_has_one_table_and_one_window_for_all_of_them(name: str) -> None:
    graph, found = reference_of(FIXTURES / name), census(reference_of(FIXTURES / name))
    assert (found["Cos"], found["Sin"], found["Where"]) == (2, 2, 2)  # the other Where moves tokens to the front
    nodes = [node for node in graph.nodes if node.op == "GroupQueryAttention"]
    kinds = json.loads((FIXTURES / name / "config.json").read_text("utf-8"))["layer_types"]
    assert ["bias" if len(node.inputs) > 9 else "" for node in nodes] == [
        "bias" if kind == SLIDING else "" for kind in kinds
    ]
    assert all(dict(node.attributes)["causal"] == 0 and len(node.outputs) == 1 for node in nodes)
    assert "rotary.frequencies" not in graph.weights


# what a graph computes


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_gives_upstreams_vectors(name: str) -> None:
    known = upstream(name)
    assert known.mask.sum(1).max() > 3 * 4  # longer than the window, which is 4 to each side
    _, vectors = ran(reference_of(FIXTURES / name), known.ids, known.mask)
    assert np.abs(vectors - known.unit).max() <= 2e-5


@pytest.mark.parametrize("recipe", TRIED)
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_near_upstream_and_a_text_alone_is_what_it_is_in_company(
    folders: dict[str, Path], name: str, recipe: str
) -> None:
    known, embedder = upstream(name), Embedder(folders[name], recipe)
    together = embedder.embed_ids(known.rows)
    assert (together * known.unit).sum(1).min() >= LEAST_COS[recipe]
    alone = np.concatenate([embedder.embed_ids([row]) for row in known.rows])
    assert np.abs(alone - together).max() <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_vectors_that_are_not_normalised_are_upstream_s_too(folders: dict[str, Path], name: str) -> None:
    known = upstream(name)
    found = Embedder(folders[name], "fp32").encode(known.texts, normalize_embeddings=False)
    assert np.abs(found - known.vectors).max() <= 1e-4 * np.abs(known.vectors).max()


@settings(max_examples=40, deadline=None)
@given(drawn=st.data(), name=st.sampled_from(NAMES), recipe=st.sampled_from(TRIED))
def test_whatever_the_mask_the_real_tokens_decide_alone(drawn: st.DataObject, name: str, recipe: str) -> None:
    batch, width = drawn.draw(st.integers(1, 4)), drawn.draw(st.integers(1, 14))
    rng = np.random.default_rng(drawn.draw(st.integers(0, 2**32)))
    mask = rng.integers(0, 2, (batch, width))
    mask[np.arange(batch), rng.integers(0, width, batch)] = 1
    ids = rng.integers(0, 384, (batch, width))  # padding too has ids of its own
    hidden, vectors = run(name, recipe, ids, mask)
    rows = [ids[at][mask[at] > 0] for at in range(batch)]
    right, right_mask = np.zeros_like(ids), np.zeros_like(mask)
    for at, row in enumerate(rows):
        right[at, : len(row)], right_mask[at, : len(row)] = row, 1
    expected_hidden, expected = run(name, recipe, right, right_mask)
    assert np.abs(vectors - expected).max() <= 1e-6
    for at, row in enumerate(rows):
        assert np.abs(hidden[at][mask[at] > 0] - expected_hidden[at][: len(row)]).max() <= 1e-5


A_TENSOR = ("int8-dynamic", "int8-smooth", "int8-full", "uint8")  # these have one activation scale a batch


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in A_TENSOR])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_tokens_is_nan_and_does_not_disturb_its_neighbours(name: str, recipe: str) -> None:
    ids = np.array([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])
    mask = np.ones_like(ids)
    _, vectors = run(name, recipe, ids, mask)
    mask[1] = 0
    _, without = run(name, recipe, ids, mask)
    assert np.abs(vectors[[0, 2]] - without[[0, 2]]).max() <= 1e-6
    assert np.isnan(without[1]).all()


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_both_widths_and_passes_the_checker(name: str, recipe: str) -> None:
    spec, graph = read_spec(FIXTURES / name), made_by(name, recipe)
    assert {port.name: port.axes[-1] for port in graph.outputs} == {
        "last_hidden_state": spec.hidden_width,
        "sentence_embedding": spec.dim,
        **({"sentence_embedding_quantized": spec.dim} if recipe == "uint8-out" else {}),
    }
    model = onnx.load_from_string(model_bytes(graph))
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {entry.domain: entry.version for entry in model.opset_import}
    for node in model.graph.node:
        if node.domain == "" and node.op_type != "SimplifiedLayerNormalization":
            onnx.checker.check_node(node, context)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_file_is_read_back_into_its_graph(folders: dict[str, Path], name: str) -> None:
    back, known = read_graph(folders[name] / graph_name("")), upstream(name)
    assert back.linear_names() == reference_of(FIXTURES / name).linear_names()
    assert np.array_equal(
        ran(back, known.ids, known.mask)[1], ran(reference_of(FIXTURES / name), known.ids, known.mask)[1]
    )


# rotation, and the engine's forms


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_that_layers_are_not_added_to_as_they_are_is_not_rotated(name: str) -> None:
    graph = reference_of(FIXTURES / name)
    assert not rotate.fits(graph)
    assert rotate.apply(graph) is graph
    assert rotate.fits(reference_of(FIXTURES / "qwen3-biased"))


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_is_kept_of_a_model_that_sees_both_sides(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    path, known = folders[name] / graph_name(RECIPES["int8"].suffix), upstream(name)
    assert not derive.has_past(onnx.load(path))
    cached = Session(path, Engine(memory=Memory(cache=tmp_path)), width=read_spec(FIXTURES / name).dim)
    assert cached.prepacked is not None
    assert not cached.keeps_past
    embedder = Embedder(folders[name], "int8", memory=Memory(cache=tmp_path))
    plain = Embedder(folders[name], "int8", memory=Memory(cache=False))
    assert np.abs(embedder.embed_ids(known.rows) - plain.embed_ids(known.rows)).max() <= 1e-6
    assert embedder.prompts_bytes == 0


# other spellings, and what is refused


@pytest.mark.parametrize("name", NAMES)
def test_tensors_under_model_are_known_and_heads_are_left_out(checkpoint: Checkpoint, name: str) -> None:
    known, folder = upstream(name), checkpoint(name)
    tensors = {f"model.{k}": v for k, v in raw_tensors(folder).items()}
    tensors |= {"head.dense.weight": np.zeros((48, 48), np.uint16), "decoder.bias": np.zeros(384, np.uint16)}
    write_raw(folder, tensors)
    expected = ran(reference_of(FIXTURES / name), known.ids, known.mask)[1]
    assert np.array_equal(ran(build_changed(folder, {}), known.ids, known.mask)[1], expected)


def raw_tensors(folder: Path) -> dict[str, Any]:
    """The tensors by name, those in bfloat16 as their bits: numpy has no such type."""
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    return {
        key: np.frombuffer(data[8 + size :][slice(*entry["data_offsets"])], np.uint16).reshape(entry["shape"])
        for key, entry in header.items()
    }


def write_raw(folder: Path, tensors: dict[str, Any]) -> None:
    """The opposite, with the type that the folder's config says."""
    dtype = {"bfloat16": "BF16", "float16": "F16"}[
        json.loads((folder / "config.json").read_text("utf-8"))["torch_dtype"]
    ]
    header, at = {}, 0
    for key, value in tensors.items():
        header[key] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    body = b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_biases_of_modernbert_are_added_where_the_config_has_them(checkpoint: Checkpoint) -> None:
    known, folder = upstream("modernbert"), checkpoint("modernbert")
    plain = ran(reference_of(FIXTURES / "modernbert"), known.ids, known.mask)[1]
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(1)
    for name in list(tensors):
        if name.endswith(".weight") and "tok_embeddings" not in name:
            rows = len(tensors[name])
            tensors[name.removesuffix("weight") + "bias"] = (0.3 * rng.standard_normal(rows)).astype(np.float16)
    save_file(tensors, folder / "model.safetensors")
    seen = [plain]
    for key in ("norm_bias", "attention_bias", "mlp_bias"):
        vectors = ran(build_changed(folder, {key: True}), known.ids, known.mask)[1]
        assert np.abs(vectors - seen[-1]).max() > 1e-3
        seen.append(vectors)


SCALED = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("modernbert", {"hidden_activation": "silu"}, "'silu'"),
        ("modernbert", {"num_attention_heads": 5}, "5"),
        ("modernbert", {"num_attention_heads": 6}, "8"),  # a head of 8 numbers cannot be turned
        ("modernbert", {"layer_types": [FULL, SLIDING, "chunked_attention"]}, "'chunked_attention'"),
        ("modernbert", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "rope_theta"),
        ("modernbert", {"rope_parameters": {FULL: {"rope_type": "yarn", "rope_theta": 1e4}}}, "'yarn'"),
        ("modernbert", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("modernbert", {"partial_rotary_factor": 0.5}, "0.5"),
        ("gemma3", {"use_bidirectional_attention": False}, "False"),
        ("gemma3", {"use_bidirectional_attention": None}, "None"),
        ("gemma3", {"is_causal": False}, "False"),
        ("gemma3", {"hidden_activation": "gelu"}, "'gelu'"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "50.0"),
        ("gemma3", {"head_dim": 24}, "24"),
        ("gemma3", {"rope_scaling": SCALED}, "'linear'"),
        ("gemma3", {"rope_parameters": {FULL: {**SCALED, "rope_theta": 1e6}}}, "'linear'"),
        ("gemma3", {"layer_types": ["full", SLIDING, SLIDING]}, "'full'"),
    ],
    ids=str,
)
def test_a_setting_that_is_not_built_here_is_refused_and_named(
    checkpoint: Checkpoint, name: str, change: dict[str, Any], found: str
) -> None:
    with pytest.raises(UnknownArchitectureError) as caught:
        build_changed(checkpoint(name), change)
    assert f"found {found}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_gemma_that_says_nothing_of_both_sides_is_causal_and_refused(checkpoint: Checkpoint) -> None:
    folder = checkpoint("gemma3")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["use_bidirectional_attention"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UnknownArchitectureError, match="use_bidirectional_attention"):
        build_changed(folder, {})


@pytest.mark.parametrize(
    ("name", "change", "kind"),
    [
        ("modernbert", {"num_hidden_layers": 4, "layer_types": None}, CheckpointError),
        ("modernbert", {"num_hidden_layers": 4}, SpecError),
        ("modernbert", {"intermediate_size": 41}, CheckpointError),
        ("modernbert", {"mlp_bias": True}, CheckpointError),
        ("modernbert", {"norm_bias": True}, CheckpointError),
        ("modernbert", {"local_attention": -1}, SpecError),
        ("modernbert", {"global_attn_every_n_layers": 0}, SpecError),
        ("modernbert", {"vocab_size": 385}, CheckpointError),
        ("gemma3", {"num_key_value_heads": 3}, CheckpointError),
        ("gemma3", {"layer_types": "sliding"}, SpecError),
        ("gemma3", {"attention_bias": True}, CheckpointError),
        ("gemma3", {"sliding_window": 0}, SpecError),
        ("gemma3", {"query_pre_attn_scalar": 0}, SpecError),
        ("gemma3", {"rms_norm_eps": None}, SpecError),
        ("gemma3", {"rope_parameters": {FULL: {"rope_theta": None}}}, SpecError),
    ],
    ids=str,
)
def test_a_config_that_does_not_belong_to_the_weights_is_refused(
    checkpoint: Checkpoint, name: str, change: dict[str, Any], kind: type[FeatherbedError]
) -> None:
    with pytest.raises(kind) as caught:
        build_changed(checkpoint(name), change)
    assert len(str(caught.value).splitlines()) == 1
