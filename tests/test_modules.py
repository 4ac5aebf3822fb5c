"""modules.json and the Dense modules it names: what is read, what is refused, and what the layers compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from featherbed.errors import CheckpointError, FeatherbedError, ModelFolderError, SpecError, UnknownArchitectureError
from featherbed.make.checkpoint import open_checkpoint
from featherbed.make.graph import reference_graph
from featherbed.modules import Dense, dense_modules, modules_in
from featherbed.run.dense import read_layers, through
from featherbed.spec import Spec, read_spec
from tests.conftest import FIXTURES, cosines_of, ran

Checkpoint = Callable[[str], Path]
IDS = np.array([[2, 30, 31, 32, 3], [2, 40, 3, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


def with_dense(folder: Path, weight: Any, bias: Any = None, **config: Any) -> Path:
    """One Dense module behind the checkpoint's pooling."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")]
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in modules]
    (folder / "modules.json").write_text(json.dumps(listed), "utf-8")
    (folder / "2_Dense").mkdir(exist_ok=True)
    tensors = {"linear.weight": weight} | ({} if bias is None else {"linear.bias": bias})
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    said = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias is not None, **config}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(said), "utf-8")
    return folder


def test_the_modules_of_the_fixture_are_read_in_their_order() -> None:
    assert dense_modules(FIXTURES / "gemma3") == (
        Dense("2_Dense", 48, 72, bias=False, tanh=False),
        Dense("3_Dense", 72, 40, bias=False, tanh=False),
    )
    spec = read_spec(FIXTURES / "gemma3")
    assert (spec.dim, spec.hidden_width, spec.dense) == (40, 48, ("2_Dense", "3_Dense"))


def test_without_modules_json_there_are_none() -> None:
    assert modules_in(FIXTURES / "bert-cls") == []
    assert dense_modules(FIXTURES / "bert-cls") == ()


def test_a_spec_with_dense_modules_comes_back_from_json_and_others_say_nothing_of_them() -> None:
    spec = read_spec(FIXTURES / "gemma3")
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert not {"dense", "hidden_dim"} & read_spec(FIXTURES / "bert-cls").to_json().keys()


@pytest.mark.parametrize(
    ("values", "kind", "says"),
    [
        ({"activation_function": "torch.nn.modules.activation.GELU"}, UnknownArchitectureError, "GELU"),
        ({"use_residual": True}, UnknownArchitectureError, "use_residual"),
        ({"module_input_name": "token_embeddings"}, UnknownArchitectureError, "token_embeddings"),
        ({"module_output_name": "other"}, UnknownArchitectureError, "other"),
        ({"in_features": 47}, SpecError, "47"),
        ({"out_features": 71}, SpecError, "71"),
        ({"out_features": None}, SpecError, "out_features"),
        ({"bias": True}, CheckpointError, "linear.bias"),
    ],
    ids=str,
)
def test_a_dense_module_that_is_something_else_is_refused(
    checkpoint: Checkpoint, values: dict[str, Any], kind: type[FeatherbedError], says: str
) -> None:
    folder = checkpoint("gemma3")
    change(folder / "2_Dense" / "config.json", **values)
    with pytest.raises(kind, match=says) as caught:
        reference_graph(open_checkpoint(folder), read_spec(folder))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("path", ["../2_Dense", "Dense", "onnx", "2_Dense/inner", "/2_Dense"])
def test_a_dense_module_in_a_folder_of_another_name_is_refused(checkpoint: Checkpoint, path: str) -> None:
    folder = checkpoint("gemma3")
    modules = json.loads((folder / "modules.json").read_text("utf-8"))
    modules[2]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    with pytest.raises(SpecError, match="2_Dense"):
        read_spec(folder)


