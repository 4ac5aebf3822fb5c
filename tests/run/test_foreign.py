"""Files of others run as they are: every way they name, shape and type their inputs and outputs, against numpy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnxruntime.quantization import QuantType, quantize_dynamic

from featherbed.errors import EngineError, ModelFolderError, OptionError, SpecError, UnknownArchitectureError
from featherbed.run.batches import collate
from featherbed.run.embedder import Embedder
from featherbed.run.foreign import Foreign, chosen
from featherbed.run.session import Memory
from tests.foreign_files import DIM, SCALE, ZERO, Export, means, repository

TEXTS = ["the old harbour", "rain", "a fox in the rain, soft and grey", "soft"]
EXACT = 2e-6


def edited(path: Path, **values: object) -> None:
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({k: v for k, v in {**known, **values}.items() if v is not None}), "utf-8")


def off(embedder: Embedder, task: int | None = None, places: int | None = None) -> float:
    """How far vectors are from numpy's."""
    return float(np.abs(embedder.encode(TEXTS) - means(embedder.ids(TEXTS), task, places)).max())


@pytest.mark.parametrize("layout", ["model.onnx", "onnx/model.onnx"])
@pytest.mark.parametrize(
    "output", ["last_hidden_state", "token_embeddings", "text_embeds", "sentence_embedding", "embeddings"]
)
def test_outputs_by_every_name_in_both_layouts(tmp_path: Path, layout: str, output: str) -> None:
    folder = repository(tmp_path / "theirs")
    Export(outputs=(output,)).write(folder / layout)
    for model in (folder, folder / layout):
        embedder = Embedder(model)
        assert embedder.variant == "model"
        assert off(embedder) <= EXACT


PAST = tuple(f"past_key_values.{n}.{kind}" for n in range(28) for kind in ("key", "value"))


@pytest.mark.parametrize("half", [False, True])
def test_a_decoder_with_positions_and_56_empty_pasts(tmp_path: Path, half: bool) -> None:
    folder = repository(tmp_path, "bert-mean")
    export = Export(
        ("input_ids", "attention_mask", "position_ids"),
        ("last_hidden_state", "present.0.key", "present.0.value"),
        past=(28, 8, 128),
        half=half,
    )
    edited(folder / "config.json", num_attention_heads=16, num_key_value_heads=8, head_dim=128)
    export.write(folder / "onnx" / "model.onnx")
    embedder = Embedder(folder)
    assert off(embedder, places=0) <= (2e-3 if half else EXACT)
    ports = embedder._session.ports
    assert {p.kind for n, p in ports.inputs.items() if n in PAST} == {10 if half else 1}
    feeds = ports.feeds(collate([[1, 2], [3]], 0))
    assert {n for n in feeds if n.startswith("past")} == set(PAST)
    assert {feeds[n].shape for n in PAST} == {(2, 8, 0, 128)}
    assert {feeds[n].dtype for n in PAST} == {np.dtype(np.float16 if half else np.float32)}


