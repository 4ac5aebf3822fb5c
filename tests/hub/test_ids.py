"""Hub ids: never mistaken for paths, fetched by the real client from a server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from featherbed.errors import CheckpointError
from featherbed.folder import open_folder
from featherbed.hub.names import HubId, hub_id
from featherbed.pipeline import pull as room
from featherbed.pipeline.pull import Located, locate
from tests.conftest import FIXTURES
from tests.hub_server import COMMIT, Fault, Hub, Repository, serving, surroundings

NAME, READY = "owner/small", "owner/small-onnx"
BUILD = "import sys, featherbed; featherbed.build(sys.argv[1], 'out', ['fp32', 'q4'], check=False)"
LOCATE = "import sys; from featherbed.pipeline.pull import locate; print(locate(sys.argv[1], ['auto']).folder)"
CLI = "from featherbed.cli import main; main()"
OPEN = "import sys, featherbed; print(featherbed.Embedder(sys.argv[1]).variant)"
# the variants that were taken of a Hub id and of a folder, after their vectors were found to be the same bits
SAME = """
import sys, numpy, featherbed
models = [featherbed.Embedder(name, *sys.argv[3:]) for name in sys.argv[1:3]]
assert numpy.array_equal(*(model.encode(["rain", "a fox", ""]) for model in models))
print(*(model.variant for model in models))
"""
# as main() of the command line ends: one line, exit code 2
GUARD = """
import sys, featherbed
try:
    {}
except featherbed.FeatherbedError as error:
    assert len(str(error).splitlines()) == 1 and "expected" in str(error) and "found" in str(error)
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""


@pytest.fixture
def repository() -> Repository:
    """The checkpoint qwen3-biased, with files beside it that nobody should fetch."""
    folder = FIXTURES / "qwen3-biased"
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {name: (folder / name).read_bytes() for name in names if name != "reference.safetensors"}
    files |= dict.fromkeys(
        ["pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "modeling_evil.py", "tf_model.h5"], b"not this"
    )
    files["README.md"] = b"# small\n"
    return Repository(files)


@pytest.fixture
def hub(repository: Repository, folders: dict[str, Path]) -> Iterator[Hub]:
    """A checkpoint, and the model folder that was built from it."""
    folder = folders["qwen3-biased"]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with serving({NAME: repository, READY: Repository(files)}) as hub:
        yield hub


Run = Callable[..., "subprocess.CompletedProcess[str]"]


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
            timeout=300,
        )

    return run


def line_of(done: subprocess.CompletedProcess[str], kind: str = "HubError") -> str:
    """The one line that a refused run ends in."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith(f"{kind}: Hub id "), done.stderr
    return last


def said(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """The last line of what a command says."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.rstrip("\n").splitlines()[-1]


def document_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return dict(json.loads(said(done)))


def fetched(hub: Hub) -> list[str]:
    """The paths of all files that were asked for."""
    return [one.path for one in hub.asked if "/resolve/" in one.path]


# paths


def test_a_folder_that_is_there_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate(str(tmp_path), []) == Located(tmp_path, tmp_path.name)
    assert locate("owner/name", []) == Located(Path("owner/name"), "name")
    assert locate("owner", []) == Located(Path("owner"), "owner")
    assert locate(".", []) == Located(Path(), tmp_path.name)
    for source in (str(tmp_path), "owner/name", Path("owner/name"), "owner", "."):
        assert hub_id(source) is None


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
        "owner/model.onnx",
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
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(room, "commit_of", lambda *_: pytest.fail("went to the Hub"))
    assert hub_id(source) is None
    with pytest.raises(CheckpointError) as caught:
        locate(source, [])
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert "expected a folder, or a Hub id such as owner/name" in text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", HubId("owner/name")),
        ("owner/name@v1.0", HubId("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", HubId("owner/name", "refs/pr/3")),
        ("owner/name@", HubId("owner/name", "main")),
        (f"owner/name@{COMMIT}", HubId("owner/name", COMMIT)),
        (Path("owner/name"), HubId("owner/name")),
        ("BAAI/bge-small-en-v1.5", HubId("BAAI/bge-small-en-v1.5")),
    ],
)
def test_an_id_and_its_revision_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | Path, expected: HubId
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id(source) == expected
    assert expected.is_commit is (expected.revision == COMMIT)
    assert str(expected) == (expected.name if expected.revision == "main" else str(source))


