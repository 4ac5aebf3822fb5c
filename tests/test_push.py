"""push, with the real client against a server on this machine that speaks the Hub's commit API."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import featherbed
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import open_folder
from featherbed.pipeline.push import push
from tests.test_hub import surroundings

NAME = "owner/small-onnx"
OLD = {"onnx/model_old.onnx": b"old", "reports/old.json": b"{}", "notes.txt": b"mine"}


@dataclass
class Hub:
    """One repository, made by the first push; ``refuse`` is a status that every commit gets instead."""

    files: dict[str, bytes] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # LFS objects by sha256
    commits: list[str] = field(default_factory=list)  # their messages
    made: list[dict[str, Any]] = field(default_factory=list)
    refuse: int = 0
    url: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        """(status, JSON) of a request, as huggingface.co answers it."""
        path = path.partition("?")[0]
        api = f"/api/models/{NAME}"
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            return 200, {"url": f"{self.url}/{NAME}", "id": NAME}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith(f"{api}/tree/"):
            rows = [
                {"type": "file", "path": name, "size": len(raw), "oid": "0" * 40} for name, raw in self.files.items()
            ]
            return 200, rows
        if path == f"{api}/preupload/main":
            asked = json.loads(body)["files"]
            large = (".onnx", ".onnx_data")
            return 200, {"files": [{"path": one["path"], "shouldIgnore": False, "oid": None,
                                    "uploadMode": "lfs" if one["path"].endswith(large) else "regular"}
                                   for one in asked]}  # fmt: skip
        if path == f"/{NAME}.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            return 200, {"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}", "header": {}}}} for one in wanted
            ]}  # fmt: skip
        if path.startswith("/lfs/") and method == "PUT":
            self.stored[path.removeprefix("/lfs/")] = body
            return 200, {}
        if path == f"{api}/commit/main":
            return self._commit(body)
        return 404, {"error": f"{method} {path}"}

    def _commit(self, body: bytes) -> tuple[int, object]:
        if self.refuse:
            return self.refuse, {"error": "no"}
        for line in body.decode("utf-8").splitlines():
            key, value = json.loads(line).values()
            if key == "header":
                self.commits.append(value["summary"])
            elif key == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
            elif key == "deletedFile":
                del self.files[value["path"]]
        return 200, {"success": True, "commitOid": "a" * 40, "commitUrl": f"{self.url}/{NAME}/commit/{'a' * 40}"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, document = found.answer(self.command, self.path, body)
            raw = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PUT = answer  # noqa: N815  # http.server's own names

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


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
    hub.files |= OLD
    before = {path: path.read_bytes() for path in verified.rglob("*") if path.is_file()}
    done = command(verified, NAME, "--variants", "int8", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["commit"].endswith(f"/commit/{'a' * 40}")
    assert len(hub.commits) == 1
    assert set(hub.files) == {*document["files"], "notes.txt"}  # what was there of an older folder is gone, notes stay
    assert {name: len(hub.files[name]) for name in document["files"]} == document["files"]
    for name, raw in hub.files.items():
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
    assert (hub.made, hub.commits, hub.files) == ([], [], {})


def test_a_folder_whose_gates_fail_is_refused(verified: Path, hub: Hub, command: Run) -> None:
    done = command(verified, NAME)
    assert done.returncode == 2
    assert "int8-dynamic failed" in done.stderr
    assert "not verified" in done.stderr
    assert "--variants fp32,int8,int8-block" in done.stderr
    assert hub.made == []
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
    assert hub.made == []


def test_a_private_repository_is_made_private(verified: Path, hub: Hub, command: Run) -> None:
    assert command(verified, NAME, "--variants", "int8", "--private").returncode == 0
    asked = hub.made[0]  # the client's versions say it differently
    assert asked.get("visibility") == "private" or asked.get("private") is True
    assert hashlib.sha256(hub.files["onnx/model_int8.onnx"]).hexdigest() in hub.stored


@pytest.mark.parametrize(("status", "said"), [(403, "set HF_TOKEN"), (500, "try again later")])
def test_a_refusal_of_the_hub_is_one_line(verified: Path, hub: Hub, command: Run, status: int, said: str) -> None:
    hub.refuse = status
    done = command(verified, NAME, "--variants", "int8")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"featherbed: Hub id {NAME}: expected a place to write to")
    assert said in done.stderr.splitlines()[-1]
    assert hub.files == {}


@pytest.mark.parametrize("name", ["name", "a/b/c", "./a", "owner/name@main", "/abs/olute"])
def test_what_is_no_id_is_said_so(verified: Path, name: str) -> None:
    with pytest.raises(OptionError, match="owner/name"):
        push(verified, name, ["int8"])
