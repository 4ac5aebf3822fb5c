"""What others do to a cache meanwhile, what the disk refuses, what was changed on it: on the server of test_pull.py."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import featherbed
from featherbed.errors import HubError, OutputError, UnreachableError
from featherbed.folder import MANIFEST, open_folder
from featherbed.hub import listing as listing_room
from featherbed.hub import store as store_room
from featherbed.hub.cached import cached, cached_listing
from featherbed.hub.client import default_root
from featherbed.hub.links import LINKS, all_unlinked, unlinked
from featherbed.hub.listing import Listing, Remote
from featherbed.hub.names import HubId
from featherbed.hub.store import BUILD_LOCK, LOCK, Record, Store, size_bytes
from featherbed.pipeline import doctor
from featherbed.pipeline.evict import evict
from featherbed.pipeline.pull import carried_out, locate, plan, pull
from featherbed.pipeline.stage import Weights, staged
from featherbed.run.session import Memory
from tests.cli.test_cli import Run, run
from tests.hub_server import COMMIT, Fault, Hub
from tests.test_pull import CHECKPOINT, INT8, MODEL, assert_whole, files_of, hub, shared, snapshot, surrounded

__all__ = ["hub", "run", "surrounded"]  # fixtures


def store() -> Store:
    return Store(default_root())


def edited(path: Path, **changed: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changed), "utf-8")


def busy_with(held: Store, name: str, repository: str = CHECKPOINT) -> Callable[[], None]:
    """Hold a lock as another process does; returns what lets go of it."""
    taken, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with held.lock(repository, name):
            taken.set()
            assert let_go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(60)

    def done() -> None:
        let_go.set()
        thread.join()

    return done


def built(folders: dict[str, Path]) -> None:
    """The checkpoint fetched, and a folder of ours that stands for what was built of it."""
    pull(CHECKPOINT)
    shutil.copytree(folders["qwen3-tied"], store().built(CHECKPOINT, COMMIT))


# what names files


def test_offline_a_manifest_names_no_file_by_what_is_no_hash(
    hub: Hub, surrounded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = surrounded / "mine"
    mine.write_bytes(b"k" * 411)
    files = hub.repositories[MODEL].files
    document = json.loads(files[MANIFEST])
    document["files"]["onnx/model.onnx"] = {"sha256": str(mine), "size_bytes": 411}
    files[MANIFEST] = json.dumps(document).encode()
    pull(MODEL, ["int8"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="a hash of 40 or 64 digits"):
        pull(MODEL, ["fp32"])
    assert mine.read_bytes() == b"k" * 411


@pytest.mark.usefixtures("surrounded")
def test_what_is_no_hash_names_no_file_of_huggingface_hubs_cache(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    for digest in (str(mine), f"../../../{mine.name}"):
        file = Remote("x.json", 4, digest)
        (Path(constants.HF_HUB_CACHE) / "models--a--b" / "blobs").mkdir(parents=True, exist_ok=True)
        assert cached(Listing("a/b", COMMIT, "", (file,)), file) is None


@pytest.mark.usefixtures("hub")
def test_a_link_that_is_named_by_no_hash_is_none_of_a_listing(hub: Hub, surrounded: Path) -> None:
    where = snapshot(hub, CHECKPOINT)
    (surrounded / "mine").write_text("{}")
    (where / "mine.json").symlink_to(surrounded / "mine")
    found = cached_listing(HubId(CHECKPOINT, COMMIT))
    assert found is not None
    assert found.find("config.json") is not None
    assert found.find("mine.json") is None


# huggingface_hub's cache


@pytest.mark.parametrize("names", [["tokenizer.json"], ["config.json", "tokenizer.json"], ["config.json"]], ids=str)
def test_offline_a_checkpoint_of_which_only_some_files_are_here_is_not_said_to_be_none(
    hub: Hub, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        huggingface_hub.hf_hub_download(CHECKPOINT, name, endpoint=hub.url, cache_dir=constants.HF_HUB_CACHE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for asked in (lambda: pull(CHECKPOINT), lambda: locate(CHECKPOINT, []), lambda: featherbed.Embedder(CHECKPOINT)):
        with pytest.raises(UnreachableError, match="may have only a part of them; pull it once with a network"):
            asked()


@pytest.mark.parametrize("garbage", [b"\xff\xfe\0", b"", b"../../x", None])
def test_a_reference_that_is_garbage_is_none(
    hub: Hub, surrounded: Path, garbage: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = surrounded / "hub-cache" / "models--owner--small" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    if garbage is None:
        reference.mkdir()
    else:
        reference.write_bytes(garbage)
    assert cached_listing(HubId(CHECKPOINT)) is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnreachableError, match="offline mode"):
        pull(CHECKPOINT)
    assert hub.asked == []


@pytest.mark.usefixtures("hub")
def test_a_manifest_of_huggingface_hubs_cache_is_taken_by_many_at_once(hub: Hub, monkeypatch: Any) -> None:
    snapshot(hub, MODEL)
    copyfile, begun, half = shutil.copyfile, iter(range(1000)), threading.Event()
    before = dict(hub.served)

    def slow(source: Any, target: Any) -> Any:
        """The first writes half of it while the others, where nothing keeps them apart, believe that they are done."""
        raw, first = Path(source).read_bytes(), next(begun) == 0
        if raw != hub.repositories[MODEL].files[MANIFEST]:
            return copyfile(source, target)
        if first:
            threading.Event().wait(0.2)
            Path(target).write_bytes(raw[:100])
            half.set()
            threading.Event().wait(0.2)
        half.wait(5)
        return Path(target).write_bytes(raw) if first else None

    monkeypatch.setattr(shutil, "copyfile", slow)
    with ThreadPoolExecutor(8) as pool:
        plans = list(pool.map(lambda _: plan(MODEL, ["int8"]), range(8)))
    assert len({repr(one.manifest) for one in plans}) == 1
    assert hub.served == before
    place = store().published(MODEL, COMMIT)
    assert place.read_bytes() == hub.repositories[MODEL].files[MANIFEST]
    assert not place.is_symlink()


# others at work


def test_a_model_that_another_process_finishes_meanwhile_is_not_taken_away(hub: Hub) -> None:
    pull(CHECKPOINT)
    record = store().home(CHECKPOINT) / f"{COMMIT}.json"
    record.unlink()  # as after a kill before it was written
    findings = list(doctor.examine())
    assert [one.what for one in findings] == ["a folder that was never whole"]
    pull(CHECKPOINT)
    assert doctor.mend(findings) == (0, {})
    assert_whole(hub, CHECKPOINT)
    record.unlink()
    assert doctor.mend(findings)[0] > 0
    assert not store().folder(CHECKPOINT, COMMIT).exists()


@pytest.mark.parametrize("name", [LOCK, BUILD_LOCK])
def test_mending_waits_for_whoever_is_at_work(hub: Hub, name: str) -> None:
    folder = pull(CHECKPOINT)
    (store().home(CHECKPOINT) / f"{COMMIT}.json").unlink()
    findings = list(doctor.examine())
    done = busy_with(store(), name)
    mending = threading.Thread(target=lambda: doctor.mend(findings))
    mending.start()
    mending.join(0.3)
    assert mending.is_alive()
    assert files_of(folder).keys() == hub.repositories[CHECKPOINT].files.keys() - {
        "pytorch_model.bin",
        "onnx/model.onnx",
    }
    done()
    mending.join(60)
    assert not folder.exists()


def test_what_another_process_mended_meanwhile_is_not_fetched_again(hub: Hub) -> None:
    path = pull(MODEL, ["int8"]) / INT8
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    findings = list(doctor.examine())
    pull(MODEL, ["int8"])
    served = dict(hub.served)
    evicted = list(findings)
    assert doctor.mend(findings) == (0, {})
    evict(HubId(MODEL), [])
    assert doctor.mend(evicted) == (0, {})
    assert hub.served == served
    assert list(store().held()) == []


def test_what_is_built_while_evict_waits_goes_too(hub: Hub, folders: dict[str, Path]) -> None:
    built(folders)
    done = busy_with(store(), BUILD_LOCK)
    pruned: list[Any] = []
    evicting = threading.Thread(target=lambda: pruned.append(evict(HubId(CHECKPOINT), [], everything=True)))
    evicting.start()
    evicting.join(0.3)
    assert evicting.is_alive()
    assert_whole(hub, CHECKPOINT)  # the build that is under way has what it is made of
    (store().built(CHECKPOINT, COMMIT) / "late.txt").write_text("12345")
    done()
    evicting.join(60)
    assert pruned[0].freed[f"{COMMIT}-built/late.txt"] == 5
    assert list(store().held()) == []
    assert not store().built(CHECKPOINT, COMMIT).exists()


@pytest.mark.usefixtures("hub")
def test_a_dry_run_of_evict_waits_for_nobody() -> None:
    pull(CHECKPOINT)
    done = busy_with(store(), BUILD_LOCK)
    assert evict(HubId(CHECKPOINT), [], dry_run=True).freed
    done()


@pytest.mark.usefixtures("hub")
def test_a_variant_that_is_built_is_opened_while_another_is_being_built(folders: dict[str, Path]) -> None:
    built(folders)
    done = busy_with(store(), BUILD_LOCK)
    opening = threading.Thread(target=lambda: featherbed.Embedder(CHECKPOINT, "fp32"))
    opening.start()
    opening.join(60)
    waited = opening.is_alive()
    done()
    opening.join(60)
    assert not waited


def test_room_is_needed_for_what_nobody_fetched_meanwhile(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    known = plan(MODEL, ["int8"])
    pull(MODEL, ["int8"])
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=known.missing_bytes - 1))
    carried_out(known)
    assert_whole(hub, MODEL)


@pytest.mark.usefixtures("hub")
def test_what_goes_while_it_is_listed_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pull(MODEL, ["int8"])
    lstat, stat = Path.lstat, Path.stat

    def gone(path: Path) -> Any:
        if path.name in ("config.json", f"{COMMIT}.json"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return lstat(path)

    whole = size_bytes(folder)
    monkeypatch.setattr(Path, "lstat", gone)
    assert 0 < size_bytes(folder) < whole
    assert size_bytes(folder / "config.json") == 0
    seen = iter(range(1000))

    def gone_meanwhile(path: Path, **named: Any) -> Any:  # after it was read
        there = path.name != f"{COMMIT}.json" or next(seen) == 0
        return stat(path, **named) if there else gone(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", gone_meanwhile)
        assert list(doctor.models()) == []
    assert next(seen) == 2
    assert doctor.surroundings()["caches"]["models"]["size_bytes"] > 0


# what the disk refuses


def refusing(patch: pytest.MonkeyPatch, code: int) -> None:
    """A cache that cannot be written, whoever we are: root may write anywhere but on a disk that is read-only."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    from filelock import FileLock

    patch.setattr(FileLock, "acquire", refuse)
    patch.setattr(os, "utime", refuse)
    patch.setattr(Path, "replace", refuse)
    patch.setattr(Path, "mkdir", refuse)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_cache_that_cannot_be_written_serves_what_is_in_it(
    hub: Hub, code: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pull(MODEL, ["int8"])
    built(folders)
    hub.repositories[CHECKPOINT].refs["v1"] = COMMIT
    with monkeypatch.context() as patch:
        refusing(patch, code)
        memory = Memory(cache=False)
        assert featherbed.Embedder(MODEL, "int8", memory=memory).encode("a").shape
        assert featherbed.Embedder(CHECKPOINT, "fp32", memory=memory).encode("a").shape
        assert featherbed.Embedder(f"{CHECKPOINT}@v1", "fp32", memory=memory).encode("a").shape  # and noted nowhere
        with pytest.raises(OutputError, match=os.strerror(code)):
            pull(MODEL, ["q4"])
    assert store().revision(CHECKPOINT, "v1") is None


def test_a_file_that_cannot_be_read_is_a_finding_and_fetched_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pull(MODEL, ["int8"])
    digest = listing_room.digest
    bad = [True]

    def unreadable(file: Path, large: bool) -> str:
        if file == folder / INT8 and bad[0]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return digest(file, large)

    monkeypatch.setattr(listing_room, "digest", unreadable)
    (finding,) = doctor.examine()
    assert (finding.what, finding.broken) == ("it cannot be read: Permission denied", True)
    file = next(one for one in hub_listing(folder) if one.path == INT8)
    assert not file.matches(folder / INT8)
    unlink = Path.unlink

    def unlinked_for_good(path: Path, missing_ok: bool = False) -> None:
        bad[0] = bad[0] and path != folder / INT8
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlinked_for_good)
    assert doctor.mend([finding])[1] == {}
    assert_whole(hub, MODEL)
    assert list(doctor.examine()) == []


