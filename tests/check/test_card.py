"""The card says what the evidence says, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

import featherbed
from featherbed.check.bench import Load
from featherbed.check.card import number, scientific
from featherbed.errors import ModelFolderError
from featherbed.folder import open_folder
from featherbed.recipe import RECIPES
from tests.conftest import FIXTURES


@pytest.fixture(scope="module")
def once(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with evidence, made once."""
    root = tmp_path_factory.mktemp("evidence")
    folder = Path(shutil.copytree(folders["qwen3-tied"], root / "model"))
    probe = root / "texts.jsonl"
    probe.write_text("\n".join(json.dumps({"text": "rain " * n}) for n in range(1, 30)), "utf-8")
    featherbed.verify(folder, ["fp32", "int8", "q4"], probes=[probe], save=True)
    return folder


@pytest.fixture
def verified(once: Path, tmp_path: Path) -> Path:
    """A private copy of it."""
    return Path(shutil.copytree(once, tmp_path / "verified"))


def test_the_same_evidence_gives_the_same_bytes(verified: Path) -> None:
    before = (verified / "README.md").read_bytes()
    assert featherbed.card(verified).read_bytes() == before


def test_every_figure_of_the_quality_table_is_in_the_evidence(verified: Path) -> None:
    card = (verified / "README.md").read_text("utf-8")
    table = card.split("## Quality")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) == 3
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        metrics = json.loads((verified / "reports" / f"{cells[0].strip('`')}.json").read_text("utf-8"))["metrics"]
        (low, high), (few, many) = (metrics["intervals"][name] for name in ("cos_mean", "neighbours_at_10"))
        expected = [
            f"{number(metrics['cos_mean'], 5)} ({number(low, 5)}–{number(high, 5)})",
            number(metrics["cos_p1"], 4),
            number(metrics["cos_min"], 4),
            number(metrics["spearman"], 4),
            f"{number(metrics['neighbours_at_10'], 3)} ({number(few, 3)}–{number(many, 3)})",
            scientific(metrics["invariance_max"]),
            f"{metrics['triplets_correct']} / {metrics['triplets_total']}",
            number(metrics["triplet_margin_mean"], 3),
            number(metrics["anisotropy"], 3),
        ]
        assert cells[1:] == expected


