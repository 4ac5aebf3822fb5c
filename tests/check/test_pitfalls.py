"""Every warning of inspect, by a file or folder with that fault planted; and how files of others are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

import featherbed
from featherbed.check.inspect import inspect_file
from tests.conftest import FIXTURES
from tests.foreign_files import Export, repository

Change = Callable[[ModelProto], object]


def saved(path: Path, change: Change = lambda _: None, export: Export | None = None) -> Path:
    model = (export or Export()).model()
    change(model)
    onnx.save(model, path)
    return path


def warnings(path: Path) -> str:
    return "\n".join(inspect_file(path).warnings)


def blockwise(bits: int, level: int | None, zeros: Any = None, order: bool = False) -> Change:
    """The product, in MatMulNBits."""

    def change(model: ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == "MatMul")
        codes = np.zeros((48, 2, 32 * bits // 8), np.uint8)
        given: list[tuple[str, Any]] = [("codes", codes), ("block.scales", np.ones((48, 2), np.float32))]
        given += [("zeros", zeros)] if zeros is not None else []
        given += [("order", np.zeros(64, np.int32))] if order else []
        model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in given)
        names = [k for k, _ in given]
        if order and zeros is None:
            names.insert(2, "")
        values: dict[str, int] = {"K": 48, "N": 48, "bits": bits, "block_size": 32}
        made = helper.make_node("MatMulNBits", [node.input[0], *names], ["h"], domain="com.microsoft")
        made.attribute.extend(helper.make_attribute(k, v) for k, v in values.items())
        if level is not None:
            made.attribute.append(helper.make_attribute("accuracy_level", level))
        node.CopyFrom(made)
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    return change


def bnb4(model: ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "MatMul")
    made = helper.make_node(
        "MatMulBnb4",
        [node.input[0], "codes", "absmax"],
        ["h"],
        domain="com.microsoft",
        K=48,
        N=48,
        block_size=64,
        quant_type=1,
    )
    node.CopyFrom(made)


def other_opset(version: int) -> Change:
    return lambda m: setattr(m.opset_import[0], "version", version)


def renamed(old: str, new: str) -> Change:
    def change(model: ModelProto) -> None:
        for port in model.graph.output:
            port.name = new if port.name == old else port.name
        for node in model.graph.node:
            node.output[:] = [new if n == old else n for n in node.output]

    return change


def their_operator(model: ModelProto) -> None:
    model.graph.node[0].domain = "their.own"


def without_scale(model: ModelProto) -> None:
    for node in model.graph.node:
        node.op_type = "Their" if node.op_type == "QuantizeLinear" else node.op_type


PAST = Export(past=(28, 8, 128))
CODES = Export(outputs=("sentence_embedding_quantized",))
UNPACKED = "the whole weight is unpacked on every run"
PLANTED: dict[str, tuple[Change, Export, str]] = {
    "8 bits, no level": (blockwise(8, None), Export(), f"8 bits without accuracy_level 4: {UNPACKED}"),
    "8 bits, level 1": (blockwise(8, 1), Export(), f"8 bits without accuracy_level 4: {UNPACKED}"),
    "2 bits": (blockwise(2, 0), Export(), f"2 bits at level 0: {UNPACKED}"),
    "float zeros": (blockwise(4, 4, np.zeros((48, 2), np.float32)), Export(), f"zero points in float: {UNPACKED}"),
    "half zeros": (blockwise(4, 4, np.zeros((48, 2), np.float16)), Export(), f"zero points in float: {UNPACKED}"),
    "g_idx": (blockwise(4, 4, order=True), Export(), f"g_idx, another order of its columns: {UNPACKED}"),
    "com.microsoft": (blockwise(4, 4), Export(), "needs onnxruntime's own operators: MatMulNBits"),
    "another domain": (their_operator, Export(), "operators of their.own"),
    "a new opset": (other_opset(23), Export(), "opset 23, newer than the 21"),
    "a fixed batch": (lambda _: None, Export(batch=1), "takes 1 text at a time"),
    "a fixed length": (lambda _: None, Export(length=128), "takes 128 tokens"),
    "positions": (lambda _: None, Export(("input_ids", "position_ids")), "position_ids is a required input"),
    "a past": (lambda _: None, PAST, "56 inputs for keys and values"),
    "a task": (lambda _: None, Export(("input_ids", "task_id")), "a task must be chosen"),
    "an input too many": (lambda _: None, Export(("input_ids", "pixels")), "inputs that nobody feeds: pixels"),
    "half precision": (lambda _: None, Export(past=(1, 3, 4), half=True), "float16 inputs or outputs: past_key"),
    "no known output": (renamed("last_hidden_state", "logits"), Export(), "no output of a known name among logits"),
    "pooler_output alone": (renamed("last_hidden_state", "pooler_output"), Export(), "no output of a known name"),
    "a name and its axes": (
        renamed("last_hidden_state", "sentence_embedding"), Export(), "has 3 axes, where its name says 2"),
    "codes": (lambda _: None, CODES, "is in 8 bits: value = (code - 110) x 0.0078"),
    "codes of no meaning": (without_scale, CODES, "no QuantizeLinear says what they mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_each_fault_of_a_graph_has_its_warning(tmp_path: Path, name: str) -> None:
    change, export, says = PLANTED[name]
    assert says in warnings(saved(tmp_path / "model.onnx", change, export))
    assert says not in warnings(saved(tmp_path / "sound.onnx"))


def test_a_sound_graph_has_no_warning(tmp_path: Path) -> None:
    assert inspect_file(saved(tmp_path / "model.onnx")).warnings == ()
    assert inspect_file(saved(tmp_path / "b.onnx", blockwise(4, 4, np.zeros((48, 1), np.uint8)))).warnings == (
        "needs onnxruntime's own operators: MatMulNBits",
    )


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("model.onnx_data", ""),
        ("model.onnx.data", "weights in model.onnx.data, where other libraries look for model.onnx_data"),
        ("gone.bin", "no such file"),
        ("../out.bin", "could leave it"),
    ],
)
def test_sidecars_are_looked_at(tmp_path: Path, location: str, says: str) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(Export().model(), path, save_as_external_data=True, location="model.onnx_data")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())
    if location.startswith("model"):
        (tmp_path / "model.onnx_data").rename(tmp_path / location)
    assert (says in warnings(path)) if says else inspect_file(path).warnings == ()


def test_weights_that_share_bytes_and_bytes_of_nobody_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(Export().model(), path, save_as_external_data=True, location="model.onnx_data")
    with (tmp_path / "model.onnx_data").open("ab") as file:
        file.write(bytes(10**6))
    assert "1000000 bytes of model.onnx_data belong to no weight" in warnings(path)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "0" if entry.key == "offset" else entry.value
    path.write_bytes(model.SerializeToString())
    assert "share bytes of model.onnx_data" in warnings(path)


# how a file is quantized


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Two batches of ids."""

    def __init__(self) -> None:
        ids = np.arange(1, 17).reshape(2, 8)
        self.rest = iter([{"input_ids": ids, "attention_mask": np.ones_like(ids)}] * 2)

    def get_next(self) -> dict[str, Any] | None:
        return next(self.rest, None)