# the real client


def test_a_model_builds_from_its_id(client: Run, tmp_path: Path, folders: dict[str, Path]) -> None:
    done = client(BUILD, NAME)
    assert done.returncode == 0, done.stderr
    built = tmp_path / "work" / "out" / "onnx"
    for name in ("model.onnx", "model_q4.onnx"):
        assert (built / name).read_bytes() == (folders["qwen3-biased"] / "onnx" / name).read_bytes()
    manifest = json.loads((built.parent / "featherbed.json").read_text("utf-8"))
    assert manifest["name"] == "small"


def test_only_configs_and_safetensors_arrive_byte_for_byte(hub: Hub, repository: Repository, client: Run) -> None:
    done = client(LOCATE, NAME)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    unwanted = {"pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "modeling_evil.py", "tf_model.h5"}
    assert found == {name: raw for name, raw in repository.files.items() if name not in unwanted}
    assert {path.partition(COMMIT)[2].lstrip("/") for path in fetched(hub)} == found.keys()


def test_a_second_build_and_an_offline_one_come_from_the_cache(hub: Hub, client: Run) -> None:
    first = client(LOCATE, f"{NAME}@{COMMIT}")
    assert first.returncode == 0, first.stderr
    before = fetched(hub)
    assert before
    again = client(LOCATE, f"{NAME}@{COMMIT}")
    offline = client(LOCATE, f"{NAME}@{COMMIT}", HF_HUB_OFFLINE="1")
    assert first.stdout == again.stdout == offline.stdout
    assert fetched(hub) == before


def test_an_unknown_repository_is_one_line(client: Run) -> None:
    line = line_of(client(GUARD.format(BUILD.partition("; ")[2]), "owner/nowhere"))
    assert "Hub id owner/nowhere" in line
    assert "no such repository, or a private one" in line


def test_an_unknown_revision_is_one_line(client: Run) -> None:
    line = line_of(client(GUARD.format(BUILD.partition("; ")[2]), f"{NAME}@v9"))
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
    headers = {"X-Error-Code": code, "X-Error-Message": "line one"} if code else {"Retry-After": "0"}
    hub.faults = [Fault(times=1000, status=status, headers=headers)]
    kind = "UnreachableError" if status == 500 else "HubError"
    line = line_of(client(GUARD.format(BUILD.partition("; ")[2]), NAME), kind)
    assert found in line
    assert "no connection" not in line  # there was one


def test_offline_with_an_empty_cache_is_one_line(hub: Hub, client: Run) -> None:
    line = line_of(client(GUARD.format(BUILD.partition("; ")[2]), NAME, HF_HUB_OFFLINE="1"), "UnreachableError")
    assert "found offline mode" in line
    assert hub.asked == []


def test_a_server_that_is_not_there_is_one_line(client: Run, tmp_path: Path) -> None:
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    line = line_of(client(GUARD.format(BUILD.partition("; ")[2]), NAME, **nobody), "UnreachableError")
    assert "found no connection, or one that broke" in line
    assert not list((tmp_path / "work").iterdir())


def test_an_id_the_hub_does_not_allow_is_one_line(client: Run) -> None:
    line = line_of(client(GUARD.format(BUILD.partition("; ")[2]), "owner/na me--x"))
    assert "an id the Hub does not allow" in line


def test_the_command_line_says_so_and_ends_with_code_2(hub: Hub, client: Run, tmp_path: Path) -> None:
    done = client(CLI, "build", "owner/nowhere", "-o", "m")
    assert done.returncode == 2
    assert done.stderr.rstrip("\n").splitlines()[-1].startswith("featherbed: Hub id owner/nowhere: expected ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work" / "m").exists()
    assert hub.asked


# ready variants, and a checkpoint that has none


def test_ready_variants_are_copied_and_not_built(
    hub: Hub, client: Run, tmp_path: Path, folders: dict[str, Path]
) -> None:
    done = client(CLI, "build", READY, "-o", "mine", "--variants", "q4")
    assert said(done) == "not built, its variants were ready: mine"
    document = document_of(client(CLI, "build", READY, "--variants", "q4", "--json"))
    assert document == {"folder": "small-onnx", "built": False, "passed": None}
    for name in ("mine", "small-onnx"):
        model = open_folder(tmp_path / "work" / name)
        model.check_hashes()
        assert list(model.manifest.variants) == ["fp32", "q4"]
        assert [path.name for path in sorted((model.path / "onnx").iterdir())] == ["model.onnx", "model_q4.onnx"]
        for file in model.manifest.files:
            assert (model.path / file).read_bytes() == (folders["qwen3-biased"] / file).read_bytes()
    assert not [path for path in fetched(hub) if "int8" in path or "int4" in path]


def test_of_ready_variants_nobody_named_the_reference_and_the_best_are_copied(client: Run, tmp_path: Path) -> None:
    assert document_of(client(CLI, "build", READY, "--json"))["built"] is False
    assert list(open_folder(tmp_path / "work" / "small-onnx").manifest.variants) == ["fp32", "int8"]


def test_a_variant_that_is_not_among_the_ready_ones_is_one_line(hub: Hub, client: Run, tmp_path: Path) -> None:
    files = hub.repositories[READY].files
    document = json.loads(files["featherbed.json"])
    del document["variants"]["q4"]
    files["featherbed.json"] = json.dumps(document).encode()
    done = client(CLI, "build", READY, "-o", "mine", "--variants", "q4")
    assert done.returncode == 2
    assert "expected one of fp32, int8" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "work").iterdir()) == []


