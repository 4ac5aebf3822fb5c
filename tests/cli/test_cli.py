"""The command line: every verb from end to end, its last line, its exit codes, its silence."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featherbed
from featherbed.cli import main
from featherbed.run import files
from featherbed.run import windows as windows_room
from featherbed.run.foreign import Foreign
from tests.conftest import CALIBRATION, FIXTURES, upstream
from tests.foreign_files import Export, repository

OPTIONS = {
    "build": "-o --out --variants --gate --pooling --calibration --base-model --operators --static --verify --no-verify"
    " --json",
    "verify": "--variants --gate --probe --reference --retrieval --baseline --record --junit --save --no-save --json",
    "inspect": "--json",
    "bench": "--variants --tokens --batch --rounds --threads --pool-size --provider --save --no-save --json",
    "card": "--json",
    "report": "--json",
    "pull": "--variants -o --out --dry-run --json",
    "prune": "--keep --force --dry-run --json",
    "list": "--json",
    "doctor": "--mend --json",
    "push": "--variants --weights --private --dry-run --json",
    "eval": "--variants --modes --corpus --queries --qrels --group --titles --no-titles --save --no-save --json",
    "tune": "--min --max --goal --trials --calibration --probe --json",
    "conform": "--variants --load --no-load --python --node --json",
    "repair": "-o --out --in-place --pooling --dry-run --json",
    "export": "-o --out --variant --layout --json",
    "embed": "-o --out --variant --query --field --dim --threads --pool-size --provider --config --model --batch-size "
    "--pooling --task --output --json",
}
METRICS = (
    "n cos_mean cos_p1 cos_min pearson spearman neighbours_at_10 invariance_batch invariance_padding invariance_order "
    "triplets_correct triplets_total triplet_margin_mean anisotropy unit_norm_max_error pooling_max_error not_finite "
    "size_bytes intervals percentiles worst invariance_max"
)
GATES = {"not_finite", "cos_min", "invariance_max", "unit_norm_max_error", "pooling_max_error"}
SPEEDS = "tokens_per_s texts_per_s latency_p50_ms latency_p95_ms load_s rss_mib rss_private_mib rss_peak_mib size_bytes"
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "numpy", "tokenizers", "huggingface_hub", "safetensors")
BAR = re.compile(r" (\d+% +[\d.]+M?/[\d.]+M?|[\d.]+M?) +\d+:\d\d:\d\d$")  # of how many, where anybody knows
PROBE = [
    {"anchor": "rain", "positive": "Rain fell all night.", "negative": "a fox"},
    {"text": "The quick brown fox jumps over the lazy dog."},
    {"sentence1": "ein Bett", "sentence2": "a bed"},
]
QUICK = ("--tokens", 16, "--batch", 2, "--rounds", 1)


@dataclass(frozen=True)
class Outcome:
    """How a command ended, what it printed, and what it wrote on standard error beside progress bars."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        assert self.out.endswith("\n")
        return dict(json.loads(self.out.removesuffix("\n").split("\n")[-1]))

    @property
    def complaints(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip() and not BAR.search(line)]


