"""The card says what the evidence says, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import featherbed
from featherbed.check.bench import Load
from featherbed.check.card import number, scientific
from featherbed.errors import ModelFolderError
from featherbed.folder import open_folder
from featherbed.recipe import RECIPES


@pytest.fixture
def verified(copied: Callable[[str], Path], tmp_path: Path) -> Path:
    folder = copied("qwen3-tied")
    probe = tmp_path / "texts.jsonl"
    probe.write_text("\n".join(json.dumps({"text": "rain " * n}) for n in range(1, 30)), "utf-8")
    featherbed.verify(folder, ["fp32", "int8", "q4"], probes=[probe], save=True)
    return folder


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


def test_the_snippet_on_the_card_runs(verified: Path) -> None:
    card = (verified / "README.md").read_text("utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.S)
    scope: dict[str, object] = {}
    exec(compile(snippet.replace("PATH/TO/THIS/FOLDER", str(verified)), "card", "exec"), scope)
    assert scope["queries"].shape == scope["documents"].shape == (1, 48)  # type: ignore[attr-defined]
