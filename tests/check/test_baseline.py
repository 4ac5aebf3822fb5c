"""Baselines: what was reached before on this kind of CPU is a gate; another kind does not pass unseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import featherbed
from featherbed.check.baseline import ROOM, baseline_gates, kind
from featherbed.cli import app
from featherbed.errors import OptionError

TEXTS = [f"{'the old harbour lay full of rain water ' * (n % 9)}{n}" for n in range(30)]


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    path = tmp_path / "probe.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), "utf-8")
    return path


@pytest.fixture
def recorded(folders: dict[str, Path], probe: Path, tmp_path: Path) -> Path:
    """A baseline of the command line's own making."""
    path = tmp_path / "baselines.json"
    words = ["verify", str(folders["bert-mean"]), "--variants", "fp32,int8", "--probe", str(probe)]
    done = CliRunner().invoke(app, [*words, "--baseline", str(path), "--record"])
    assert done.exit_code == 0, done.output
    return path


def test_the_same_files_pass_their_own_baseline(folders: dict[str, Path], probe: Path, recorded: Path) -> None:
    report = featherbed.verify(folders["bert-mean"], ["int8"], probes=[probe], baseline=recorded)
    judged = [v for v in report.verdicts if v.variant == "int8"]
    assert report.passed
    assert len([v for v in judged if v.metric == "cos_mean"]) == 1
    assert len([v for v in judged if v.metric == "cos_min"]) == 2  # the default gate's, and the baseline's


def test_what_fell_below_its_baseline_fails(folders: dict[str, Path], probe: Path, recorded: Path) -> None:
    known = json.loads(recorded.read_text("utf-8"))
    known[kind()]["int8"]["cos_mean"] += 2 * ROOM["cos_mean"]
    recorded.write_text(json.dumps(known), "utf-8")
    report = featherbed.verify(folders["bert-mean"], ["int8"], probes=[probe], baseline=recorded)
    assert {(v.variant, v.metric) for v in report.verdicts if not v.passed} == {("int8", "cos_mean")}


def test_another_kind_of_cpu_does_not_pass_unseen(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = kind()
    monkeypatch.setattr("featherbed.check.baseline.kind", lambda: "aarch64, asimddp")
    with pytest.raises(OptionError, match="aarch64, asimddp") as error:
        baseline_gates(recorded, ["int8"])
    assert here in str(error.value)
    assert "--record" in str(error.value)


def test_a_variant_that_was_never_recorded_is_named(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"figures of q4 .*other variants"):
        baseline_gates(recorded, ["int8", "q4"])
    with pytest.raises(OptionError, match="no such file"):
        baseline_gates(tmp_path / "nothing.json", ["int8"])


@pytest.mark.parametrize("text", ["[]", '{"x": {"int8": {"cos_min": "high"}}}', '{"x": {"int8": {"beauty": 1}}}'])
def test_a_file_that_is_no_baseline_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "baselines.json"
    path.write_text(text, "utf-8")
    with pytest.raises(OptionError, match=r"baselines\.json"):
        baseline_gates(path, ["int8"])


def test_other_kinds_and_variants_stay_when_one_is_recorded(
    folders: dict[str, Path], probe: Path, recorded: Path
) -> None:
    known = json.loads(recorded.read_text("utf-8"))
    known["aarch64"] = {"int8": {"cos_min": 0.5}}
    recorded.write_text(json.dumps(known), "utf-8")
    words = ["verify", str(folders["bert-mean"]), "--variants", "int8-block", "--probe", str(probe)]
    assert CliRunner().invoke(app, [*words, "--baseline", str(recorded), "--record"]).exit_code == 0
    now = json.loads(recorded.read_text("utf-8"))
    assert now["aarch64"] == {"int8": {"cos_min": 0.5}}
    assert set(now[kind()]) == {"fp32", "int8", "int8-block"}


def test_record_needs_to_know_where(folders: dict[str, Path]) -> None:
    done = CliRunner().invoke(app, ["verify", str(folders["bert-mean"]), "--record"])
    assert isinstance(done.exception, OptionError)