def test_dense_weights_that_are_missing_are_named(checkpoint: Checkpoint) -> None:
    folder = checkpoint("gemma3")
    (folder / "3_Dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="3_Dense"):
        open_checkpoint(folder)
    with pytest.raises(ModelFolderError, match="3_Dense"):
        read_layers(folder)


@pytest.mark.parametrize("damage", ["cut", "other shape", "other type", "no json"])
def test_dense_weights_that_are_damaged_are_refused_where_vectors_are_made(checkpoint: Checkpoint, damage: str) -> None:
    path = checkpoint("gemma3") / "2_Dense" / "model.safetensors"
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:-4000])
        case "other shape":
            save_file({"linear.weight": np.zeros((71, 48), np.float32)}, path)
        case "other type":
            save_file({"linear.weight": np.zeros((72, 48), np.int8)}, path)
        case _:
            path.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelFolderError, match="Dense module"):
        read_layers(path.parent.parent)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_layers_are_read_from_every_type_a_checkpoint_has(checkpoint: Checkpoint, dtype: str) -> None:
    folder = checkpoint("gemma3")
    path = folder / "2_Dense" / "model.safetensors"
    weight = load_file(path)["linear.weight"]
    if dtype == "bfloat16":
        codes = (weight.view(np.uint32) >> 16).astype(np.uint16)
        expected = (codes.astype(np.uint32) << 16).view(np.float32)
        header = {"linear.weight": {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [0, codes.nbytes]}}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + codes.tobytes())
    else:
        expected = weight.astype(dtype).astype(np.float32)
        save_file({"linear.weight": weight.astype(dtype)}, path)
    assert np.array_equal(read_layers(folder)[0].weight, expected)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("act", ["torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity", None])
@pytest.mark.parametrize("name", ["bert-mean", "bert-cls", "qwen3-tied"])
def test_any_family_may_have_a_dense_module_with_bias_and_tanh(
    checkpoint: Checkpoint, name: str, act: str | None, biased: bool
) -> None:
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((24, 48)).astype(np.float32)
    bias = rng.standard_normal(24).astype(np.float32) if biased else None
    plain = FIXTURES / name
    folder = with_dense(checkpoint(name), weight, bias, **({} if act is None else {"activation_function": act}))
    hidden, _ = ran(reference_graph(open_checkpoint(plain), read_spec(plain)), IDS, MASK)
    pooled = {
        "bert-mean": (hidden * MASK[:, :, None]).sum(1) / MASK.sum(1, keepdims=True),
        "bert-cls": hidden[:, 0],
        "qwen3-tied": hidden[[0, 1], [4, 2]],
    }[name]
    expected = pooled @ weight.T + (0 if bias is None else bias)
    expected = expected if act is not None and act.endswith("Identity") else np.tanh(expected)  # tanh if it is silent
    found_hidden, found = ran(reference_graph(open_checkpoint(folder), read_spec(folder)), IDS, MASK)
    assert np.array_equal(found_hidden, hidden)
    assert found.shape == (2, 24)
    assert cosines_of(found, expected).min() > 1 - 1e-6
    assert np.abs(through(read_layers(folder), pooled) - expected).max() < 1e-5


def test_a_first_module_of_another_width_than_hidden_states_is_refused(checkpoint: Checkpoint) -> None:
    folder = with_dense(checkpoint("bert-cls"), np.zeros((24, 47), np.float32))
    with pytest.raises(SpecError, match="47"):
        reference_graph(open_checkpoint(folder), read_spec(folder))


def test_a_model_folder_keeps_them_for_sentence_transformers(tmp_path: Path) -> None:
    from featherbed.make.assemble import write_configs

    shutil.copytree(FIXTURES / "gemma3", tmp_path / "source")
    (tmp_path / "out").mkdir()
    write_configs(tmp_path / "source", tmp_path / "out", read_spec(tmp_path / "source"))
    assert dense_modules(tmp_path / "out") == dense_modules(FIXTURES / "gemma3")
    assert [kind for kind, _ in modules_in(tmp_path / "out")] == [
        "Transformer",
        "Pooling",
        "Dense",
        "Dense",
        "Normalize",
    ]
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text("utf-8"))
    assert pooling["word_embedding_dimension"] == 48
    for one, other in zip(read_layers(tmp_path / "out"), read_layers(FIXTURES / "gemma3"), strict=True):
        assert np.array_equal(one.weight, other.weight)