def test_positions_follow_the_mask_whatever_the_side(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    Export(("input_ids", "attention_mask", "position_ids")).write(folder / "model.onnx")
    batch = collate([[5, 6, 7], [8, 9]], 0)
    ports = Embedder(folder)._session.ports
    assert ports.feeds(batch)["position_ids"].tolist() == [[0, 1, 2], [0, 1, 1]]
    left = type(batch)(batch.ids[:, ::-1], batch.mask[:, ::-1], batch.places)
    assert ports.feeds(left)["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "mpnet"])
def test_robertas_kind_counts_positions_from_behind_the_pad(tmp_path: Path, family: str) -> None:
    folder = repository(tmp_path)
    edited(folder / "config.json", model_type=family)
    Export(("input_ids", "attention_mask", "position_ids")).write(folder / "model.onnx")
    embedder = Embedder(folder)
    assert off(embedder, places=embedder.spec.pad_id + 1) <= EXACT
    positions = json.loads((folder / "config.json").read_text("utf-8"))["max_position_embeddings"]
    assert embedder.spec.max_length <= positions - embedder.spec.pad_id - 1


def test_sizes_of_a_past_that_the_graph_does_not_say_come_from_the_config(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    Export(past=(2, "heads", "size")).write(folder / "model.onnx")
    edited(folder / "config.json", num_key_value_heads=3, head_dim=5)
    embedder = Embedder(folder)
    assert off(embedder) <= EXACT
    assert embedder._session.ports.feeds(collate([[1]], 0))["past_key_values.1.value"].shape == (1, 3, 0, 5)
    edited(folder / "config.json", num_key_value_heads=None, head_dim=None, num_attention_heads=None)
    with pytest.raises(
        EngineError, match=r"past_key_values\.0\.key .*num_key_value_heads in config\.json, found neither"
    ):
        Embedder(folder)


def test_a_past_that_is_not_the_config_s_is_refused(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    Export(past=(1, 4, 16)).write(folder / "model.onnx")
    edited(folder / "config.json", num_key_value_heads=2)
    with pytest.raises(EngineError, match=r"expected 2 heads as config\.json says, found 4"):
        Embedder(folder)


@pytest.mark.parametrize("wide", [(), (1,), ("texts",)])
def test_a_task_is_said_by_name_or_number_or_by_the_configs_and_asked_for_otherwise(
    tmp_path: Path, wide: tuple[int | str, ...]
) -> None:
    folder = repository(tmp_path)
    inputs = ("input_ids", "attention_mask", "task_id")
    Export(inputs, wide=wide).write(folder / "model.onnx")
    names = ["retrieval.query", "retrieval.passage", "separation"]
    edited(folder / "config.json", lora_adaptations=names)
    with pytest.raises(OptionError, match=r"expected one of retrieval\.query.*Foreign\(task='retrieval\.query'\)"):
        Embedder(folder)
    with pytest.raises(OptionError, match="no such task"):
        Embedder(folder, foreign=Foreign(task="sorting"))
    text = [TEXTS[0]]
    for said, number in ((1, 1), ("separation", 2)):
        embedder = Embedder(folder, foreign=Foreign(task=said))
        expected = means(embedder.ids(text), number)
        assert np.abs(embedder.encode(text) - expected).max() <= EXACT
    edited(folder / "config_sentence_transformers.json", default_task="retrieval.passage")
    assert np.abs(Embedder(folder).encode(text) - means(embedder.ids(text), 1)).max() <= EXACT


def test_no_cache_is_used_and_token_types_are_zeros(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    Export(("input_ids", "attention_mask", "token_type_ids", "use_cache_branch")).write(folder / "model.onnx")
    embedder = Embedder(folder)
    feeds = embedder._session.ports.feeds(collate([[1, 2]], 0))
    assert feeds["use_cache_branch"].tolist() == [False]
    assert not feeds["token_type_ids"].any()
    assert np.isfinite(embedder.encode(TEXTS)).all()
    assert np.abs(np.linalg.norm(embedder.encode(TEXTS), axis=1) - 1).max() <= EXACT


@pytest.mark.parametrize("whole", [TensorProto.INT32, TensorProto.INT64])
def test_whole_numbers_are_fed_in_the_type_that_is_declared(tmp_path: Path, whole: int) -> None:
    folder = repository(tmp_path)
    Export(("input_ids", "attention_mask", "position_ids"), whole=whole).write(folder / "model.onnx")
    assert off(Embedder(folder), places=0) <= EXACT


@pytest.mark.parametrize("output", ["last_hidden_state", "sentence_embedding"])
def test_outputs_in_half_precision_come_as_float32(tmp_path: Path, output: str) -> None:
    folder = repository(tmp_path)
    Export(outputs=(output,), half=True).write(folder / "model.onnx")
    embedder = Embedder(folder)
    assert embedder.encode(TEXTS).dtype == np.float32
    assert off(embedder) <= 2e-3


def test_vectors_in_8_bits_are_read_with_their_scale_and_zero_point(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    Export(outputs=("sentence_embedding_quantized",)).write(folder / "model.onnx")
    embedder = Embedder(folder)
    codes = np.clip(np.rint(means(embedder.ids(TEXTS)) / SCALE) + ZERO, 0, 255)
    plain = (codes - ZERO) * SCALE
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    found = embedder.encode(TEXTS)
    assert np.abs(found - plain).max() <= 1e-5
    assert (found * means(embedder.ids(TEXTS))).sum(axis=1).min() > 0.999
    without = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    assert np.abs(found - without).max() > 0.05


def test_codes_without_a_scale_are_refused(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    model = Export(outputs=("sentence_embedding_quantized",)).model()
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            node.op_type, node.input[:] = "Cast", node.input[:1]
            node.attribute.append(onnx.helper.make_attribute("to", TensorProto.UINT8))
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(EngineError, match="expected a QuantizeLinear that makes it"):
        Embedder(folder)


def test_a_pooled_output_goes_before_hidden_states_and_pooler_output_is_only_taken_if_asked_for(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    Export(outputs=("last_hidden_state", "pooler_output", "sentence_embedding")).write(folder / "model.onnx")
    ports = Embedder(folder)._session.ports
    assert (ports.vectors and ports.vectors.name, ports.hidden and ports.hidden.name) == (
        "sentence_embedding",
        "last_hidden_state",
    )
    asked = Embedder(folder, foreign=Foreign(output="pooler_output"))._session.ports
    assert (asked.vectors and asked.vectors.name, asked.hidden) == ("pooler_output", None)
    with pytest.raises(OptionError, match="expected one of last_hidden_state, pooler_output, sentence_embedding"):
        Embedder(folder, foreign=Foreign(output="logits"))
    Export(outputs=("pooler_output",)).write(folder / "model.onnx")
    with pytest.raises(EngineError, match="outputs pooler_output"):
        Embedder(folder)


def test_only_the_output_that_is_read_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = repository(tmp_path)
    Export(outputs=("present.0.key", "last_hidden_state", "present.0.value"), past=(1, 3, 4)).write(
        folder / "model.onnx"
    )
    embedder = Embedder(folder)
    asked: list[list[str]] = []
    real = embedder._session._call

    def call(session: Any, outputs: list[str], feeds: Any, keep: bool = True) -> Any:
        asked.append(outputs)
        return real(session, outputs, feeds, keep)

    monkeypatch.setattr(embedder._session, "_call", call)
    embedder.encode(TEXTS)
    assert set(map(tuple, asked)) == {("last_hidden_state",)}


@pytest.mark.parametrize(("name", "rank"), [("last_hidden_state", 2), ("sentence_embedding", 3), ("embeddings", 1)])
def test_a_name_and_a_number_of_axes_that_disagree_are_an_error(tmp_path: Path, name: str, rank: int) -> None:
    folder = repository(tmp_path)
    model = Export(outputs=("last_hidden_state",)).model()
    model.graph.node[-1].output[0] = "made"
    axes = [np.array(n) for n in {1: (0, 0), 2: (0,), 3: ()}[rank]]
    last = "made"
    for at, _ in enumerate(axes):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), f"at{at}"))
        model.graph.node.append(onnx.helper.make_node("Gather", [last, f"at{at}"], [f"cut{at}"], axis=0))
        last = f"cut{at}"
    model.graph.node.append(onnx.helper.make_node("Identity", [last], [name]))
    del model.graph.output[:]
    shape: list[str | int | None] = ["a", "b", DIM]
    shape = shape[3 - rank :]
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(EngineError, match=f"{name}.*axes"):
        Embedder(folder)


@pytest.mark.parametrize("output", ["last_hidden_state", "sentence_embedding"])
def test_a_fixed_batch_and_length_are_looped_and_padded_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, output: str
) -> None:
    folder = repository(tmp_path)
    Export(outputs=(output,), batch=1, length=12).write(folder / "model.onnx")
    embedder = Embedder(folder)
    assert embedder.spec.max_length == 12
    assert max(map(len, embedder.ids(["rain " * 40]))) == 12
    assert off(embedder) <= EXACT
    assert len(embedder.notices) == 2
    assert sum("takes 1 text at a time" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("location", ["model.onnx_data", "model.onnx.data", "weights.bin", "sub/w e i g h t s"])
def test_weights_beside_the_graph_under_any_name(tmp_path: Path, location: str) -> None:
    folder = repository(tmp_path)
    (folder / "onnx" / "sub").mkdir(parents=True)
    onnx.save(
        Export().model(),
        folder / "onnx" / "model.onnx",
        save_as_external_data=True,
        location=location,
        size_threshold=0,
    )
    embedder = Embedder(folder)
    assert embedder._session._source.graph.outside
    assert off(embedder) <= EXACT


def test_weights_of_4_bits_beside_the_graph(tmp_path: Path) -> None:
    """Numbers of half a byte are no array of numpy's: the sidecar is handed over whole."""
    folder = repository(tmp_path)
    model = Export(("input_ids", "attention_mask")).model()
    codes = np.arange(-8, 8)
    tensor = onnx.TensorProto(name="codes", data_type=TensorProto.INT4, dims=[16])
    tensor.raw_data = bytes(int((codes[n] & 15) | (codes[n + 1] & 15) << 4) for n in range(0, 16, 2))
    model.graph.initializer.append(tensor)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.float32), "unit"))
    first = model.graph.node[0]
    first.output[0] = "seen"
    extra = [
        onnx.helper.make_node("DequantizeLinear", ["codes", "unit"], ["wide"]),
        onnx.helper.make_node("ReduceSum", ["wide"], ["sum"], keepdims=0),  # -8
        onnx.helper.make_node("Add", ["sum", "eight"], ["nothing"]),
        onnx.helper.make_node("Add", ["seen", "nothing"], ["x0"]),
    ]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(8, np.float32), "eight"))
    for at, node in enumerate(extra):
        model.graph.node.insert(1 + at, node)
    model.opset_import[0].version, model.ir_version = 21, 10
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    embedder = Embedder(folder)
    assert embedder._session._source.loading().files
    assert off(embedder) <= EXACT


