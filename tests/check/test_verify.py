"""verify on real folders: good ones pass, planted faults fail at the gate that names them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import featherbed
from featherbed.check.invariance import COMPANY, LONGEST, company, invariance, padded_left
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import MANIFEST, file_record, open_folder
from featherbed.report import Report
from featherbed.run.batches import Batch, collate
from featherbed.run.embedder import Embedder

TEXTS = [f"{'the old harbour lay full of rain water ' * (n % 9)}{n}" for n in range(80)]


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    path = tmp_path / "probe.jsonl"
    rows: list[dict[str, str]] = [{"text": text} for text in TEXTS]
    rows.append({"anchor": "a soft bed", "positive": "the bed is soft", "negative": "rain"})
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


def damage(folder: Path, file: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph and make the manifest agree, so that only measuring can find it."""
    path = folder / "onnx" / file
    model = onnx.load(str(path))
    change(model)
    onnx.save(model, str(path))
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    record = file_record(path)
    manifest["files"][f"onnx/{file}"] = {"sha256": record.sha256, "size_bytes": record.size_bytes}
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def initializer(model: onnx.ModelProto, ending: str) -> onnx.TensorProto:
    (found,) = (t for t in model.graph.initializer if t.name.endswith(ending))
    assert isinstance(found, onnx.TensorProto)
    return found


def scaled(ending: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = initializer(model, ending)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))

    return change


def failed(report: Report) -> set[tuple[str, str]]:
    return {(v.variant, v.metric) for v in report.verdicts if not v.passed}


def test_good_variants_pass(folders: dict[str, Path], probe: Path) -> None:
    report = featherbed.verify(folders["bert-mean"], ["fp32", "int8", "int8-block"], probes=[probe])
    assert failed(report) == set()
    assert report.metrics["fp32"].cos_min == pytest.approx(1, abs=1e-9)
    assert report.metrics["int8"].n == len(TEXTS) + 3
    assert report.metrics["int8"].triplets_total == 1


def test_per_tensor_int8_fails_the_invariance_gate(folders: dict[str, Path], probe: Path) -> None:
    report = featherbed.verify(folders["qwen3-tied"], ["int8-dynamic"], probes=[probe])
    assert ("int8-dynamic", "invariance_max") in failed(report)


def test_a_doubled_scale_fails_the_cosine_gate(copied: Callable[[str], Path], probe: Path) -> None:
    folder = copied("bert-mean")
    damage(folder, "model_int8.onnx", scaled("encoder.layer.0.output.dense.weight.scales", 2))
    assert ("int8", "cos_min") in failed(featherbed.verify(folder, ["int8"], probes=[probe]))


def test_swapped_layers_fail_the_cosine_gate(copied: Callable[[str], Path], probe: Path) -> None:
    def swap(model: onnx.ModelProto) -> None:
        one = initializer(model, "layer.0.intermediate.dense.weight.s8")
        other = initializer(model, "layer.1.intermediate.dense.weight.s8")
        one.name, other.name = other.name, one.name

    folder = copied("bert-mean")
    damage(folder, "model_int8.onnx", swap)
    assert ("int8", "cos_min") in failed(featherbed.verify(folder, ["int8"], probes=[probe]))


def test_nan_in_a_weight_fails_and_is_null_in_the_document(copied: Callable[[str], Path], probe: Path) -> None:
    folder = copied("bert-mean")
    damage(folder, "model_int8.onnx", scaled("encoder.layer.1.output.LayerNorm.weight", math.nan))
    report = featherbed.verify(folder, ["int8"], probes=[probe])
    assert ("int8", "cos_min") in failed(report)
    assert report.to_json()["variants"]["int8"]["cos_min"] is None
    json.dumps(report.to_json(), allow_nan=False)


def test_missing_normalisation_fails_the_unit_norm_gate(copied: Callable[[str], Path], probe: Path) -> None:
    def unnormalised(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == "LpNormalization")
        node.op_type = "Identity"
        del node.attribute[:]

    folder = copied("bert-mean")
    damage(folder, "model_int8.onnx", unnormalised)
    assert ("int8", "unit_norm_max_error") in failed(featherbed.verify(folder, ["int8"], probes=[probe]))


