"""Hub ids: never mistaken for paths, fetched by the real client from a server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from featherbed.errors import CheckpointError
from featherbed.hub import locate
from tests.conftest import FIXTURES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BUILD = "import sys, featherbed; featherbed.build(sys.argv[1], 'out', ['fp32', 'q4'], check=False)"
LOCATE = "import sys; from featherbed.hub import locate; print(locate(sys.argv[1]))"
# as main() of the command line ends: one line, exit code 2
GUARD = """
import sys, featherbed
try:
    {}
except featherbed.FeatherbedError as error:
    assert len(str(error).splitlines()) == 1 and "expected" in str(error) and "found" in str(error)
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""


@dataclass
class Hub:
    """A server that speaks as much of the Hub's language as a download needs, for one repository."""

    files: dict[str, bytes]
    name: str = "owner/small"
    status: int = 200  # of every answer
    code: str = ""  # X-Error-Code of every answer
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a GET."""
        self.asked.append(path)
        path = path.partition("?")[0]
        api, resolve = f"/api/models/{self.name}", f"/{self.name}/resolve/"
        if self.status != 200:
            return self.status, {"X-Error-Code": self.code, "X-Error-Message": "line one"} if self.code else {}, b""
        if path in {api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"}:
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": self.name, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if path.startswith(f"{api}/tree/"):
            rows = [
                {"type": "file", "path": name, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
                for name, raw in self.files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(rows).encode()
        if path.startswith(f"{api}/revision/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        name = path.removeprefix(resolve).partition("/")[2]
        if path.startswith(resolve) and name in self.files:
            tag = hashlib.sha256(self.files[name]).hexdigest()
            return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, self.files[name]
        code = "EntryNotFound" if path.startswith(resolve) else "RepoNotFound"
        return 404, {"X-Error-Code": code}, b""


def served(hub: Hub) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(body=True)

        def do_HEAD(self) -> None:
            self._send(body=False)

        def _send(self, body: bool) -> None:
            status, headers, raw = hub.answer(self.path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(raw))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The fixture qwen3-biased as a repository, with files beside it that nobody should fetch."""
    folder = FIXTURES / "qwen3-biased"
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {name: (folder / name).read_bytes() for name in names if name != "reference.safetensors"}
    files |= dict.fromkeys(
        ["pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "modeling_evil.py", "tf_model.h5"], b"not this"
    )
    files["README.md"] = b"# small\n"
    hub = Hub(files)
    server = served(hub)
    yield hub
    server.shutdown()
    server.server_close()


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def surroundings(url: str, cache: Path) -> dict[str, str]:
    """The environment of a process whose Hub is at ``url``, with none of the user's own settings."""
    inherited = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP"))}
    return inherited | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Run:
    """Runs a line of Python in a process of its own, whose Hub is ours and whose cache is empty at first."""

    def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "work").mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=surroundings(hub.url, tmp_path / "cache") | environment,
            cwd=tmp_path / "work",
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


def line_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused run ends in."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("CheckpointError: Hub id "), done.stderr
    return last


# paths


def test_a_folder_that_is_there_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate(str(tmp_path)) == tmp_path
    assert locate("owner/name") == Path("owner/name")
    assert locate("owner") == Path("owner")
    assert locate(".") == Path()