# which file is meant


SUFFIXES = (
    "", "_fp16", "_quantized", "_int8", "_uint8", "_q4", "_q4f16", "_bnb4", "_O2", "_O3", "_O4", "_optimized",
    "_qint8_avx512_vnni", "_qint8_arm64", "_quint8_avx2",
)  # fmt: skip


def empty(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("place", ["", "onnx/"])
def test_every_convention_s_suffix_names_its_file(tmp_path: Path, place: str, suffix: str) -> None:
    folder = empty(tmp_path, [f"{place}model{one}.onnx" for one in SUFFIXES])
    file = f"{place}model{suffix}.onnx"
    for said in ([suffix[1:]] if suffix else ["auto", "fp32"]) + [file, Path(file).name, Path(file).stem]:
        assert chosen(folder, said) == folder / file


@pytest.mark.parametrize(
    ("names", "variant", "file"),
    [
        (["model.onnx", "onnx/model.onnx"], "auto", "onnx/model.onnx"),
        (["model.onnx", "onnx/model_q4.onnx"], "auto", "model.onnx"),
        (["gte.onnx"], "auto", "gte.onnx"),
        (["model_q4.onnx", "onnx/model_q4.onnx"], "q4", "onnx/model_q4.onnx"),
        (["model_q4.onnx", "onnx/model_q4.onnx"], "auto", "onnx/model_q4.onnx"),
        (["gte-small_q4.onnx", "gte-small.onnx"], "q4", "gte-small_q4.onnx"),
        (["a_q4.onnx", "b_q4.onnx", "model_q4.onnx"], "q4", "model_q4.onnx"),
    ],
)
def test_the_rule_by_which_a_file_is_chosen(tmp_path: Path, names: list[str], variant: str, file: str) -> None:
    assert chosen(empty(tmp_path, names), variant) == tmp_path / file


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["a.onnx", "b.onnx"], "auto"),
        (["model_q4.onnx", "model_int8.onnx"], "auto"),
        (["a_q4.onnx", "b_q4.onnx"], "q4"),
        (["model.onnx"], "int8"),
        (["model.onnx", "model_quantized.onnx"], "int8"),
        (["model.onnx"], "../model"),
    ],
)
def test_what_could_be_several_files_or_none_lists_them(tmp_path: Path, names: list[str], variant: str) -> None:
    with pytest.raises(OptionError) as caught:
        chosen(empty(tmp_path, names), variant)
    assert caught.value.found == ", ".join(names) or set(caught.value.found.split(", ")) == set(names)


