"""Planted bad artifacts: each is rejected, with words that point at the cause. Good ones are not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import featherbed
from featherbed.errors import FeatherbedError
from featherbed.folder import MANIFEST, file_record
from tests.check.test_verify import damage, initializer, scaled
from tests.conftest import CALIBRATION

TEXTS = ["the old harbour lay full of rain", "rain", "soft", *(f"a bed of {n} feathers, soft" for n in range(40))]
Change = Callable[[Path], None]


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    path = tmp_path / "probe.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), "utf-8")
    return path


def rehashed(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Make the manifest agree with the files, so that only looking closer can find what was done to them."""
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    for name in manifest["files"]:
        manifest["files"][name] = vars(file_record(folder / name))
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def edited(name: str, change: Callable[[dict[str, Any]], None]) -> Change:
    def edit(folder: Path) -> None:
        found = json.loads((folder / name).read_text("utf-8"))
        change(found)
        (folder / name).write_text(json.dumps(found), "utf-8")
        rehashed(folder)

    return edit


def graph(change: Callable[[onnx.ModelProto], None], file: str = "model_int8.onnx") -> Change:
    return lambda folder: damage(folder, file, change)


def renamed_output(model: onnx.ModelProto, nodes: list[onnx.NodeProto], constants: dict[str, Any]) -> None:
    """``nodes`` make the output "sentence_embedding" from here on; the old one is called "was"."""
    for node in model.graph.node:
        for at, name in enumerate(node.output):
            if name == "sentence_embedding":
                node.output[at] = "was"
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    model.graph.node.extend(nodes)


def times_when_short(factor: float) -> Callable[[onnx.ModelProto], None]:
    """Texts of one word, three tokens, are multiplied by ``factor``: one row among many good ones."""

    def change(model: onnx.ModelProto) -> None:
        nodes = [
            helper.make_node("ReduceSum", ["attention_mask", "axis"], ["bad.length"], keepdims=1),
            helper.make_node("LessOrEqual", ["bad.length", "bad.three"], ["bad.short"]),
            helper.make_node("Where", ["bad.short", "bad.factor", "bad.one"], ["bad.by"]),
            helper.make_node("Mul", ["was", "bad.by"], ["sentence_embedding"]),
        ]
        numbers = {"three": np.asarray(3), "one": np.float32(1), "factor": np.float32(factor)}
        constants = {"axis": np.asarray([1]), **{f"bad.{key}": value for key, value in numbers.items()}}
        renamed_output(model, nodes, constants)

    return change


def last_is_sum_less_one(model: onnx.ModelProto) -> None:
    """The last token is looked for where it stands only when padding is on the right."""
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "bad.axis"], ["bad.length"], keepdims=1),
        helper.make_node("Sub", ["bad.length", "bad.one"], ["bad.at"]),
        helper.make_node("GatherND", ["last_hidden_state", "bad.at"], ["bad.row"], batch_dims=1),
        helper.make_node("LpNormalization", ["bad.row"], ["sentence_embedding"], axis=-1, p=2),
    ]
    renamed_output(model, nodes, {"bad.axis": np.asarray([1]), "bad.one": np.asarray(1)})


def swapped(model: onnx.ModelProto) -> None:
    one, other = (initializer(model, f"layer.{n}.intermediate.dense.weight.s8") for n in (0, 1))
    one.name, other.name = other.name, one.name


def another_vocabulary(tokenizer: dict[str, Any]) -> None:
    """Every ordinary piece under its neighbour's id."""
    vocabulary = tokenizer["model"]["vocab"]
    pieces = [piece for piece in vocabulary if not piece.startswith("[")]
    ids = [vocabulary[piece] for piece in pieces]
    vocabulary.update(dict(zip(pieces, ids[1:] + ids[:1], strict=True)))


def no_end_token(tokenizer: dict[str, Any]) -> None:
    tokenizer["post_processor"] = None