def test_a_changed_byte_is_found_before_anything_is_measured(copied: Callable[[str], Path], probe: Path) -> None:
    folder = copied("bert-mean")
    path = folder / "onnx" / "model_int8.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFolderError, match="sha256"):
        featherbed.verify(folder, ["int8"], probes=[probe])


def test_a_changed_tokenizer_is_found_too(copied: Callable[[str], Path], probe: Path) -> None:
    folder = copied("bert-mean")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace('"lowercase": true', '"lowercase": false'), "utf-8")
    with pytest.raises(ModelFolderError, match=r"tokenizer\.json"):
        featherbed.verify(folder, ["int8"], probes=[probe])


def test_a_gate_on_what_is_not_measured_is_refused(folders: dict[str, Path], probe: Path) -> None:
    with pytest.raises(OptionError, match="--reference"):
        featherbed.verify(folders["bert-mean"], gates=["reference_max_error=1e-5"], probes=[probe])


def test_a_folder_without_the_reference_cannot_be_verified(copied: Callable[[str], Path], probe: Path) -> None:
    folder = copied("bert-mean")
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    del manifest["variants"]["fp32"]
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(ModelFolderError, match="reference"):
        featherbed.verify(folder, ["int8"], probes=[probe])


def test_a_stricter_gate_replaces_the_default_one(folders: dict[str, Path], probe: Path) -> None:
    report = featherbed.verify(folders["bert-mean"], ["int8"], gates=["cos_min=0.9999999"], probes=[probe])
    assert failed(report) == {("int8", "cos_min")}
    assert [v.bound for v in report.verdicts if v.metric == "cos_min"] == [0.9999999]


def test_an_unknown_variant_is_refused(folders: dict[str, Path], probe: Path) -> None:
    with pytest.raises(OptionError, match="int9"):
        featherbed.verify(folders["bert-mean"], ["int9"], probes=[probe])


def test_verify_twice_gives_the_same_document(folders: dict[str, Path], probe: Path) -> None:
    first, second = (featherbed.verify(folders["bert-cls"], probes=[probe]).to_json() for _ in range(2))
    assert first == second


def test_saved_evidence_marks_the_manifest_and_auto_avoids_what_failed(
    copied: Callable[[str], Path], probe: Path
) -> None:
    folder = copied("qwen3-biased")
    report = featherbed.verify(folder, gates=["cos_min=0.99999"], probes=[probe], save=True)
    opened = open_folder(folder)
    assert {v.name: v.passed for v in opened.manifest.variants.values()} == {
        name: report.passed_by(name) for name in report.metrics
    }
    assert opened.manifest.variants["int8"].passed is False
    assert Embedder(folder).variant == "fp32"
    opened.check_hashes()


def test_the_company_is_64_texts_of_mixed_lengths_and_keeps_the_end_token() -> None:
    rows = [[1, *range(10, 10 + n), 2] for n in range(200)]
    chosen = company(rows)
    assert len(chosen) == COMPANY
    assert {len(row) for row in chosen} >= {2, LONGEST}
    assert all(row[0] == 1 and row[-1] == 2 for row in chosen)


def test_left_padding_moves_rows_and_nothing_else() -> None:
    batch = padded_left(collate([[5, 6, 7], [8]], pad_id=9), pad_id=9)
    assert batch.ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch.mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_an_engine_that_looks_at_its_neighbours_is_found(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = Embedder(folders["bert-mean"], "fp32")
    honest = embedder.embed

    def leaky(batch: Batch, unit: bool = True) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return honest(batch, unit) + np.float32(0.05 * batch.ids.mean() / 384)

    rows = embedder.ids(TEXTS)
    still = invariance(embedder, rows)
    assert max(still.batch, still.padding, still.order) <= 1e-12
    monkeypatch.setattr(embedder, "embed", leaky)
    assert invariance(embedder, rows).batch > 1e-5


def test_the_same_verify_twice_leaves_the_same_bytes(copied: Callable[[str], Path], probe: Path) -> None:
    folder = copied("qwen3-tied")
    kept = []
    for _ in range(2):
        featherbed.verify(folder, ["fp32", "int8"], probes=[probe], save=True)
        files = [folder / MANIFEST, folder / "README.md", folder / "report.html", *(folder / "reports").iterdir()]
        kept.append({path.name: path.read_bytes() for path in files})
    assert kept[0] == kept[1]
