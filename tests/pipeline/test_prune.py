"""prune: variants leave a folder with all that is theirs and nothing else, and no moment leaves it broken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featherbed
from featherbed.errors import ModelFolderError, OptionError, OutputError
from featherbed.folder import MANIFEST, Variant, dump, open_folder, write_text
from featherbed.make.write import write_graph
from featherbed.pipeline import variants as variants_room
from featherbed.pipeline.prune import Pruned, prune
from tests.cli.test_cli import Run, run
from tests.conftest import FIXTURES

__all__ = ["run"]  # the fixture

NAMES = ["fp32", "int8-dynamic", "q4"]
TUNE = ("reports/tune.json", "reports/tune.svg")
Make = Callable[[], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified folder of three variants, each with a sidecar."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants_room, "write_graph", partial(write_graph, inline_limit_bytes=0))
        return featherbed.build(FIXTURES / "bert-cls", tmp_path_factory.mktemp("built") / "model", NAMES).folder


@pytest.fixture
def make(built: Path, tmp_path: Path) -> Make:
    """Copies of it, to be damaged."""
    numbers = count()
    return lambda: Path(shutil.copytree(built, tmp_path / f"{next(numbers)}" / "model"))


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def sidecars(folder: Path) -> dict[str, bool]:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return dict(config["transformers.js_config"]["use_external_data_format"])


def check_whole(folder: Path, variants: list[str]) -> None:
    """The folder has these variants, nothing else, and nothing in it speaks of others but the history."""
    opened = open_folder(folder)
    opened.check_hashes()
    m = opened.manifest
    assert list(m.variants) == variants
    assert set(m.files) == set(files(folder)) - {MANIFEST}
    theirs = {file for one in m.variants.values() for file in one.files}
    assert {file for file in m.files if file.startswith("onnx/")} == theirs
    assert sidecars(folder) == {Path(one.files[0]).name: True for one in m.variants.values() if len(one.files) > 1}
    assert "tuned" in variants or not set(TUNE) & set(m.files)
    card, page = ((folder / name).read_text("utf-8") for name in ("README.md", "report.html"))
    for name in {*NAMES, "tuned"} - set(variants):
        assert f"`{name}`" not in card.partition("## Changes")[0] or name == "fp32"  # what all were measured against
        assert f"<b>{name}</b>" not in page
        assert f"reports/{name}.json" not in m.files


def with_tuned(folder: Path) -> Path:
    """The same folder with ``tuned``, and with how it was found."""
    opened = open_folder(folder)
    for end in ("", "_data"):
        shutil.copyfile(folder / f"onnx/model_q4.onnx{end}", folder / f"onnx/model_tuned.onnx{end}")
    for name in TUNE:
        (folder / name).write_text("{}", "utf-8")
    names = ("onnx/model_tuned.onnx", "onnx/model_tuned.onnx_data")
    q4 = opened.manifest.variants["q4"]
    opened.adding(Variant("tuned", {**q4.recipe, "name": "tuned"}, names, q4.least_onnxruntime)).with_evidence({})
    return folder


# what goes


def test_what_goes_is_what_only_the_others_had(make: Make) -> None:
    folder = make()
    before, manifest = files(folder), open_folder(folder).manifest
    pruned = prune(folder, ["q4", "fp32"])
    expected = ["onnx/model_int8_dynamic.onnx", "onnx/model_int8_dynamic.onnx_data", "reports/int8-dynamic.json"]
    assert pruned == Pruned({n: len(before[n]) for n in expected}, (), ("int8-dynamic",), ("fp32", "q4"))
    assert pruned.freed_bytes == sum(len(before[n]) for n in expected)
    check_whole(folder, ["fp32", "q4"])
    after = files(folder)
    assert before.keys() - after.keys() == set(expected)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {MANIFEST, "README.md", "report.html", "config.json"}
    assert sidecars(folder) == {"model.onnx": True, "model_q4.onnx": True}
    (line,) = open_folder(folder).manifest.history
    assert replace(line, date="") == replace(manifest.change("int8-dynamic"), date="")
    assert f"`int8-dynamic` | removed | featherbed {featherbed.__version__}" in (folder / "README.md").read_text(
        "utf-8"
    )


def test_a_config_that_says_nothing_of_sidecars_stays_as_it_is(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["bert-mean"], tmp_path / "model"))
    before = files(folder)
    prune(folder, ["fp32", "int8"])
    open_folder(folder).check_hashes()
    assert files(folder)["config.json"] == before["config.json"]
    left = {path.name for path in (folder / "onnx").iterdir()}
    assert left == {"model.onnx", "model_int8.onnx", "model_quantized.onnx"}


def test_a_variant_goes_with_its_other_name_and_frees_its_bytes_once(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["bert-mean"], folder)
    size = (folder / "onnx" / "model_int8.onnx").stat().st_size
    (folder / "onnx" / "model_quantized.onnx").unlink()
    os.link(folder / "onnx" / "model_int8.onnx", folder / "onnx" / "model_quantized.onnx")
    pruned = prune(folder, [name for name in open_folder(folder).manifest.variants if name != "int8"])
    freed = [pruned.freed["onnx/model_int8.onnx"], pruned.freed["onnx/model_quantized.onnx"]]
    assert sorted(freed) == [0, size]
    assert not (folder / "onnx" / "model_quantized.onnx").exists()
    open_folder(folder).check_hashes()
    assert "onnx/model_quantized.onnx" not in open_folder(folder).manifest.files


def test_a_copy_that_a_stopped_run_left_is_taken_by_the_next(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["bert-mean"], tmp_path / "model"))
    prune(folder, ["fp32", "q4"])
    (folder / "onnx" / "model_quantized.onnx").write_bytes(b"left")
    assert prune(folder, ["fp32", "q4"]).left_over == ("onnx/model_quantized.onnx",)


def test_a_dry_run_tells_the_same_and_writes_nothing(make: Make) -> None:
    folder = make()
    before = files(folder)
    told = prune(folder, ["fp32"], dry_run=True)
    assert files(folder) == before
    assert told == prune(folder, ["fp32"])
    check_whole(folder, ["fp32"])


def test_where_nothing_is_to_be_freed_nothing_is_written(make: Make, run: Run) -> None:
    folder = make()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert prune(folder, NAMES) == Pruned({}, (), (), tuple(NAMES))
    outcome = run("prune", folder, "--keep", "fp32,q4,int8-dynamic")
    assert (outcome.code, outcome.out) == (0, "nothing to free: fp32, int8-dynamic, q4 stay\n")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_file_that_a_kept_variant_uses_too_stays(make: Make) -> None:
    folder = make()
    opened = open_folder(folder)
    q4 = opened.manifest.variants["q4"]
    shared = replace(q4, files=(q4.files[0], "onnx/model_int8_dynamic.onnx_data", q4.files[1]))
    manifest = replace(opened.manifest, variants=opened.manifest.variants | {"q4": shared})
    write_text(folder / MANIFEST, dump(manifest.to_json()))
    pruned = prune(folder, ["fp32", "q4"])
    assert set(pruned.freed) == {"onnx/model_int8_dynamic.onnx", "reports/int8-dynamic.json"}
    check_whole(folder, ["fp32", "q4"])


def test_files_that_are_not_ours_stay(make: Make) -> None:
    folder = make()
    mine = ["notes.txt", "onnx/model_fp16.onnx", "onnx/old.onnx", "onnx/model.onnx.bak", "tune.work/tune.json"]
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine", "utf-8")
    assert not set(prune(folder, ["fp32"]).freed) & set(mine)
    assert all((folder / name).is_file() for name in mine)


def test_with_tuned_goes_the_search_that_found_it(make: Make) -> None:
    folder = with_tuned(make())
    kept = Path(shutil.copytree(folder, folder.with_name("kept")))
    pruned = prune(folder, ["fp32", "q4"])
    assert {*TUNE, "onnx/model_tuned.onnx", "onnx/model_tuned.onnx_data"} < set(pruned.freed)
    check_whole(folder, ["fp32", "q4"])
    prune(kept, ["fp32", "tuned"])
    open_folder(kept).check_hashes()
    assert set(TUNE) < set(open_folder(kept).manifest.files)


def test_a_search_that_found_nothing_within_its_bounds_keeps_its_evidence(make: Make) -> None:
    folder = make()
    (folder / TUNE[0]).write_text("{}", "utf-8")
    open_folder(folder).with_evidence({})
    assert TUNE[0] not in prune(folder, ["fp32"]).freed
    assert TUNE[0] in open_folder(folder).manifest.files


# what is refused


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (["fp32", "int9"], "one of fp32, int8-dynamic, q4"),
        ([], "--keep: expected some of fp32, int8-dynamic, q4, found no variant"),
        (["q4"], "verify and tune measure against it.*add fp32 to --keep, or lose it with --force"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused_and_nothing_goes(make: Make, keep: list[str], said: str) -> None:
    folder = make()
    before = files(folder)
    for dry_run in (False, True):
        with pytest.raises(OptionError, match=said):
            prune(folder, keep, dry_run=dry_run)
    assert files(folder) == before


def test_force_names_no_variant_that_is_not_there(make: Make) -> None:
    folder = make()
    with pytest.raises(OptionError, match="some of"):
        prune(folder, [], force=True)
    with pytest.raises(OptionError, match="no such variant"):
        prune(folder, ["int8"], force=True)


def test_evidence_that_cannot_be_read_is_said_before_anything_goes(make: Make) -> None:
    folder = make()
    (folder / "reports" / "q4.json").write_text("{", "utf-8")
    before = files(folder)
    with pytest.raises(ModelFolderError, match=r"q4\.json: expected a JSON object"):
        prune(folder, ["fp32", "q4"])
    assert files(folder) == before


def test_a_folder_that_may_not_be_changed_is_one_line_and_is_whole(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(OutputError, match="Permission denied; give it, and prune again"):
            prune(folder, ["fp32"])
    open_folder(folder).check_hashes()
    prune(folder, ["fp32"])
    check_whole(folder, ["fp32"])


# without the reference


def test_without_fp32_the_others_embed_and_verify_says_what_is_missing(make: Make, run: Run) -> None:
    folder = make()
    expected = featherbed.Embedder(folder, "q4").encode(["rain", "a fox"])
    assert "fp32" in prune(folder, ["q4"], force=True).gone
    check_whole(folder, ["q4"])
    assert np.array_equal(featherbed.Embedder(folder, "q4").encode(["rain", "a fox"]), expected)
    assert featherbed.Embedder(folder).variant == "q4"
    for words in (("verify", folder), ("verify", folder, "--variants", "q4"), ("tune", folder)):
        outcome = run(*words)
        assert (outcome.code, outcome.out, len(outcome.complaints)) == (2, "", 1)
        assert "expected the reference variant fp32" in outcome.complaints[0]
        assert "build the folder again with fp32" in outcome.complaints[0]
    for words in (("inspect", folder), ("card", folder), ("report", folder)):
        assert run(*words).code == 0
    check_whole(folder, ["q4"])
    card = (folder / "README.md").read_text("utf-8")
    assert "`fp32` is not in this folder: build it to repeat it." in card
    assert "Repeat it with `featherbed verify`" not in card
    assert prune(folder, ["q4"]) == Pruned({}, (), (), ("q4",))  # what is gone needs no force


# stopped


class Killed(BaseException):
    """No error that anybody catches."""


@contextmanager
def killed_at(number: int, after: bool) -> Iterator[list[str]]:
    """Files are replaced and removed until the ``number``-th of these calls, which kills, when it is done or before."""
    calls = list[str]()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "unlink"):
            real = getattr(Path, name)

            def call(path: Path, *words: Any, _real: Any = real, _name: str = name, **named: Any) -> Any:
                calls.append(f"{_name} {path.name}")
                if len(calls) != number:
                    return _real(path, *words, **named)
                if after:
                    _real(path, *words, **named)
                raise Killed

            patch.setattr(Path, name, call)
        yield calls


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("keep", "force"), [(["fp32"], False), (["q4"], True)], ids=["fp32", "q4"])
def test_stopped_anywhere_the_folder_is_whole_and_the_next_run_ends_it(
    make: Make, keep: list[str], force: bool, after: bool
) -> None:
    for number in count(1):
        folder = with_tuned(make())
        started = files(folder)
        with killed_at(number, after) as calls:
            try:
                prune(folder, keep, force=force)
                break
            except Killed:
                pass
        opened = open_folder(folder)
        opened.check_hashes()
        for name in opened.manifest.variants:
            assert featherbed.Embedder(folder, name).encode("rain").shape == (opened.manifest.spec.dim,)
        there = {name for name in files(folder) if ".tmp-" not in name}
        assert there <= started.keys()
        told = prune(folder, keep, force=force, dry_run=True)
        assert told == prune(folder, keep, force=force)
        assert told.left_over == tuple(n for n in sorted(told.freed) if n not in opened.manifest.files)
        for path in folder.glob("*.tmp-*"):  # what a killed process was writing
            path.unlink()
        check_whole(folder, keep)
        assert [line.variant for line in open_folder(folder).manifest.history] == [
            name for name in (*NAMES, "tuned") if name not in keep
        ]
        assert prune(folder, keep) == Pruned({}, (), (), tuple(keep))
    assert number == len(calls) + 1
    assert number > 12  # manifest, evidence, config, pages, manifest, graphs and sidecars
    check_whole(folder, keep)


def test_evidence_taken_down_again_after_a_stop_goes_with_the_next_run(make: Make) -> None:
    folder = make()
    with killed_at(2, False), pytest.raises(Killed):  # the manifest is written, and nothing removed
        prune(folder, ["fp32"])
    featherbed.card(folder)
    assert "reports/q4.json" in open_folder(folder).manifest.files
    assert {"reports/q4.json", "reports/int8-dynamic.json"} < set(prune(folder, ["fp32"]).freed)
    check_whole(folder, ["fp32"])


def test_a_run_that_was_stopped_is_ended_where_no_file_is_left_over(make: Make) -> None:
    for number in (2, 3, 4):  # config.json, card, report
        folder = make()
        for name in ("onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "reports/q4.json"):
            (folder / name).unlink()
        with killed_at(number, False) as calls, pytest.raises(Killed):
            prune(folder, ["fp32", "int8-dynamic"])
        assert calls[0] == f"replace {MANIFEST}.tmp-{os.getpid()}"
        assert set(open_folder(folder).manifest.files) < set(files(folder))
        assert prune(folder, ["fp32", "int8-dynamic"]).freed == {}
        for path in folder.glob("*.tmp-*"):
            path.unlink()
        check_whole(folder, ["fp32", "int8-dynamic"])


# as a user types it


def test_each_file_is_shown_with_its_size(make: Make, run: Run) -> None:
    folder = make()
    sizes = {name: len(raw) for name, raw in files(folder).items()}
    wanted = ["onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "reports/q4.json"]
    total = sum(sizes[name] for name in wanted)
    words = ("prune", folder, "--keep", "fp32,int8-dynamic")
    told = run(*words, "--dry-run")
    lines = [f"{sizes[name]:>14,}  {name}" for name in wanted]
    assert told.out.splitlines() == [*lines, f"3 files, {total / 1e6:.1f} MB would be freed: fp32, int8-dynamic stay"]
    done = run(*words, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.document == {
        "freed": {name: sizes[name] for name in wanted},
        "gone": ["q4"],
        "kept": ["fp32", "int8-dynamic"],
        "left_over": [],
        "freed_bytes": total,
    }
    check_whole(folder, ["fp32", "int8-dynamic"])


def test_what_a_stopped_run_left_over_is_called_so(make: Make, run: Run) -> None:
    folder = make()
    with killed_at(8, False), pytest.raises(Killed):
        prune(folder, ["fp32", "int8-dynamic"])
    out = run("prune", folder, "--keep", "fp32").out
    marked = [line.split()[1] for line in out.splitlines() if line.endswith("left over by a run that was stopped")]
    assert marked == ["onnx/model_q4.onnx_data"]
    assert "onnx/model_int8_dynamic.onnx\n" in out
    check_whole(folder, ["fp32"])
