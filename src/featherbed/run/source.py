"""The file of a session: checked before it is read, and held open: what is loaded later is what was loaded first."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featherbed.errors import EngineError, ModelFolderError
from featherbed.run import sidecars, sound
from featherbed.run.prepack import sidecars_of

Bytes = npt.NDArray[np.uint8]
ALIGNMENT = 8
Identity = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Loading:
    """What onnxruntime is handed: a path, or a graph's bytes and its weights (bytes, onnx's type, axes) by name.

    ``files`` are whole sidecars by name instead: weights of less than a byte a number are no array of numpy's.
    """

    model: str | bytes
    weights: dict[str, tuple[Bytes, int, tuple[int, ...]]] = field(default_factory=dict)
    files: dict[str, Bytes] = field(default_factory=dict)


class Source:
    """A graph's file and its sidecars. Safe to use from many threads.

    Nothing is read before ``graph`` or ``loading`` is asked for: a session over prepacked weights may never need it.
    """

    def __init__(self, path: Path, foreign: bool = False, check: Callable[[], None] | None = None) -> None:
        """``foreign``: nobody vouches for the file, so onnxruntime opens none of its sidecars itself.

        ``check`` is called before the file is read. Raises ModelFolderError where there is none.
        """
        self.path, self._foreign, self._check = path, foreign, check
        self._descriptor = sound.open_file(path)
        weakref.finalize(self, os.close, self._descriptor)
        self._known = identity(path, [p.name for p in sidecars_of(path)])
        self._lock = threading.Lock()
        self._graph: sound.Graph | None = None
        self._opened: dict[str, sidecars.Opened] = {}
        self._weights: dict[str, tuple[Bytes, int, tuple[int, ...]]] = {}

    @property
    def graph(self) -> sound.Graph:
        """What was read of the graph. Raises ModelFolderError on what onnxruntime should not see, EngineError when
        the file was replaced since it was opened and nothing of it is held."""
        with self._lock:
            if self._graph is None:
                if identity(self.path, [p.name for p in sidecars_of(self.path)]) != self._known:
                    raise EngineError(
                        f"{self.path}",
                        expected="the file that was opened",
                        found="another in its place",
                        remedy="open the model again",
                    )
                if self._check is not None:
                    self._check()
                graph = sound.read(self.path, self._descriptor)
                self._opened = sidecars.open_all(graph)
                self._known = identity(self.path, list(self._opened))
                self._graph = graph
            return self._graph

    def unchanged(self) -> bool:
        """Whether the files at the paths are still those that were looked at."""
        return identity(self.path, list(self._opened) or [p.name for p in sidecars_of(self.path)]) == self._known

    def loading(self) -> Loading:
        """What to load, the same file every time. Raises as ``graph``."""
        graph = self.graph
        if not graph.outside:
            held = sidecars.DESCRIPTORS / str(self._descriptor)
            return Loading(str(held if held.exists() else self.path))
        home = Path(os.path.realpath(self.path.parent))
        plain = all(one.real == home / name for name, one in self._opened.items())
        if plain and not self._foreign and self.unchanged():
            return Loading(str(self.path))
        if any(sound.BITS.get(weight.kind, 0) % 8 for weight in graph.outside):
            files = {name: np.frombuffer(one.view, np.uint8) for name, one in self._opened.items()}
            return Loading(bytes(graph.view), files=files)
        with self._lock:
            self._weights = self._weights or {
                w.name: (self._bytes(w), w.kind, w.dims) for w in graph.outside if w.name in graph.used
            }
        return Loading(bytes(graph.view), self._weights)

    def _bytes(self, weight: sound.Tensor) -> Bytes:
        """A weight where it is mapped; a copy where it does not lie as its numbers want to."""
        view = self._opened[weight.location or ""].view[weight.offset : weight.offset + weight.length]
        data = np.frombuffer(view, np.uint8)
        return data if data.ctypes.data % ALIGNMENT == 0 else data.copy()


def identity(path: Path, names: list[str]) -> Identity:
    """What tells a graph's file, its sidecars and their folders from others of the same names.

    Raises ModelFolderError where one of them is gone.
    """
    found = []
    try:
        for one in (path, *(path.parent / name for name in names)):
            known, home = one.stat(), one.parent.stat()
            found += [(known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns), (home.st_dev, home.st_ino, 0, 0)]
    except (OSError, ValueError) as error:
        raise ModelFolderError(
            f"{path}", expected="the file that was opened, and its weights", found=f"{error}", remedy="open it again"
        ) from error
    return tuple(found)
