"""A graph's sidecars: which file a name may mean, opened so that what is read is what was checked.

A name in a graph is somebody else's. It means a file in the graph's own folder or below. A link may lead to such a
file, to one beside the file that the graph itself is a link to, or, as huggingface_hub lays its cache out, from a
snapshot to the cache's own blobs. A hard link is a file like any other: whoever made one could read what it names. What
is opened is looked at once it is open, so that nothing can be put in its place in between.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from featherbed.errors import ModelFolderError
from featherbed.run.sound import Graph, Tensor

MEMORY = "_ORT_MEM_ADDR_"  # how onnxruntime marks an address in memory; never in a file
DESCRIPTORS = Path("/proc/self/fd")
LEAST_HOLE_BYTES = 2**17  # a gap below it is there for the sake of pages
ESCAPED = re.compile(r"%([0-9a-fA-F]{2})")
DIGEST = re.compile(r"[0-9a-f]{40,64}")


@dataclass(frozen=True)
class Opened:
    """A sidecar, mapped: what it is called in the graph, the file that it really is, its bytes."""

    location: str
    real: Path
    view: memoryview


def open_all(graph: Graph) -> dict[str, Opened]:
    """The sidecars of a graph by the names it has for them, each long enough for all that lies in it.

    Raises ModelFolderError on a name that leads out of the folder, a file that is missing, no file, or too short.
    """
    found: dict[str, Opened] = {}
    for weight in graph.outside:
        assert weight.location is not None
        if weight.location not in found:
            found[weight.location] = opened(graph.path, weight.location)
        view = found[weight.location].view
        if weight.offset + weight.length > len(view):
            raise ModelFolderError(
                f"{found[weight.location].real}",
                expected=f"{weight.length} bytes of {weight.name!r} at {weight.offset}",
                found=f"a file of {len(view)} bytes",
                remedy="it is cut, or of another model: fetch it again",
            )
    return found


def opened(graph: Path, location: str) -> Opened:
    """The sidecar that the graph at ``graph`` calls ``location``. Raises ModelFolderError."""
    check_name(graph, location)
    home = Path(os.path.realpath(graph.parent))
    path = home / location
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device is not even opened
            raise _refused(graph, location, "a file", "something else: a folder, a pipe or a device")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            return _looked_at(graph, location, descriptor, home)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise ModelFolderError(
            f"{path}",
            expected=f"the weights of {graph.name}, which are in a file of this name",
            found="no such file",
            remedy="fetch it too, beside the graph, under this name",
        ) from error
    except (OSError, ValueError) as error:
        raise _refused(
            graph, location, "a file that can be read", f"{getattr(error, 'strerror', None) or error}"
        ) from error


def _looked_at(graph: Path, location: str, descriptor: int, home: Path) -> Opened:
    """What is open, if it is a file, and one that may be read for this graph."""
    known = os.fstat(descriptor)
    real = _real(descriptor, home / location)
    if not stat.S_ISREG(known.st_mode):
        raise _refused(graph, location, "a file", "something else: a folder, a pipe or a device")
    if not (_below(real, home) or _below(real, Path(os.path.realpath(graph)).parent) or _in_cache(real, graph)):
        raise _refused(graph, location, f"a file in {home}", f"a link that leads to {real}")
    if not known.st_size:
        return Opened(location, real, memoryview(b""))
    return Opened(location, real, memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)))


def _real(descriptor: int, path: Path) -> Path:
    """Where an open file lies: by the system's own knowledge on Linux, else by its path once more."""
    if DESCRIPTORS.is_dir():
        return (DESCRIPTORS / str(descriptor)).readlink()
    real = Path(os.path.realpath(path))
    if not os.path.samestat(os.fstat(descriptor), real.stat()):
        raise OSError(f"{path} was replaced while it was opened")
    return real


def _below(path: Path, folder: Path) -> bool:
    return folder in path.parents


def _in_cache(real: Path, graph: Path) -> bool:
    """Whether a graph of a snapshot in huggingface_hub's cache may read ``real``: a blob of its repository, or one of
    the store that repositories share."""
    for snapshots in graph.absolute().parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            cache = Path(os.path.realpath(repository.parent))
            own, shared = cache / repository.name / "blobs", cache / "blobs"
            return DIGEST.fullmatch(real.name) is not None and (_below(real, own) or _below(real, shared))
    return False


def check_name(graph: Path, location: str) -> None:
    """Raises ModelFolderError on a name that could mean a file outside the graph's folder, in any spelling."""
    seen = unicodedata.normalize("NFKC", location)
    for _ in range(3):
        seen = ESCAPED.sub(lambda found: chr(int(found[1], 16)), seen)
    parts = re.split(r"[/\\]", seen)
    climbs = any(part.strip(" .") == "" and ".." in part for part in parts)
    absolute = seen.startswith(("/", "\\", "~")) or ":" in seen
    if climbs or absolute or MEMORY in seen or "\0" in seen or "\\" in seen or not seen.strip(" ./"):
        raise _refused(graph, location, "the name of a file in the graph's own folder", "one that could leave it")


def _refused(graph: Path, location: str, expected: str, found: str) -> ModelFolderError:
    return ModelFolderError(
        f"the weights of {graph}, in {location[:200]!r}",
        expected=expected,
        found=found,
        remedy="do not trust this model, or put its weights beside the graph",
    )


def oddities(weights: Iterable[Tensor], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """What is odd about where weights lie in sidecars of these sizes: bytes that two of them share, bytes of none."""
    found, ends, last = list[str](), dict[str, int](), dict[str, str]()
    outside = [(w.location or "", w.offset, w.length, w.name) for w in weights if w.location is not None and w.length]
    for location, offset, length, name in sorted(outside):
        end = ends.get(location, 0)
        if offset < end:
            found.append(f"{last[location]} and {name} share bytes of {location}")
        elif offset - end >= LEAST_HOLE_BYTES:
            found.append(f"{offset - end} bytes of {location} belong to no weight")
        if offset + length >= end:
            ends[location], last[location] = offset + length, name
    left = {location: size - ends[location] for location, size in sizes.items() if location in ends}
    return (*found, *(f"{n} bytes of {f} belong to no weight" for f, n in left.items() if n >= LEAST_HOLE_BYTES))
