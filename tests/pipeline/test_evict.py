"""prune with a Hub id: variants, or all of it, out of the cache; on the server of tests/test_pull.py."""

from __future__ import annotations

from pathlib import Path

import pytest

import featherbed
from featherbed.errors import HubError, OptionError
from featherbed.folder import open_folder
from featherbed.hub.client import default_root
from featherbed.hub.names import HubId
from featherbed.hub.store import Store
from featherbed.pipeline import doctor
from featherbed.pipeline.evict import evict
from featherbed.pipeline.pull import pull
from tests.hub_server import COMMIT, Hub
from tests.test_pull import CHECKPOINT, MODEL, NEXT, assert_whole, files_of, hub, surrounded

__all__ = ["hub", "surrounded"]  # fixtures


def test_variants_go_and_the_rest_stays_whole_and_what_went_can_be_fetched_again(hub: Hub) -> None:
    folder = pull(MODEL, ["fp32", "int8", "q4"])
    seen = evict(HubId(MODEL), ["int8"], dry_run=True)
    assert (folder / "onnx" / "model.onnx").is_file()
    pruned = evict(HubId(MODEL), ["int8"])
    assert pruned == seen
    assert set(pruned.freed) == {"onnx/model.onnx", "onnx/model_q4.onnx"}  # nothing was verified: there are no reports
    assert (pruned.gone, pruned.kept) == (("fp32", "q4"), ("int8",))
    assert list(open_folder(assert_whole(hub, MODEL)).manifest.variants) == ["int8"]
    assert set(doctor.examine()) == set()
    assert evict(HubId(MODEL), ["int8"]).freed == {}
    asked = len(hub.asked)
    featherbed.Embedder(f"{MODEL}@{COMMIT}", "int8")
    assert len(hub.asked) == asked  # nothing is missing
    pull(MODEL, ["q4"])
    assert list(open_folder(assert_whole(hub, MODEL)).manifest.variants) == ["int8", "q4"]


def test_a_run_that_was_stopped_leaves_a_whole_model_and_the_next_takes_the_rest(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pull(MODEL, ["all"])
    unlink = Path.unlink
    for good in range(3):
        with monkeypatch.context() as patch:
            left = [good]

            def limited(path: Path, missing_ok: bool = False, left: list[int] = left) -> None:
                if "onnx" in path.parts:
                    left[0] -= 1
                    if left[0] < 0:
                        raise KeyboardInterrupt
                unlink(path, missing_ok=missing_ok)

            patch.setattr(Path, "unlink", limited)
            with pytest.raises(KeyboardInterrupt):
                evict(HubId(MODEL), ["fp32", "int8"])
        assert_whole(hub, MODEL)
    pruned = evict(HubId(MODEL), ["fp32", "int8"])
    assert set(pruned.left_over) == set(pruned.freed) != set()
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx", "model_int8.onnx"]
    assert_whole(hub, MODEL)


def test_without_anything_to_keep_a_revision_goes_or_everything(hub: Hub) -> None:
    hub.repositories[MODEL].older[NEXT] = dict(hub.repositories[MODEL].files)
    pull(MODEL)
    pull(f"{MODEL}@{NEXT}")
    evict(HubId(MODEL, NEXT), [])
    assert [held.record.commit for held in Store(default_root()).held()] == [COMMIT]
    pull(f"{MODEL}@{NEXT}")
    pruned = evict(HubId(MODEL), [], everything=True)
    assert {name.partition("/")[0] for name in pruned.freed} == {COMMIT, NEXT}
    assert list(Store(default_root()).held()) == []
    with pytest.raises(HubError, match="found nothing; see `featherbed list`"):
        evict(HubId(MODEL), [], everything=True)
    assert list(doctor.examine()) == []
    pull(MODEL)
    assert_whole(hub, MODEL)


def test_of_a_checkpoint_the_variants_that_were_built_go(hub: Hub) -> None:
    featherbed.Embedder(CHECKPOINT, "q4")
    with pytest.raises(OptionError, match="a list without fp32"):
        evict(HubId(CHECKPOINT), ["q4"])
    pruned = evict(HubId(CHECKPOINT), ["fp32"])
    assert pruned.gone == ("q4",)
    assert_whole(hub, CHECKPOINT)
    built = Store(default_root()).built(CHECKPOINT, COMMIT)
    open_folder(built).check_hashes()
    assert "onnx/model_q4.onnx" not in files_of(built)


@pytest.mark.usefixtures("hub")
def test_an_unknown_variant_is_an_error_and_nothing_goes() -> None:
    folder = pull(MODEL, ["int8"])
    before = files_of(folder)
    with pytest.raises(OptionError, match="expected one of int8, found no such variant"):
        evict(HubId(MODEL), ["q4"])
    assert files_of(folder) == before
