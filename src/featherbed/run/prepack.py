"""Prepacked weights, saved once and mapped ever after.

onnxruntime lays weights out anew for its kernels each time it loads a file: seconds, and a private copy of the
model. Here a file's engine graph (run/derive.py) is saved once with the weights already laid out; sessions then map
them, so that they are shared between sessions and processes and count as the system's memory, not as ours.

    <cache>/<key>/engine.onnx  engine.data  entry.json        and for decoders  keys.onnx  behind.onnx  long.onnx

The key is made of the file, of onnxruntime's version and of the CPU's flags: a layout serves no other. An entry is
written beside its place and renamed when whole; one whose files are not those it names is made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from featherbed.cpu import cpu
from featherbed.run import sidecars

Array = npt.NDArray[Any]

LOG = logging.getLogger("featherbed")
FORMAT = 3  # of an entry, its graphs among it
READABLE = 0o755  # a cache may be shared by users; temporary folders are their maker's alone
LEAST_BYTES = 16 * 2**20  # smaller files load in no time and take no memory worth sharing
SAMPLES, SAMPLE_BYTES = 64, 4096
ENGINE, DATA, KEYS, BEHIND, LONG, ENTRY = (
    "engine.onnx", "engine.data", "keys.onnx", "behind.onnx", "long.onnx", "entry.json",
)  # fmt: skip
TIMEOUT_S = 900
UNFIT = 7  # exit code of the process that prepacks
IDS = np.arange(1, 25).reshape(2, 12)  # ids every vocabulary has
SEEN = 8  # of them, as if they were a prompt
SAME = 0.03
DAMAGED = "its files are not those it was made with"
FATAL = 4  # onnxruntime's severity: the parent says what failed


@dataclass(frozen=True)
class Prepacked:
    """An entry of the cache: a folder of graphs over one file of prepacked weights."""

    folder: Path

    def graph(self, name: str) -> Path | None:
        """The graph ENGINE, KEYS, BEHIND or LONG; None where the model has no such form."""
        path = self.folder / name
        return path if path.is_file() else None


def default_cache() -> Path:
    """FEATHERBED_CACHE, or the user's cache folder."""
    own = os.environ.get("FEATHERBED_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    home = Path(own) if own else (Path(base) if base else Path.home() / ".cache") / "featherbed"
    return home / "prepacked"


def prepacked(path: Path, cache: Path | None = None, check: Callable[[], object] = lambda: None) -> Prepacked | None:
    """The entry of ``cache`` for the graph at ``path``, made if need be; None, and the log says why, if it cannot.

    ``check`` is called before one is made: whoever finds an entry reads nothing of the file but its hash. Nothing is
    written but the new entry. Those that this onnxruntime on this CPU made of an earlier file at ``path``
    are removed.
    """
    try:
        cache = cache or default_cache()
        folder = cache / key(path)
        if _sound(folder):
            with suppress(OSError):  # when it was last used; a cache may be another user's
                os.utime(folder / ENTRY)
            return Prepacked(folder)
        if reason := _unfit(folder):
            LOG.debug("%s is loaded without prepacked weights: %s", path, reason)
            return None
        check()
        cache.mkdir(parents=True, exist_ok=True)
        _remove_left(cache)
        _check_room(path, cache)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=cache) as place:
            _make(path, Path(place))
            _write_entry(path, Path(place))
            Path(place).chmod(READABLE)
            _put(Path(place), folder)
            Path(place).mkdir(exist_ok=True)  # what TemporaryDirectory removes
        _remove_older(path, folder)
        return Prepacked(folder) if _sound(folder) else None
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        LOG.warning("weights of %s are not prepacked, loading takes longer and more memory: %s", path, error)
        return None


@dataclass(frozen=True)
class Entry:
    """An entry of the cache as it lies there: the file it was made of, its bytes, when it was last used (POSIX time).

    ``fault`` says why nobody can use it any more; "" where somebody can.
    """

    folder: Path
    source: str
    size_bytes: int
    used: float
    fault: str