Run = Callable[..., Outcome]
Copy = Callable[[str], Path]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line inside this process."""

    def call(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["featherbed", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), out, err)

    return call


def spawn(*words: object, stdin: bytes = b"", cwd: Path | None = None, **environment: str) -> Outcome:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "featherbed.cli", *map(str, words)]
    ended = subprocess.run(
        command, input=stdin, cwd=cwd, capture_output=True, check=False, env={**os.environ, **environment}
    )
    return Outcome(ended.returncode, ended.stdout.decode("utf-8", "replace"), ended.stderr.decode("utf-8", "replace"))


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBE), "utf-8")
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("rain\na fox\n\nein Bett", "utf-8")
    return path


def check_report(document: dict[str, Any], variants: list[str], gates: set[str]) -> None:
    assert document["probe"].keys() == {"name", "version", "sha256", "texts", "triplets"}
    assert list(document["variants"]) == variants
    for row in document["variants"].values():
        assert list(row) == METRICS.split()
        assert all(
            isinstance(
                value, dict if name in ("intervals", "percentiles") else list if name == "worst" else (int, float)
            )
            for name, value in row.items()
        )
    assert {(g["variant"], g["metric"]) for g in document["gates"]} == {(v, m) for v in variants for m in gates}
    for gate in document["gates"]:
        assert list(gate) == ["variant", "metric", "bound", "value", "passed"]
        assert gate["value"] == document["variants"][gate["variant"]][gate["metric"]]
    assert document["passed"] is all(gate["passed"] for gate in document["gates"])


def test_the_whole_river_runs_and_each_last_line_is_one_document(tmp_path: Path, texts: Path) -> None:
    gates = GATES
    folder = tmp_path / "small"

    few = ("--calibration", CALIBRATION)
    built = spawn("build", FIXTURES / "bert-mean", "-o", folder, "--variants", "fp32,int8,q4", *few, "--json")
    assert (built.code, built.complaints) == (0, [])
    assert list(built.document) == ["folder", "built", "passed", "probe", "variants", "gates"]
    assert (built.document["folder"], built.document["built"]) == (str(folder), True)
    check_report(built.document, ["fp32", "int8", "q4"], gates)

    verified = spawn("verify", folder, "--json")
    assert (verified.code, verified.complaints) == (0, [])
    assert list(verified.document) == ["passed", "probe", "variants", "gates"]
    check_report(verified.document, ["fp32", "int8", "q4"], gates)
    assert verified.document["probe"] == built.document["probe"]
    assert verified.document["variants"]["int8"]["n"] == verified.document["probe"]["texts"]

    inspected = spawn("inspect", folder, "--json")
    assert (inspected.code, inspected.err) == (0, "")
    assert list(inspected.document) == ["path", "manifest", "spec", "files", "warnings"]
    assert [f["variant"] for f in inspected.document["files"]] == ["fp32", "int8", "q4"]
    sizes = {f["variant"]: f["size_bytes"] for f in inspected.document["files"]}
    assert sizes == {name: row["size_bytes"] for name, row in verified.document["variants"].items()}

    benched = spawn("bench", folder, "--variants", "int8", *QUICK, "--save", "--json")
    assert (benched.code, benched.complaints) == (0, [])
    assert list(benched.document) == ["machine", "load", "variants"]
    assert benched.document["load"] == {
        "tokens": 16, "batch": 2, "rounds": 1, "threads": 0, "pool_size": 0, "provider": "cpu",
    }  # fmt: skip
    assert list(benched.document["variants"]) == ["int8"]
    row = benched.document["variants"]["int8"]
    assert list(row) == SPEEDS.split()
    assert all(value > 0 for value in row.values())
    assert row["rss_private_mib"] <= row["rss_mib"] <= row["rss_peak_mib"]
    assert row["size_bytes"] == sizes["int8"]

    (folder / "README.md").unlink()
    carded = spawn("card", folder, "--json")
    assert (carded.code, carded.err) == (0, "")
    assert carded.document == {"card": str(folder / "README.md")}
    assert "## Speed and memory" in (folder / "README.md").read_text("utf-8")

    embedded = spawn("embed", folder, texts, "-", "-o", tmp_path / "v.npy", "--json", stdin=b"snow\r\nhail\n")
    assert (embedded.code, embedded.complaints) == (0, [])
    document = embedded.document
    assert document.pop("seconds") >= 0
    assert document == {
        "out": str(tmp_path / "v.npy"), "variant": "int8", "provider": "cpu", "texts": 6, "dimensions": 48,
    }  # fmt: skip
    expected = featherbed.Embedder(folder, "int8").encode(["rain", "a fox", "", "ein Bett", "snow", "hail"])
    assert np.abs(np.load(tmp_path / "v.npy") - expected).max() <= 1e-6


def test_without_json_the_same_verbs_talk_to_people(run: Run, copied: Copy, probe: Path, texts: Path) -> None:
    folder, out = copied("bert-cls"), texts.with_name("v.npy")
    expected = {
        ("verify", folder, "--probe", probe, "--variants", "fp32,q4"): ["fp32", "q4", "few.jsonl", "passed"],
        ("inspect", folder): ["cls pooling", "prompt query: 'find: '", "model_int8.onnx", "input_ids int64"],
        ("bench", folder, "--variants", "q4", *QUICK): ["2 × 16 tokens", "provider cpu", "q4"],
        ("card", folder): [f"wrote {folder / 'README.md'}"],
        ("embed", folder, texts, "-o", out): ["4 texts, 48 dimensions, variant int8 on cpu", str(out)],
        ("build", FIXTURES / "bert-cls", "-o", folder, "--no-verify"): [f"built {folder}"],
    }
    for words, parts in expected.items():
        outcome = run(*words)
        assert (outcome.code, outcome.complaints) == (0, []), words
        assert [part for part in parts if part not in outcome.out] == [], words


def test_inspect_reads_a_bare_file(run: Run, folders: dict[str, Path]) -> None:
    document = run("inspect", folders["qwen3-tied"] / "onnx" / "model_q4.onnx", "--json").document
    assert (document["path"], document["spec"]) == ("model_q4.onnx", None)
    assert [f["file"] for f in document["files"]] == ["model_q4.onnx"]


def test_a_build_that_is_not_verified_has_no_verdict(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    outcome = run("build", FIXTURES / "bert-cls", "-o", folder, "--no-verify", "--variants", " fp32, q4 ", "--json")
    assert outcome.code == 0
    assert outcome.document == {"folder": str(folder), "built": True, "passed": None}
    variants = json.loads((folder / "featherbed.json").read_text("utf-8"))["variants"]
    assert {name: v["passed"] for name, v in variants.items()} == {"fp32": None, "q4": None}


def test_a_build_names_its_folder_after_the_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("build", FIXTURES / "bert-cls", "--no-verify", "--variants", "fp32")
    assert [p.name for p in tmp_path.iterdir()] == ["bert-cls-onnx"]


def test_verify_takes_variants_probe_and_gates(run: Run, folders: dict[str, Path], probe: Path) -> None:
    gate = ("--gate", "cos_min=0.5", "--gate", "triplet_accuracy=0")
    outcome = run("verify", folders["bert-mean"], "--variants", "q4,fp32", "--probe", probe, *gate, "--json")
    assert outcome.code == 0
    document = outcome.document
    assert (document["probe"]["name"], document["probe"]["texts"]) == ("few.jsonl", 6)
    assert document["variants"].keys() == {"fp32", "q4"}
    bounds = {g["metric"]: g["bound"] for g in document["gates"] if g["variant"] == "q4"}
    assert bounds.keys() == GATES | {"triplet_accuracy"}
    assert (bounds["cos_min"], bounds["invariance_max"], bounds["triplet_accuracy"]) == (0.5, 1e-4, 0)


@pytest.mark.parametrize("as_json", [("--json",), ()])
def test_a_gate_that_fails_is_exit_code_1_after_the_report(
    run: Run, folders: dict[str, Path], probe: Path, as_json: tuple[str, ...]
) -> None:
    words = ("verify", folders["bert-mean"], "--variants", "int8", "--probe", probe, "--gate", "cos_min=1.1", *as_json)
    outcome = run(*words)
    assert (outcome.code, outcome.complaints) == (1, [])
    if as_json:
        check_report(outcome.document, ["int8"], GATES)
        assert [g["metric"] for g in outcome.document["gates"] if not g["passed"]] == ["cos_min"]
    else:
        assert "FAILED" in outcome.out
        assert "gate failed: int8 cos_min is 0.9" in outcome.out


def test_junit_is_written_beside_what_is_printed_and_a_bad_place_is_an_error(
    run: Run, folders: dict[str, Path], probe: Path, tmp_path: Path
) -> None:
    words = ("verify", folders["bert-mean"], "--variants", "int8", "--probe", probe, "--gate", "cos_min=1.1")
    outcome = run(*words, "--junit", tmp_path / "gates.xml")
    assert outcome.code == 1
    text = (tmp_path / "gates.xml").read_text("utf-8")
    assert '<testsuite name="int8"' in text
    assert 'failures="1"' in text
    assert "expected at least 1.1" in text
    outcome = run(*words, "--junit", tmp_path / "nowhere" / "gates.xml")
    assert outcome.code == 2
    assert "nowhere" in outcome.err
    assert outcome.out == ""


def test_stock_int8_fails_the_default_gates(run: Run, folders: dict[str, Path]) -> None:
    outcome = run("verify", folders["qwen3-tied"], "--variants", "int8-dynamic", "--json")
    assert outcome.code == 1
    assert "invariance_max" in [g["metric"] for g in outcome.document["gates"] if not g["passed"]]


def test_a_build_whose_gate_fails_is_kept_and_marked_and_never_chosen(run: Run, tmp_path: Path, texts: Path) -> None:
    folder, out = tmp_path / "small", tmp_path / "v.npy"
    built = run("build", FIXTURES / "bert-cls", "-o", folder, "--variants", "fp32,q4", "--gate", "cos_min=1.1")
    assert built.code == 1
    variants = json.loads((folder / "featherbed.json").read_text("utf-8"))["variants"]
    assert {name: v["passed"] for name, v in variants.items()} == {"fp32": False, "q4": False}
    refused = run("embed", folder, texts, "-o", out)
    assert (refused.code, out.exists()) == (2, False)
    assert "none of fp32, q4" in refused.err
    assert run("embed", folder, texts, "-o", out, "--variant", "q4").code == 0


def test_embed_takes_a_folder_of_others_and_what_its_configs_leave_open(run: Run, tmp_path: Path, texts: Path) -> None:
    folder, out = repository(tmp_path / "theirs", leave=["1_Pooling"]), tmp_path / "v.npy"
    Export(("input_ids", "attention_mask", "task_id"), ("last_hidden_state", "token_embeddings")).write(
        folder / "model.onnx"
    )
    refused = run("embed", folder, texts, "-o", out)
    assert (refused.code, out.exists()) == (2, False)
    assert "--pooling mean" in refused.err
    refused = run("embed", folder, texts, "-o", out, "--pooling", "mean")
    assert (refused.code, out.exists()) == (2, False)
    assert "--task" in refused.err
    said = ("--pooling", "mean", "--task", "2", "--output", "token_embeddings")
    assert run("embed", folder, texts, "-o", out, *said).code == 0
    expected = featherbed.Embedder(folder, foreign=Foreign("mean", "token_embeddings", 2)).encode(["rain", "a fox"])
    assert np.abs(np.load(out)[:2] - expected).max() <= 1e-6


def test_embed_puts_the_query_prompt_before_each_text(run: Run, folders: dict[str, Path], texts: Path) -> None:
    known, out = upstream("qwen3-biased"), texts.with_name("v.npy")
    expected = featherbed.Embedder(folders["qwen3-biased"], "fp32").encode(
        ["find: rain", "find: a fox", "find: ", "find: ein Bett"], truncate_dim=9
    )
    words = ("embed", folders["qwen3-biased"], texts, "-o", out, "--variant", "fp32", "--query", "--dim", 9, "--json")
    assert run(*words).document["dimensions"] == 9
    assert np.array_equal(np.load(out), expected)
    run("embed", folders["qwen3-biased"], texts, "-o", out, "--variant", "fp32")
    rain = known.unit[known.texts.index("rain")]
    assert np.abs(np.load(out)[0] - rain).max() <= 2e-5


def test_embed_reads_another_field_and_writes_texts_beside_vectors(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "späť"}\n{"body": "a\\nb"}\n', "utf-8")
    (tmp_path / "b.csv").write_text('id,body\n1,"x, y"\n', "utf-8")
    inputs = (tmp_path / "b.csv", tmp_path / "a.jsonl")
    out = tmp_path / "v.jsonl"
    assert run("embed", folders["bert-mean"], *inputs, "-o", out, "--field", "body").code == 0
    rows = [json.loads(line) for line in out.read_text("utf-8").removesuffix("\n").split("\n")]
    assert [row["text"] for row in rows] == ["x, y", "späť", "a\nb"]
    expected = featherbed.Embedder(folders["bert-mean"]).encode_document(["x, y", "späť", "a\nb"])
    assert np.abs(np.array([row["embedding"] for row in rows]) - expected).max() <= 1e-6


def test_embed_of_no_texts_writes_no_vectors(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    out = tmp_path / "v.npy"
    assert run("embed", folders["bert-mean"], tmp_path / "empty.txt", "-o", out).code == 0
    assert np.load(out).shape == (0, 48)


@pytest.fixture
def windows_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_room, "WINDOW_TEXTS", 4)


def numbered(path: Path, count: int) -> list[str]:
    """A file of so many texts; the texts."""
    lines = [f"rain number {n}" for n in range(count)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), "utf-8")
    return lines


@pytest.mark.usefixtures("windows_of_four")
@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
def test_embed_holds_two_windows_of_texts_however_many_there_are(
    run: Run, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    lines = numbered(tmp_path / "a.jsonl", 50)
    read_texts, write = files.read_texts, files.VectorFile.write
    read, held = 0, list[int]()

    def reading(path: str, field: str) -> Iterator[str]:
        nonlocal read
        for text in read_texts(path, field):
            read += 1
            yield text

    def writing(self: files.VectorFile, texts: Sequence[str], vectors: Any) -> None:
        held.append(read - self.rows)
        assert list(texts) == lines[self.rows : self.rows + len(vectors)]
        write(self, texts, vectors)

    monkeypatch.setattr(files, "read_texts", reading)
    monkeypatch.setattr(files.VectorFile, "write", writing)
    out = tmp_path / f"v{suffix}"
    outcome = run("embed", folders["bert-mean"], tmp_path / "a.jsonl", "-o", out, "--variant", "fp32", "--json")
    assert (outcome.code, outcome.complaints, outcome.document["texts"]) == (0, [], 50)
    assert len(held) == 13
    assert max(held) <= 2 * 4
    if suffix == ".npy":
        expected = featherbed.Embedder(folders["bert-mean"], "fp32").encode(lines)
        assert np.abs(np.load(out) - expected).max() <= 1e-6


@pytest.mark.usefixtures("windows_of_four")
@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_a_bad_line_far_behind_the_first_vectors_leaves_what_was_there(
    run: Run, folders: dict[str, Path], tmp_path: Path, suffix: str
) -> None:
    numbered(tmp_path / "a.jsonl", 30)
    with (tmp_path / "a.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"body": "rain"}\n')
    out = tmp_path / f"v{suffix}"
    out.write_bytes(b"old")
    outcome = run("embed", folders["bert-mean"], tmp_path / "a.jsonl", "-o", out)
    assert (outcome.code, outcome.out, len(outcome.complaints)) == (2, "", 1)
    assert "line 31 of" in outcome.complaints[0]
    assert {p.name: p.read_bytes()[:3] for p in tmp_path.iterdir()} == {"a.jsonl": b'{"t', out.name: b"old"}


@pytest.mark.usefixtures("windows_of_four")
def test_an_interrupt_between_two_windows_leaves_nothing_half_written(
    run: Run, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered(tmp_path / "a.jsonl", 30)
    write = files.VectorFile.write

    def interrupted(self: files.VectorFile, texts: Sequence[str], vectors: Any) -> None:
        write(self, texts, vectors)
        if self.rows > 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(files.VectorFile, "write", interrupted)
    outcome = run("embed", folders["bert-mean"], tmp_path / "a.jsonl", "-o", tmp_path / "v.npy")
    assert (outcome.code, outcome.out) == (130, "")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_interrupt_while_standard_input_is_silent_ends_the_run_and_leaves_nothing(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "featherbed.cli", "embed", str(folders["bert-mean"]), "-", "-o", "v.npy"]
    # a suite that was started in the background ignores interrupts, and so would its children
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdin=pipe, stderr=pipe, preexec_fn=heed) as process:
        try:
            assert process.stdin
            process.stdin.write(b"rain " * 40_000 + b"\n")  # more than a pipe holds: written when it is being read
            process.stdin.flush()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []


def test_threads_and_runs_change_no_vector(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    numbered(tmp_path / "a.jsonl", 20)
    words = ("embed", folders["qwen3-tied"], tmp_path / "a.jsonl", "--variant", "fp32", "-o")
    run(*words, tmp_path / "all.npy")
    for options in (("--threads", 1), ("--threads", 2, "--pool-size", 2), ("--provider", "cpu", "--pool-size", 3)):
        assert run(*words, tmp_path / "v.npy", *options, "--json").document["provider"] == "cpu"
        assert np.abs(np.load(tmp_path / "v.npy") - np.load(tmp_path / "all.npy")).max() <= 1e-6


@pytest.mark.parametrize("verb", ["embed {texts} -o v.npy", "bench --tokens 16"])
def test_a_provider_that_is_not_installed_is_exit_code_3_and_says_how_to_get_it(
    run: Run, folders: dict[str, Path], texts: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(texts.parent)
    name, *words = verb.format(texts=texts).split()
    outcome = run(name, folders["bert-mean"], *words, "--provider", "openvino")
    assert (outcome.code, outcome.out, len(outcome.complaints)) == (3, "", 1)
    assert "pip install onnxruntime-openvino" in outcome.complaints[0]
    assert [p.name for p in texts.parent.iterdir()] == ["texts.txt"]


FAULTS = {
    "no model folder": ("verify {tmp}/absent", "expected a model folder with featherbed.json"),
    "no model folder to inspect": ("inspect {tmp}", "no featherbed.json"),
    "no onnx file": ("inspect {tmp}/absent.onnx", "expected an .onnx file, found no such file"),
    "no model folder for a card": ("card {tmp}", "no featherbed.json"),
    "no checkpoint": ("build {tmp}/absent", "expected a folder, or a Hub id"),
    "an empty checkpoint": ("build {tmp} -o {tmp}/out", "config.json: expected a JSON object, found no such file"),
    "an unknown recipe": ("build {checkpoint} -o {tmp}/out --variants int9", "did you mean int8?"),
    "no recipe": ("build {checkpoint} -o {tmp}/out --variants ,", "found an empty list"),
    "an unknown pooling": ("build {checkpoint} -o {tmp}/out --pooling max", "expected one of lasttoken, mean, cls"),
    "another pooling": ("build {checkpoint} -o {tmp}/out --pooling cls", "expected mean as"),
    "an output that is no model folder": ("build {checkpoint} -o {checkpoint}", "expected a new folder"),
    "an unknown variant to verify": ("verify {folder} --variants int9", "expected one of fp32, int8"),
    "an unknown variant to bench": ("bench {folder} --tokens 16 --variants int9", "expected one of fp32, int8"),
    "an unknown variant to embed": ("embed {folder} {texts} -o {tmp}/v.npy --variant int9", "expected one of fp32"),
    "an unknown variant to keep": ("prune {folder} --keep int9", "expected one of fp32, int8"),
    "no variant to keep": ("prune {folder} --keep ,", "name at least one"),
    "a list without fp32": ("prune {folder} --keep int8,q4", "add fp32 to --keep, or lose it with --force"),
    "no place for weights": ("push {folder} me/m --weights here", "expected as-built, inside, beside"),
    "no model folder to prune": ("prune {tmp} --keep fp32", "no featherbed.json"),
    "a path to pull": ("pull {folder}", "expected owner/name or owner/name@revision, found a path that is here"),
    "no id to pull": ("pull {tmp}/absent", "expected owner/name or owner/name@revision, found something else"),
    "no model folder to choose of": ("doctor {tmp}", "no featherbed.json"),
    "nothing to choose of": ("doctor {tmp}/absent", "expected a model folder with featherbed.json, found no such"),
    "an unknown metric": ("verify {folder} --gate speed=1", "found an unknown metric"),
    "a bound that is no number": ("verify {folder} --gate cos_min=high", "found the bound 'high'"),
    "no probe": ("verify {folder} --probe {tmp}/absent.jsonl", "expected a file of JSON lines"),
    "a probe that is none": ("verify {folder} --probe {texts}", "line 1 of"),
    "texts that are too long to bench": ("bench {folder} --tokens 65", "--tokens: expected at most 64"),
    "no rounds": ("bench {folder} --rounds 0", "rounds of at least 1"),
    "no provider of that name to bench": ("bench {folder} --tokens 16 --provider gpu", "did you mean cuda?"),
    "no threads to bench": ("bench {folder} --threads -1", "threads and pool size of at least 0"),
    "a config that is not there": (
        "embed {texts} --config {tmp}/a.toml -o {tmp}/v.npy",
        "a.toml: expected a file in TOML",
    ),
    "a model that is no file": ("embed {texts} --model {tmp}/a.onnx -o {tmp}/v.npy", "cannot read ONNX file"),
    "a batch of less than none": ("embed {folder} {texts} --batch-size -1 -o {tmp}/v.npy", "at least 1"),
    "no graph to conform": ("conform {checkpoint}", "expected a folder with .onnx files"),
    "an unknown variant to conform": ("conform {folder} --variants int9", "expected one of fp32, int8"),
    "no graph to repair": ("repair {checkpoint} --dry-run", "expected a folder with .onnx files"),
    "no place for what is repaired": ("repair {folder}", "expected one place: -o OUT for a new folder, or --in-place"),
    "what is repaired in its own place": ("repair {folder} -o {folder}", "say --in-place"),
    "an unknown pooling to repair": ("repair {folder} --pooling max --dry-run", "expected one of lasttoken, mean, cls"),
    "an unknown layout": ("export {folder} --variant int8 --layout ark -o {tmp}/x", "expected one of tei, browser"),
    "an unknown variant to export": ("export {folder} --variant int9 -o {tmp}/x", "expected one of fp32, int8"),
    "an export into a folder in use": ("export {folder} --variant int8 -o {checkpoint}", "expected a new folder"),
    "no provider of that name": ("embed {folder} {texts} -o {tmp}/v.npy --provider gpu", "did you mean cuda?"),
    "less than no threads": ("embed {folder} {texts} -o {tmp}/v.npy --threads -1", "threads: expected at least 1"),
    "less than no runs": ("embed {folder} {texts} -o {tmp}/v.npy --pool-size -1", "pool_size: expected at least 1"),
    "standard input twice": ("embed {folder} - - -o {tmp}/v.npy", "expected standard input once"),
    "no input": ("embed {folder} {tmp}/absent.txt -o {tmp}/v.npy", "absent.txt: expected a readable file"),
    "an unknown input": ("embed {folder} {tmp}/a.pdf -o {tmp}/v.npy", "expected a file ending in .txt"),
    "an unknown output": ("embed {folder} {texts} -o {tmp}/v.csv", "expected a file ending in .npy"),
    "an output in no folder": ("embed {folder} {texts} -o {tmp}/absent/v.npy", "expected a folder that exists"),
    "a dimension too many": ("embed {folder} {texts} -o {tmp}/v.npy --dim 49", "a whole number from 1 to 48"),
    "a dimension too few": ("embed {folder} {texts} -o {tmp}/v.npy --dim 0", "a whole number from 1 to 48"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_exit_code_2_and_one_line(
    run: Run, folders: dict[str, Path], tmp_path: Path, texts: Path, fault: str
) -> None:
    words, part = FAULTS[fault]
    places = {
        "{tmp}": tmp_path,
        "{folder}": folders["bert-mean"],
        "{texts}": texts,
        "{checkpoint}": FIXTURES / "bert-mean",
    }
    for name, place in places.items():
        words = words.replace(name, str(place))
    before = sorted(tmp_path.iterdir())
    outcome = run(*words.split(), *(["--json"] if "--json" in OPTIONS[words.split()[0]] else []))
    assert (outcome.code, outcome.out, len(outcome.complaints)) == (2, "", 1)
    assert outcome.complaints[0].startswith("featherbed: ")
    assert part in outcome.complaints[0]
    assert sorted(tmp_path.iterdir()) == before


def test_a_cut_file_is_one_line_without_a_traceback_in_a_real_process(copied: Copy, texts: Path) -> None:
    folder = copied("bert-mean")
    path = folder / "onnx" / "model.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    for words in (
        ("verify", folder),
        ("bench", folder, *QUICK),
        ("embed", folder, texts, "-o", "v.npy", "--variant", "fp32"),
    ):
        outcome = spawn(*words, cwd=texts.parent)
        assert (outcome.code, outcome.out, len(outcome.complaints)) == (2, "", 1)
        assert re.search(r"^featherbed: .*model\.onnx: expected \d+ bytes, found 1000 bytes", outcome.complaints[0])


def test_an_error_before_any_work_draws_no_bar_and_no_blank_line(run: Run, tmp_path: Path) -> None:
    outcome = run("verify", tmp_path)
    assert outcome.err.startswith("featherbed: ")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    "words", ["--nope", "embed", "verify", "frobnicate", "bench . --tokens many", "embed . a.txt", "card . --gate a=1"]
)
def test_a_command_that_makes_no_sense_is_exit_code_2_with_a_hint(run: Run, words: str) -> None:
    outcome = run(*words.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert "--help" in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.complaints[-1].startswith("Error: ")


def test_parquet_without_pyarrow_is_exit_code_3_before_any_work(
    run: Run, folders: dict[str, Path], texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    outcome = run("embed", folders["bert-mean"], texts, "-o", texts.with_name("v.parquet"))
    assert (outcome.code, outcome.out, len(outcome.complaints)) == (3, "", 1)
    assert "pip install 'featherbed[parquet]'" in outcome.err
    assert [p.name for p in texts.parent.iterdir()] == ["texts.txt"]


def test_a_reference_without_torch_is_exit_code_3(
    run: Run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "featherbed.check.reference", raising=False)
    outcome = run("verify", folders["bert-mean"], "--reference", FIXTURES / "bert-mean")
    assert (outcome.code, outcome.out, len(outcome.complaints)) == (3, "", 1)
    assert "pip install 'featherbed[reference]'" in outcome.err


def test_help_names_every_verb(run: Run) -> None:
    outcome = run("--help")
    assert (outcome.code, outcome.err) == (0, "")
    listed = re.findall(r"^  ([a-z]+)  ", outcome.out.partition("Commands:")[2], re.MULTILINE)
    assert set(listed) == OPTIONS.keys()


@pytest.mark.parametrize("verb", OPTIONS)
def test_help_of_a_verb_names_each_of_its_options(run: Run, verb: str) -> None:
    outcome = run(verb, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    heads = re.findall(r"^  (-.*?)(?:  |$)", outcome.out.partition("Options:")[2], re.MULTILINE)
    named = {name for head in heads for name in re.findall(r"(?<!\S)--?[a-z-]+", head)}
    assert named == {*OPTIONS[verb].split(), "--help"}


def test_a_command_without_words_shows_the_help(run: Run) -> None:
    outcome = run()
    assert outcome.code == 2
    assert "Commands:" in outcome.out + outcome.err


def test_version_is_the_packages(run: Run) -> None:
    outcome = run("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{featherbed.__version__}\n", "")


@pytest.mark.parametrize("words", [None, ["--help"], ["--version"], *([verb, "--help"] for verb in OPTIONS)])
def test_importing_and_asking_for_help_load_nothing_heavy(words: list[str] | None) -> None:
    script = f"""
