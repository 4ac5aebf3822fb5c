"""Real files of a model folder elsewhere that is made of links, such as a snapshot in huggingface_hub's own cache.

    <root>/links/<key>/         its files, and which folder they are of
    <root>/links/<key>.tmp-PID  what a process was making

onnxruntime since 1.24 refuses a sidecar that is a link out of its graph's folder; huggingface_hub since 1.32 has such.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from featherbed.errors import InputError
from featherbed.folder import MANIFEST, ModelFolder, dump, open_folder, publish, sidecar_name, write_text
from featherbed.hub.store import Store, inside, linked, size_bytes

LINKS, OF = "links", ".of"  # the folder of them all; in each, the path that it is of


@dataclass(frozen=True)
class Unlinked:
    """A folder of real files: which folder it is of, its bytes, and why it is useless ("" where it is not)."""

    folder: Path
    source: str
    size_bytes: int
    fault: str


def leads_out(model: ModelFolder) -> bool:
    """Whether a sidecar is a link out of the folder that its graph is in."""
    data = [model.path / name for name in model.manifest.files if name.endswith(sidecar_name(".onnx"))]
    graphs = [path.with_name(path.name.removesuffix("_data")) for path in data]
    return any(path.resolve().parent != graph.resolve().parent for path, graph in zip(data, graphs, strict=True))


def unlinked(store: Store, model: ModelFolder) -> Path:
    """A folder of real files with the content of one that is made of links (``leads_out``).

    Hard links cost nothing; where the disk is another one, files are copied. Raises OutputError.
    """
    place = store.root / LINKS / _key(model)
    if (place / MANIFEST).is_file():
        return place
    with store.lock(LINKS):  # which is a name like a repository's: one process or thread at a time
        if (place / MANIFEST).is_file():
            return place
        with publish(place) as folder:
            for name in (*model.manifest.files, MANIFEST):
                linked((model.path / name).resolve(), folder / name)
            write_text(folder / OF, f"{model.path.resolve()}\n")
    return place


def all_unlinked(store: Store) -> Iterator[Unlinked]:
    """All that there are, whole or not. Whoever holds the lock of LINKS knows that nobody is making one."""
    for folder in inside(store.root / LINKS):
        if folder.is_dir() and not folder.name.startswith("."):
            source, fault = _source(folder)
            yield Unlinked(folder, source, size_bytes(folder), fault)


def _source(folder: Path) -> tuple[str, str]:
    """(path of the folder that one is of, why it is useless)."""
    if not (folder / MANIFEST).is_file() or "." in folder.name:
        return "", "it was never whole"
    source = ""
    with suppress(OSError, ValueError):
        source = (folder / OF).read_text("utf-8").removesuffix("\n")
    try:
        same = bool(source) and _key(open_folder(Path(source))) == folder.name
    except (InputError, OSError):
        return source, "its folder is gone"
    return source, "" if same else "its folder is another one now" if source else "nobody knows of which folder it is"


def _key(model: ModelFolder) -> str:
    known = f"{model.path.resolve()}\n{dump(model.manifest.to_json())}"
    return hashlib.sha256(known.encode()).hexdigest()[:32]