def hub_listing(folder: Path) -> list[Remote]:
    record = store().record(MODEL, folder.name)
    assert record is not None
    return list(record.files.values())


# what was changed on the disk


def test_a_record_knows_the_manifest_that_was_fetched_and_older_ones_are_read(hub: Hub) -> None:
    pull(MODEL, ["int8"])
    record = store().record(MODEL, COMMIT)
    assert record is not None
    assert Remote(MANIFEST, len(hub.repositories[MODEL].files[MANIFEST]), record.manifest).matches(
        store().published(MODEL, COMMIT)
    )
    old = record.to_json()
    del old["manifest"]
    assert Record.from_json(old) == replace(record, manifest="")
    (store().home(MODEL) / f"{COMMIT}.json").write_text(json.dumps(old))
    assert list(doctor.examine()) == []
    evict(HubId(MODEL), ["int8"])
    pull(MODEL, ["q4"])
    assert_whole(hub, MODEL)
    found = store().record(MODEL, COMMIT)
    assert found is not None
    assert found.manifest == record.manifest


def test_a_manifest_that_was_changed_on_the_disk_is_found_and_mended(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pull(MODEL, ["int8", "q4"])
    spec = json.loads((folder / MANIFEST).read_text("utf-8"))["spec"]
    published = store().published(MODEL, COMMIT)
    for place, what in (
        (folder / MANIFEST, "it does not say what the published one says"),
        (published, "its bytes are not those that were fetched"),
    ):
        edited(place, spec=spec | {"pooling": "mean"})
        assert [(Path(one.where), one.what, one.broken) for one in doctor.examine()] == [(place, what, True)]
        if place == published:
            with monkeypatch.context() as patch:
                patch.setattr(constants, "HF_HUB_OFFLINE", True)
                with pytest.raises(HubError, match="it was changed on the disk; pull again with a network"):
                    pull(MODEL, ["int8"])
        doctor.mend(list(doctor.examine()))
        assert list(doctor.examine()) == []
        assert list(open_folder(assert_whole(hub, MODEL)).manifest.variants) == ["int8", "q4"]
        assert open_folder(folder).manifest.spec.to_json() == spec


# the caller's own errors


@pytest.mark.parametrize("when", ["at once", "while bytes come"])
def test_what_a_progress_raises_comes_out_as_it_is(hub: Hub, when: str) -> None:
    class CancelledError(Exception):
        pass

    mine = CancelledError("by the user")

    def told(_: str, done: int, total: int) -> None:
        if when == "at once" or done > total / 2:
            raise mine

    with pytest.raises(CancelledError) as caught:
        pull(MODEL, ["int8"], progress=told)
    assert caught.value is mine
    assert list(store().held()) == []
    before = dict(hub.served)
    pull(MODEL, ["int8"])
    assert_whole(hub, MODEL)
    size = len(hub.repositories[MODEL].files[INT8])
    assert hub.served[INT8] - before.get(INT8, 0) <= size


def test_an_error_of_the_hub_is_not_hidden_by_a_progress(hub: Hub) -> None:
    hub.faults.append(Fault("tokenizer.json", times=9, status=403))
    with pytest.raises(HubError, match="not allowed"):
        pull(MODEL, ["int8"], progress=lambda *_: None)


# bytes that are freed


@pytest.mark.usefixtures("hub")
def test_bytes_with_another_name_that_stays_are_not_said_to_be_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_room, "LEAST_LINKED_BYTES", 0)
    folder = pull(MODEL, ["int8", "q4"], tmp_path / "mine").parent / "mine"
    freed = evict(HubId(MODEL), ["int8"], dry_run=True).freed
    assert freed == {"onnx/model_q4.onnx": 0}
    (folder / "onnx" / "model_q4.onnx").unlink()
    pruned = evict(HubId(MODEL), ["int8"])
    assert pruned.freed_bytes == pruned.freed["onnx/model_q4.onnx"] > 0
    both = store().folder(MODEL, COMMIT)
    os.link(both / INT8, both / "twice.onnx")
    (folder / INT8).unlink()
    size = (both / INT8).stat().st_size
    freed = evict(HubId(MODEL), []).freed
    assert sorted([freed[f"{COMMIT}/{INT8}"], freed[f"{COMMIT}/twice.onnx"]]) == [0, size]  # with its last name