def times(folder: Path) -> dict[Path, int]:
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("rain\na fox\n\nein Bett\n", "utf-8")
    return path


def test_texts_are_embedded_by_the_id_of_ready_variants(
    hub: Hub, client: Run, tmp_path: Path, texts: Path, folders: dict[str, Path]
) -> None:
    for variant, words in (("int8", ()), ("q4", ("--variant", "q4"))):
        for source, out in ((READY, "id.npy"), (str(folders["qwen3-biased"]), "folder.npy")):
            document = document_of(client(CLI, "embed", source, str(texts), "-o", out, *words, "--json"))
            assert (document["variant"], document["texts"]) == (variant, 4)
        assert (tmp_path / "work" / "id.npy").read_bytes() == (tmp_path / "work" / "folder.npy").read_bytes()
    before = fetched(hub)
    assert {path.rpartition("/")[2] for path in before if "onnx/model" in path} == {
        "model_int8.onnx", "model_q4.onnx",
    }  # fmt: skip
    offline = client(CLI, "embed", READY, str(texts), "-o", "offline.npy", "--variant", "q4", HF_HUB_OFFLINE="1")
    assert said(offline).startswith("4 texts, 72 dimensions, variant q4 on cpu")
    assert f"{READY}: offline mode; taking it as it was last seen, commit {COMMIT[:7]}" in offline.stderr
    assert (tmp_path / "work" / "offline.npy").read_bytes() == (tmp_path / "work" / "id.npy").read_bytes()
    assert fetched(hub) == before


