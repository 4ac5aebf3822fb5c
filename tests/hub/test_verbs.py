"""pull, list and doctor as a user types them: in processes of their own, with a Hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep

import onnxruntime
import pytest

import featherbed
from featherbed.check.machine import machine
from featherbed.folder import MANIFEST, dump, open_folder
from featherbed.hub.store import Store
from featherbed.recipe import RECIPES
from featherbed.run import prepack
from tests.cli.test_cli import Outcome
from tests.conftest import FIXTURES
from tests.hub_server import COMMIT, Fault, Hub, Repository, serving, surroundings

MODEL, CHECKPOINT = "owner/small-onnx", "owner/small"
INT8 = "onnx/model_int8.onnx"
VARIANTS = list(RECIPES)
MACHINE = [
    "featherbed", "cpu", "flags", "cores", "system", "python", "onnxruntime", "memory_mib", "available_mib",
    "providers", "versions", "caches", "hub",
]  # fmt: skip
FINE = "nothing is wrong in the caches"
SPEEDS = {"fp32": 900.0, "int8": 1000.0, "q4": 400.0}  # tokens/s
COSINES = {"fp32": 1.0, "int8": 0.9987, "q4": 0.98}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def measured(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of all variants with figures of three of them, as if this machine had measured them."""
    folder = Path(shutil.copytree(folders["qwen3-tied"], tmp_path_factory.mktemp("measured") / "small-onnx"))
    (folder / "reports").mkdir(exist_ok=True)
    for name, speed in SPEEDS.items():
        bench = {"machine": machine(), "tokens_per_s": speed}
        report = {"variant": name, "metrics": {"cos_min": COSINES[name]}, "bench": bench}
        (folder / "reports" / f"{name}.json").write_text(dump(report), "utf-8")
    open_folder(folder).with_evidence({"fp32": True, "int8": True, "int8-dynamic": False})
    return folder


@pytest.fixture
def hub(measured: Path) -> Iterator[Hub]:
    """A model folder of every variant, and the checkpoint that it was built from."""
    repositories = {MODEL: Repository(files_of(measured)), CHECKPOINT: Repository(files_of(FIXTURES / "qwen3-tied"))}
    with serving(repositories) as hub:
        yield hub


Run = Callable[..., Outcome]


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """The command line in a process of its own, whose Hub is ours and whose caches are empty at first."""
    (tmp_path / "work").mkdir()

    def call(*words: object, **environment: str) -> Outcome:
        ended = subprocess.run(
            [sys.executable, "-m", "featherbed.cli", *map(str, words)],
            env=surroundings(hub.url, tmp_path / "cache") | environment,
            cwd=tmp_path / "work",
            capture_output=True,
            check=False,
            timeout=300,
        )
        out, err = (raw.decode("utf-8", "replace") for raw in (ended.stdout, ended.stderr))
        assert "Traceback" not in err
        return Outcome(ended.returncode, out, err)

    return call


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache" / "featherbed" / "models")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Where prepacked weights go."""
    return tmp_path / "cache" / "featherbed" / "prepacked"


def fine(outcome: Outcome) -> Outcome:
    assert (outcome.code, outcome.complaints) == (0, [])
    return outcome


def refusal(outcome: Outcome) -> str:
    """The one line that a refused command ends in."""
    assert (outcome.code, len(outcome.complaints)) == (2, 1), outcome.err
    assert outcome.complaints[0].startswith("featherbed: ")
    return outcome.complaints[0]