def test_evidence_of_before_a_metric_was_measured_has_a_dash_there(verified: Path) -> None:
    path = verified / "reports" / "int8.json"
    report = json.loads(path.read_text("utf-8"))
    for name in ("cos_p1", "spearman", "neighbours_at_10", "intervals"):
        del report["metrics"][name]
    path.write_text(json.dumps(report), "utf-8")
    card = featherbed.card(verified).read_text("utf-8")
    row = next(line for line in card.split("## Quality")[1].splitlines() if line.startswith("| `int8` |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == number(report["metrics"]["cos_mean"], 5)
    assert (cells[2], cells[4], cells[5]) == ("–", "–", "–")


def test_hashes_and_sizes_are_those_of_the_manifest(verified: Path) -> None:
    card = (verified / "README.md").read_text("utf-8")
    files = open_folder(verified).manifest.files
    listed = re.findall(r"\| `(onnx/[^`]+)` \| (\d+) \| `([0-9a-f]{64})` \|", card)
    assert {name for name, _, _ in listed} == {f"onnx/model{recipe.suffix}.onnx" for recipe in RECIPES.values()}
    assert all((files[name].size_bytes, files[name].sha256) == (int(size), sha) for name, size, sha in listed)


def test_each_row_of_speed_keeps_its_own_load(verified: Path) -> None:
    featherbed.bench(verified, ["int8"], Load(tokens=16, batch=2, rounds=1), save=True)
    featherbed.bench(verified, ["q4"], Load(tokens=8, batch=1, rounds=2), save=True)
    card = (verified / "README.md").read_text("utf-8")
    assert "`int8`: batches of 2 × 16 tokens, median of 1 rounds" in card
    assert "`q4`: batches of 1 × 8 tokens, median of 2 rounds" in card


def test_an_unverified_folder_claims_nothing(folders: dict[str, Path]) -> None:
    card = (folders["bert-mean"] / "README.md").read_text("utf-8")
    assert "## Quality" not in card
    assert "not verified" in card


def test_evidence_of_another_variant_is_refused(verified: Path) -> None:
    report = (verified / "reports" / "int8.json").read_text("utf-8")
    (verified / "reports" / "q4.json").write_text(report, "utf-8")
    with pytest.raises(ModelFolderError, match="evidence of q4"):
        featherbed.card(verified)


def test_a_cosine_below_one_never_reads_as_one() -> None:
    assert number(0.99999999, 4) == "0.9999"
    assert number(1.0, 4) == number(1 - 1e-15, 4) == "1.0000"
    assert number(-0.01239, 3) == "-0.012"
    assert number(None, 4) == "–"
    assert scientific(0.0) == "0"


def told(value: object) -> Iterator[float]:
    """Every number of a JSON value."""
    if isinstance(value, dict):
        for one in value.values():
            yield from told(one)
    elif isinstance(value, list):
        for one in value:
            yield from told(one)
    elif isinstance(value, str):
        yield from (float(one) for one in re.findall(r"\d+(?:\.\d+)?", value))
    elif isinstance(value, int | float):
        yield float(value)


def test_every_number_on_the_card_is_in_the_evidence(verified: Path) -> None:
    featherbed.bench(verified, ["fp32", "int8"], Load(tokens=16, batch=2, rounds=1), save=True)
    card = (verified / "README.md").read_text("utf-8")
    sources = [verified / "featherbed.json", *sorted((verified / "reports").glob("*.json"))]
    known = {number for path in sources for number in told(json.loads(path.read_text("utf-8")))}
    sizes = open_folder(verified).manifest
    known |= {float(sizes.size_bytes(name)) for name in sizes.variants}
    written = {
        f"{scale(value):.{digits}f}"
        for value in known
        for scale in (abs, lambda v: abs(v) / 1e6)
        for digits in range(6)
    }
    written |= {number(abs(value), digits) for value in known for digits in range(6)}
    written |= {scientific(abs(value)) for value in known} | {f"{abs(value):g}" for value in known}
    written |= {"64", "95", "1", "2"}  # of the notes: company of 64, 95 % intervals, 1 − cosine, 1 % below
    prose = re.sub(r"^---\n.*?\n---\n|```.*?```|`[^`]*`|#+ .*|sha256 [0-9a-f]+…", " ", card, flags=re.S)
    prose = re.sub(r"fp32|float32|bert|qwen3|int8|int4|q4|\bp\d\d\b|10\b", " ", prose)  # names
    for found in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e[-+]\d+)?", prose):
        assert found in written, found


def test_the_hub_can_read_the_front_matter(verified: Path) -> None:
    metadata = ModelCard.load(verified / "README.md").data
    assert metadata.library_name == "featherbed"
    assert metadata.pipeline_tag == "feature-extraction"
    assert metadata.base_model is None
    kept = json.loads((verified / "reports" / "int8.json").read_text("utf-8"))["metrics"]
    assert metadata.eval_results is not None
    values = {(result.metric_name, result.metric_value) for result in metadata.eval_results}
    assert ("int8: worst cosine to fp32", kept["cos_min"]) in values
    assert not any("fp32:" in str(name) for name, _ in values)


def test_the_origin_is_on_the_card(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("bert-mean")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n", "utf-8")
    featherbed.build(source, tmp_path / "out", ["fp32"], check=False, base_model="owner/upstream")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", ["en"], "owner/upstream")
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert "[owner/upstream](https://huggingface.co/owner/upstream)" in card.text


def test_what_gave_way_is_remembered(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = checkpoint("bert-mean"), tmp_path / "out"
    featherbed.build(source, out, ["fp32", "q4", "int8-dynamic"], check=False)
    before = open_folder(out).manifest
    featherbed.build(source, out, ["fp32", "q4"], check=False)
    assert [change.variant for change in open_folder(out).manifest.history] == ["int8-dynamic"]
    featherbed.build(FIXTURES / "bert-cls", out, ["fp32", "q4"], check=False)
    history = open_folder(out).manifest.history
    assert [change.variant for change in history] == ["int8-dynamic", "fp32", "q4"]
    assert history[2].sha256 == before.files[before.variants["q4"].files[-1]].sha256
    rows = (out / "README.md").read_text("utf-8").split("## Changes")[1]
    assert rows.count("replaced") == 2
    assert rows.count("removed") == 1


def snippets(folder: Path) -> dict[str, str]:
    card = (folder / "README.md").read_text("utf-8").replace("PATH/TO/THIS/FOLDER", str(folder))
    return dict(re.findall(r"### ([^\n]+)\n\n```\w+\n(.*?)```", card, re.S))


def test_the_card_tells_everyone_how(verified: Path) -> None:
    assert list(snippets(verified)) == [
        "featherbed", "sentence-transformers", "fastembed", "transformers.js", "onnxruntime alone",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3-tied", "bert-cls"])
def test_the_snippets_of_featherbed_and_onnxruntime_run_and_agree(
    copied: Callable[[str], Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(name)
    found = snippets(folder)
    scope: dict[str, Any] = {}
    exec(compile(found["featherbed"], "card", "exec"), scope)
    bare: dict[str, Any] = {}
    exec(compile(found["onnxruntime alone"], "card", "exec"), bare)
    both = np.concatenate([scope["queries"], scope["documents"]])
    assert both.shape == bare["vectors"].shape
    assert np.abs(both - bare["vectors"]).max() < 1e-3  # the engine derives its own graph
    assert capsys.readouterr().out