def entries(cache: Path) -> Iterator[Entry]:
    """All entries of a cache, whole or not."""
    for folder in sorted(path for path in cache.glob("*") if path.is_dir() and not path.name.startswith(".")):
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        try:
            known = json.loads((folder / ENTRY).read_text("utf-8"))
            source, maker, used = str(known["source"]), str(known["maker"]), (folder / ENTRY).stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError):
            yield Entry(folder, "", size, folder.stat().st_mtime, "an older featherbed made it")
            continue
        fault = "" if Path(source).is_file() else "its model is gone"
        if maker != _maker():
            fault = "another onnxruntime or CPU made it"
        elif not (_sound(folder) or _unfit(folder)):
            fault = DAMAGED
        yield Entry(folder, source, size, used, fault)


def _put(place: Path, folder: Path) -> None:
    """Rename a new entry to its key, unless another process was faster. Raises OSError."""
    if _sound(folder) or _unfit(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        place.rename(folder)
    except OSError:
        if not (_sound(folder) or _unfit(folder)):  # faster in this very moment, or a true failure
            raise


def _remove_left(cache: Path) -> None:
    """Remove what processes that were killed left behind."""
    for place in cache.glob(".new-*"):
        if place.stat().st_mtime < time.time() - 2 * TIMEOUT_S:
            shutil.rmtree(place, ignore_errors=True)


def key(path: Path) -> str:
    """Names the entry of a graph: its bytes, its sidecars' sizes, times and samples, onnxruntime, the CPU's flags."""
    digest = hashlib.sha256(f"{FORMAT} {_maker()}\n".encode())
    with path.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    for sidecar in sidecars_of(path):
        digest.update(f"{sidecar.name} {sidecar.stat().st_mtime_ns} {sample(sidecar)}\n".encode())
    return digest.hexdigest()[:32]


def _maker() -> str:
    """What lays weights out, and for whom: a layout is of no use to another."""
    model, flags = cpu()
    return f"onnxruntime {ort.__version__} {model} {' '.join(sorted(flags))}"


def size_bytes(path: Path) -> int:
    """Bytes of a graph and its sidecars."""
    return sum(p.stat().st_size for p in (path, *sidecars_of(path)))


def sample(path: Path) -> str:
    """A hash of a file's size and of SAMPLES pieces of it: two models differ in every piece."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for at in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * at // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def sidecars_of(path: Path) -> list[Path]:
    """External data of a graph by the names in use: <graph>_data, <graph>.data."""
    return [p for p in (path.with_name(path.name + end) for end in ("_data", ".data")) if p.is_file()]


def _sound(folder: Path) -> bool:
    """Whether every file of an entry is the one it was made with."""
    try:
        entry = json.loads((folder / ENTRY).read_text("utf-8"))
        return bool(entry["files"]) and all(sample(folder / name) == found for name, found in entry["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _unfit(folder: Path) -> str:
    """Why a file of this key cannot be prepacked, where that was found out before."""
    try:
        return str(json.loads((folder / ENTRY).read_text("utf-8")).get("unfit", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _write_entry(path: Path, folder: Path) -> None:
    files = {p.name: sample(p) for p in sorted(folder.iterdir())}
    entry: dict[str, Any] = {"source": str(path.absolute()), "maker": _maker(), "files": files}
    if not entry["files"]:
        entry["unfit"] = f"prepacked by onnxruntime {ort.__version__} it gives other vectors"
    for file in folder.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    (folder / ENTRY).write_text(json.dumps(entry, indent=1) + "\n", "utf-8")


def _check_room(path: Path, cache: Path) -> None:
    needed, free = 5 * size_bytes(path), shutil.disk_usage(cache).free  # both layouts, twice while moved, and air
    if free < needed:
        raise OSError(f"{cache} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are wanted")


def _remove_older(path: Path, kept: Path) -> None:
    for entry in kept.parent.glob(f"*/{ENTRY}"):
        try:
            found = json.loads(entry.read_text("utf-8"))
            same = (found["source"], found["maker"]) == (str(path.absolute()), _maker())
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if entry.parent != kept and same:
            shutil.rmtree(entry.parent, ignore_errors=True)


def _make(path: Path, folder: Path) -> None:
    """Derive and save in a process of its own: what it takes, about twice the file, is gone when it ends."""
    LOG.info("prepacking the weights of %s, once", path)
    words = [sys.executable, "-P", "-m", "featherbed.run.prepack", str(path.absolute()), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode == UNFIT:
        LOG.info("%s stays as it is: prepacked it gives other vectors", path)
        for file in folder.iterdir():
            file.unlink()
    elif done.returncode or not (folder / ENGINE).is_file():
        raise RuntimeError((done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1])


def main(source: str, out: str) -> int:
    """Write the engine graph of ``source`` and its further forms into ``out``; UNFIT where its vectors are others.

    onnxruntime 1.31 loads prepacked weights wrongly that do not lie where kernels read them (``align``), so nothing
    is believed.
    """
    import onnx  # only where a graph is taken apart: a session that finds its entry never loads it

    from featherbed.run import align, derive

    path, folder = Path(source), Path(out)
    plain = onnx.load(path, load_external_data=False)
    reading = {"session.model_external_initializers_file_folder_path": str(_follow_links(plain, path))}
    saving = reading | {
        "session.optimized_model_external_initializers_file_name": DATA,
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        "session.save_external_prepacked_constant_initializers": "1",
    }
    session = _session(plain.SerializeToString(), reading)
    fixed = [axis for axis in session.get_inputs()[0].shape if isinstance(axis, int)]
    # kernels for one row are others
    shapes = (np.resize(IDS, fixed),) if fixed else (IDS, IDS[:1], IDS[:1, :1])
    expected = _answers(session, shapes)
    del session
    _session(derive.engine_graph(plain).SerializeToString(), saving, folder / ENGINE)  # saved, and let go
    engine = onnx.load(folder / ENGINE, load_external_data=False)
    if align.align(engine, folder):
        (folder / ENGINE).write_bytes(engine.SerializeToString())
    found = _answers(_session(str(folder / ENGINE), {}), shapes)
    if not all(_same(*pair) for pair in zip(expected, found, strict=True)):
        return UNFIT
    if derive.has_past(engine):
        forms = {KEYS: derive.keys_and_values, BEHIND: derive.behind_past, LONG: derive.for_long}
        for name, form in forms.items():
            onnx.save(form(engine), folder / name)
        _check_forms(folder, expected[1])
    return 0


def _follow_links(model: Any, path: Path) -> Path:
    """Name external data as they are really called, and return the folder they are in.

    onnxruntime refuses links that lead out of a folder, and a Hub cache is made of them; what else leads out is refused
    here, though whoever asked for an entry has looked already: that was a moment ago, in another process.
    """
    parent = path.parent
    for weight in model.graph.initializer:
        for entry in (e for e in weight.external_data if e.key == "location"):
            real = sidecars.opened(path, entry.value).real
            entry.value, parent = real.name, real.parent
    return parent


def _check_forms(folder: Path, expected: dict[str, Array]) -> None:
    """Remove the forms of an engine graph that do not give its vector [1, D] of the first row of IDS."""
    seen = _run(_session(str(folder / KEYS), {}), IDS[:1, :SEEN])
    past = {name.replace("present", "past_key_values", 1): value for name, value in seen.items()}
    if not _same(expected, _run(_session(str(folder / BEHIND), {}), IDS[:1, SEEN:], past)):
        (folder / KEYS).unlink()
        (folder / BEHIND).unlink()
    if not _same(expected, _run(_session(str(folder / LONG), {}), IDS[:1])):
        (folder / LONG).unlink()


def _session(graph: bytes | str, entries: dict[str, str], save: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = FATAL
    if save is not None:
        options.optimized_model_filepath = str(save)
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _answers(session: ort.InferenceSession, shapes: Sequence[Array]) -> list[dict[str, Array]]:
    """Outputs for each of several rows of ids."""
    return [_run(session, ids) for ids in shapes]


def _run(session: ort.InferenceSession, ids: Array, past: dict[str, Array] | None = None) -> dict[str, Array]:
    """All outputs by name, of rows of ids without padding."""
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        **(past or {}),
    }
    names = [o.name for o in session.get_outputs()]
    wanted = {i.name for i in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True))


def _same(expected: dict[str, Array], found: dict[str, Array]) -> bool:
    """Whether all that was found is as expected to SAME of its length: far above rounding, far below a wrong weight."""
    return all(np.linalg.norm(expected[n] - found[n]) <= SAME * np.linalg.norm(expected[n]) for n in found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