def stale_location(folder: Path) -> None:
    """The graph names a sidecar that was renamed after it."""
    path = folder / "onnx" / "model_int8.onnx"
    model = onnx.load(str(path))
    onnx.save(model, str(path), save_as_external_data=True, location="old_name.onnx_data", size_threshold=0)
    (folder / "onnx" / "old_name.onnx_data").rename(folder / "onnx" / "model_int8.onnx_data")

    def with_sidecar(manifest: dict[str, Any]) -> None:
        name = "onnx/model_int8.onnx_data"
        manifest["variants"]["int8"]["files"].append(name)
        manifest["files"][name] = vars(file_record(folder / name))

    rehashed(folder, with_sidecar)


def other_pooling(folder: Path) -> None:
    """Folder and graph disagree: the configuration says cls, the graph averages."""
    rehashed(folder, lambda m: m["spec"].update(pooling="cls"))


BAD: dict[str, tuple[str, Change, str]] = {
    "a scale doubled": ("bert-mean", graph(scaled("encoder.layer.0.output.dense.weight.scales", 2)), "damaged weight"),
    "a layer swapped": ("bert-mean", graph(swapped), "damaged weight"),
    "wrong pooling": ("bert-mean", other_pooling, "pools otherwise than the folder's configuration"),
    "end token missing": ("qwen3-tied", edited("tokenizer.json", no_end_token), "ends each text with the id"),
    "another tokenizer": (
        "bert-mean",
        edited("tokenizer.json", another_vocabulary),
        "token ids that the folder was made",
    ),
    "one row of zeros": ("bert-mean", graph(times_when_short(0)), "not at length 1"),
    "one row of NaN": ("bert-mean", graph(times_when_short(math.nan)), "NaN or Inf in a vector"),
    "last token is sum less one": ("qwen3-tied", graph(last_is_sum_less_one), "depends on the padding side"),
    "stale sidecar": ("bert-mean", stale_location, "old_name.onnx_data"),
}


def why_rejected(folder: Path, probe: Path) -> str:
    """What is said of a bad folder; nothing of one that passes."""
    try:
        report = featherbed.verify(folder, ["int8"], gates=["invariance_padding=1e-4"], probes=[probe])
    except FeatherbedError as error:
        return str(error)
    return " ".join(str(verdict) for verdict in report.verdicts if not verdict.passed)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_artifact_is_rejected_and_the_cause_is_named(
    name: str, copied: Callable[[str], Path], probe: Path
) -> None:
    fixture, change, cause = BAD[name]
    folder = copied(fixture)
    change(folder)
    assert cause in why_rejected(folder, probe)


def test_stock_int8_of_a_model_with_outliers_is_rejected(tmp_path: Path, probe: Path) -> None:
    import plant

    from tests.conftest import FIXTURES

    plant.plant(FIXTURES / "qwen3-tied", tmp_path / "loud", ("norms", "down"), 100)
    featherbed.build(
        tmp_path / "loud", tmp_path / "out", ["fp32", "int8-dynamic"], check=False, calibration=CALIBRATION
    )
    report = featherbed.verify(tmp_path / "out", ["fp32", "int8-dynamic"], probes=[probe])
    assert report.passed_by("fp32")
    words = " ".join(str(v) for v in report.verdicts if not v.passed)
    assert "int8-dynamic cos_min" in words
    assert "outliers that rounding crushed" in words


@pytest.mark.parametrize("fixture", ["bert-cls", "bert-mean", "qwen3-biased", "qwen3-tied"])
def test_good_artifacts_are_not_rejected(fixture: str, folders: dict[str, Path], probe: Path) -> None:
    variants = ["fp32", "int8", "int8-block"]
    if fixture.startswith("bert"):  # the decoders' random rows of 48 numbers are too short for 4 bits
        variants += ["int4", "int4-small"]
    report = featherbed.verify(folders[fixture], variants, probes=[probe])
    assert [str(verdict) for verdict in report.verdicts if not verdict.passed] == []


def test_a_folder_of_before_token_ids_were_recorded_is_still_taken(copied: Callable[[str], Path], probe: Path) -> None:
    folder = copied("bert-mean")
    rehashed(folder, lambda m: m.pop("token_ids_sha256"))
    assert featherbed.verify(folder, ["int8"], probes=[probe]).passed
    shutil.rmtree(folder)