@pytest.mark.parametrize(
    ("kind", "per_channel", "phrases"),
    [
        (QuantType.QInt8, True, ("W8A8, an activation scale a tensor", "s8 weights, a scale a channel")),
        (QuantType.QInt8, False, ("W8A8, an activation scale a tensor", "s8 weights, one scale")),
        (QuantType.QUInt8, False, ("W8A8, an activation scale a tensor", "u8 weights, one scale")),
    ],
)
def test_onnxruntime_s_dynamic_files_are_named(
    tmp_path: Path, kind: QuantType, per_channel: bool, phrases: Sequence[str]
) -> None:
    source, path = saved(tmp_path / "model.onnx"), tmp_path / "model_quantized.onnx"
    quantize_dynamic(source, path, weight_type=kind, per_channel=per_channel, op_types_to_quantize=["MatMul"])
    found = inspect_file(path)
    assert set(phrases) <= set(found.quantization)
    assert "a text's vector depends on its company" in "\n".join(found.warnings)
    assert ("x86 has no fast product" in "\n".join(found.warnings)) == (kind is QuantType.QUInt8)
    assert found.table == "float"
    quantize_dynamic(source, path, weight_type=kind)
    assert inspect_file(path).table == "uint8"  # onnxruntime rounds tables as it does activations


@pytest.mark.parametrize("per_channel", [True, False])
def test_onnxruntime_s_static_files_are_named(tmp_path: Path, per_channel: bool) -> None:
    source, path = saved(tmp_path / "model.onnx"), tmp_path / "model_static.onnx"
    quantize_static(
        source, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel, op_types_to_quantize=["MatMul"]
    )
    found = inspect_file(path).quantization
    assert "QDQ, static activation scales" in found
    assert f"s8 weights, {'a scale a channel' if per_channel else 'one scale'}" in found


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (blockwise(4, 4, np.zeros((48, 1), np.uint8)), "MatMulNBits 4 bits, block 32, level 4, zero points"),
        (blockwise(8, None), "MatMulNBits 8 bits, block 32, level 0"),
        (bnb4, "MatMulBnb4 NF4, block 64"),
    ],
)
def test_block_by_block_files_are_named(tmp_path: Path, change: Change, phrase: str) -> None:
    assert phrase in inspect_file(saved(tmp_path / "model.onnx", change)).quantization


