"""doctor(): what this machine has, what is wrong in its caches, and how to mend it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import featherbed
from featherbed.check.advice import Advice, advise
from featherbed.check.card import evidence_of
from featherbed.check.machine import machine
from featherbed.check.memory import available_mib, total_mib
from featherbed.errors import InputError
from featherbed.folder import MANIFEST, ModelFolder, open_folder, read_manifest
from featherbed.hub.client import connection, default_root
from featherbed.hub.names import hub_id
from featherbed.hub.store import MODEL_FOLDER, Held, Record, Store, disk_failed, size_bytes
from featherbed.pipeline.pull import plan, pull
from featherbed.progress import Progress, silent
from featherbed.run.prepack import DAMAGED, default_cache, entries
from featherbed.run.session import available_providers

PACKAGES = ("onnxruntime", "onnx", "numpy", "tokenizers", "huggingface_hub", "hf_xet", "pyarrow", "bm25s", "torch")


@dataclass(frozen=True)
class Finding:
    """Something in a cache that is not as it should be: where, what, how to mend it, and what mending takes away first.

    ``broken`` False: only unfinished or useless, nothing would be wrong with it.
    """

    where: str
    what: str
    remedy: str
    remove: tuple[Path, ...]
    size_bytes: int = 0  # of what is taken away
    broken: bool = True
    again: tuple[str, tuple[str, ...]] | None = None  # the Hub id and the variants that mending fetches


def surroundings() -> dict[str, Any]:
    """What this machine has: CPU, memory in MiB, versions, providers, places with their free bytes, the Hub."""
    root = default_root()
    return {
        "featherbed": featherbed.__version__,
        **machine(),
        "memory_mib": round(total_mib()),
        "available_mib": round(available_mib()),
        "providers": list(available_providers()),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "caches": {"models": _place(root), "prepacked": _place(default_cache())},
        "hub": connection(),
    }


def advice(source: str) -> Advice | None:
    """Which variant of a model folder or Hub id this machine should take; None of a checkpoint, which has none yet.

    Of an id only the manifest is fetched, and the evidence of what is here is read. Raises as ``pull`` and ``advise``.
    """
    if hub_id(source) is None:
        model = open_folder(Path(source))
        return advise(model.manifest, {name: evidence_of(model, name) for name in model.manifest.variants}, source)
    known = plan(source)
    if known.published is None:
        return None
    folder = Store(default_root()).folder(known.record.repository, known.record.commit)
    here = ModelFolder(folder, known.published)
    reports = {name: evidence_of(here, name) for name in known.published.variants if here.report_path(name).is_file()}
    return advise(known.published, reports, source)


def examine(progress: Progress = silent) -> Iterator[Finding]:
    """Every fault in the caches; each file of each model is read and compared with its hash."""
    store = Store(default_root())
    for held in store.held():
        yield from _of_model(store, held, progress)
    for path in store.left_over():
        name = path.relative_to(store.root).parts[0].replace("--", "/")
        if store.busy(name):  # it is on its way
            continue
        whole = path.stat().st_size if path.is_file() else size_bytes(path)
        what = "a download that was stopped" if path.is_file() else "a folder that was never whole"
        what = "a record or manifest that cannot be read" if path.suffix == ".json" else what
        yield Finding(name, what, f"`featherbed pull {name}` goes on with it", (path,), whole, broken=False)
    for entry in entries(default_cache()):
        if entry.fault:
            what = f"prepacked weights are useless: {entry.fault}"
            where = entry.source or str(entry.folder)
            damaged = entry.fault == DAMAGED
            yield Finding(where, what, "made anew when they are needed", (entry.folder,), entry.size_bytes, damaged)


@dataclass(frozen=True)
class Model:
    """A model in the cache. ``variants`` are those that are here, of a checkpoint those that were built."""

    repository: str
    commit: str
    revisions: tuple[str, ...]
    kind: str
    variants: tuple[str, ...]
    size_bytes: int
    used: float  # POSIX time
    folder: str


@dataclass(frozen=True)
class Packed:
    """Prepacked weights in the cache: of which file, when last used, and why they are useless ("" where not)."""

    folder: str
    source: str
    size_bytes: int
    used: float  # POSIX time
    fault: str


def models() -> Iterator[Model]:
    """What was fetched from the Hub, by name."""
    store = Store(default_root())
    for held in store.held():
        record = held.record
        model = record.kind == MODEL_FOLDER
        where = held.folder if model else store.built(record.repository, record.commit)
        try:
            variants = tuple(open_folder(where).manifest.variants)
        except InputError:
            variants = ()
        yield Model(
            record.repository, record.commit, held.revisions, record.kind, variants, held.size_bytes, held.used,
            str(held.folder),
        )  # fmt: skip


def packed() -> Iterator[Packed]:
    """Prepacked weights, by key."""
    for entry in entries(default_cache()):
        yield Packed(str(entry.folder), entry.source, entry.size_bytes, entry.used, entry.fault)


def mend(findings: Sequence[Finding], progress: Progress = silent) -> tuple[int, dict[str, InputError]]:
    """Take away what is broken, unfinished or useless, and fetch again what is broken of models.

    Returns the bytes that were taken away, and by Hub id what was refused: it is fetched when it is needed. Raises
    OutputError when the disk refuses.
    """
    taken = 0
    for path in (path for finding in findings for path in finding.remove):
        try:
            if path.is_dir():
                taken += size_bytes(path)
                shutil.rmtree(path)
            elif path.exists():
                taken += path.stat().st_size
                path.unlink()
        except OSError as error:
            raise disk_failed(path, error) from error
    failed: dict[str, InputError] = {}
    for source, variants in dict.fromkeys(one.again for one in findings if one.again):
        try:
            pull(source, variants, progress=progress)
        except InputError as error:  # its manifest may be garbage too; the others are fetched all the same
            failed[source] = error
    return taken, failed


def _of_model(store: Store, held: Held, progress: Progress) -> Iterator[Finding]:
    record = held.record
    name = f"{record.repository}@{record.commit}"
    fetch = f"`featherbed pull {name}` fetches it again"
    again = (name, _variants(store, record))
    for done, (path, file) in enumerate(sorted(record.files.items())):
        progress(f"read {record.repository}", done, len(record.files))
        if not file.matches(held.folder / path):
            there = (held.folder / path).exists()
            found = "its bytes are not those that were fetched" if there else "it is gone"
            gone = (held.folder / path,) if there else ()
            yield Finding(f"{held.folder / path}", found, fetch, gone, file.size_bytes if there else 0, again=again)
    progress(f"read {record.repository}", len(record.files), len(record.files))
    if record.kind == MODEL_FOLDER:
        for manifest in (held.folder / MANIFEST, store.published(record.repository, record.commit)):
            try:
                read_manifest(manifest)
            except InputError as error:
                yield Finding(f"{manifest}", error.found, fetch, (manifest,), again=again)
    built = store.built(record.repository, record.commit)
    if built.is_dir() and not store.busy(record.repository):  # or a variant may be coming to it right now
        try:
            open_folder(built).check_hashes()
        except InputError as error:
            yield Finding(f"{built}", f"{error.subject}: {error.found}", "built again when it is needed", (built,))


def _variants(store: Store, record: Record) -> tuple[str, ...]:
    """The variants whose files a record names, by the published manifest; none where that cannot be read."""
    if record.kind != MODEL_FOLDER:
        return ()
    for path in (
        store.published(record.repository, record.commit),
        store.folder(record.repository, record.commit) / MANIFEST,
    ):
        with suppress(InputError):
            variants = read_manifest(path).variants.values()
            return tuple(one.name for one in variants if record.files.keys() >= set(one.files))
    return ()


def _place(folder: Path) -> dict[str, Any]:
    """A cache's folder, its bytes, what is free on its disk, and whether it can be written."""
    above = next(path for path in (folder, *folder.parents) if path.exists())
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(above).free
    return {"path": str(folder), "size_bytes": size, "free_bytes": free, "writable": os.access(above, os.W_OK)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
