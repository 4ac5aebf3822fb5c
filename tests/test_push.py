"""push, with the real client against a server on this machine that speaks the Hub's commit API."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import featherbed
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import open_folder
from featherbed.pipeline.push import push
from tests.hub_server import Hub, Repository, serving, surroundings

NAME = "owner/small-onnx"
OLD = {"onnx/model_old.onnx": b"old", "reports/old.json": b"{}", "notes.txt": b"mine"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    """One that holds nothing: the first push makes the repository."""
    with serving() as hub:
        yield hub


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(hub: Hub, tmp_path: Path) -> Run:
    """The command line in a process of its own, whose Hub is ours."""

    def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "featherbed.cli", "push", *map(str, words)],
            env=surroundings(hub.url, tmp_path / "cache") | {"HF_TOKEN": "hf_of_a_test"} | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


@pytest.fixture(scope="module")
def judged(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose fp32, int8 and int8-block passed, int8-dynamic failed, and the others were never verified."""
    root = tmp_path_factory.mktemp("judged")
    folder = Path(shutil.copytree(folders["qwen3-tied"], root / "model"))
    probe = root / "texts.jsonl"
    probe.write_text("\n".join(json.dumps({"text": "rain " * n}) for n in range(1, 30)), "utf-8")
    featherbed.verify(folder, ["fp32", "int8", "int8-block", "int8-dynamic"], probes=[probe], save=True)
    verdicts = {name: one.passed for name, one in open_folder(folder).manifest.variants.items()}
    assert (verdicts["int8"], verdicts["int8-block"], verdicts["int8-dynamic"], verdicts["q4"]) == (
        True, True, False, None,
    )  # fmt: skip
    return folder


@pytest.fixture
def verified(judged: Path, tmp_path: Path) -> Path:
    """A private copy, to be damaged."""
    return Path(shutil.copytree(judged, tmp_path / "verified"))


def test_what_is_pushed_is_a_model_folder_of_the_chosen_variants(
    verified: Path, hub: Hub, command: Run, tmp_path: Path
) -> None:
    there = hub.repositories[NAME] = Repository(dict(OLD))
    before = {path: path.read_bytes() for path in verified.rglob("*") if path.is_file()}
    done = command(verified, NAME, "--variants", "int8", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["commit"].endswith(f"/commit/{there.commit}")
    assert len(there.messages) == 1
    # what was there of an older folder is gone, notes stay
    assert set(there.files) == {*document["files"], "notes.txt"}
    assert {name: len(there.files[name]) for name in document["files"]} == document["files"]
    for name, raw in there.files.items():
        (tmp_path / "fetched" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fetched" / name).write_bytes(raw)
    fetched = open_folder(tmp_path / "fetched")
    fetched.check_hashes()
    assert list(fetched.manifest.variants) == ["fp32", "int8"]
    assert featherbed.Embedder(tmp_path / "fetched", "int8").encode("rain").shape == (48,)
    for page in ("README.md", "report.html"):
        assert "int8-dynamic" not in (tmp_path / "fetched" / page).read_text("utf-8")
    assert {path: path.read_bytes() for path in verified.rglob("*") if path.is_file()} == before
    assert [path for path in verified.parent.iterdir() if "push-" in path.name] == []


def test_a_dry_run_lists_what_would_go_and_goes_nowhere(verified: Path, hub: Hub, command: Run) -> None:
    done = command(verified, NAME, "--variants", "int8,int8-block", "--dry-run")
    assert done.returncode == 0
    assert "onnx/model_int8_block.onnx" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("not pushed, as asked")
    assert hub.repositories == {}


def test_a_folder_whose_gates_fail_is_refused(verified: Path, hub: Hub, command: Run) -> None:
    done = command(verified, NAME)
    assert done.returncode == 2
    assert "int8-dynamic failed" in done.stderr
    assert "not verified" in done.stderr
    assert "--variants fp32,int8,int8-block" in done.stderr
    assert hub.repositories == {}
    with pytest.raises(ModelFolderError, match="int8-dynamic failed"):
        push(verified, NAME, ["int8", "int8-dynamic"], dry_run=True)
    with pytest.raises(ModelFolderError, match="q4 not verified"):
        push(verified, NAME, ["q4"], dry_run=True)


def test_a_file_that_is_not_the_manifests_is_refused(verified: Path, hub: Hub) -> None:
    path = verified / "onnx" / "model_int8.onnx"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ModelFolderError, match=r"model_int8\.onnx.*sha256"):
        push(verified, NAME, ["int8"], dry_run=True)
    path.unlink()
    with pytest.raises(ModelFolderError, match=r"model_int8\.onnx.*no such file"):
        push(verified, NAME, ["int8"], dry_run=True)
    assert hub.repositories == {}


def test_a_private_repository_is_made_private(verified: Path, hub: Hub, command: Run) -> None:
    assert command(verified, NAME, "--variants", "int8", "--private").returncode == 0
    made = hub.repositories[NAME]
    asked = made.created or {}  # the client's versions say it differently
    assert asked.get("visibility") == "private" or asked.get("private") is True
    assert hashlib.sha256(made.files["onnx/model_int8.onnx"]).hexdigest() in made.stored


@pytest.mark.parametrize(("status", "said"), [(403, "set HF_TOKEN"), (500, "try again later")])
def test_a_refusal_of_the_hub_is_one_line(verified: Path, hub: Hub, command: Run, status: int, said: str) -> None:
    hub.refuse = status
    done = command(verified, NAME, "--variants", "int8")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"featherbed: Hub id {NAME}: expected a place to write to")
    assert said in done.stderr.splitlines()[-1]
    assert hub.repositories[NAME].files == {}


@pytest.mark.parametrize("name", ["name", "a/b/c", "./a", "owner/name@main", "/abs/olute"])
def test_what_is_no_id_is_said_so(verified: Path, name: str) -> None:
    with pytest.raises(OptionError, match="owner/name"):
        push(verified, name, ["int8"])
