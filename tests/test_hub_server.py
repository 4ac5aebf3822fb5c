"""The Hub of our tests is one that huggingface_hub, the real client, takes for the real one."""

from __future__ import annotations

import hashlib
import http.client
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_server import COMMIT, Fault, Hub, Repository, git_oid, serving, sha256_of

NAME = "owner/small"
TOKEN = "hf_of_a_test"
OLD = "f" * 40
WEIGHTS = bytes(range(256)) * 2000
FILES = {
    "config.json": b"{}",
    "README.md": b"# small\n",
    "empty.txt": b"",
    "onnx/model.onnx": WEIGHTS,
    "onnx/a name & more.json": b"[1]",
    "long.txt": b"x" * 1_500_000,
}

patient = pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) < 2, reason="older clients neither go on nor wait as long as told"
)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client's waits between attempts, which are not waited for."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def repository() -> Repository:
    return Repository(dict(FILES), older={OLD: {"config.json": b"old"}}, refs={"v1.0": OLD, "refs/pr/3": OLD})


@pytest.fixture
def hub(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    # read when huggingface_hub was imported: the environment would come too late
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # 10 MB: the client forgets a part of one
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    with serving({NAME: repository}) as hub:
        yield hub
        if hasattr(huggingface_hub, "close_session"):  # its connections would outlive the server
            huggingface_hub.close_session()


def read(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    return {one.relative_to(root).as_posix(): one.read_bytes() for one in root.rglob("*") if one.is_file()}


def fetched(hub: Hub, cache: Path, token: str | bool = False, revision: str | None = None) -> dict[str, bytes]:
    """A whole snapshot, by the real client."""
    folder = snapshot_download(NAME, revision=revision, endpoint=hub.url, cache_dir=cache, token=token)
    return read(folder)


def weights(hub: Hub, cache: Path) -> bytes:
    """One large file, by the real client."""
    return Path(hf_hub_download(NAME, "onnx/model.onnx", endpoint=hub.url, cache_dir=cache, token=False)).read_bytes()


def plainly(url: str, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    """(status, body, headers) of a GET that no library mends."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    try:
        connection.request("GET", url.removeprefix(f"http://{urlsplit(url).netloc}"), headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_snapshot_is_byte_for_byte_what_the_repository_holds(hub: Hub, tmp_path: Path, revision: str | None) -> None:
    assert fetched(hub, tmp_path, revision=revision) == FILES
    assert hub.served == {name: len(raw) for name, raw in FILES.items() if raw}
    assert {one.host for one in hub.asked if "model.onnx" in one.path} == {"hub", "cdn"}


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/3", OLD])
def test_tags_branches_and_older_commits_have_their_own_files(hub: Hub, tmp_path: Path, revision: str) -> None:
    assert fetched(hub, tmp_path, revision=revision) == {"config.json": b"old"}


def test_a_listing_comes_in_pages_and_names_what_git_would_name(hub: Hub, tmp_path: Path) -> None:
    hub.page = 2
    api = HfApi(hub.url, token=False)
    rows = {row.path: row for row in api.list_repo_tree(NAME, recursive=True, expand=True)}
    assert set(rows) == {*FILES, "onnx"}
    assert len([one for one in hub.asked if "/tree/" in one.path]) == 4
    assert {row.path for row in api.list_repo_tree(NAME)} == {name.partition("/")[0] for name in FILES}
    assert {row.path for row in api.list_repo_tree(NAME, "onnx")} == {n for n in FILES if n.startswith("onnx/")}
    config, model = rows["config.json"], rows["onnx/model.onnx"]
    assert isinstance(config, huggingface_hub.hf_api.RepoFile)
    assert isinstance(model, huggingface_hub.hf_api.RepoFile)
    (tmp_path / "config.json").write_bytes(FILES["config.json"])
    git = subprocess.run(
        ["git", "hash-object", "config.json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert config.blob_id == git.stdout.strip() == git_oid(FILES["config.json"])
    assert config.lfs is None
    assert model.lfs is not None
    assert model.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest() == sha256_of(WEIGHTS)
    assert model.lfs.size == model.size == len(WEIGHTS)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client's own use of its httpx
def test_what_is_uploaded_comes_back(
    hub: Hub, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uploaded(message: str, *gone: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", hub.url)  # older clients compare the commit's address with it
            done = api.upload_folder(
                repo_id=NAME, folder_path=folder, commit_message=message, delete_patterns=list(gone)
            )
        return done.oid

    api = HfApi(hub.url, token=TOKEN)
    folder = tmp_path / "mine"
    for name, raw in {**FILES, "config.json": b'{"new": 1}', "model.safetensors": WEIGHTS[::-1]}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    (folder / "long.txt").unlink()
    first = uploaded("more", "long.*")
    assert (first, repository.messages) == (repository.commit, ["more"])
    assert fetched(hub, tmp_path / "cache") == read(folder)
    assert fetched(hub, tmp_path / "cache", revision=COMMIT) == FILES  # the commit before
    assert repository.stored == {sha256_of(WEIGHTS[::-1]): WEIGHTS[::-1]}  # model.onnx was there already
    assert uploaded("the same") == first
    assert repository.messages == ["more"]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.delete_file("README.md", NAME, parent_commit=COMMIT)


def test_a_repository_is_made_once_and_may_be_private(hub: Hub, tmp_path: Path) -> None:
    api = HfApi(hub.url, token=TOKEN)
    for _ in range(2):
        api.create_repo("owner/new", private=True, exist_ok=True)
    made = hub.repositories["owner/new"]
    assert made.created is not None
    assert (made.created["name"], made.token) == ("new", TOKEN)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("owner/new")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(hub.url, token=False).model_info("owner/new")
    assert hub.repositories[NAME].created is None
    assert not list(tmp_path.iterdir())


def test_a_token_opens_a_private_repository_and_never_reaches_the_cdn(
    hub: Hub, repository: Repository, tmp_path: Path
) -> None:
    repository.token = TOKEN
    with pytest.raises(RepositoryNotFoundError, match="401"):
        fetched(hub, tmp_path)
    assert hub.served == {}
    assert fetched(hub, tmp_path, token=TOKEN) == FILES
    assert {one.authorization for one in hub.asked if one.host == "hub"} == {"", f"Bearer {TOKEN}"}
    assert {one.authorization for one in hub.asked if one.host == "cdn"} == {""}


def test_the_cdn_refuses_a_token(hub: Hub) -> None:
    assert plainly(f"{hub.cdn}/{sha256_of(WEIGHTS)}", Authorization=f"Bearer {TOKEN}")[0] == 400
    assert hub.served == {}
    assert plainly(f"{hub.cdn}/{sha256_of(WEIGHTS)}")[:2] == (200, WEIGHTS)


def test_what_is_not_there_or_not_allowed_is_told_apart(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    def ask(name: str = NAME, file: str = "config.json", revision: str = "main") -> None:
        hf_hub_download(name, file, revision=revision, endpoint=hub.url, cache_dir=tmp_path, token=False)

    with pytest.raises(RepositoryNotFoundError):
        ask("owner/nowhere")
    with pytest.raises(RevisionNotFoundError):
        ask(revision="v9")
    with pytest.raises(EntryNotFoundError):
        ask(file="nothing.json")
    repository.gated = True
    with pytest.raises(GatedRepoError):
        ask()
    assert HfApi(hub.url, token=False).model_info(NAME).gated == "auto"


@patient
def test_a_cut_connection_is_really_cut_and_the_client_asks_for_the_rest(
    hub: Hub, slept: list[float], tmp_path: Path
) -> None:
    hub.faults = [Fault("model.onnx", cut=100_000)]
    assert weights(hub, tmp_path) == WEIGHTS
    assert [one.range for one in hub.asked if one.host == "cdn"] == ["", "bytes=100000-"]
    assert hub.served["onnx/model.onnx"] == len(WEIGHTS)
    assert slept


@patient
def test_a_range_may_be_ignored(hub: Hub, slept: list[float], tmp_path: Path) -> None:
    hub.faults = [Fault("model.onnx", cut=100_000), Fault("model.onnx", ignore_range=True)]
    assert weights(hub, tmp_path) == WEIGHTS
    assert hub.served["onnx/model.onnx"] == len(WEIGHTS) + 100_000
    assert slept


@pytest.mark.parametrize(
    ("asked", "status", "expected", "content_range"),
    [
        ("bytes=0-0", 206, WEIGHTS[:1], f"bytes 0-0/{len(WEIGHTS)}"),
        ("bytes=-5", 206, WEIGHTS[-5:], f"bytes {len(WEIGHTS) - 5}-{len(WEIGHTS) - 1}/{len(WEIGHTS)}"),
        ("bytes=7-999999999", 206, WEIGHTS[7:], f"bytes 7-{len(WEIGHTS) - 1}/{len(WEIGHTS)}"),
        (f"bytes={len(WEIGHTS)}-", 416, b"", f"bytes */{len(WEIGHTS)}"),
    ],
)
def test_a_range_is_what_was_asked_for(hub: Hub, asked: str, status: int, expected: bytes, content_range: str) -> None:
    found = plainly(f"{hub.cdn}/{sha256_of(WEIGHTS)}", Range=asked)
    assert found[:2] == (status, expected)
    assert found[2]["Content-Range"] == content_range


@patient
def test_a_429_is_seen_with_its_retry_after(hub: Hub, slept: list[float], tmp_path: Path) -> None:
    hub.faults = [Fault("?file=onnx/model.onnx", times=2, status=429, headers={"Retry-After": "7"})]
    assert weights(hub, tmp_path) == WEIGHTS
    assert len([one for one in hub.asked if one.host == "cdn"]) == 3
    assert slept == [8.0, 8.0]  # the client adds a second


def test_faults_hit_as_often_as_they_say_after_as_many_as_they_let_pass(hub: Hub) -> None:
    hub.faults = [Fault("config.json", 2, status=500, skip=1), Fault("nowhere", status=500)]
    found = [plainly(f"{hub.url}/{NAME}/resolve/main/config.json")[0] for _ in range(4)]
    assert found == [200, 500, 500, 200]
    assert [fault.times for fault in hub.faults] == [0, 1]


def test_wrong_bytes_of_the_right_size_pass_the_client_unnoticed(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault("model.onnx", replace=lambda raw: raw[::-1])]
    assert weights(hub, tmp_path) == WEIGHTS[::-1]  # it compares sizes: whoever needs more checks the sha256


def test_a_captive_portal_answers_everything_with_a_page(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(times=99, html=True)]
    with pytest.raises(OSError, match=r"X-Repo-Commit|locate the file"):
        weights(hub, tmp_path)
    assert hub.served == {}


def test_a_redirect_goes_where_the_fault_says(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault("/main/config.json", times=9, redirect=f"/{NAME}/resolve/{OLD}/config.json")]
    path = hf_hub_download(NAME, "config.json", endpoint=hub.url, cache_dir=tmp_path, token=False)
    assert Path(path).read_bytes() == b"old"
    assert [one.path.split("/")[-2] for one in hub.asked[:2]] == ["main", OLD]


def test_a_cut_or_reset_connection_announces_more_than_it_gives(hub: Hub) -> None:
    address = f"{hub.cdn}/{sha256_of(WEIGHTS)}"
    hub.faults = [Fault(cut=1000), Fault(cut=1000, reset=True)]
    with pytest.raises(http.client.IncompleteRead) as caught:
        plainly(address)
    assert (len(caught.value.partial), caught.value.expected) == (1000, len(WEIGHTS) - 1000)
    with pytest.raises(ConnectionResetError):
        plainly(address)


def test_a_slow_download_arrives_in_small_pieces(hub: Hub, tmp_path: Path) -> None:
    hub.bytes_per_s = 20e6
    assert weights(hub, tmp_path) == WEIGHTS
    assert hub.served["onnx/model.onnx"] == len(WEIGHTS)


def test_a_hub_that_is_switched_off_answers_nobody() -> None:
    with serving({NAME: Repository({"a.txt": b"a"})}) as hub:
        connection = http.client.HTTPConnection(urlsplit(hub.url).netloc)
        connection.request("GET", f"/{NAME}/resolve/main/a.txt")
        assert connection.getresponse().read() == b"a"
    assert connection.sock.recv(1) == b""  # it was kept alive, and is dead
    connection.close()
    with pytest.raises(ConnectionError):
        plainly(hub.url)