def test_a_folder_without_graphs_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"one with \.onnx files in it or in its folder onnx, found neither"):
        Embedder(repository(tmp_path))


# what configs leave open


def test_a_pooling_that_nobody_says_is_asked_for(tmp_path: Path) -> None:
    folder = repository(tmp_path, leave=["1_Pooling"])
    Export().write(folder / "onnx" / "model.onnx")
    with pytest.raises(SpecError, match=r"Foreign\(pooling='mean'\)"):
        Embedder(folder)
    assert off(Embedder(folder, foreign=Foreign(pooling="mean"))) <= EXACT
    first = Embedder(folder, foreign=Foreign(pooling="cls"))
    assert off(first) > 0.01


def test_a_pooling_that_contradicts_the_files_is_refused(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    Export().write(folder / "model.onnx")
    with pytest.raises(SpecError, match=r"expected mean as .* says, found cls"):
        Embedder(folder, foreign=Foreign(pooling="cls"))


@pytest.mark.parametrize("schema", [{"pooling_mode_mean_tokens": True}, {"pooling_mode": "mean"}])
def test_both_schemas_of_pooling_are_read(tmp_path: Path, schema: dict[str, Any]) -> None:
    folder = repository(tmp_path)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(schema), "utf-8")
    Export().write(folder / "model.onnx")
    assert off(Embedder(folder)) <= EXACT