@pytest.mark.parametrize(
    "source",
    [
        "/owner/name",
        "./owner/name",
        "../name",
        "./name",
        "~/name",
        "~owner/name",
        "name",
        "a/b/c",
        "owner\\name",
        "C:\\models/name",
        "owner/name/",
        "@main",
        "name@main",
        "x" * 5000,
        "owner/" + "x" * 300 + "/name",
    ],
    ids=lambda source: source[:20],
)
def test_what_looks_like_a_path_is_never_taken_for_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    from featherbed import hub as room

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(room, "_fetch", lambda *_: pytest.fail("went to the Hub"))
    with pytest.raises(CheckpointError) as caught:
        locate(source)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert "expected a folder, or a Hub id such as owner/name" in text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("owner/name@", ("owner/name", None)),
        ("BAAI/bge-small-en-v1.5", ("BAAI/bge-small-en-v1.5", None)),
    ],
)
def test_an_id_and_its_revision_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: tuple[str, str | None]
) -> None:
    from featherbed import hub as room

    asked: list[tuple[str, str | None]] = []

    def fetch(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return tmp_path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(room, "_fetch", fetch)
    assert locate(source) == tmp_path
    assert asked == [expected]


# the real client


def test_a_model_builds_from_its_id(hub: Hub, client: Run, tmp_path: Path, folders: dict[str, Path]) -> None:
    done = client(BUILD, hub.name)
    assert done.returncode == 0, done.stderr
    built = tmp_path / "work" / "out" / "onnx"
    for name in ("model.onnx", "model_q4.onnx"):
        assert (built / name).read_bytes() == (folders["qwen3-biased"] / "onnx" / name).read_bytes()
    manifest = json.loads((built.parent / "featherbed.json").read_text("utf-8"))
    assert manifest["name"] == "small"


def test_only_configs_and_safetensors_arrive_byte_for_byte(hub: Hub, client: Run) -> None:
    done = client(LOCATE, hub.name)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    unwanted = {"pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "modeling_evil.py", "tf_model.h5"}
    assert found == {name: raw for name, raw in hub.files.items() if name not in unwanted}
    fetched = {path.partition(COMMIT)[2].lstrip("/") for path in hub.asked if "/resolve/" in path}
    assert not fetched & unwanted


def test_a_second_build_and_an_offline_one_come_from_the_cache(hub: Hub, client: Run) -> None:
    first = client(LOCATE, f"{hub.name}@{COMMIT}")
    assert first.returncode == 0, first.stderr
    before = [path for path in hub.asked if "/resolve/" in path]
    assert before
    again = client(LOCATE, f"{hub.name}@{COMMIT}")
    offline = client(LOCATE, f"{hub.name}@{COMMIT}", HF_HUB_OFFLINE="1")
    assert first.stdout == again.stdout == offline.stdout
    assert [path for path in hub.asked if "/resolve/" in path] == before


def test_an_unknown_repository_is_one_line(client: Run) -> None:
    line = line_of(client(GUARD.format(BUILD.partition("; ")[2]), "owner/nowhere"))
    assert "Hub id owner/nowhere" in line
    assert "no such repository, or a private one" in line


def test_an_unknown_revision_is_one_line(hub: Hub, client: Run) -> None:
    line = line_of(client(GUARD.format(BUILD.partition("; ")[2]), f"{hub.name}@v9"))
    assert "no revision v9" in line


@pytest.mark.parametrize(
    ("status", "code", "found"),
    [
        (404, "", "404"),
        (404, "RepoNotFound", "no such repository"),
        (401, "RepoNotFound", "no such repository"),
        (403, "GatedRepo", "a gated repository"),
        (500, "", "500"),
    ],
)
def test_an_answer_that_is_no_success_is_one_line(hub: Hub, client: Run, status: int, code: str, found: str) -> None:
    hub.status, hub.code = status, code
    line = line_of(client(GUARD.format(BUILD.partition("; ")[2]), hub.name))
    assert found in line
    assert "no connection" not in line  # there was one


def test_offline_with_an_empty_cache_is_one_line(hub: Hub, client: Run) -> None:
    line = line_of(client(GUARD.format(BUILD.partition("; ")[2]), hub.name, HF_HUB_OFFLINE="1"))
    assert "nothing in the cache" in line
    assert hub.asked == []


def test_a_server_that_is_not_there_is_one_line(hub: Hub, client: Run, tmp_path: Path) -> None:
    line = line_of(client(GUARD.format(BUILD.partition("; ")[2]), hub.name, HF_ENDPOINT="http://127.0.0.1:9"))
    assert "nothing in the cache" in line
    assert not list((tmp_path / "work").iterdir())


def test_an_id_the_hub_does_not_allow_is_one_line(client: Run) -> None:
    line = line_of(client(GUARD.format(BUILD.partition("; ")[2]), "owner/na me--x"))
    assert "an id the Hub does not allow" in line


def test_the_command_line_says_so_and_ends_with_code_2(hub: Hub, client: Run, tmp_path: Path) -> None:
    done = client("from featherbed.cli import main; main()", "build", "owner/nowhere", "-o", "m")
    assert done.returncode == 2
    assert done.stderr.rstrip("\n").splitlines()[-1].startswith("featherbed: Hub id owner/nowhere: expected ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work" / "m").exists()
    assert hub.asked