import sys
import featherbed
if (words := {words!r}) is not None:
    from featherbed.cli import main
    sys.argv = ["featherbed", *words]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
sys.stderr.write(" ".join(name for name in {HEAVY!r} if name in sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stderr == ""


def test_the_measure_of_heavy_guests_sees_one() -> None:
    script = f"import sys, featherbed.run.batches; print([name for name in {HEAVY!r} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "['numpy']\n"


@pytest.mark.parametrize("words", [("--help",), ("inspect", "{folder}"), ("inspect", "{folder}", "--json")])
def test_a_reader_that_goes_away_is_no_error(folders: dict[str, Path], words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "featherbed.cli", *(w.format(folder=folders["bert-mean"]) for w in words)]
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_is_not_utf8_gets_its_table_and_its_document(copied: Copy, encoding: str) -> None:
    folder = copied("bert-mean")
    path = folder / "featherbed.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["spec"]["prompts"]["query"] = "查询："
    path.write_text(json.dumps(manifest), "utf-8")
    table = spawn("inspect", folder, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert (table.code, table.err) == (0, "")
    document = spawn("inspect", folder, "--json", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert (document.code, document.err) == (0, "")
    assert document.document["spec"]["prompts"]["query"] == "查询："


def test_a_folder_is_judged_mended_and_exported_and_each_last_line_is_one_document(
    run: Run, copied: Copy, tmp_path: Path
) -> None:
    folder = copied("bert-mean")
    judged = run("conform", folder, "--variants", "int8", "--no-load", "--json")
    assert judged.code == 1  # text-embeddings-inference has an older onnxruntime
    assert list(judged.document) == ["passed", "verdicts", "findings", "tries"]
    assert judged.document["verdicts"]["int8"]["fastembed"] == "by rules"
    assert judged.document["tries"] == {"int8": {}}

    (folder / "special_tokens_map.json").unlink()
    listed = run("repair", folder, "--dry-run", "--json").document
    assert {"config.json", "special_tokens_map.json"} == {change["file"] for change in listed["changes"]}
    mended = run("repair", folder, "-o", tmp_path / "mended", "--json")
    assert (mended.code, mended.complaints) == (0, [])
    assert mended.document["changes"] == listed["changes"]
    assert mended.document["folder"] == str(tmp_path / "mended")

    laid = run("export", folder, "--variant", "q4", "--layout", "browser", "-o", tmp_path / "laid", "--json")
    assert (laid.code, laid.complaints) == (0, [])
    assert list(laid.document) == ["folder", "graph", "layout", "cosine", "passed", "findings"]
    assert (laid.document["graph"], laid.document["passed"]) == ("onnx/model_quantized.onnx", True)

    for words, part in {
        ("conform", folder, "--variants", "int8", "--no-load"): "does not conform",
        ("repair", folder, "--in-place"): "special_tokens_map.json: written",
        ("repair", folder, "--dry-run"): "nothing to mend",
        ("export", folder, "--variant", "int8", "-o", tmp_path / "tei"): "int8 is onnx/model.onnx",
    }.items():
        assert part in run(*words).out, words


def test_embed_takes_its_model_from_a_config(run: Run, folders: dict[str, Path], texts: Path) -> None:
    config, out = texts.with_name("featherbed.toml"), texts.with_name("v.npy")
    config.write_text(f'[embedding]\nmodel = "{folders["bert-mean"]}"\nbatch_size = 2\n', "utf-8")
    assert run("embed", texts, "--config", config, "-o", out, "--json").document["variant"] == "fp32"
    quantized = folders["bert-mean"] / "onnx" / "model_int8.onnx"
    config.write_text(f'[embedding]\nquantized_model_path = "{quantized}"\n', "utf-8")
    assert run("embed", texts, "--config", config, "-o", out, "--json").document["variant"] == "model_int8"
    told = run("embed", texts, "--model", folders["bert-mean"], "--variant", "q4", "-o", out, "--json")
    assert told.document["variant"] == "q4"
