"""One variant where another server looks: it opens there, gives its vectors, in operators that are old enough."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper
from tokenizers import Tokenizer

from featherbed.check.facts import facts
from featherbed.check.graph_rules import TEI_ONNXRUNTIME, newer
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import file_record, open_folder
from featherbed.make import rewrite as rewriting
from featherbed.make.ir import Graph
from featherbed.make.read import read_foreign
from featherbed.make.variant import made
from featherbed.make.write import SIDECAR_LEAST_BYTES, write_graph
from featherbed.pipeline.export import CLOSE, LAYOUTS, bound, export
from featherbed.recipe import RECIPES, recorded
from featherbed.run.embedder import Embedder
from featherbed.steps import Standard
from tests.conftest import FIXTURES, cosines_of, made_by, ran, reference_of, upstream
from tests.foreign_folder import edit, hashes, with_sidecar

Copy = Callable[[str], Path]


def as_tei_runs_it(folder: Path, text: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """model.onnx or onnx/model.onnx, int64 inputs, float32 ``sentence_embedding``: what its OrtBackend does."""
    graph = next(path for path in (folder / "model.onnx", folder / "onnx" / "model.onnx") if path.exists())
    json.loads((folder / "config.json").read_text("utf-8"))["num_hidden_layers"]
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    ids = np.array([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids], np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    named = {port.name for port in session.get_inputs()}
    (found,) = session.run(["sentence_embedding"], {name: feeds[name] for name in named})
    assert found.dtype == np.float32
    return np.asarray(found[0])


@pytest.mark.parametrize("sidecar", ["", "int8.data", "model_int8.onnx_data"])
def test_a_variant_is_the_only_model_of_the_new_folder(
    copied: Copy, tmp_path: Path, sidecar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sidecar:  # a graph of this size keeps its weights beside it
        monkeypatch.setattr(rewriting, "write_graph", partial(write_graph, inline_limit_bytes=0))
    source, out = copied("bert-mean"), tmp_path / "laid"
    expected = Embedder(source, "int8").encode("rain in the night")
    if sidecar:  # as if built so: the manifest says what lies there
        with_sidecar(source, "onnx/model_int8.onnx", sidecar)
        files = [f"onnx/{name}" for name in ("model_int8.onnx", sidecar)]
        manifest = json.loads((source / "featherbed.json").read_text("utf-8"))
        manifest["variants"]["int8"]["files"] = files
        manifest["files"] |= {name: vars(file_record(source / name)) for name in files}
        (source / "featherbed.json").write_text(json.dumps(manifest), "utf-8")
    before = hashes(source)
    done = export(source, "int8", out)
    assert hashes(source) == before
    assert done.cosine >= 0.99999
    assert [graph.file for graph in facts(out).graphs] == ["onnx/model.onnx"]
    assert np.abs(as_tei_runs_it(out, "rain in the night") - expected).max() <= 1e-5
    names = {path.name for path in (out / "onnx").iterdir()}
    assert names == ({"model.onnx", "model.onnx_data"} if sidecar else {"model.onnx"})
    told = json.loads((out / "config.json").read_text("utf-8")).get("transformers.js_config")
    assert told == ({"use_external_data_format": {"model.onnx": True}} if sidecar else None)
    assert done.rewritten
    assert {finding.rule.id for finding in done.findings if finding.rule.fails} <= {"tei-config"}


def test_weights_are_linked_and_what_tells_of_other_variants_stays_behind(copied: Copy, tmp_path: Path) -> None:
    source, out = copied("qwen3-tied"), tmp_path / "laid"
    export(source, "fp32", out, "browser")
    laid = out / LAYOUTS["browser"].graph
    assert laid.stat().st_ino == (source / "onnx" / "model.onnx").stat().st_ino
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert not there & {"featherbed.json", "README.md", "report.html", "onnx/model.onnx"}
    assert {"tokenizer.json", "modules.json", "1_Pooling/config.json", "config.json"} <= there


def test_an_export_that_differs_fails(copied: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featherbed.pipeline import export as room

    laid = iter([np.eye(3)[[0, 1, 2]], np.eye(3)[[1, 0, 2]]])
    monkeypatch.setattr(room, "ours", lambda *_: next(laid))
    done = export(copied("bert-mean"), "int8", tmp_path / "laid")
    assert (done.cosine, done.passed) == (0.0, False)


def test_a_folder_of_another_is_exported_by_its_file(copied: Copy, tmp_path: Path) -> None:
    source = copied("bert-mean")
    spec = open_folder(source).manifest.spec
    (source / "featherbed.json").unlink()
    done = export(source, "onnx/model_int8.onnx", tmp_path / "laid")
    assert done.cosine >= 0.99999
    assert Embedder(tmp_path / "laid" / "onnx" / "model.onnx").spec.dim == spec.dim


# operators


@pytest.mark.parametrize("variant", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["bert-mean", "qwen3-tied"])
def test_what_tei_gets_it_can_open(copied: Copy, tmp_path: Path, name: str, variant: str) -> None:
    source, out = copied(name), tmp_path / "laid"
    edit(source / "config.json", lambda c: {**c, "architectures": ["AModel"]})
    manifest = json.loads((source / "featherbed.json").read_text("utf-8"))
    manifest["files"]["config.json"] = vars(file_record(source / "config.json"))
    (source / "featherbed.json").write_text(json.dumps(manifest), "utf-8")
    before, done = facts(source, [variant]).graphs[0].seen, export(source, variant, out)
    after = facts(out).graphs[0].seen
    assert before is not None
    assert after is not None
    assert newer(before, TEI_ONNXRUNTIME)
    assert not newer(after, TEI_ONNXRUNTIME)
    assert set(after.domains) == {"ai.onnx"}
    assert (done.passed, done.rewritten) == (True, True)
    recipe = json.loads(after.metadata["featherbed.recipe"])
    told = json.loads(before.metadata["featherbed.recipe"])
    assert recorded(recipe).steps == (*recorded(told).steps, Standard(blocks=True))
    assert {**recipe, "steps": told["steps"]} == told
    others = {key for key in after.metadata if key != "featherbed.recipe"}
    assert {key: after.metadata[key] for key in others} == {key: before.metadata[key] for key in others}


def test_a_graph_that_is_old_enough_is_linked(copied: Copy, tmp_path: Path) -> None:
    source, again = copied("bert-mean"), tmp_path / "again"
    export(source, "int8", tmp_path / "laid")
    done = export(tmp_path / "laid", "onnx/model.onnx", again)
    assert not done.rewritten
    assert (again / "onnx" / "model.onnx").samefile(tmp_path / "laid" / "onnx" / "model.onnx")


@pytest.mark.parametrize("recipe", ["int4-small", "int8-block", "q4", "bnb4", "int8-dynamic", "int8-static"])
@pytest.mark.parametrize("name", ["bert-mean", "qwen3-tied"])
@pytest.mark.parametrize("limit", [0, 2**30])
def test_every_variant_computes_the_same_and_weights_in_blocks_stay(
    tmp_path: Path, name: str, recipe: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewriting, "write_graph", partial(write_graph, inline_limit_bytes=limit))
    fused = made_by(name, recipe)
    write_graph(fused, tmp_path / "a.onnx", {}, inline_limit_bytes=limit)
    rewriting.rewrite(tmp_path / "a.onnx", tmp_path / "b.onnx", {})
    seen = facts(tmp_path, ["b.onnx"]).graphs[0].seen
    assert seen is not None
    assert not newer(seen, TEI_ONNXRUNTIME)
    assert set(seen.operators) & {"com.microsoft.GroupQueryAttention", "com.microsoft.GatherBlockQuantized"} == set()
    blocks = [node.op for node in fused.nodes if node.op in {"MatMulNBits", "MatMulBnb4"}]
    assert sum(seen.operators.get(f"com.microsoft.{op}", 0) for op in set(blocks)) == len(blocks)
    graph, _ = read_foreign(tmp_path / "b.onnx")
    for weight_name, weight in graph.weights.items():
        if weight_name in fused.weights and weight.shape:
            assert weight.array().tobytes() == fused.weights[weight_name].array().tobytes()
    known = upstream(name)
    ids = known.ids[:3, :5]  # without padding, which a scale for the whole batch would see
    _, vectors = ran(graph, ids, np.ones_like(ids))
    _, expected = ran(fused, ids, np.ones_like(ids))
    assert cosines_of(vectors, expected).min() >= 1 - 1e-9
    assert bool(seen.sidecars) == (limit == 0)


def test_numbers_of_four_bits_stay_as_they_are(tmp_path: Path) -> None:
    graph = made(reference_of(FIXTURES / "bert-mean"), (*RECIPES["q4"].steps, Standard()), None).graph
    packed = {name: w.array().tobytes() for name, w in graph.weights.items() if w.packed}
    assert packed
    for limit in (0, 2**30):
        write_graph(graph, tmp_path / "a.onnx", {}, inline_limit_bytes=limit)
        back, _ = read_foreign(tmp_path / "a.onnx")
        assert {name: w.array().tobytes() for name, w in back.weights.items() if w.packed} == packed
        assert all(back.weights[name].shape == graph.weights[name].shape for name in packed)
    model = onnx.load(tmp_path / "a.onnx")
    listed = next(w for w in model.graph.initializer if w.data_type == TensorProto.INT4)
    name, numbers = listed.name, list(listed.raw_data)
    listed.ClearField("raw_data")
    listed.int32_data.extend(numbers)
    assert numpy_helper.to_array(listed).shape == graph.weights[name].shape
    onnx.save(model, tmp_path / "b.onnx")
    assert read_foreign(tmp_path / "b.onnx")[0].weights[name].array().tobytes() == packed[name]


def test_weights_are_read_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_graph(made_by("bert-mean", "int8"), tmp_path / "a.onnx", {}, inline_limit_bytes=0)
    mapped: list[str] = []

    def writing(graph: Graph, *_: object) -> dict[str, object]:
        mapped.append(f"write {graph.name}")
        return {}

    def reading(*_: object) -> None:
        mapped.append("read")

    monkeypatch.setattr(np, "memmap", reading)
    monkeypatch.setattr(rewriting, "write_graph", writing)
    rewriting.rewrite(tmp_path / "a.onnx", tmp_path / "b.onnx", {})
    assert [word.partition(" ")[0] for word in mapped] == ["write"]
    assert max(w.stat().st_size for w in tmp_path.glob("*_data")) > SIDECAR_LEAST_BYTES


def test_what_nothing_stands_for_is_refused_and_no_folder_is_left(copied: Copy, tmp_path: Path) -> None:
    source = copied("bert-mean")
    (source / "featherbed.json").unlink()
    model = onnx.load(source / "onnx" / "model.onnx")
    node = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
    node.attribute.append(onnx.helper.make_attribute("smooth_softmax", 1))
    onnx.save(model, source / "onnx" / "model.onnx")
    with pytest.raises(OptionError, match=r"model\.onnx, which needs onnxruntime 1\.30.*smooth_softmax"):
        export(source, "onnx/model.onnx", tmp_path / "laid")
    assert not (tmp_path / "laid").exists()


def test_a_graph_with_functions_of_its_own_is_refused(tmp_path: Path) -> None:
    write_graph(made_by("bert-mean", "fp32"), tmp_path / "a.onnx", {})
    model = onnx.load(tmp_path / "a.onnx")
    model.functions.add(name="mine", domain="d")
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(ModelFolderError, match="functions of its own: mine"):
        rewriting.rewrite(tmp_path / "a.onnx", tmp_path / "b.onnx", {})


@pytest.mark.parametrize(
    "said", [{}, {"featherbed.recipe": "{"}, {"featherbed.recipe": '{"steps": [{"step": "New"}]}'}]
)
def test_a_recipe_that_nobody_can_read_stays_as_it_is(tmp_path: Path, said: dict[str, str]) -> None:
    write_graph(made_by("bert-mean", "fp32"), tmp_path / "a.onnx", {})
    rewriting.rewrite(tmp_path / "a.onnx", tmp_path / "b.onnx", said)
    model = onnx.load(tmp_path / "b.onnx")
    assert {p.key: p.value for p in model.metadata_props} == said


@pytest.mark.parametrize(
    ("recipe", "least"),
    [("fp32", CLOSE), ("int4", CLOSE), ("bnb4", CLOSE), ("int8", 0.999), ("int8-block", 0.999), ("int8-dynamic", 0.99),
     ("uint8", 0.99)],
)  # fmt: skip
def test_how_near_it_must_be_depends_on_how_activations_are_rounded(tmp_path: Path, recipe: str, least: float) -> None:
    write_graph(made_by("bert-mean", recipe), tmp_path / "a.onnx", {})
    seen = facts(tmp_path, ["a.onnx"]).graphs[0].seen
    assert seen is not None
    assert bound(seen) == least
