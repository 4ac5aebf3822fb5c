"""uint8-out: the third output against plain codes of the second, and its scale and zero point where others look."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherbed.make.calibrate.texts import reference
from featherbed.make.quantize.output import CODES, apply, chosen
from featherbed.make.variant import made
from featherbed.make.write import write_graph
from featherbed.recipe import RECIPES, Recipe, Shelf, recorded
from featherbed.run.embedder import Embedder
from featherbed.run.pooling import dequantized, normalize
from featherbed.steps import QuantizedOutput
from tests.conftest import FIXTURES, NAMES, cosines_of, reference_of, texts_for, upstream

Float = npt.NDArray[np.float32]


def plain(vector: Float, step: QuantizedOutput) -> list[int]:
    return [min(max(round(float(v / np.float32(step.scale))) + step.zero_point, 0), 255) for v in vector]


@pytest.mark.parametrize("name", NAMES)
def test_the_codes_are_those_of_the_vector_and_tell_it_again(tmp_path: Path, name: str) -> None:
    texts, known = texts_for(FIXTURES / name), upstream(name)
    found = made(reference_of(FIXTURES / name), (QuantizedOutput(),), texts)
    step = found.steps[0]
    assert isinstance(step, QuantizedOutput)
    assert 0 < step.zero_point < 255
    write_graph(found.graph, tmp_path / "model.onnx", {})
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    assert names == ["last_hidden_state", "sentence_embedding", CODES]
    assert session.get_outputs()[2].shape == ["batch_size", known.vectors.shape[1]]
    feeds = {"input_ids": known.ids, "attention_mask": known.mask, "token_type_ids": np.zeros_like(known.ids)}
    declared = {port.name for port in session.get_inputs()}
    _, vectors, codes = session.run(names, {key: value for key, value in feeds.items() if key in declared})
    assert codes.dtype == np.uint8
    assert codes.tolist() == [plain(vector, step) for vector in vectors]
    told = dequantized(codes, step.scale, step.zero_point)
    assert cosines_of(told, vectors).min() > 0.999
    inside = (codes > 0) & (codes < 255)  # what lies beyond all calibration texts is clipped
    assert np.abs(told - vectors)[inside].max() < 0.51 * step.scale
    # what the codes themselves would say of two texts is another thing
    raw = normalize(codes.astype(np.float32))
    assert np.abs(raw @ raw.T - vectors @ vectors.T).max() > 0.1


def test_the_range_is_that_of_the_vectors_and_a_margin() -> None:
    vectors = np.array([[-0.3, 0.1], [0.2, 0.5]], np.float32)
    exact, wide = chosen(QuantizedOutput(margin=0.0), vectors), chosen(QuantizedOutput(margin=0.5), vectors)
    assert [exact.scale, exact.zero_point] == pytest.approx([0.8 / 255, round(0.3 / (0.8 / 255))])
    assert [wide.scale, wide.zero_point] == pytest.approx([1.6 / 255, round(0.7 / (1.6 / 255))])


@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=20), st.floats(0, 0.5))
def test_components_that_were_seen_are_told_to_half_a_step(values: list[float], margin: float) -> None:
    vectors = np.asarray([values], np.float32)
    step = chosen(QuantizedOutput(margin), vectors)
    codes = np.asarray([plain(vectors[0], step)], np.uint8)
    # zero has a code of its own, so the ends of the range may be half a step off
    assert np.abs(dequantized(codes, step.scale, step.zero_point) - vectors).max() <= 1.01 * step.scale + 1e-7


def test_the_scale_is_of_the_model_before_anything_was_rounded() -> None:
    name = "bert-mean"
    graph, texts = reference_of(FIXTURES / name), texts_for(FIXTURES / name)
    step = made(graph, RECIPES["uint8-out"].steps, texts).steps[-1]
    assert step == chosen(QuantizedOutput(), reference(graph, texts, "look"))


def test_scale_and_zero_point_come_back_from_the_manifest_bit_for_bit() -> None:
    step = chosen(QuantizedOutput(), np.array([[-0.1, 0.23456]], np.float32))
    plain_recipe = Recipe("uint8-out", "_uint8_out", Shelf.COMPATIBLE, (step,), "").to_json()
    assert recorded(json.loads(json.dumps(plain_recipe))).steps == (step,)
    graph = apply(reference_of(FIXTURES / "bert-mean"), step)
    assert graph.weights[f"{CODES}.scale"].array() == np.float32(step.scale)
    assert float(graph.weights[f"{CODES}.scale"].array()) == step.scale


def test_a_built_folder_has_it_in_manifest_and_file_and_embeds_as_ever(tmp_path: Path) -> None:
    from featherbed.pipeline.build import build
    from tests.conftest import CALIBRATION

    build(FIXTURES / "bert-mean", tmp_path / "out", ["uint8-out"], check=False, calibration=CALIBRATION)
    manifest = json.loads((tmp_path / "out" / "featherbed.json").read_text("utf-8"))
    step = manifest["variants"]["uint8-out"]["recipe"]["steps"][-1]
    assert step["step"] == "QuantizedOutput"
    assert step["scale"] > 0
    model = onnx.load(str(tmp_path / "out" / "onnx" / "model_uint8_out.onnx"))
    metadata = {one.key: one.value for one in model.metadata_props}
    assert json.loads(metadata["featherbed.recipe"])["steps"][-1] == step
    texts = ["a small text", "and another"]
    vectors = Embedder(tmp_path / "out", "uint8-out").encode(texts)
    assert cosines_of(vectors, Embedder(tmp_path / "out", "fp32").encode(texts)).min() > 0.99
