"""The families beside bert and qwen3: upstream's vectors, whatever the padding, and settings that are refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import cache
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

import featherbed
from featherbed.errors import CheckpointError, SpecError, UnknownArchitectureError
from featherbed.folder import graph_name
from featherbed.make.checkpoint import open_checkpoint
from featherbed.make.graph import reference_graph
from featherbed.make.graph.mpnet import FARTHEST, buckets
from featherbed.make.ir import Graph
from featherbed.make.write import model_bytes
from featherbed.run import derive
from featherbed.run.embedder import Embedder
from featherbed.run.pooling import cut, layer_norm, normalize
from featherbed.run.session import Memory
from featherbed.spec import Pooling, Spec, read_spec
from tests.conftest import CALIBRATION, FIXTURES, made_by, ran, reference_of, upstream

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
FAMILIES = ("xlm-roberta", "mpnet", "nomic_bert", "qwen2")
ENCODERS = ("xlm-roberta", "mpnet", "nomic_bert")
BUILT = ("fp32", "int8", "int4", "q4")
VOCABULARY = 384


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each family. Do not change them."""
    root = tmp_path_factory.mktemp("families")
    return {
        name: featherbed.build(FIXTURES / name, root / name, BUILT, check=False, calibration=CALIBRATION).folder
        for name in FAMILIES
    }