def test_configs_in_the_repository_are_found_though_the_graph_has_some_beside_it(tmp_path: Path) -> None:
    """As bge publishes it: onnx/ has config.json and tokenizer.json of its own, pooling is above."""
    folder = repository(tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / "onnx").mkdir(exist_ok=True)
        shutil.copy(folder / name, folder / "onnx" / name)
    Export().write(folder / "onnx" / "model.onnx")
    for model in (folder, folder / "onnx" / "model.onnx"):
        assert off(Embedder(model)) <= EXACT


def test_any_family_is_taken_and_the_most_tokens_can_be_said(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    edited(folder / "config.json", model_type="t5-like", hidden_size=None, d_model=DIM, max_position_embeddings=None)
    edited(folder / "tokenizer_config.json", model_max_length=None)
    Export().write(folder / "model.onnx")
    with pytest.raises(SpecError, match="max_position_embeddings"):
        Embedder(folder)
    embedder = Embedder(folder, foreign=Foreign(max_length=9))
    assert (embedder.spec.family, embedder.spec.max_length) == ("t5-like", 9)
    assert off(embedder) <= 0.5  # the long text is cut
    assert np.abs(embedder.encode("rain") - means(embedder.ids(["rain"]))[0]).max() <= EXACT


def test_modules_behind_the_pooling_must_be_in_the_graph(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    Export().write(folder / "model.onnx")
    with pytest.raises(UnknownArchitectureError, match="has Dense too, found hidden states only"):
        Embedder(folder)
    Export(outputs=("sentence_embedding",)).write(folder / "model.onnx")
    assert off(Embedder(folder)) <= EXACT


def test_what_is_said_of_others_is_not_said_of_our_folders(folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="it is a folder of ours"):
        Embedder(folders["bert-mean"], foreign=Foreign(pooling="cls"))


def test_files_of_others_run_as_they_are_without_prepacked_weights(tmp_path: Path) -> None:
    folder = repository(tmp_path / "theirs")
    Export().write(folder / "model.onnx")
    embedder = Embedder(folder, memory=Memory(cache=tmp_path / "cache"))
    assert embedder._session.prepacked is None
    assert not (tmp_path / "cache").exists()


# onnxruntime's own quantizers


@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
def test_what_onnxruntime_quantizes_runs(tmp_path: Path, kind: QuantType) -> None:
    folder = repository(tmp_path)
    Export().write(folder / "onnx" / "model.onnx")
    quantize_dynamic(folder / "onnx" / "model.onnx", folder / "onnx" / "model_quantized.onnx", weight_type=kind)
    embedder = Embedder(folder, "quantized")
    found = (embedder.encode(TEXTS) * means(embedder.ids(TEXTS))).sum(axis=1)
    assert 0.99 < found.min() < 1


# huggingface_hub's cache


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_made_of_links_is_read_where_its_links_lead(tmp_path: Path, shared: bool) -> None:
    cache = tmp_path / "hub"
    repo = cache / "models--they--theirs"
    snapshot = repository(repo / "snapshots" / ("a" * 40))
    made = tmp_path / "made"
    made.mkdir()
    onnx.save(Export().model(), made / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    (snapshot / "onnx").mkdir()
    (repo / "blobs").mkdir()
    for at, name in enumerate(("model.onnx", "model.onnx_data")):
        blob = repo / "blobs" / f"{at:064x}"
        shutil.move(made / name, blob)
        if shared:
            place = cache / "blobs" / f"{at:02x}" / f"{at:064x}"
            place.parent.mkdir(parents=True)
            blob.rename(place)
            blob.symlink_to(os.path.relpath(place, blob.parent))
        (snapshot / "onnx" / name).symlink_to(os.path.relpath(blob, snapshot / "onnx"))
    assert off(Embedder(snapshot)) <= EXACT
    assert off(Embedder(snapshot / "onnx" / "model.onnx")) <= EXACT
