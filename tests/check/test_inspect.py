"""inspect says what a file is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import featherbed
from featherbed.check.inspect import inspect_file, quantization, table_kind
from featherbed.errors import ModelFolderError
from featherbed.recipe import RECIPES, BlockwiseLinear, BlockwiseTable


@pytest.mark.parametrize(
    ("file", "phrase"),
    [
        ("model.onnx", "none"),
        ("model_int8.onnx", "W8A8, an activation scale a token"),
        ("model_int8_dynamic.onnx", "W8A8, an activation scale a tensor"),
        ("model_int8_block.onnx", "MatMulNBits 8 bits, block 64, level 4"),
        ("model_q4.onnx", "MatMulNBits 4 bits, block 32, level 0"),
    ],
)
def test_each_recipe_is_recognised_from_the_graph_alone(folders: dict[str, Path], file: str, phrase: str) -> None:
    found = inspect_file(folders["qwen3-tied"] / "onnx" / file)
    assert phrase in found.quantization
    assert not found.static_batch
    assert found.kv_inputs == 0


@pytest.mark.parametrize("recipe", ["int4", "int4-small", "q4", "int8-block"])
def test_blocks_and_zero_points_are_said_as_the_recipe_has_them(folders: dict[str, Path], recipe: str) -> None:
    found = inspect_file(folders["qwen3-tied"] / "onnx" / f"model{RECIPES[recipe].suffix}.onnx").quantization
    expected = set()
    for step in RECIPES[recipe].steps:
        if isinstance(step, BlockwiseLinear):
            ending = ", zero points" if step.searched else ""
            expected.add(f"MatMulNBits {step.bits} bits, block {step.block}, level {step.accuracy_level or 0}{ending}")
        elif isinstance(step, BlockwiseTable):
            whole = 48 if step.bits == 8 else step.block  # a row is shorter than a block, and is one
            expected.add(f"table in {step.bits} bits, block {min(step.block, whole)}")
    assert set(found) == expected


@pytest.mark.parametrize(
    ("codes", "scales", "phrase"),
    [
        ((9, 3, 128), (9, 3, 1), "table in 8 bits, block 128"),
        ((9, 39, 8), (9, 3, 1), "table in 8 bits, 3 scales a row"),  # 312 wide
    ],
)
def test_a_table_in_operators_of_the_standard_is_said_to_be_in_8_bits(
    codes: tuple[int, ...], scales: tuple[int, ...], phrase: str
) -> None:
    weights = [
        numpy_helper.from_array(np.zeros(codes, np.int8), "t.q8"),
        numpy_helper.from_array(np.zeros(scales, np.float32), "t.scales"),
    ]
    nodes = [helper.make_node("Gather", [name, "ids"], [f"rows of {name}"]) for name in ("t.q8", "t.scales")]
    graph = helper.make_graph(nodes, "g", [], [], weights)
    assert quantization(graph) == (phrase,)
    assert table_kind(graph) == "int8, in blocks"


def test_bytes_by_group_add_up_to_the_weights(folders: dict[str, Path]) -> None:
    path = folders["bert-mean"] / "onnx" / "model.onnx"
    tensors = onnx.load(str(path)).graph.initializer
    assert sum(inspect_file(path).weights_bytes.values()) == sum(len(t.raw_data) for t in tensors)


def test_a_folder_shows_its_spec_and_every_variant(folders: dict[str, Path]) -> None:
    document = featherbed.inspect(folders["qwen3-biased"])
    assert document["spec"]["pooling"] == "lasttoken"
    assert document["spec"]["prompts"]["query"] == "find: "
    assert [f["variant"] for f in document["files"]] == list(RECIPES)


def test_encoders_need_a_newer_onnxruntime_than_decoders(folders: dict[str, Path]) -> None:
    least = {n: inspect_file(folders[n] / "onnx" / "model.onnx").least_onnxruntime for n in ("bert-cls", "qwen3-tied")}
    assert least == {"bert-cls": "1.30", "qwen3-tied": "1.27"}


def test_a_static_batch_and_kv_inputs_are_seen(tmp_path: Path) -> None:
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "sequence_length"])
    past = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT16, [1, 8, "past", 128])
    out = helper.make_tensor_value_info("last_hidden_state", TensorProto.INT64, [1, "sequence_length"])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["input_ids"], ["last_hidden_state"])], "g", [ids, past], [out]
    )
    onnx.save(helper.make_model(graph), str(tmp_path / "model.onnx"))
    found = inspect_file(tmp_path / "model.onnx")
    assert found.static_batch
    assert found.kv_inputs == 1
    assert found.inputs["past_key_values.0.key"] == "float16[1, 8, past, 128]"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "ONNX"),
        (bytes(range(256)) * 16, "ONNX"),
    ],
)
def test_what_is_not_onnx_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFolderError, match=says) as error:
        inspect_file(path)
    assert "\n" not in str(error.value)


def test_a_model_cut_anywhere_is_an_error_or_still_a_graph(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = (folders["bert-cls"] / "onnx" / "model.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    refused = 0
    for part in range(64):
        path.write_bytes(whole[: len(whole) * part // 64])
        try:
            inspect_file(path)
        except ModelFolderError:
            refused += 1
    assert refused >= 60