@cache
def opened(name: str, recipe: str) -> Any:
    """onnxruntime's session of a fixture's graph after a recipe."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    graph = made_by(name, recipe)
    return ort.InferenceSession(model_bytes(graph), options, providers=["CPUExecutionProvider"])


def run(name: str, recipe: str, ids: Ids, mask: Ids) -> tuple[Vectors, Vectors]:
    """(last_hidden_state [B, T, D], sentence_embedding [B, D])."""
    session = opened(name, recipe)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    names = [port.name for port in session.get_inputs()]
    hidden, vectors = session.run(["last_hidden_state", "sentence_embedding"], {n: feeds[n] for n in names})
    return hidden, vectors


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """A private copy of a fixture, its config.json changed; None takes a key out."""

    def make(name: str, **changes: Any) -> Path:
        folder = Path(shutil.copytree(FIXTURES / name, tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"))
        config = json.loads((folder / "config.json").read_text("utf-8")) | changes
        config = {key: value for key, value in config.items() if key not in changes or value is not None}
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        return folder

    return make


def placed(rows: list[list[int]], width: int, side: str) -> tuple[Ids, Ids]:
    """Ids and mask [B, T]: padding with random ids left, right, or among the tokens."""
    rng = np.random.default_rng(len(rows) * width)
    ids, mask = rng.integers(0, VOCABULARY, (len(rows), width)), np.zeros((len(rows), width), np.int64)
    for at, row in enumerate(rows):
        places = {
            "left": np.arange(width - len(row), width),
            "right": np.arange(len(row)),
            "holes": np.sort(rng.choice(width, len(row), replace=False)),
        }[side]
        ids[at, places], mask[at, places] = row, 1
    return ids, mask


def short(name: str, most: int = 40) -> list[list[int]]:
    """Rows of a fixture that leave room for padding."""
    return [row for row in upstream(name).rows if len(row) <= most]


# what a graph computes


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_gives_upstreams_vectors(name: str) -> None:
    known = upstream(name)
    _, vectors = ran(reference_of(FIXTURES / name), known.ids, known.mask)
    assert np.abs(vectors - known.unit).max() <= 2e-6
    if name == "mpnet":  # far enough apart for distances that share a bucket
        assert max(map(len, known.rows)) > 17


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
@pytest.mark.parametrize("side", ["left", "holes"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_side_of_the_padding_changes_nothing(name: str, side: str, recipe: str) -> None:
    rows = short(name)
    width = max(map(len, rows)) + 3
    ids, mask = placed(rows, width, "right")
    expected_hidden, expected = run(name, recipe, ids, mask)
    ids, mask = placed(rows, width, side)
    hidden, vectors = run(name, recipe, ids, mask)
    assert np.abs(vectors - expected).max() <= 1e-6
    for at, row in enumerate(rows):
        assert np.abs(hidden[at][mask[at] > 0] - expected_hidden[at][: len(row)]).max() <= 1e-5


@settings(max_examples=25, deadline=None)
@given(drawn=st.data(), name=st.sampled_from(FAMILIES))
def test_whatever_the_mask_the_real_tokens_decide_alone(drawn: st.DataObject, name: str) -> None:
    batch, width = drawn.draw(st.integers(1, 3)), drawn.draw(st.integers(1, 24))
    rng = np.random.default_rng(drawn.draw(st.integers(0, 2**32)))
    mask = rng.integers(0, 2, (batch, width))
    mask[np.arange(batch), rng.integers(0, width, batch)] = 1
    ids = rng.integers(0, VOCABULARY, (batch, width))
    _, vectors = run(name, "fp32", ids, mask)
    for at in range(batch):
        row = ids[at][mask[at] > 0][None]
        assert np.abs(run(name, "fp32", row, np.ones_like(row))[1][0] - vectors[at]).max() <= 1e-6


@pytest.mark.parametrize("recipe", BUILT)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_alone_has_the_vector_it_has_in_company(name: str, recipe: str) -> None:
    known = upstream(name)
    _, together = run(name, recipe, known.ids, known.mask)
    for at, row in enumerate(known.rows):
        _, alone = run(name, recipe, np.array([row]), np.ones((1, len(row)), np.int64))
        assert np.abs(alone[0] - together[at]).max() <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_every_recipe_stays_near_the_reference(built: dict[str, Path], name: str) -> None:
    texts = upstream(name).texts
    exact = Embedder(built[name], "fp32").encode(texts)
    assert np.abs(exact - upstream(name).unit).max() <= 2e-6
    for recipe, least in (("int8", 0.97), ("int4", 0.4), ("q4", 0.25)):  # random weights
        cosines = (Embedder(built[name], recipe).encode(texts) * exact).sum(1)
        assert cosines.min() > least, recipe
        assert cosines.max() < 1 - 1e-7, recipe


@pytest.mark.parametrize("name", FAMILIES)
def test_prepacked_weights_give_the_same_and_only_decoders_keep_prompts(
    built: dict[str, Path], tmp_path: Path, name: str
) -> None:
    texts = upstream(name).texts
    kept = Embedder(built[name], "fp32", memory=Memory(cache=tmp_path))
    assert kept._session.prepacked is not None
    assert kept._session.keeps_past == (name not in ENCODERS)
    expected = Embedder(built[name], "fp32").encode(texts, prompt="find: ")
    assert np.abs(kept.encode(texts, prompt="find: ") - expected).max() <= 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_prompt_leaves_behind_is_kept_only_where_no_token_sees_those_behind_it(
    built: dict[str, Path], name: str
) -> None:
    model = onnx.load(str(built[name] / graph_name("")))
    assert derive.has_past(model) == (name not in ENCODERS)


# settings


def graph_of(folder: Path) -> Graph:
    return reference_graph(open_checkpoint(folder), read_spec(folder))


def vectors_of(folder: Path) -> Vectors:
    known = upstream(folder.name.rpartition("-")[0])
    return ran(graph_of(folder), known.ids, known.mask)[1]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {"hidden_act": "gelu_new"}) for name in ("xlm-roberta", "mpnet", "nomic_bert", "qwen2")),
        ("xlm-roberta", {"position_embedding_type": "relative_key"}),
        ("xlm-roberta", {"is_decoder": True}),
        ("mpnet", {"relative_attention_num_buckets": 64}),
        ("mpnet", {"num_attention_heads": 4}),
        ("nomic_bert", {"activation_function": "gelu"}),
        ("nomic_bert", {"prenorm": True}),
        ("nomic_bert", {"rotary_emb_fraction": 0.5}),
        ("nomic_bert", {"rotary_emb_interleaved": True}),
        ("nomic_bert", {"rotary_scaling_factor": 2.0}),
        ("nomic_bert", {"qkv_proj_bias": True}),
        ("nomic_bert", {"num_experts": 8}),
        ("nomic_bert", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1000.0}}),
        ("qwen2", {"use_sliding_window": True}),
    ],
    ids=str,
)
def test_a_setting_that_is_not_built_here_is_refused_not_ignored(
    copy: Callable[..., Path], name: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(UnknownArchitectureError) as caught:
        graph_of(copy(name, **changes))
    assert len(str(caught.value).splitlines()) == 1
    words = {"use_sliding_window": "sliding window", "rope_parameters": "rope_type", "num_attention_heads": "head size"}
    assert all(words.get(key, key) in str(caught.value) for key in changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("xlm-roberta", {"type_vocab_size": 2}),
        ("xlm-roberta", {"max_position_embeddings": 65}),
        ("mpnet", {"intermediate_size": 80}),
        ("nomic_bert", {"num_hidden_layers": 3}),
        ("nomic_bert", {"vocab_size": 448}),
        ("qwen2", {"num_key_value_heads": 3}),
    ],
    ids=str,
)
def test_a_config_that_does_not_belong_to_the_weights_is_refused(
    copy: Callable[..., Path], name: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json belongs to these weights"):
        graph_of(copy(name, **changes))


def renamed_tensors(folder: Path, name_of: Callable[[str], str]) -> None:
    tensors = {name_of(key): value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(("name", "root"), [("xlm-roberta", "roberta."), ("mpnet", "mpnet."), ("qwen2", "model.")])
def test_tensors_below_a_root_are_known(copy: Callable[..., Path], name: str, root: str) -> None:
    plain, below = copy(name), copy(name)
    renamed_tensors(below, lambda key: root + key)
    assert np.array_equal(vectors_of(below), vectors_of(plain))


def test_older_names_of_norms_are_known(copy: Callable[..., Path]) -> None:
    plain, old = copy("mpnet"), copy("mpnet")
    renamed_tensors(old, lambda key: key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"))
    assert np.array_equal(vectors_of(old), vectors_of(plain))


@pytest.mark.parametrize("kind", ["roberta", "camembert"])
def test_roberta_and_camembert_are_the_same_function(copy: Callable[..., Path], kind: str) -> None:
    folder = copy("xlm-roberta", model_type=kind)
    assert read_spec(folder).family == kind
    assert np.array_equal(vectors_of(folder), vectors_of(copy("xlm-roberta")))


PUBLISHED = {  # as nomic-ai wrote them, and transformers does not
    "hidden_size": None, "num_hidden_layers": None, "num_attention_heads": None, "intermediate_size": None,
    "layer_norm_eps": None, "hidden_act": None, "rope_parameters": None, "head_dim": None,
    "max_position_embeddings": None, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_inner": 80,
    "layer_norm_epsilon": 1e-12, "activation_function": "swiglu", "rotary_emb_base": 1000, "n_positions": 8192,
    "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "prenorm": False,
    "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "use_rms_norm": False, "causal": False,
}  # fmt: skip


def test_the_config_that_nomic_published_means_the_same(copy: Callable[..., Path]) -> None:
    new, old = copy("nomic_bert"), copy("nomic_bert", **PUBLISHED)
    assert np.array_equal(vectors_of(old), vectors_of(new))
    other = copy("nomic_bert", **{**PUBLISHED, "rotary_emb_base": 10_000})
    assert not np.array_equal(vectors_of(other), vectors_of(new))
    (old / "tokenizer_config.json").write_text("{}", "utf-8")
    assert read_spec(old).max_length == 8192


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_decoder_that_says_is_causal_false_sees_both_ways(copy: Callable[..., Path], family: str) -> None:
    name = {"qwen2": "qwen2", "qwen3": "qwen3-tied"}[family]
    ids = np.array([[20, 30, 40, 50]])
    changed = ids.copy()
    changed[0, -1] = 60
    for causal in (True, False):
        graph = graph_of(copy(name, is_causal=causal))
        first = [ran(graph, one, np.ones_like(one))[0][0, 0] for one in (ids, changed)]
        assert np.array_equal(*first) == causal


# what a spec says of them


def test_what_files_do_not_say_is_the_families(copy: Callable[..., Path]) -> None:
    found: dict[str, Spec] = {}
    for name in FAMILIES:
        folder = copy(name)
        (folder / "config_sentence_transformers.json").unlink()
        (folder / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}', "utf-8")
        if name != "xlm-roberta":
            (folder / "1_Pooling" / "config.json").unlink()
        found[name] = read_spec(folder)
    assert [found[n].max_length for n in FAMILIES] == [64, 64, 66, 128]  # positions behind the pad's
    assert [found[n].pooling for n in FAMILIES] == [Pooling.CLS, Pooling.MEAN, Pooling.MEAN, Pooling.LAST]
    assert [found[n].token_types for n in FAMILIES] == [False, False, True, False]
    assert [found[n].norm_before_cut for n in FAMILIES] == [False, False, True, False]
    assert found["nomic_bert"].prompts == {"query": "search_query: ", "document": "search_document: "}
    assert not any(found[n].prompts for n in FAMILIES if n != "nomic_bert")
    for spec in found.values():
        assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_positions_begin_behind_the_pad_whatever_its_id(copy: Callable[..., Path]) -> None:
    moved = copy("xlm-roberta", pad_token_id=3)
    tokens = json.loads((moved / "tokenizer_config.json").read_text("utf-8"))
    (moved / "tokenizer_config.json").write_text(json.dumps({**tokens, "model_max_length": 512}), "utf-8")
    assert read_spec(moved).max_length == 62
    ids = np.array([[0, 20, 30, 2]])
    one, other = (ran(graph_of(f), ids, np.ones_like(ids))[1] for f in (moved, copy("xlm-roberta")))
    assert np.abs(one - other).max() > 1e-3
    for wrong in ("1", True, -1):
        with pytest.raises(SpecError, match="pad_token_id"):
            read_spec(copy("xlm-roberta", pad_token_id=wrong))
    with pytest.raises(SpecError, match="max_position_embeddings"):
        read_spec(copy("mpnet", max_position_embeddings=2))


# the bias of mpnet


def plain_bucket(distance: int) -> int:
    """The bucket of a distance, key minus query (Raffel et al. 2020, both directions)."""
    far, side = abs(distance), 16 if distance > 0 else 0
    if far < 8:
        return side + far
    return side + min(15, 8 + math.floor(math.log(far / 8) / math.log(128 / 8) * 8 + 1e-6))


def test_distances_fall_into_the_buckets_of_the_paper() -> None:
    distances = np.arange(-600, 601)
    assert buckets(distances).tolist() == [plain_bucket(int(d)) for d in distances]
    ends = buckets(np.array([-10_000, -FARTHEST, FARTHEST - 1, 10_000]))
    assert ends.tolist() == [15, 15, 31, 31]  # nothing is lost where distances are clipped


def test_the_bias_reaches_tokens_that_are_far_apart() -> None:
    table = load_file(FIXTURES / "mpnet" / "model.safetensors")["encoder.relative_attention_bias.weight"]
    graph = reference_of(FIXTURES / "mpnet")
    at = next(n for n in graph.nodes if n.op == "GroupQueryAttention").inputs[10]
    nodes = [n for n in graph.nodes if n.op in ("Unsqueeze", "Transpose") and n.outputs[0] == at]
    assert len(nodes) == 1
    weight = next(w for n, w in graph.weights.items() if n.endswith("by_distance")).array()
    assert weight.nbytes % 64 == 0  # what onnxruntime saves behind it begins where its kernel can read
    for distance in (-128, -90, -20, -1, 0, 1, 7, 8, 15, 16, 100, 127):
        assert np.array_equal(weight[distance + FARTHEST], table.astype(np.float32)[plain_bucket(distance)])


# shorter vectors


def plain_cut(vector: list[float], width: int) -> list[float]:
    """Layer norm, cut, length 1: loops in float64."""
    mean = sum(vector) / len(vector)
    spread = math.sqrt(sum((v - mean) ** 2 for v in vector) / len(vector) + 1e-5)
    kept = [(v - mean) / spread for v in vector[:width]]
    length = math.sqrt(sum(v * v for v in kept))
    return [v / length for v in kept]


@pytest.mark.parametrize("width", [1, 5, 16, 47])
def test_a_shorter_vector_of_nomic_goes_through_a_layer_norm_first(built: dict[str, Path], width: int) -> None:
    known = upstream("nomic_bert")
    embedder = Embedder(built["nomic_bert"], "fp32")
    found = embedder.encode(known.texts, truncate_dim=width)
    expected = np.array([plain_cut(row.tolist(), width) for row in known.vectors])
    assert np.abs(found - expected).max() <= 2e-5
    if width > 1:
        assert np.abs(found - normalize(known.unit[:, :width])).max() > 1e-3  # what others do
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() <= 1e-6
    whole = embedder.encode(known.texts, truncate_dim=48)
    assert np.array_equal(whole, embedder.encode(known.texts))  # nothing is cut: no norm


def test_cutting_without_length_one_keeps_the_layer_norms_own() -> None:
    vectors = np.random.default_rng(1).normal(3, 2, (4, 32)).astype(np.float32)
    normed = layer_norm(vectors)
    assert np.abs(normed.mean(1)).max() < 1e-6
    assert np.abs(normed.std(1) - 1).max() < 1e-4
    assert np.array_equal(cut(vectors, 7, norm_first=True, unit=False), normed[:, :7])
    assert np.array_equal(cut(vectors, 7, norm_first=False, unit=False), vectors[:, :7])