# real files in place of links


@pytest.fixture
def linked_folder(hub: Hub, folders: dict[str, Path], surrounded: Path) -> Path:
    """A snapshot that huggingface_hub made of links which onnxruntime refuses."""
    place = surrounded / "beside"
    place.mkdir()
    staged(open_folder(folders["qwen3-tied"]), ["fp32", "q4"], Weights.BESIDE, place)
    hub.repositories[MODEL].files = files_of(place)
    where = snapshot(hub, MODEL)
    shared(surrounded / "hub-cache")
    return where


def test_real_files_in_place_of_links_are_listed(linked_folder: Path, run: Run) -> None:
    featherbed.Embedder(linked_folder, "q4")
    (one,) = doctor.unlinked()
    assert (Path(one.source), one.fault) == (linked_folder.resolve(), "")
    assert one.size_bytes == size_bytes(one.folder) > 0
    outcome = run("list", "--json")
    assert outcome.document["linked"] == [{**vars(one), "folder": str(one.folder)}]
    assert "1 of folders made of links" in run("list").out
    assert list(doctor.examine()) == []


@pytest.mark.parametrize("fate", ["gone", "another", "unknown"])
def test_real_files_of_a_folder_that_is_gone_or_another_are_taken_away(linked_folder: Path, fate: str) -> None:
    model = open_folder(linked_folder)
    kept = unlinked(store(), model)
    if fate == "gone":
        shutil.rmtree(linked_folder)
    elif fate == "another":
        raw = (linked_folder / MANIFEST).read_bytes()
        (linked_folder / MANIFEST).unlink()
        (linked_folder / MANIFEST).write_bytes(raw)
        edited(linked_folder / MANIFEST, name="another")
    else:
        (kept / ".of").unlink()
    (finding,) = doctor.examine()
    assert not finding.broken
    assert doctor.mend([finding])[0] == finding.size_bytes > 0
    assert list(all_unlinked(store())) == []
    assert list(doctor.examine()) == []


def test_what_a_killed_process_left_of_real_files_is_taken_away_and_nothing_else(linked_folder: Path) -> None:
    kept = unlinked(store(), open_folder(linked_folder))
    before = files_of(kept)
    half = kept.with_name(f"{'0' * 32}.tmp-1")
    (half / "onnx").mkdir(parents=True)
    (half / "onnx" / "model.onnx").write_bytes(b"half")
    done = busy_with(store(), LOCK, LINKS)
    assert list(doctor.examine()) == []  # somebody may be making it
    done()
    (finding,) = doctor.examine()
    assert (finding.broken, finding.remove) == (False, (half,))
    assert doctor.mend([finding])[0] == 4
    assert not half.exists()
    assert files_of(kept) == before
