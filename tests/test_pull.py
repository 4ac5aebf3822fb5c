"""pull, in this process: the real client against a server on this machine, with a folder and a checkpoint on it."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

import featherbed
from featherbed.errors import FeatherbedError, HubError, OptionError, OutputError, UnreachableError
from featherbed.folder import MANIFEST, open_folder
from featherbed.hub import client as room
from featherbed.hub.client import default_root
from featherbed.hub.listing import Listing, Remote
from featherbed.hub.store import Store
from featherbed.pipeline.pull import carried_out, locate, plan, pull
from tests import hub_repository
from tests.conftest import FIXTURES
from tests.hub_server import COMMIT, Fault, Hub, Repository, serving

MODEL, CHECKPOINT = "owner/small-onnx", "owner/small"
INT8 = "onnx/model_int8.onnx"
NEXT = "fedcba9876543210fedcba9876543210fedcba98"


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def surrounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whose caches are empty, who has no token, and for whom waiting takes no time."""
    monkeypatch.setenv("FEATHERBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(room, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client's own waits
    return tmp_path


@pytest.fixture
def hub(folders: dict[str, Path], surrounded: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server with a model folder of eight variants and the checkpoint that it was built from."""
    monkeypatch.chdir(surrounded)
    repositories = {
        MODEL: Repository(files_of(folders["qwen3-tied"])),
        CHECKPOINT: Repository(
            files_of(FIXTURES / "qwen3-tied") | dict.fromkeys(["pytorch_model.bin", "onnx/model.onnx"], b"not this")
        ),
    }
    with serving(repositories) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield hub


def assert_whole(hub: Hub, repository: str, commit: str = COMMIT) -> Path:
    """Everything that a record names is byte for byte what the repository holds; returns the folder."""
    store = Store(default_root())
    record = store.record(repository, commit)
    assert record is not None
    found = hub.repositories[repository].at(commit)
    assert found is not None
    folder = store.folder(repository, commit)
    for name in record.files:
        assert (folder / name).read_bytes() == found[1][name], name
    if (folder / MANIFEST).is_file():
        open_folder(folder).check_hashes()
    return folder


# what is fetched


def test_only_what_the_chosen_variant_needs_is_fetched(hub: Hub, folders: dict[str, Path]) -> None:
    folder = pull(MODEL, ["q4"])
    assert folder == assert_whole(hub, MODEL)
    model = open_folder(folder)
    assert list(model.manifest.variants) == ["q4"]
    assert [path.name for path in (folder / "onnx").iterdir()] == ["model_q4.onnx"]
    assert set(hub.served) == {*model.manifest.files, MANIFEST}
    texts = ["a frog", "rain on the roof"]
    here, there = (featherbed.Embedder(one, "q4").encode(texts) for one in (folder, folders["qwen3-tied"]))
    assert np.array_equal(here, there)


@pytest.mark.usefixtures("hub")
def test_without_a_name_the_variant_that_auto_means_is_fetched() -> None:
    assert list(open_folder(pull(MODEL)).manifest.variants) == ["int8"]


@pytest.mark.usefixtures("hub")
def test_all_is_every_variant(folders: dict[str, Path]) -> None:
    folder = pull(MODEL, ["all"])
    here, there = files_of(folder), files_of(folders["qwen3-tied"])
    assert there.keys() - here.keys() == {"onnx/model_quantized.onnx"}  # int8 once more: nothing is fetched twice
    assert {name for name in here if here[name] != there[name]} == {"featherbed.json"}


def test_of_a_checkpoint_configs_and_safetensors_are_fetched(hub: Hub) -> None:
    folder = pull(CHECKPOINT)
    assert set(files_of(folder)) == set(hub.repositories[CHECKPOINT].files) - {"pytorch_model.bin", "onnx/model.onnx"}
    assert_whole(hub, CHECKPOINT)


def test_a_plan_says_sizes_and_where_each_file_is_and_fetches_only_the_manifest(hub: Hub) -> None:
    known = plan(MODEL, ["int8"])
    files = hub.repositories[MODEL].files
    assert {s.file.path: s.file.size_bytes for s in known.steps} == {
        name: len(files[name]) for name in open_manifest(hub).files if "onnx/" not in name or name == INT8
    }
    assert {s.state for s in known.steps} == {"to fetch"}
    assert known.missing_bytes == sum(s.file.size_bytes for s in known.steps)
    assert set(hub.served) == {MANIFEST}
    pull(MODEL, ["int8"])
    assert {s.state for s in plan(MODEL, ["int8"]).steps} == {"here"}


def open_manifest(hub: Hub) -> Any:
    folder = Path("published")
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_bytes(hub.repositories[MODEL].files[MANIFEST])
    return open_folder(folder).manifest


def test_another_variant_later_comes_beside_the_first_which_is_not_fetched_again(hub: Hub) -> None:
    pull(MODEL, ["int8"])
    before = dict(hub.served)
    folder = pull(MODEL, ["fp32", "int8"])
    assert list(open_folder(folder).manifest.variants) == ["fp32", "int8"]
    assert {name for name in hub.served if hub.served[name] != before.get(name)} == {"onnx/model.onnx"}
    assert_whole(hub, MODEL)


def test_a_new_commit_fetches_only_what_changed(hub: Hub) -> None:
    pull(MODEL, ["int8"])
    repository = hub.repositories[MODEL]
    repository.older[COMMIT] = dict(repository.files)
    repository.commit = NEXT
    before = dict(hub.served)
    folder = pull(MODEL, ["int8"])
    assert folder.name == NEXT
    assert {name for name in hub.served if hub.served[name] != before[name]} == {MANIFEST}
    assert_whole(hub, MODEL, NEXT)
    assert_whole(hub, MODEL, COMMIT)


def test_a_revision_may_be_a_branch_a_tag_or_a_commit(hub: Hub) -> None:
    repository = hub.repositories[MODEL]
    repository.older[NEXT] = dict(repository.files)
    repository.refs |= {"v1": NEXT, "refs/pr/3": NEXT}
    assert pull(f"{MODEL}@v1").name == NEXT
    assert pull(f"{MODEL}@refs/pr/3").name == NEXT
    assert pull(f"{MODEL}@{COMMIT}").name == COMMIT
    with pytest.raises(HubError, match="no revision v9"):
        pull(f"{MODEL}@v9")


def test_a_record_says_what_came_from_where(hub: Hub) -> None:
    pull(MODEL, ["int8"])
    record = Store(default_root()).record(MODEL, COMMIT)
    assert record is not None
    assert (record.repository, record.commit, record.endpoint) == (MODEL, COMMIT, hub.url)
    assert (record.kind, record.auto) == ("model folder", "int8")
    assert record.files[INT8].digest == open_manifest(hub).files[INT8].sha256


@pytest.mark.usefixtures("hub")
def test_out_gets_a_copy_of_what_was_asked_for(tmp_path: Path) -> None:
    pull(MODEL, ["fp32"])
    pull(MODEL, ["int8"], tmp_path / "mine")
    model = open_folder(tmp_path / "mine")
    assert list(model.manifest.variants) == ["int8"]
    model.check_hashes()
    assert not (tmp_path / "mine" / "onnx" / "model.onnx").exists()


def test_progress_ends_at_the_whole_size_whatever_was_there_before(hub: Hub) -> None:
    told: list[tuple[str, int, int]] = []
    known = plan(MODEL, ["int8"])
    part = Store(default_root()).partial(MODEL, next(s.file.digest for s in known.steps if s.file.path == INT8))
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(hub.repositories[MODEL].files[INT8][:1000])
    pull(MODEL, ["int8"], progress=lambda *one: told.append(one))
    total = sum(s.file.size_bytes for s in known.steps)
    assert told[-1] == (f"fetch {MODEL}", total, total)
    assert hub.served[INT8] == len(hub.repositories[MODEL].files[INT8]) - 1000


def test_many_at_once_fetch_every_byte_once(hub: Hub) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(pull(MODEL, ["int8"]))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5
    assert hub.served[INT8] == len(hub.repositories[MODEL].files[INT8])
    assert_whole(hub, MODEL)


# offline


def test_offline_takes_what_is_here_and_names_what_is_not(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pull(MODEL, ["int8"])
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(MODEL, ["int8"]) == folder
    assert "offline mode; taking it as it was last seen" in caplog.text
    with pytest.raises(UnreachableError, match=r"onnx/model_q4\.onnx.*not in the cache yet.*offline mode"):
        pull(MODEL, ["q4"])
    with pytest.raises(UnreachableError, match="offline mode"):
        pull("owner/other")
    assert len(hub.asked) == asked


def test_a_hub_that_is_busy_or_gone_is_no_reason_to_refuse_what_is_here(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pull(MODEL, ["int8"])
    hub.faults.append(Fault("/api/", times=100, status=503))
    assert pull(MODEL, ["int8"]) == folder
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert pull(MODEL, ["int8"]) == folder


def test_a_commit_that_is_here_is_used_without_asking_anybody(hub: Hub) -> None:
    featherbed.Embedder(f"{MODEL}@{COMMIT}", "int8")
    asked = len(hub.asked)
    featherbed.Embedder(f"{MODEL}@{COMMIT}", "int8")
    assert len(hub.asked) == asked


# huggingface_hub's own cache


def snapshot(hub: Hub, name: str) -> Path:
    # the folder is named: the function took its default down when it was imported
    return Path(huggingface_hub.snapshot_download(name, endpoint=hub.url, cache_dir=constants.HF_HUB_CACHE))


def shared(cache: Path) -> None:
    """Blobs as huggingface_hub keeps them since 1.32: links to a store that all repositories share."""
    for at, blob in enumerate(sorted(cache.glob("models--*/blobs/*"))):
        place = cache / "blobs" / f"{at:02x}" / f"{at:064x}"
        place.parent.mkdir(parents=True, exist_ok=True)
        blob.rename(place)
        blob.symlink_to(os.path.relpath(place, blob.parent))


@pytest.mark.parametrize("layout", ["links", "links to a shared store", "no links"])
def test_what_huggingface_hub_has_is_taken_and_not_fetched(
    hub: Hub, surrounded: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "no links":
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True, raising=False)
        monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: False)
    where = snapshot(hub, MODEL)
    if layout == "links to a shared store":
        shared(surrounded / "hub-cache")
    assert (where / INT8).is_symlink() == (layout != "no links")
    before = dict(hub.served)
    folder = pull(MODEL, ["int8", "fp32"])
    assert hub.served == before
    assert_whole(hub, MODEL)
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_a_wrong_file_in_huggingface_hubs_cache_is_not_taken(hub: Hub) -> None:
    where = (snapshot(hub, MODEL) / INT8).resolve()
    raw = bytearray(where.read_bytes())
    raw[len(raw) // 2] ^= 1
    where.write_bytes(raw)
    pull(MODEL, ["int8"])
    assert_whole(hub, MODEL)
    assert where.read_bytes() == bytes(raw)  # somebody else's


@pytest.mark.parametrize("layout", ["links", "links to a shared store"])
@pytest.mark.parametrize("name", [MODEL, CHECKPOINT])
def test_offline_a_snapshot_of_huggingface_hub_is_enough(
    hub: Hub, surrounded: Path, layout: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot(hub, name)
    if layout == "links to a shared store":
        shared(surrounded / "hub-cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(name).name == COMMIT
    assert_whole(hub, name)


def test_offline_a_snapshot_with_less_than_all_is_completed_when_there_is_a_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = snapshot(hub, CHECKPOINT)
    (where / "1_Pooling" / "config.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnreachableError, match="may have only a part of them"):
        locate(CHECKPOINT, [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = locate(CHECKPOINT, []).folder
    assert (folder / "1_Pooling" / "config.json").is_file()
    where = snapshot(hub, MODEL)
    (where / INT8).resolve().unlink()
    (where / INT8).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnreachableError, match=r"onnx/model_int8\.onnx, not in the cache yet"):
        pull(MODEL, ["int8"])
    pull(MODEL, ["q4"])
    assert_whole(hub, MODEL)


# what is refused


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"token": "hf_secret"}, "no such repository, or a private one"),
        ({"gated": True}, "a gated repository"),
    ],
)
def test_a_repository_that_is_not_ours_to_see_says_so(hub: Hub, change: dict[str, Any], found: str) -> None:
    for key, value in change.items():
        setattr(hub.repositories[MODEL], key, value)
    with pytest.raises(HubError, match=found):
        pull(MODEL)


def test_a_token_opens_a_private_repository_and_never_reaches_the_cdn(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[MODEL].token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(MODEL, ["int8"])
    assert_whole(hub, MODEL)
    assert {one.authorization for one in hub.asked if one.host == "hub"} == {"Bearer hf_secret"}
    assert {one.authorization for one in hub.asked if one.host == "cdn"} == {""}


@pytest.mark.parametrize(("status", "found"), [(401, "401: not allowed"), (403, "403: not allowed"), (404, "404")])
@pytest.mark.parametrize("match", ["/api/models/", "/resolve/"])
def test_a_refusal_is_one_line_and_nothing_is_left_that_looks_whole(
    hub: Hub, status: int, found: str, match: str
) -> None:
    hub.faults.append(Fault(match, times=100, status=status))
    with pytest.raises(HubError, match=found) as caught:
        pull(MODEL)
    assert len(str(caught.value).splitlines()) == 1
    assert list(Store(default_root()).held()) == []


def test_a_portals_page_is_not_taken_for_an_answer(hub: Hub) -> None:
    hub.faults.append(Fault("/api/", times=100, html=True))
    with pytest.raises(HubError, match="not the Hub's"):
        pull(MODEL)
    hub.faults[:] = [Fault(INT8, times=100, html=True), Fault("file=onnx", times=100, html=True)]
    with pytest.raises(HubError, match="a page to log in"):
        pull(MODEL, ["int8"])
    hub.faults.clear()
    pull(MODEL, ["int8"])
    assert_whole(hub, MODEL)


@pytest.mark.usefixtures("hub")
def test_an_unknown_variant_names_those_there_are() -> None:
    with pytest.raises(OptionError, match=r"int9.*expected one of fp32.*found no such variant"):
        pull(MODEL, ["int9"])
    with pytest.raises(OptionError, match="a checkpoint, which has no variants; make them: featherbed build"):
        pull(CHECKPOINT, ["int8"])


def test_a_repository_of_neither_kind_says_what_it_has(hub: Hub) -> None:
    hub.repositories["owner/bin"] = Repository({"config.json": b"{}", "pytorch_model.bin": bytes(2**20 + 1)})
    with pytest.raises(HubError, match=r"a checkpoint with safetensors, found neither: \.bin"):
        pull("owner/bin")


@pytest.mark.parametrize("source", ["name", "a/b/c", "./a", "~/a", "/abs/olute", "a\\b", "@main", "some/model.onnx"])
def test_what_is_no_id_is_said_so_and_nobody_is_asked(hub: Hub, source: str) -> None:
    with pytest.raises(OptionError, match="owner/name"):
        pull(source)
    assert hub.asked == []


def test_a_manifest_that_does_not_fit_its_repository_is_refused(hub: Hub) -> None:
    files = hub.repositories[MODEL].files
    whole = dict(files)
    files[INT8] = files[INT8][:-1] + bytes([files[INT8][-1] ^ 1])
    with pytest.raises(HubError, match=r"model_int8\.onnx.*changed after it was pushed"):
        pull(MODEL, ["int8"])
    files[INT8] = whole[INT8]
    files["tokenizer.json"] += b" "
    with pytest.raises(HubError, match=r"tokenizer\.json.*changed after it was pushed"):
        pull(MODEL, ["int8"])
    files["tokenizer.json"] = whole["tokenizer.json"][:-1] + b" "  # the same size: git's hash says nothing of a sha256
    with pytest.raises(HubError, match=r"tokenizer\.json.*changed after it was pushed"):
        pull(MODEL, ["int8"])
    files["tokenizer.json"] = whole["tokenizer.json"]
    del files["config.json"]
    with pytest.raises(HubError, match=r"config\.json.*no such file"):
        pull(MODEL, ["int8"])
    assert list(Store(default_root()).held()) == []


# names


ESCAPES = [
    "../evil.json", "../../evil.json", "onnx/../../evil.json", "/etc/evil.json", "//host/evil.json", "./evil.json",
    "onnx//evil.json", "..\\evil.json", "C:\\evil.json", "C:evil.json", "\\\\host\\share\\evil.json", "evil\0.json",
    "evil\n.json", "..", "onnx/..", "a:b.json", "\x1b[2Jevil.json",
]  # fmt: skip
UNPORTABLE = [
    "con.json", "AUX.txt", "sub/nul.json", "com1.json", "LPT9.tar.json", "CONFIG.json", "1_pooling/Config.json",
    "trailing./x.json", "space /x.json", "what?.json", "a|b.json", "<x>.json", "e" * 260 + ".json", "ﬁ/../x.json",
    "config.json/x.json", "Config.JSON/y/z.json",
]  # fmt: skip


@pytest.mark.parametrize("name", [*ESCAPES, *UNPORTABLE], ids=lambda name: ascii(name)[:30])
def test_names_that_leave_the_folder_or_that_some_system_cannot_write_are_refused(
    hub: Hub, name: str, surrounded: Path
) -> None:
    hub.repositories[CHECKPOINT].files[name] = b"{}"
    before = {path for path in surrounded.rglob("*") if "cache" not in path.parts}
    with pytest.raises(HubError, match="every system can write"):
        pull(CHECKPOINT)
    assert list(Store(default_root()).held()) == []
    assert {path for path in surrounded.rglob("*") if "cache" not in path.parts} == before


def test_a_manifest_with_such_names_is_refused_too(hub: Hub) -> None:
    files = hub.repositories[MODEL].files
    document = json.loads(files[MANIFEST])
    for name in ("../evil.json", "/etc/evil", "a\\b"):
        files[MANIFEST] = json.dumps(
            document | {"files": document["files"] | {name: {"sha256": "", "size_bytes": 2}}}
        ).encode()
        with pytest.raises(FeatherbedError, match="leaves the folder"):
            pull(MODEL, ["int8"])
        hub.repositories[MODEL].commit = f"{abs(hash(name)):040x}"[-40:]


def test_a_link_that_lies_in_the_cache_is_not_written_through(hub: Hub, surrounded: Path) -> None:
    mine = surrounded / "mine.txt"
    mine.write_text("mine")
    folder = Store(default_root()).folder(MODEL, COMMIT)
    (folder / "onnx").mkdir(parents=True)
    (folder / INT8).symlink_to(mine)
    (folder / "config.json").symlink_to(mine)
    pull(MODEL, ["int8"])
    assert mine.read_text() == "mine"
    assert_whole(hub, MODEL)
    assert not (folder / INT8).is_symlink()


def test_a_commit_that_is_no_commit_is_refused(hub: Hub) -> None:
    hub.repositories[MODEL].commit = "../../../etc"
    with pytest.raises(HubError, match="a commit of 40 digits"):
        pull(MODEL)


@pytest.mark.parametrize(
    ("endpoint", "url", "target"),
    [
        ("https://huggingface.co", "https://huggingface.co/a", "http://cdn.example/a"),
        ("https://huggingface.co", "https://huggingface.co/a", "file:///etc/passwd"),
        ("https://huggingface.co", "https://huggingface.co/a", "ftp://cdn.example/a"),
        ("https://huggingface.co", "https://cdn.example/a", "https://127.0.0.1/a"),
        ("https://huggingface.co", "https://cdn.example/a", "https://[::1]/a"),
        ("https://huggingface.co", "https://cdn.example/a", "https://169.254.169.254/latest"),
        ("https://huggingface.co", "https://cdn.example/a", "https://10.0.0.8/a"),
        ("https://huggingface.co", "https://cdn.example/a", "https://localhost:8080/a"),
        ("https://huggingface.co", "https://cdn.example/a", "https://2130706433/a"),
        ("https://huggingface.co", "https://cdn.example/a", "https://me:x@127.1:80/a"),
        ("https://huggingface.co", "https://cdn.example/a", "https://LOCALHOST./a"),
        ("https://huggingface.co", "https://cdn.example/a", "https://[::ffff:127.0.0.1]/a"),
    ],
)
def test_redirections_to_less_than_https_or_into_our_network_are_refused(endpoint: str, url: str, target: str) -> None:
    with pytest.raises(HubError, match="redirections to https"):
        room._check_redirection(url, target, Listing("a/b", COMMIT, endpoint, ()))


def test_redirections_to_a_cdn_or_within_a_private_network_are_followed() -> None:
    for endpoint, target in (
        ("https://huggingface.co", "https://cdn-lfs.hf.co/a"),
        ("http://10.0.0.1", "http://10.0.0.2/a"),
        ("http://127.0.0.1:80", "http://127.0.0.1:81/a"),
    ):
        room._check_redirection(f"{endpoint}/a", target, Listing("a/b", COMMIT, endpoint, ()))


def test_a_redirection_of_the_server_to_a_file_is_refused(hub: Hub) -> None:
    hub.faults.append(Fault(INT8, times=9, redirect="file:///etc/passwd"))
    with pytest.raises(HubError, match="file://"):
        pull(MODEL, ["int8"])


# faults


def test_a_connection_cut_at_fifty_places_is_gone_on_with(hub: Hub) -> None:
    raw = hub.repositories[MODEL].files[INT8]
    offsets = sorted(random.Random(6).sample(range(1, len(raw)), 50))
    hub.faults += [Fault("file=onnx", cut=at) for at in [offsets[0], *np.diff(offsets).tolist()]]
    pull(MODEL, ["int8"])
    assert_whole(hub, MODEL)
    ranges = [one.range for one in hub.asked if one.host == "cdn"]
    assert ranges == ["", *(f"bytes={at}-" for at in offsets)]
    assert hub.served[INT8] == len(raw)  # every byte once


@pytest.mark.parametrize("reset", [False, True])
def test_each_of_fifty_cuts_alone_is_gone_on_with(hub: Hub, reset: bool) -> None:
    raw = hub.repositories[MODEL].files[INT8]
    for at in random.Random(7).sample(range(len(raw)), 50):
        shutil.rmtree(default_root(), ignore_errors=True)
        hub.asked.clear()
        hub.faults[:] = [Fault("file=onnx", cut=at, reset=reset)]
        pull(MODEL, ["int8"])
        assert_whole(hub, MODEL)
        assert hub.faults[0].times == 0
        starts = [int(one.range.removeprefix("bytes=").rstrip("-") or 0) for one in hub.asked if one.host == "cdn"]
        assert starts == ([0, at] if not reset else [0, starts[1]])  # after a reset, what was not read yet is lost


def test_a_pull_that_was_given_up_is_gone_on_with_by_the_next(hub: Hub) -> None:
    raw = hub.repositories[MODEL].files[INT8]
    hub.faults += [Fault("file=onnx", cut=5000), Fault("file=onnx", times=9, cut=0)]
    with pytest.raises(HubError, match="what has arrived is kept"):
        pull(MODEL, ["int8"])
    assert [s.missing_bytes for s in plan(MODEL, ["int8"]).steps if s.file.path == INT8] == [len(raw) - 5000]
    hub.faults.clear()
    pull(MODEL, ["int8"])
    assert_whole(hub, MODEL)
    assert hub.served[INT8] == len(raw)


def test_a_server_that_knows_no_ranges_is_asked_from_the_start(hub: Hub) -> None:
    hub.faults += [Fault("file=onnx", cut=5000), Fault("file=onnx", ignore_range=True)]
    pull(MODEL, ["int8"])
    assert_whole(hub, MODEL)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("match", ["/api/models/", "/tree/", "/resolve/", "file=onnx"])
def test_a_busy_server_is_asked_again(hub: Hub, status: int, match: str) -> None:
    hub.faults.append(Fault(match, times=2, status=status))
    pull(MODEL, ["int8"])
    assert_whole(hub, MODEL)
    assert hub.faults[0].times == 0


def test_retry_after_is_waited_for(hub: Hub) -> None:
    waited: list[float] = []
    wanted = Remote(INT8, len(hub.repositories[MODEL].files[INT8]), "")
    hub.faults.append(Fault("file=onnx", times=2, status=429, headers={"Retry-After": "7"}))
    room.download(Listing(MODEL, COMMIT, hub.url, (wanted,)), wanted, Path("part"), lambda _: None, waited.append)
    assert waited == [7, 7]
    hub.faults.append(Fault("file=onnx", times=2, status=429, headers={"Retry-After": "4000"}))
    Path("part").unlink()
    with pytest.raises(HubError, match="429: too many requests"):
        room.download(Listing(MODEL, COMMIT, hub.url, (wanted,)), wanted, Path("part"), lambda _: None, waited.append)
    assert waited == [7, 7]


@pytest.mark.parametrize("name", [INT8, "tokenizer.json", MANIFEST])
def test_wrong_bytes_of_the_right_size_are_never_accepted(hub: Hub, name: str) -> None:
    for at in range(3):
        hub.faults[:] = [
            Fault(name, times=100, replace=lambda raw: bytes([raw[0] ^ 1]) + raw[1:]),
            Fault("file=onnx", times=100 if name == INT8 else 0, replace=lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
        ]
        with pytest.raises(HubError, match="as many other ones, twice"):
            pull(MODEL, ["int8"])
        store = Store(default_root())
        assert list(store.held()) == [], at
        assert not (store.folder(MODEL, COMMIT) / name).exists()
    hub.faults.clear()
    pull(MODEL, ["int8"])
    assert_whole(hub, MODEL)


def test_wrong_bytes_once_are_fetched_again(hub: Hub) -> None:
    hub.faults.append(Fault("file=onnx", replace=lambda raw: bytes(len(raw))))
    pull(MODEL, ["int8"])
    assert_whole(hub, MODEL)


def test_a_beginning_of_another_file_is_found_out_and_fetched_again(hub: Hub) -> None:
    digest = next(s.file.digest for s in plan(MODEL, ["int8"]).steps if s.file.path == INT8)
    part = Store(default_root()).partial(MODEL, digest)
    part.parent.mkdir(parents=True, exist_ok=True)
    for junk in (b"x" * 100, b"x" * 10**7):
        part.write_bytes(junk)
        pull(MODEL, ["int8"])
        assert_whole(hub, MODEL)
        (Store(default_root()).folder(MODEL, COMMIT) / INT8).unlink()


def test_a_changed_byte_in_the_cache_is_fetched_again_by_the_next_pull(hub: Hub) -> None:
    folder = pull(MODEL, ["int8"])
    path = folder / INT8
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    pull(MODEL, ["int8"])
    assert_whole(hub, MODEL)


# what was wrong once


def listed(monkeypatch: pytest.MonkeyPatch, name: str, **said: Any) -> None:
    """Have the server list a file with something else."""
    row_of = hub_repository.row_of

    def changed(path: str, raw: bytes) -> dict[str, Any]:
        return row_of(path, raw) | (said if path == name else {})

    monkeypatch.setattr(hub_repository, "row_of", changed)


@pytest.mark.parametrize(
    "said",
    [{"oid": "../../../mine"}, {"oid": "/etc/passwd"}, {"oid": None}, {"oid": 7}, {"size": "12"}, {"size": -1},
     {"size": 1.5}, {"path": 5}, {"path": "\ud800.json"}],
    ids=str,
)  # fmt: skip
def test_a_listing_that_names_no_file_size_or_hash_is_refused(
    hub: Hub, said: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(monkeypatch, "config.json", **said)
    with pytest.raises(HubError, match="not the Hub's"):
        pull(CHECKPOINT)
    assert hub.served == {}


def test_files_of_one_content_come_once_and_each_gets_its_place(hub: Hub) -> None:
    raw = random.Random(2).randbytes(300_000)
    hub.repositories[CHECKPOINT].files |= {
        "a/model.safetensors": raw,
        "b/model.safetensors": raw,
        "c.json": b"",
        "d.json": b"",
    }
    pull(CHECKPOINT)
    assert_whole(hub, CHECKPOINT)
    assert sum(
        size for name, size in hub.served.items() if name in ("a/model.safetensors", "b/model.safetensors")
    ) == len(raw)


def test_variants_that_others_fetch_at_the_same_time_are_all_in_the_manifest(hub: Hub) -> None:
    known = [plan(MODEL, [name]) for name in ("fp32", "int8", "q4")]  # each without the others
    for one in known:
        carried_out(one)
    assert list(open_folder(assert_whole(hub, MODEL)).manifest.variants) == ["fp32", "int8", "q4"]
    record = Store(default_root()).record(MODEL, COMMIT)
    assert record is not None
    assert record.files.keys() == open_folder(pull(MODEL, ["q4"])).manifest.files.keys()


def test_a_server_without_ranges_that_cuts_here_and_there_is_given_up(hub: Hub) -> None:
    size = len(hub.repositories[MODEL].files[INT8])
    hub.faults += [Fault("file=onnx", ignore_range=True, cut=size * (3 + at % 2) // 10) for at in range(200)]
    with pytest.raises(HubError, match="what has arrived is kept"):
        pull(MODEL, ["int8"])
    assert hub.served[INT8] < 5 * size


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["variants"]["int8"].update(files=["onnx/nope.onnx"]),
        lambda m: m["variants"]["int8"].update(files=[]),
        lambda m: m["variants"]["int8"].update(recipe=5),
        lambda m: m["variants"]["int8"].update(least_onnxruntime=None),
        lambda m: m.update(variants={}),
        lambda m: m.update(spec={}),
        lambda m: m.update(origin=5),
    ],
)
def test_a_manifest_that_is_none_is_a_typed_error(hub: Hub, change: Callable[[dict[str, Any]], None]) -> None:
    files = hub.repositories[MODEL].files
    document = json.loads(files[MANIFEST])
    change(document)
    files[MANIFEST] = json.dumps(document).encode()
    with pytest.raises(FeatherbedError, match="expected"):
        pull(MODEL, ["int8"])
    assert list(Store(default_root()).held()) == []


# the disk


def test_a_disk_without_room_is_said_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    known = plan(MODEL, ["int8"])
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=known.missing_bytes - 1))
    before = dict(hub.served)
    with pytest.raises(OutputError, match="room for"):
        pull(MODEL, ["int8"])
    assert hub.served == before


class Full:
    """Every write of the system fails from the k-th on, as on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, good: int) -> None:
        self.left = good
        self._lock = threading.Lock()
        opened = room._opened
        monkeypatch.setattr(room, "_opened", lambda part, mode: self._guarded(opened(part, mode)))
        replace = Path.replace
        monkeypatch.setattr(Path, "replace", lambda path, target: self._one(lambda: replace(path, target)))

    def _one(self, write: Callable[[], Any]) -> Any:
        with self._lock:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write()

    def _guarded(self, file: Any) -> Any:
        outer = self

        class Guarded:
            def write(self, raw: bytes) -> Any:
                return outer._one(lambda: file.write(raw))

            def __enter__(self) -> Guarded:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

        return Guarded()


def test_a_disk_that_is_full_at_any_write_is_a_typed_error_and_nothing_wrong_is_accepted(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[str] = []
    for good in range(1000):
        shutil.rmtree(default_root(), ignore_errors=True)
        with monkeypatch.context() as patch:
            full = Full(patch, good)
            try:
                pull(MODEL, ["int8"])
            except OutputError as error:
                failed.append(str(error))
        if full.left >= 0:
            break
        for held in Store(default_root()).held():
            assert all(file.matches(held.folder / name) for name, file in held.record.files.items())
        if good % 7 == 0:
            pull(MODEL, ["int8"])
            assert_whole(hub, MODEL)
    assert len(failed) > 20
    assert all("No space left" in line for line in failed)
    assert_whole(hub, MODEL)
