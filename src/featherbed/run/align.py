"""Saved weights moved to addresses that kernels may read them at.

onnxruntime 1.31 writes the weights of an optimized graph, and what kernels made of them, one behind the other. Some
kernels read 64 bytes at a time from where 64 divides the address: behind a weight of another length they read wrongly,
or end the process (docs/lab.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

BYTES = 64
PREPACKED = "prepacked_"  # keys of external data: "kernel|offset;length;hash|offset;length;hash"


def align(model: Any, folder: Path) -> bool:
    """Lay out the data file of an optimized graph in ``folder`` anew where an offset is none; whether it was.

    ``model`` is the graph's ModelProto, and is changed with it: the caller writes it. While it lasts the data is there
    twice.
    """
    weights = [weight for weight in model.graph.initializer if weight.external_data]
    if not any(offset % BYTES for weight in weights for offset, _ in _places(weight)):
        return False
    source = folder / _said(weights[0], "location").value
    target = source.with_name(source.name + ".tmp")
    with source.open("rb") as old, target.open("wb") as new:
        for weight in weights:
            for entry in weight.external_data:
                if entry.key == "offset":
                    entry.value = str(_moved(old, new, int(entry.value), int(_said(weight, "length").value)))
                elif entry.key.startswith(PREPACKED):
                    kernel, *places = entry.value.split("|")
                    moved = [
                        f"{_moved(old, new, int(offset), int(length))};{length};{digest}"
                        for offset, length, digest in (place.split(";") for place in places)
                    ]
                    entry.value = "|".join([kernel, *moved])
    target.replace(source)
    return True


def _said(weight: Any, key: str) -> Any:
    return next(entry for entry in weight.external_data if entry.key == key)


def _places(weight: Any) -> Iterator[tuple[int, int]]:
    """(offset, length) of a weight's bytes, and of those that kernels made of them."""
    yield int(_said(weight, "offset").value), int(_said(weight, "length").value)
    for entry in weight.external_data:
        if entry.key.startswith(PREPACKED):
            for place in entry.value.split("|")[1:]:
                offset, length, _ = place.split(";")
                yield int(offset), int(length)


def _moved(old: BinaryIO, new: BinaryIO, offset: int, length: int) -> int:
    """Copy bytes to the next address that BYTES divides; returns that."""
    new.write(b"\0" * (-new.tell() % BYTES))
    at = new.tell()
    old.seek(offset)
    shutil.copyfileobj(_Part(old, length), new, 2**24)
    return at


class _Part:
    """The next ``length`` bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file, self._left = file, length

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes, none at the end."""
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data