def test_a_checkpoint_is_built_in_the_cache_once(
    hub: Hub, client: Run, tmp_path: Path, texts: Path, folders: dict[str, Path]
) -> None:
    work = tmp_path / "work"

    def embed(source: str, out: str, *words: str, **environment: str) -> str:
        done = client(CLI, "embed", source, str(texts), "-o", out, *words, "--json", **environment)
        assert json.loads(said(done))["texts"] == 4
        return done.stderr

    assert "verify q4" in embed(NAME, "first.npy", "--variant", "q4")
    (built,) = (tmp_path / "cache").rglob(f"{COMMIT}-built")
    assert list(open_folder(built).manifest.variants) == ["fp32", "q4"]
    assert None not in {one.passed for one in open_folder(built).manifest.variants.values()}  # verified
    for name in ("model.onnx", "model_q4.onnx"):
        assert (built / "onnx" / name).read_bytes() == (folders["qwen3-biased"] / "onnx" / name).read_bytes()
    embed(str(folders["qwen3-biased"]), "folder.npy", "--variant", "q4")
    assert (work / "first.npy").read_bytes() == (work / "folder.npy").read_bytes()

    before, asked = times(built), fetched(hub)
    assert "q4" not in embed(NAME, "second.npy", "--variant", "q4")
    assert "write" not in embed(NAME, "offline.npy", "--variant", "q4", HF_HUB_OFFLINE="1")
    assert (times(built), fetched(hub)) == (before, asked)
    for out in ("second.npy", "offline.npy"):
        assert (work / out).read_bytes() == (work / "first.npy").read_bytes()

    assert "write int8-dynamic" in embed(NAME, "more.npy", "--variant", "int8-dynamic")
    model = open_folder(built)
    model.check_hashes()
    assert list(model.manifest.variants) == ["fp32", "q4", "int8-dynamic"]
    assert sorted(path.stem for path in (built / "reports").glob("*.json")) == ["fp32", "int8-dynamic", "q4"]
    assert times(built / "onnx").items() >= {path: at for path, at in before.items() if path.suffix == ".onnx"}.items()
    assert [path.name for path in built.parent.iterdir() if ".tmp-" in path.name] == []


def test_an_unknown_variant_of_a_checkpoint_is_one_line_and_leaves_nothing(
    client: Run, tmp_path: Path, texts: Path
) -> None:
    done = client(CLI, "embed", NAME, str(texts), "-o", "x.npy", "--variant", "q5")
    assert done.returncode == 2
    assert "variant 'q5': expected one of fp32, int8" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "work").iterdir()) == []
    assert not list((tmp_path / "cache").rglob(f"{COMMIT}-built"))


@pytest.mark.parametrize("variant", ["auto", "fp32", "q4"])
def test_an_embedder_of_an_id_is_that_of_the_folder_bit_for_bit(
    client: Run, folders: dict[str, Path], variant: str
) -> None:
    expected = "int8 int8" if variant == "auto" else f"{variant} {variant}"
    assert said(client(SAME, READY, str(folders["qwen3-biased"]), variant)) == expected


def test_auto_is_the_best_of_all_ready_variants_and_not_of_those_that_are_here(
    hub: Hub, client: Run, folders: dict[str, Path]
) -> None:
    files = hub.repositories[READY].files
    document = json.loads(files["featherbed.json"])
    document["variants"]["int8"]["passed"] = False
    files["featherbed.json"] = json.dumps(document).encode()
    assert said(client(SAME, READY, str(folders["qwen3-biased"]), "q4")) == "q4 q4"
    assert said(client(OPEN, READY)) == "int8-block"


def test_an_embedder_of_a_checkpoint_s_id_is_that_of_what_was_built_bit_for_bit(client: Run, tmp_path: Path) -> None:
    assert said(client(OPEN, NAME)) == "int8"
    (built,) = (tmp_path / "cache").rglob(f"{COMMIT}-built")
    assert list(open_folder(built).manifest.variants) == ["fp32", "int8"]
    assert said(client(SAME, NAME, str(built))) == "int8 int8"
    assert said(client(SAME, f"{NAME}@{COMMIT}", str(built), "fp32", HF_HUB_OFFLINE="1")) == "fp32 fp32"
