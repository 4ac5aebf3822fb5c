"""What a record may say, what doctor may take away, what it says of variants: each of these was wrong once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from featherbed.check import advice as advice_room
from featherbed.check.advice import advise
from featherbed.check.baseline import kind_of
from featherbed.errors import HubError
from featherbed.hub.store import Store
from featherbed.pipeline import doctor
from tests.check.test_advice import ALL, HERE, manifest_of, report

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("FEATHERBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    store = Store(tmp_path / "cache" / "models")
    store.home("a/b").mkdir(parents=True)
    return store


def write_record(store: Store, **changed: Any) -> None:
    raw = {
        "repository": "a/b", "commit": COMMIT, "endpoint": "", "kind": "checkpoint", "auto": "", "date": "",
        "whole": True, "files": {},
    }  # fmt: skip
    (store.home("a/b") / f"{COMMIT}.json").write_text(json.dumps(raw | changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"files": {"../../../../mine/x.txt": {"size_bytes": 9, "digest": "0" * 40}}},
        {"commit": "../../../mine", "files": {"x.txt": {"size_bytes": 9, "digest": "0" * 40}}},
        {"repository": "../../mine/c"},
    ],
)
def test_a_record_that_leads_out_of_the_cache_is_not_believed(
    store: Store, tmp_path: Path, changed: dict[str, Any]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.txt").write_text("mine")
    write_record(store, **changed)
    assert list(store.held()) == []
    for finding in doctor.examine():
        assert all(path.resolve().is_relative_to(store.root) for path in finding.remove)


def test_a_record_that_cannot_be_read_is_left_over_too(store: Store) -> None:
    (store.home("a/b") / f"{COMMIT}.json").write_text("{")
    (store.home("a/b") / f"{COMMIT}.published.json").write_text("{}")
    doctor.mend(list(doctor.examine()))
    assert [path.name for path in store.home("a/b").iterdir() if path.suffix == ".json"] == []


def test_a_cache_in_which_no_lock_can_be_made_is_examined_all_the_same(store: Store) -> None:
    store.folder("a/b", COMMIT).mkdir()
    (store.home("a/b") / ".lock").mkdir()  # stands for a cache that is read-only
    assert [one.where for one in doctor.examine()] == ["a/b"]


def test_to_examine_writes_nothing(store: Store) -> None:
    store.folder("a/b", COMMIT).mkdir()
    before = sorted(store.root.rglob("*"))
    assert len(list(doctor.examine())) == 1
    assert sorted(store.root.rglob("*")) == before


@pytest.mark.parametrize("digest", ["/etc/passwd", "../../mine", "", "0" * 39, "g" * 40, "0" * 64 + "/x"])
def test_what_is_no_hash_names_no_file_in_the_store(store: Store, digest: str) -> None:
    with pytest.raises(HubError, match="a hash of 40 or 64 digits"):
        store.partial("a/b", digest)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice_room, "available_mib", lambda: 8000.0)
    monkeypatch.setattr(advice_room, "kind", lambda: kind_of(HERE))


@pytest.mark.usefixtures("here")
def test_fp32_is_closest_to_itself_though_nobody_compared_it() -> None:
    reports = {"fp32": report(1000.0), "int8": report(990.0, 0.99)}  # bench of all, verify of int8 alone
    assert advise(manifest_of(ALL), reports, "m").variant == "fp32"


@pytest.mark.usefixtures("here")
def test_what_is_none_of_the_preferred_is_not_said_to_be_one() -> None:
    assert "first that is sound of int8, int8-block, fp32" not in advise(manifest_of({"int4": 70}), {}, "m").reasons[0]


@pytest.mark.usefixtures("here")
def test_arm_with_asimddp_has_8_bit_dot_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice_room, "kind", lambda: kind_of({"system": "Linux aarch64", "flags": ["asimddp"]}))
    assert not [line for line in advise(manifest_of(ALL), {}, "m").reasons if "no dot product" in line]
