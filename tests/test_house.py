"""The house of docs/house.md, enforced: which way imports point, and which guest may enter which room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "featherbed"
MODULES = sorted(SOURCE.rglob("*.py"))

# cli → pipeline → {make, check, serve, search, bulk} → run → ground → errors
FLOORS = {"cli": 5, "pipeline": 4, "make": 3, "check": 3, "serve": 3, "search": 3, "bulk": 3, "run": 2, "errors": 0}
GROUND = 1
GUESTS = {  # a heavy package, and the only rooms it may enter
    "torch": {"make/export.py", "check/reference.py"},
    "transformers": {"make/export.py", "check/reference.py", "check/peers/"},
    "onnxscript": {"make/export.py"},
    # prepack.py has it lay weights out, in a process of its own; peers/ are scripts for the Python of others
    "onnxruntime": {"run/session.py", "run/prepack.py", "check/peers/"},
    **{peer: {"check/peers/"} for peer in ("sentence_transformers", "fastembed", "optimum")},
    "huggingface_hub": {"hub/client.py", "hub/cached.py"},  # the second asks nobody: it reads that library's cache
    **{network: {"hub/client.py"} for network in ("httpx", "requests", "urllib", "socket", "http", "aiohttp")},
    "filelock": {"hub/store.py"},
    "fastapi": {"serve/"},
    "tokenizers": {"run/tokens.py", "check/peers/"},
    "onnx": {
        "make/write.py",
        "make/read.py",
        "make/relocate.py",
        "make/graph/static.py",
        "check/range.py",
        "check/inspect.py",
        "check/pitfalls.py",
        "run/derive.py",
        "run/prepack.py",
    },
    "rich": {"progress.py", "cli/"},
    "typer": {"cli/"},
    "psutil": {"check/memory.py"},
    "pyarrow": {"run/files.py"},
    "mteb": {"check/mteb.py"},
    "bm25s": {"check/lexical.py"},
    "yaml": {"origin.py", "check/front_matter.py"},
}
LATE = {"run/prepack.py": {"onnx", "featherbed.run.derive"}}  # loaded where a graph is taken apart, by no other session
# the one function of a room that may read it, and only when called
ENVIRONMENT = {"run/prepack.py": "default_cache", "hub/client.py": "default_root", "settings.py": "environment"}
LIMIT_LINES = 400


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def floor_of(room: str) -> int:
    """The floor of "run/tokens.py" or "featherbed.run.tokens"."""
    first = room.removeprefix("featherbed.").replace("/", ".").removesuffix(".py").split(".")[0]
    return FLOORS.get(first, GROUND)


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(imported module, whether at run time) of a file; imports for type checkers only are marked."""
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            submodules = [
                f"{module}.{a.name}" for a in node.names if (SOURCE.parent / module.replace(".", "/")).is_dir()
            ]
            yield from ((m, id(node) not in typing_only) for m in submodules or [module])


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def graph() -> dict[str, set[str]]:
    """Room → the rooms it imports, by dotted name."""
    known = {
        "featherbed." + name_of(p).removesuffix(".py").replace("/", ".").removesuffix(".__init__") for p in MODULES
    }
    found: dict[str, set[str]] = {}
    for path in MODULES:
        me = "featherbed." + name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        found[me] = {
            target
            for module, at_run_time in imports(parsed(path))
            if at_run_time
            for target in [module if module in known else module.rpartition(".")[0]]
            if target in known and target not in {me, "featherbed"}
        }
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    room = name_of(path)
    if room == "__init__.py":
        return  # the porch opens every door, and nobody comes in through it but cli and pipeline
    for module, _ in imports(parsed(path)):
        if module.startswith("featherbed."):
            assert floor_of(module) <= floor_of(room), f"{room} looks up to {module}"


def test_make_and_run_meet_only_in_the_pipeline() -> None:
    for room, targets in graph().items():
        if room.startswith("featherbed.make") and not room.startswith("featherbed.make.calibrate"):
            assert not [t for t in targets if t.startswith("featherbed.run")], room


def test_make_and_check_do_not_know_each_other() -> None:
    for room, targets in graph().items():
        for one, other in (("make", "check"), ("check", "make")):
            if room.startswith(f"featherbed.{one}"):
                assert not [t for t in targets if t.startswith(f"featherbed.{other}")], room


def test_only_the_top_floors_come_in_through_the_porch() -> None:
    for path in MODULES:
        if floor_of(name_of(path)) < FLOORS["pipeline"] and name_of(path) != "__init__.py":
            assert "featherbed" not in {m for m, _ in imports(parsed(path))}, name_of(path)


def test_there_is_no_circle() -> None:
    edges = graph()

    def walk(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, " → ".join((*trail, room))
        for target in edges.get(room, ()):
            walk(target, (*trail, room))

    for room in edges:
        walk(room, ())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_guests_stay_in_their_rooms(path: Path) -> None:
    room = name_of(path)
    for module, at_run_time in imports(parsed(path)):
        rooms = GUESTS.get(module.split(".")[0])
        if rooms is not None and at_run_time:
            assert any(room == r or (r.endswith("/") and room.startswith(r)) for r in rooms), f"{module} in {room}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_room_grows_past_its_walls(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= LIMIT_LINES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_option_dicts_and_no_mutable_defaults(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.args.kwarg is None, f"{node.name} takes **{node.args.kwarg and node.args.kwarg.arg}"
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                assert not isinstance(default, (ast.List, ast.Dict, ast.Set)), f"{node.name} has a mutable default"


@pytest.mark.parametrize("room", LATE)
def test_what_only_a_first_run_needs_is_not_loaded_by_the_others(room: str) -> None:
    tree = parsed(SOURCE / room)
    first = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    assert {module for module, _ in imports(tree)} >= LATE[room]
    assert not {module for module, _ in imports(first)} & LATE[room]


def environment_readers(tree: ast.AST) -> set[str]:
    """Names of the functions that read the environment; "" for what is read at import."""
    reads = {
        id(node): ""
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"})
        or (isinstance(node, ast.ImportFrom) and {a.name for a in node.names} & {"environ", "getenv"})
    }
    for function in ast.walk(tree):  # outer ones first: the innermost has the last word
        if isinstance(function, ast.FunctionDef):
            reads |= {id(node): function.name for node in ast.walk(function) if id(node) in reads}
    return set(reads.values())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_cli_prints_and_one_function_reads_the_environment(path: Path) -> None:
    room = name_of(path)
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or room.startswith("cli/"), room
    assert environment_readers(parsed(path)) == ({ENVIRONMENT[room]} if room in ENVIRONMENT else set()), room


@pytest.mark.parametrize(
    ("source", "readers"),
    [
        ("import os\nx = os.environ['A']", {""}),
        ("from os import getenv", {""}),
        ("def f():\n    def g():\n        return os.getenv('A')\n    return g", {"g"}),
        ("def f():\n    return 1", set()),
    ],
)
def test_the_measure_of_reads_of_the_environment_sees_them(source: str, readers: set[str]) -> None:
    assert environment_readers(ast.parse(source)) == readers


def test_the_porch_has_at_most_ten_names() -> None:
    import featherbed

    assert len(featherbed.__all__) <= 10
    assert all(getattr(featherbed, name) is not None for name in featherbed.__all__)


def test_the_tree_of_errors_is_the_one_drawn_at_the_top() -> None:
    from featherbed import errors

    drawn = {word for word in (errors.__doc__ or "").split() if word.endswith("Error")}
    defined = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.FeatherbedError)}
    assert drawn == defined