def test_half_precision_is_named(tmp_path: Path) -> None:
    def change(model: ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == "weight":
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), "weight"))

    assert inspect_file(saved(tmp_path / "model.onnx", change)).quantization == ("float16",)


def test_our_own_recipes_are_named_with_their_tables(folders: dict[str, Path]) -> None:
    graphs = folders["bert-mean"] / "onnx"
    assert "s8 weights, a scale a channel" in inspect_file(graphs / "model_int8.onnx").quantization
    assert inspect_file(graphs / "model.onnx").table == "float"
    assert inspect_file(graphs / "model_int4.onnx").table.endswith("in blocks")


# folders


def edited(name: str, **values: object) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        path = folder / name
        known = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps({k: v for k, v in {**known, **values}.items() if v is not None}), "utf-8")

    return act


PADDED = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
          "pad_token": "[PAD]"}  # fmt: skip
CUT = {"direction": "Right", "max_length": 128, "strategy": "LongestFirst", "stride": 0}
FOLDERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "padding": ("bert-mean", edited("tokenizer.json", padding=PADDED), "json itself pads texts, to 128 tokens"),
    "truncation": ("bert-mean", edited("tokenizer.json", truncation=CUT), "json itself cuts texts, to 128 tokens"),
    "no length": ("bert-mean", edited("tokenizer_config.json", model_max_length=None), "missing: fastembed refuses"),
    "an absurd length": ("bert-mean", edited("tokenizer_config.json", model_max_length=1e30), "fastembed refuses it"),
    "no end token": ("qwen3-tied", edited("tokenizer.json", post_processor=None), "puts no end token behind a text"),
    "two poolings": ("bert-mean", edited("1_Pooling/config.json", pooling_mode_cls_token=True), "exactly one pooling"),
    "no pooling": ("bert-mean", lambda f: shutil.rmtree(f / "1_Pooling"), "1_Pooling/config.json, found no such file"),
    "the new schema": (
        "bert-mean", lambda f: (f / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}', "utf-8"),
        "lacks the old keys"),
    "no modules": ("bert-mean", lambda _: None, "no modules.json"),
    "no tokenizer": ("bert-mean", lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json, found none"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_each_fault_of_configs_has_its_warning(tmp_path: Path, name: str) -> None:
    fixture, damage, says = FOLDERS[name]
    folder = repository(tmp_path / "theirs", fixture)
    saved(folder / "model.onnx")
    if name != "no modules":
        (folder / "modules.json").write_text(
            json.dumps([{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling")]),
            "utf-8",
        )
        edited("tokenizer_config.json", model_max_length=128)(folder)
        edited("tokenizer.json", padding=None, truncation=None)(folder)
        assert featherbed.inspect(folder)["warnings"] == []
    damage(folder)
    document = featherbed.inspect(folder)
    assert any(says in warning for warning in document["warnings"]), document["warnings"]
    assert (document["spec"] is None) == (name in ("two poolings", "no pooling", "no tokenizer"))


def test_all_files_of_a_foreign_folder_are_listed_and_a_broken_one_is_named(tmp_path: Path) -> None:
    folder = repository(tmp_path / "theirs")
    (folder / "onnx").mkdir()
    for name in ("model.onnx", "onnx/model.onnx", "onnx/model_q4.onnx"):
        saved(folder / name)
    (folder / "onnx" / "model_fp16.onnx").write_bytes(b"<html>")
    document = featherbed.inspect(folder)
    assert [f["file"] for f in document["files"]] == ["onnx/model.onnx", "onnx/model_q4.onnx", "model.onnx"]
    assert any("model_fp16.onnx: expected an ONNX model" in warning for warning in document["warnings"])
    assert document["spec"]["pooling"] == "mean"


def test_the_padding_that_minilm_ships_is_seen(tmp_path: Path) -> None:
    assert (FIXTURES / "bert-mean" / "tokenizer.json").is_file()
    folder = repository(tmp_path / "theirs")
    saved(folder / "model.onnx", lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", TensorProto.FLOAT))
    edited("tokenizer.json", padding=PADDED, truncation=CUT)(folder)
    assert sum("itself" in warning for warning in featherbed.inspect(folder)["warnings"]) == 2