def rows(outcome: Outcome) -> list[list[str]]:
    """The cells of all rows of tables."""
    lines = [line for line in outcome.out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def stop_after_5000_bytes(hub: Hub) -> None:
    """Cut the first connection for weights, and refuse all others."""
    hub.faults += [Fault("file=onnx", cut=5000), Fault("file=onnx", times=9, status=404, skip=1)]


def listed(outcome: Outcome) -> dict[str, tuple[int, str]]:
    """What pull says of each file: its bytes, and where it is."""
    lines = [line.split(maxsplit=2) for line in outcome.out.splitlines() if line.startswith(" ")]
    return {name: (int(size.replace(",", "")), state) for size, name, state in lines}


def needed(measured: Path, *variants: str) -> dict[str, int]:
    """Sizes of the files of some variants, each once, and of what all share."""
    manifest = open_folder(measured).manifest.once()
    left = manifest.without([name for name in manifest.variants if name not in variants])
    return {name: record.size_bytes for name, record in left.files.items()}


def assert_whole(folder: Path, measured: Path, *variants: str) -> None:
    """A model folder of these variants, byte for byte as it was published, and of nothing else."""
    model = open_folder(folder)
    model.check_hashes()
    assert list(model.manifest.variants) == list(variants)
    assert {path for path in files_of(folder) if path != MANIFEST} == needed(measured, *variants).keys()
    assert all((folder / name).read_bytes() == (measured / name).read_bytes() for name in model.manifest.files)


# pull


def test_pull_says_what_is_needed_and_how_large_it_is(run: Run, hub: Hub, store: Store, measured: Path) -> None:
    expected = needed(measured, "int8")
    outcome = fine(run("pull", MODEL, "--dry-run"))
    assert listed(outcome) == {name: (size, "to fetch") for name, size in expected.items()}
    total = f"{sum(expected.values()) / 1e6:.1f} MB"
    *_, said, others, last = outcome.out.splitlines()
    assert said == f"model folder {MODEL} at {COMMIT[:7]}: {len(expected)} files, {total}, {total} to fetch"
    manifest = open_folder(measured).manifest
    sizes = {name: manifest.size_bytes(name) for name in VARIANTS if name != "int8"}
    assert others == f"not asked for: {', '.join(f'{name} {size / 1e6:.1f} MB' for name, size in sizes.items())}"
    assert last == "not fetched, as asked"
    assert set(hub.served) == {MANIFEST}
    assert list(store.held()) == []
    assert fine(run("doctor")).out.splitlines()[-1] == FINE


def test_pull_says_sizes_before_it_fetches(run: Run, hub: Hub, measured: Path) -> None:
    stop_after_5000_bytes(hub)
    outcome = run("pull", MODEL)
    assert INT8 in refusal(outcome)
    assert listed(outcome) == {name: (size, "to fetch") for name, size in needed(measured, "int8").items()}
    hub.faults.clear()
    assert listed(fine(run("pull", MODEL, "--dry-run")))[INT8] == (needed(measured, "int8")[INT8], "partly here")


def test_pull_fetches_once_and_ends_with_the_folder(run: Run, hub: Hub, store: Store, measured: Path) -> None:
    folder = store.folder(MODEL, COMMIT)
    assert fine(run("pull", MODEL)).out.splitlines()[-1] == str(folder)
    assert_whole(folder, measured, "int8")
    before = dict(hub.served)
    again = fine(run("pull", MODEL))
    assert {state for _, state in listed(again).values()} == {"here"}
    assert "0.0 MB to fetch" in again.out
    assert hub.served == before
    offline = run("pull", MODEL, HF_HUB_OFFLINE="1")
    assert (offline.code, offline.out) == (0, again.out)
    assert offline.complaints == [f"{MODEL}: offline mode; taking it as it was last seen, commit {COMMIT[:7]}"]


def test_pull_takes_variants_and_names_those_that_nobody_asked_for(run: Run, store: Store, measured: Path) -> None:
    fine(run("pull", MODEL, "--variants", " q4,fp32, "))
    assert_whole(store.folder(MODEL, COMMIT), measured, "fp32", "q4")
    outcome = fine(run("pull", MODEL, "--variants", "all"))
    assert "not asked for: nothing, these are all" in outcome.out
    assert_whole(store.folder(MODEL, COMMIT), measured, *VARIANTS)


@pytest.mark.parametrize("dry", [("--dry-run",), ()])
def test_pull_s_document_says_the_same(run: Run, store: Store, measured: Path, dry: tuple[str, ...]) -> None:
    outcome = fine(run("pull", f"{MODEL}@{COMMIT}", "--variants", "int8,q4", "--json", *dry))
    assert outcome.out.count("\n") == 1
    expected = needed(measured, "int8", "q4")
    assert outcome.document == {
        "repository": MODEL,
        "commit": COMMIT,
        "kind": "model folder",
        "variants": ["int8", "q4"],
        "files": {name: {"size_bytes": size, "state": "to fetch"} for name, size in expected.items()},
        "missing_bytes": sum(expected.values()),
        "folder": None if dry else str(store.folder(MODEL, COMMIT)),
    }


def test_pull_puts_a_copy_where_it_is_asked_to(run: Run, tmp_path: Path, measured: Path) -> None:
    fine(run("pull", MODEL, "--variants", "fp32"))
    outcome = fine(run("pull", MODEL, "-o", "mine"))
    assert outcome.out.splitlines()[-1] == "mine"
    assert_whole(tmp_path / "work" / "mine", measured, "int8")
    document = fine(run("pull", MODEL, "--variants", "q4,int8", "--out", "mine", "--json")).document
    assert document["folder"] == "mine"
    assert_whole(tmp_path / "work" / "mine", measured, "int8", "q4")


def test_pull_of_a_checkpoint_says_how_to_build_it(run: Run, hub: Hub, store: Store) -> None:
    outcome = fine(run("pull", CHECKPOINT))
    assert f"checkpoint {CHECKPOINT} at {COMMIT[:7]}: " in outcome.out
    *_, folder, last = outcome.out.splitlines()
    assert folder == str(store.folder(CHECKPOINT, COMMIT))
    assert last == f"a checkpoint: build it with `featherbed build {CHECKPOINT}`"
    document = fine(run("pull", CHECKPOINT, "--json", "-o", "mine")).document
    assert (document["kind"], document["variants"], document["missing_bytes"]) == ("checkpoint", [], 0)
    assert files_of(store.folder(CHECKPOINT, COMMIT)) == hub.repositories[CHECKPOINT].files


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "an unknown repository": (("owner/nowhere",), "no such repository, or a private one"),
    "an unknown revision": ((f"{MODEL}@v9",), "found no revision v9"),
    "an unknown variant": ((MODEL, "--variants", "int9"), "expected one of fp32, int8"),
    "variants of a checkpoint": ((CHECKPOINT, "--variants", "int8"), "a checkpoint, which has no variants"),
    "a path": (("./small",), "expected owner/name or owner/name@revision"),
    "a path that is there": (("mine",), "found a path that is here"),
    "another folder in the place of the copy": ((MODEL, "-o", "mine"), "expected a new folder, or a model folder"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("as_json", [("--json",), ()])
def test_what_pull_refuses_is_exit_code_2_and_one_line(
    run: Run, tmp_path: Path, case: str, as_json: tuple[str, ...]
) -> None:
    words, found = REFUSED[case]
    (tmp_path / "work" / "mine").mkdir()
    (tmp_path / "work" / "mine" / "notes.txt").write_text("mine")
    outcome = run("pull", *words, *as_json)
    assert found in refusal(outcome)
    assert outcome.out == "" or (not as_json and "-o" in words)
    assert files_of(tmp_path / "work") == {"mine/notes.txt": b"mine"}


def test_pull_offline_with_an_empty_cache_is_exit_code_2(run: Run, hub: Hub) -> None:
    assert "found offline mode" in refusal(run("pull", MODEL, HF_HUB_OFFLINE="1"))
    assert hub.asked == []


# list


def test_list_of_empty_caches(run: Run, hub: Hub) -> None:
    assert fine(run("list")).out == "0 of the Hub, 0 prepacked: 0.0 MB\n"
    assert fine(run("list", "--json")).document == {"models": [], "prepacked": [], "linked": []}
    assert hub.asked == []


def test_list_names_models_with_variants_revisions_and_sizes(run: Run, hub: Hub, store: Store) -> None:
    hub.repositories[MODEL].refs["v1"] = COMMIT
    fine(run("pull", MODEL, "--variants", "int8,q4"))
    fine(run("pull", f"{MODEL}@v1"))
    fine(run("pull", f"{CHECKPOINT}@{COMMIT}"))
    models = {one["repository"]: one for one in fine(run("list", "--json")).document["models"]}
    for name, kind, revisions, variants in (
        (MODEL, "model folder", ["main", "v1"], ["int8", "q4"]),
        (CHECKPOINT, "checkpoint", [], []),
    ):
        one, folder = models.pop(name), store.folder(name, COMMIT)
        assert one == {
            "repository": name,
            "commit": COMMIT,
            "revisions": revisions,
            "kind": kind,
            "variants": variants,
            "size_bytes": sum(map(len, files_of(folder).values())),
            "used": one["used"],
            "folder": str(folder),
        }
        assert one["used"] == (store.home(name) / f"{COMMIT}.json").stat().st_mtime
    assert models == {}
    outcome = fine(run("list"))
    assert [row[:3] for row in rows(outcome)] == [
        [f"{CHECKPOINT}@{COMMIT[:7]}", "checkpoint", "–"],
        [f"{MODEL}@main, v1", "model folder", "int8, q4"],
    ]
    assert outcome.out.splitlines()[-1].startswith("2 of the Hub, 0 prepacked: ")


def test_list_says_when_a_model_was_last_used(run: Run, store: Store, tmp_path: Path) -> None:
    fine(run("pull", MODEL))
    long_ago = 1_000_000_000.0
    record = store.home(MODEL) / f"{COMMIT}.json"
    os.utime(record, (long_ago, long_ago))
    assert rows(fine(run("list")))[0][-1] == "2001-09-09 01:46"
    (tmp_path / "work" / "texts.txt").write_text("rain\n")
    fine(run("embed", MODEL, "texts.txt", "-o", "x.npy"))
    (one,) = fine(run("list", "--json")).document["models"]
    assert one["used"] > long_ago + 10**8


def test_list_names_prepacked_weights(run: Run, store: Store, packed: Path, measured: Path, tmp_path: Path) -> None:
    fine(run("pull", MODEL))
    source = store.folder(MODEL, COMMIT) / INT8
    other = Path(shutil.copy(measured / "onnx" / "model.onnx", tmp_path))
    for path in (source, other):
        assert prepack.prepacked(path, packed) is not None
    other.unlink()
    found = {one["source"]: one for one in fine(run("list", "--json")).document["prepacked"]}
    assert {name: one["fault"] for name, one in found.items()} == {str(source): "", str(other): "its model is gone"}
    for one in found.values():
        folder = Path(one["folder"])
        assert folder.parent == packed
        assert one["size_bytes"] == sum(map(len, files_of(folder).values()))
        assert one["used"] == (folder / "entry.json").stat().st_mtime
    outcome = fine(run("list"))
    assert "prepacked weights" in outcome.out
    told = {row[0].removeprefix("…"): row[-1] for row in rows(outcome)[1:]}  # long paths are cut
    assert sorted(told.values()) == ["its model is gone", "–"]
    for path in (source, other):
        assert [fault for end, fault in told.items() if str(path).endswith(end)] == [found[str(path)]["fault"] or "–"]
    assert outcome.out.splitlines()[-1].startswith("1 of the Hub, 2 prepacked: ")


# doctor: this machine, and the variant for it


def test_doctor_says_what_this_machine_has(run: Run, hub: Hub, store: Store, packed: Path) -> None:
    outcome = fine(run("doctor", "--json"))
    assert outcome.out.count("\n") == 1
    document = outcome.document
    here = document.pop("machine")
    assert document == {"advice": None, "findings": [], "taken_bytes": 0, "failed": []}
    assert list(here) == MACHINE
    assert {key: here[key] for key in machine()} == machine()
    assert 0 < here["available_mib"] < here["memory_mib"]
    assert here["providers"] == onnxruntime.get_available_providers()
    assert here["versions"]["onnxruntime"] == onnxruntime.__version__
    assert here["hub"] == {"endpoint": hub.url, "offline": False, "token": False}
    assert {name: place["path"] for name, place in here["caches"].items()} == {
        "models": str(store.root), "prepacked": str(packed),
    }  # fmt: skip
    for place in here["caches"].values():
        assert (place["size_bytes"], place["writable"], place["free_bytes"] > 0) == (0, True, True)
    text = fine(run("doctor", HF_TOKEN="hf_of_a_test", HF_HUB_OFFLINE="1"))
    for part in (
        here["cpu"],
        f"memory: {here['memory_mib']:,} MiB",
        f"featherbed {featherbed.__version__}, Python {here['python']}",
        "CPUExecutionProvider",
        f"cache of models: {store.root}: 0.0 MB",
        f"cache of prepacked: {packed}: 0.0 MB",
        f"Hub: {hub.url}, with a token, offline mode",
        FINE,
    ):
        assert part in text.out
    assert "hf_of_a_test" not in text.out + text.err
    assert hub.asked == []


def test_doctor_counts_what_is_in_the_caches(run: Run, store: Store) -> None:
    fine(run("pull", MODEL))
    place = fine(run("doctor", "--json")).document["machine"]["caches"]["models"]
    assert place["size_bytes"] == sum(map(len, files_of(store.root).values()))


def test_doctor_chooses_a_variant_of_a_folder(run: Run, measured: Path) -> None:
    advice = fine(run("doctor", measured, "--json")).document["advice"]
    assert list(advice) == ["variant", "auto", "reasons", "candidates"]
    assert (advice["variant"], advice["auto"]) == ("int8", "int8")
    assert advice["reasons"][0] == "int8 ran at 1,000 tokens/s on this kind of CPU, faster than any other"
    manifest = open_folder(measured).manifest
    assert advice["candidates"] == [
        {
            "name": name,
            "size_bytes": manifest.size_bytes(name),
            "cos_min": COSINES.get(name),
            "tokens_per_s": SPEEDS.get(name),
            "out": "failed a gate" if name == "int8-dynamic" else "",
        }
        for name in VARIANTS
    ]
    outcome = fine(run("doctor", measured))
    assert f"{measured}: take int8" in outcome.out
    assert f"- {advice['reasons'][0]}" in outcome.out
    assert "- int8-dynamic is out: it failed a gate" in outcome.out
    assert '"auto" takes' not in outcome.out
    told = {row[0]: row[2:] for row in rows(outcome)}
    assert told["int8 ←"] == ["0.9987", "1,000", "–"]
    assert told["int8-dynamic"] == ["–", "–", "failed a gate"]
    assert told.keys() == {"int8 ←", *VARIANTS} - {"int8"}


def test_doctor_says_so_when_auto_takes_another(run: Run, measured: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(measured, tmp_path / "mine"))
    path = folder / "reports" / "q4.json"
    report = json.loads(path.read_text("utf-8"))
    report["bench"]["tokens_per_s"] = 3000.0
    path.write_text(dump(report), "utf-8")
    outcome = fine(run("doctor", folder))
    assert f"{folder}: take q4" in outcome.out
    assert '- "auto" takes int8: name q4 with --variant' in outcome.out
    advice = fine(run("doctor", folder, "--json")).document["advice"]
    assert (advice["variant"], advice["auto"]) == ("q4", "int8")


def test_doctor_chooses_a_variant_of_an_id_and_fetches_only_its_manifest(run: Run, hub: Hub) -> None:
    advice = fine(run("doctor", MODEL, "--json")).document["advice"]
    assert set(hub.served) == {MANIFEST}
    assert (advice["variant"], advice["auto"]) == ("int8", "int8")
    assert [one["name"] for one in advice["candidates"]] == VARIANTS
    assert {one["tokens_per_s"] for one in advice["candidates"]} == {None}  # nobody has fetched any figures
    assert f"{MODEL}: take int8" in fine(run("doctor", MODEL)).out
    fine(run("pull", MODEL, "--variants", "int8,q4"))
    advice = run("doctor", MODEL, "--json", HF_HUB_OFFLINE="1").document["advice"]
    assert {one["name"]: one["tokens_per_s"] for one in advice["candidates"] if one["tokens_per_s"]} == {
        "int8": 1000.0, "q4": 400.0,
    }  # fmt: skip


def test_doctor_says_that_a_checkpoint_has_no_variants_yet(run: Run, hub: Hub) -> None:
    outcome = fine(run("doctor", CHECKPOINT))
    assert f"{CHECKPOINT}: a checkpoint, which has no variants yet: `featherbed build {CHECKPOINT}`" in outcome.out
    assert fine(run("doctor", CHECKPOINT, "--json")).document["advice"] is None
    assert not hub.served


def test_doctor_of_what_is_not_there_is_exit_code_2_and_one_line(run: Run, measured: Path, tmp_path: Path) -> None:
    assert "no such repository" in refusal(run("doctor", "owner/nowhere"))
    assert "no such folder" in refusal(run("doctor", "nowhere"))
    folder = Path(shutil.copytree(measured, tmp_path / "mine"))
    open_folder(folder).with_evidence(dict.fromkeys(VARIANTS, False))
    line = refusal(run("doctor", folder, "--json"))
    assert "expected one that passed its gates" in line
    assert "int8 failed a gate" in line


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_is_not_utf8_gets_its_tables(run: Run, measured: Path, encoding: str) -> None:
    fine(run("pull", CHECKPOINT, PYTHONIOENCODING=encoding, PYTHONUTF8="0"))
    for words in (("list",), ("doctor", measured)):
        assert fine(run(*words, PYTHONIOENCODING=encoding, PYTHONUTF8="0")).out


# doctor: what is broken


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def garbage(path: Path) -> None:
    path.write_bytes(b'{"format": 1, "files": ')


def another_format(path: Path) -> None:
    path.write_text('{"format": 9}')


def findings(outcome: Outcome) -> list[str]:
    """The lines of doctor about what is wrong."""
    return [line for line in outcome.out.splitlines() if line.startswith(("broken: ", "note: "))]


OTHER_BYTES = "its bytes are not those that were fetched"
BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a byte of a graph": (f"{COMMIT}/{INT8}", flip, OTHER_BYTES),
    "a byte of a small file": (f"{COMMIT}/tokenizer.json", flip, OTHER_BYTES),
    "a file that is cut": (f"{COMMIT}/{INT8}", cut, OTHER_BYTES),
    "a file that is gone": (f"{COMMIT}/{INT8}", Path.unlink, "it is gone"),
    "all files gone": (COMMIT, shutil.rmtree, ""),
    "garbage in the manifest": (f"{COMMIT}/{MANIFEST}", garbage, "JSONDecodeError"),
    "no manifest": (f"{COMMIT}/{MANIFEST}", Path.unlink, "no such file"),
    "another manifest": (f"{COMMIT}/{MANIFEST}", another_format, "format 9"),
    "garbage in the published manifest": (f"{COMMIT}.published.json", garbage, "JSONDecodeError"),
    "no published manifest": (f"{COMMIT}.published.json", Path.unlink, "no such file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_found_and_mended(run: Run, hub: Hub, store: Store, measured: Path, case: str) -> None:
    name, damage, what = BROKEN[case]
    fine(run("pull", MODEL, "--variants", "int8,q4"))
    path, folder = store.home(MODEL) / name, store.folder(MODEL, COMMIT)
    damage(path)
    outcome = run("doctor")
    assert (outcome.code, outcome.complaints) == (1, [])
    told = findings(outcome)
    assert told
    assert all(line.startswith(f"broken: {path}") and what in line for line in told)
    assert all(f"`featherbed pull {MODEL}@{COMMIT}` fetches it again" in line for line in told)
    assert outcome.out.splitlines()[-1] == "`featherbed doctor --mend` mends these"
    mended = fine(run("doctor", "--mend"))
    assert findings(mended) == told
    assert mended.out.splitlines()[-1].startswith(f"mended: {len(told)} things, ")
    assert_whole(folder, measured, "int8", "q4")
    assert fine(run("doctor")).out.splitlines()[-1] == FINE
    before = dict(hub.served)
    assert fine(run("pull", MODEL, "--variants", "int8,q4")).out.splitlines()[-1] == str(folder)
    assert hub.served == before


@pytest.mark.parametrize("case", [case for case in BROKEN if case.startswith(("a ", "garbage"))])
def test_what_is_broken_offline_is_taken_away_and_comes_with_the_next_pull(
    run: Run, hub: Hub, store: Store, measured: Path, case: str
) -> None:
    name, damage, _ = BROKEN[case]
    fine(run("pull", MODEL, "--variants", "int8,q4"))
    path, folder = store.home(MODEL) / name, store.folder(MODEL, COMMIT)
    damage(path)
    before = len(hub.asked)
    outcome = run("doctor", "--mend", HF_HUB_OFFLINE="1")
    assert len(hub.asked) == before
    if path == folder / MANIFEST:  # the published one is here
        assert (outcome.code, outcome.complaints) == (0, [])
        assert_whole(folder, measured, "int8", "q4")
    else:
        assert (outcome.code, path.exists()) == (1, False)
        assert outcome.out.splitlines()[-1].startswith("not fetched again: ")
    fine(run("pull", MODEL, "--variants", "int8,q4"))
    assert_whole(folder, measured, "int8", "q4")
    assert fine(run("doctor")).out.splitlines()[-1] == FINE


def test_doctor_s_document_of_what_is_broken(run: Run, store: Store, measured: Path) -> None:
    fine(run("pull", MODEL))
    path = store.folder(MODEL, COMMIT) / INT8
    flip(path)
    size = path.stat().st_size
    found = {
        "where": str(path),
        "what": OTHER_BYTES,
        "remedy": f"`featherbed pull {MODEL}@{COMMIT}` fetches it again",
        "broken": True,
    }
    outcome = run("doctor", "--json")
    assert (outcome.code, outcome.complaints) == (1, [])
    document = outcome.document
    assert (document["findings"], document["taken_bytes"]) == ([found | {"mended": False}], 0)
    assert path.exists()

    outcome = run("doctor", "--mend", "--json", HF_HUB_OFFLINE="1")
    document = outcome.document
    assert (outcome.code, document["taken_bytes"]) == (1, size)
    (failed,) = document["failed"]
    assert failed.startswith(f"Hub id {MODEL}@{COMMIT}: expected {INT8}, not in the cache yet, found offline mode")
    assert not path.exists()

    document = fine(run("doctor", "--mend", "--json")).document
    assert document["findings"] == [found | {"what": "it is gone", "mended": True}]
    assert (document["taken_bytes"], document["failed"]) == (0, [])
    assert_whole(store.folder(MODEL, COMMIT), measured, "int8")


def test_the_remedy_that_doctor_names_is_one(run: Run, store: Store, measured: Path) -> None:
    fine(run("pull", MODEL))
    flip(store.folder(MODEL, COMMIT) / INT8)
    words = run("doctor", "--json").document["findings"][0]["remedy"].split("`")[1].split()
    assert words[:2] == ["featherbed", "pull"]
    fine(run(*words[1:]))
    assert_whole(store.folder(MODEL, COMMIT), measured, "int8")


def test_a_checkpoint_that_is_broken_is_mended_too(run: Run, hub: Hub, store: Store) -> None:
    fine(run("pull", CHECKPOINT))
    path = store.folder(CHECKPOINT, COMMIT) / "model.safetensors"
    flip(path)
    outcome = run("doctor")
    assert (outcome.code, [line.partition(";")[0] for line in findings(outcome)]) == (
        1, [f"broken: {path}: {OTHER_BYTES}"],
    )  # fmt: skip
    fine(run("doctor", "--mend"))
    assert files_of(store.folder(CHECKPOINT, COMMIT)) == hub.repositories[CHECKPOINT].files


def test_what_offline_mending_took_away_is_fetched_by_whoever_opens_the_model(
    run: Run, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "work" / "texts.txt").write_text("rain\n")
    fine(run("embed", MODEL, "texts.txt", "-o", "first.npy"))
    flip(store.folder(MODEL, COMMIT) / INT8)
    run("doctor", "--mend", HF_HUB_OFFLINE="1")
    line = refusal(run("embed", f"{MODEL}@{COMMIT}", "texts.txt", "-o", "second.npy", HF_HUB_OFFLINE="1"))
    assert f"expected {INT8}, not in the cache yet, found offline mode" in line
    fine(run("embed", MODEL, "texts.txt", "-o", "second.npy"))
    assert (tmp_path / "work" / "first.npy").read_bytes() == (tmp_path / "work" / "second.npy").read_bytes()


@pytest.mark.parametrize("kind", [MODEL, CHECKPOINT])
def test_a_record_that_is_garbage_makes_a_folder_that_nobody_trusts(run: Run, store: Store, kind: str) -> None:
    fine(run("pull", kind))
    before, record = files_of(store.folder(kind, COMMIT)), store.home(kind) / f"{COMMIT}.json"
    garbage(record)
    assert fine(run("list", "--json")).document["models"] == []
    size = f"{sum(map(len, before.values())) / 1e6:.1f} MB"
    told, other = findings(fine(run("doctor")))
    assert told == f"note: {kind}, {size}: a folder that was never whole; `featherbed pull {kind}` goes on with it"
    assert other.startswith(f"note: {kind}, 0.0 MB: a record or manifest that cannot be read;")
    fine(run("doctor", "--mend"))
    assert not store.folder(kind, COMMIT).exists()
    fine(run("pull", kind))
    assert files_of(store.folder(kind, COMMIT)) == before
    assert fine(run("doctor")).out.splitlines()[-1] == FINE


def test_a_record_that_is_garbage_costs_no_byte_where_the_files_are_whole(run: Run, hub: Hub, store: Store) -> None:
    fine(run("pull", MODEL))
    garbage(store.home(MODEL) / f"{COMMIT}.json")
    before = dict(hub.served)
    fine(run("pull", MODEL))
    assert hub.served == before
    assert fine(run("doctor")).out.splitlines()[-1] == FINE


def test_an_unfinished_download_is_a_note_and_exit_code_0(run: Run, hub: Hub, store: Store, measured: Path) -> None:
    stop_after_5000_bytes(hub)
    refusal(run("pull", MODEL))
    hub.faults.clear()
    assert store.partial(MODEL, open_folder(measured).manifest.files[INT8].sha256).stat().st_size == 5000
    outcome = fine(run("doctor"))
    assert "a download that was stopped" in outcome.out
    assert all(line.startswith(f"note: {MODEL}") for line in findings(outcome))
    assert all(f"`featherbed pull {MODEL}` goes on with it" in line for line in findings(outcome))
    assert outcome.out.splitlines()[-1] == "`featherbed doctor --mend` mends these"
    assert {one["broken"] for one in fine(run("doctor", "--json")).document["findings"]} == {False}
    fine(run("pull", MODEL))
    assert hub.served[INT8] == needed(measured, "int8")[INT8]  # every byte once
    assert_whole(store.folder(MODEL, COMMIT), measured, "int8")
    assert fine(run("doctor")).out.splitlines()[-1] == FINE


def test_stale_partials_are_a_note_and_mending_takes_them_away(run: Run, store: Store, measured: Path) -> None:
    fine(run("pull", MODEL))
    parts = [store.partial(MODEL, digit * 64) for digit in "01"]
    for part in parts:
        part.write_bytes(bytes(1_700_000))
    assert findings(fine(run("doctor"))) == [
        f"note: {MODEL} and 1 more, 3.4 MB: a download that was stopped; `featherbed pull {MODEL}` goes on with it"
    ]
    found = {
        "where": MODEL,
        "what": "a download that was stopped",
        "remedy": f"`featherbed pull {MODEL}` goes on with it",
        "broken": False,
    }
    document = fine(run("doctor", "--json")).document
    assert document["findings"] == [found | {"mended": False}] * 2
    outcome = fine(run("doctor", "--mend"))
    assert outcome.out.splitlines()[-1] == "mended: 2 things, 3.4 MB taken away"
    assert not any(part.exists() for part in parts)
    assert_whole(store.folder(MODEL, COMMIT), measured, "int8")
    assert fine(run("doctor")).out.splitlines()[-1] == FINE


def test_what_a_killed_writer_left_behind_is_a_note_of_its_repository(run: Run, store: Store, measured: Path) -> None:
    fine(run("pull", MODEL))
    folder = store.folder(MODEL, COMMIT)
    left = [store.home(MODEL) / f"{COMMIT}.json.tmp-1", folder / f"{MANIFEST}.tmp-1", folder / "onnx" / "x.tmp-1"]
    for path in left:
        path.write_bytes(b"half")
    (store.home(MODEL) / f"{COMMIT}-built.tmp-1").mkdir()
    document = fine(run("doctor", "--mend", "--json")).document
    assert {(one["where"], one["broken"]) for one in document["findings"]} == {(MODEL, False)}
    assert (len(document["findings"]), document["taken_bytes"]) == (4, 12)
    assert {path.name for path in store.home(MODEL).rglob("*") if "tmp" in path.name} == set()
    assert_whole(folder, measured, "int8")


def test_a_broken_model_that_was_built_is_taken_away_and_built_again(
    run: Run, hub: Hub, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "work" / "texts.txt").write_text("rain\n")
    embed = ("embed", CHECKPOINT, "texts.txt", "--variant", "q4", "-o")
    fine(run(*embed, "first.npy"))
    assert fine(run("list", "--json")).document["models"][0]["variants"] == ["fp32", "q4"]
    built = store.built(CHECKPOINT, COMMIT)
    flip(built / "onnx" / "model_q4.onnx")
    outcome = run("doctor")
    assert (outcome.code, outcome.complaints) == (1, [])
    (told,) = findings(outcome)
    assert told.startswith(f"broken: {built}: {built / 'onnx' / 'model_q4.onnx'}: ")
    assert told.endswith("; built again when it is needed")
    fine(run("doctor", "--mend"))
    assert not built.exists()
    before = dict(hub.served)
    fine(run(*embed, "second.npy"))
    assert hub.served == before  # the checkpoint is whole
    assert (tmp_path / "work" / "first.npy").read_bytes() == (tmp_path / "work" / "second.npy").read_bytes()
    assert fine(run("doctor")).out.splitlines()[-1] == FINE


def test_prepacked_weights_that_are_broken_or_useless_are_taken_away(
    run: Run, store: Store, packed: Path, measured: Path, tmp_path: Path
) -> None:
    fine(run("pull", MODEL))
    source = store.folder(MODEL, COMMIT) / INT8
    other = Path(shutil.copy(measured / "onnx" / "model.onnx", tmp_path))
    entries = [found.folder for path in (source, other) if (found := prepack.prepacked(path, packed))]
    other.unlink()
    assert len(entries) == 2
    useless = {
        "where": str(other),
        "what": "prepacked weights are useless: its model is gone",
        "remedy": "made anew when they are needed",
        "broken": False,
        "mended": False,
    }
    assert fine(run("doctor", "--json")).document["findings"] == [useless]
    flip(entries[0] / "engine.data")
    outcome = run("doctor")
    assert (outcome.code, outcome.complaints) == (1, [])
    expected = f"broken: {source}: prepacked weights are useless: its files are not those it was made with; made anew"
    assert [line for line in findings(outcome) if line.startswith(expected)]
    fine(run("doctor", "--mend"))
    assert list(packed.iterdir()) == []
    assert_whole(store.folder(MODEL, COMMIT), measured, "int8")
    assert fine(run("doctor")).out.splitlines()[-1] == FINE


def test_doctor_mends_nothing_that_is_not_its_own(run: Run, store: Store, measured: Path, tmp_path: Path) -> None:
    fine(run("pull", MODEL))
    for path in (store.root / "notes.txt", store.root / "mine" / "notes.txt", tmp_path / "work" / MANIFEST):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = files_of(tmp_path)
    assert fine(run("doctor", "--mend")).out.splitlines()[-1] == "mended: 0 things, 0.0 MB taken away"
    assert {name for name, raw in before.items() if files_of(tmp_path).get(name) != raw} == set()
    assert_whole(store.folder(MODEL, COMMIT), measured, "int8")


def test_doctor_while_a_pull_is_under_way_does_it_no_harm(
    run: Run, hub: Hub, store: Store, measured: Path, tmp_path: Path
) -> None:
    part = store.partial(MODEL, open_folder(measured).manifest.files[INT8].sha256)
    go_on = threading.Event()

    def waiting(raw: bytes) -> bytes:
        assert go_on.wait(200)
        return raw

    hub.faults += [Fault("file=onnx", cut=5000), Fault("file=onnx", replace=waiting)]
    environment = surroundings(hub.url, tmp_path / "cache") | {"HF_HUB_DOWNLOAD_TIMEOUT": "200"}
    words = [sys.executable, "-m", "featherbed.cli", "pull", MODEL]
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as pulling:
        try:
            while not part.exists() or part.stat().st_size < 5000:
                assert pulling.poll() is None
                sleep(0.01)
            for again in (("doctor",), ("doctor", "--mend")):
                assert findings(fine(run(*again))) == []
            assert (pulling.poll(), part.stat().st_size) == (None, 5000)
        finally:
            go_on.set()
        _, err = pulling.communicate(timeout=200)
    assert (pulling.returncode, b"Traceback" in err) == (0, False), err
    assert hub.served[INT8] == needed(measured, "int8")[INT8]
    assert_whole(store.folder(MODEL, COMMIT), measured, "int8")
