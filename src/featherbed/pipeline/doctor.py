"""doctor(): what this machine has, what is wrong in its caches, and how to mend it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
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
from featherbed.hub.fetch import restricted
from featherbed.hub.links import LINKS, Unlinked, all_unlinked
from featherbed.hub.listing import GONE, OTHER, UNREADABLE, digest
from featherbed.hub.names import hub_id
from featherbed.hub.store import MODEL_FOLDER, Held, Record, Store, disk_failed, size_bytes
from featherbed.pipeline.pull import plan, pull
from featherbed.progress import Progress, silent
from featherbed.run.prepack import DAMAGED, default_cache, entries
from featherbed.run.session import available_providers

MADE_ANEW = "made anew when they are needed"
Lock = Callable[[], AbstractContextManager[None]]
PACKAGES = ("onnxruntime", "onnx", "numpy", "tokenizers", "huggingface_hub", "hf_xet", "pyarrow", "bm25s", "torch")


@dataclass(frozen=True)
class Finding:
    """Something in a cache that is not as it should be: where, what, how to mend it, and what mending takes away first.

    ``broken`` False: only unfinished or useless, nothing would be wrong with it. ``still`` says whether it is so yet,
    while ``lock`` is held: another process may have finished or mended it meanwhile.
    """

    where: str
    what: str
    remedy: str
    remove: tuple[Path, ...]
    size_bytes: int = 0  # of what is taken away
    broken: bool = True
    again: tuple[str, tuple[str, ...]] | None = None  # the Hub id and the variants that mending fetches
    lock: Lock = field(default=nullcontext, compare=False, repr=False)
    still: Callable[[], object] = field(default=lambda: True, compare=False, repr=False)


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
    for name in store.repositories():
        if not store.busy(name):  # else it may be on its way
            yield from (_left_over(store, name, path) for path in store.left_over(name))
    if not store.busy(LINKS):
        yield from (_useless(store, one) for one in all_unlinked(store) if one.fault)
    for entry in entries(default_cache()):
        if entry.fault:
            what = f"prepacked weights are useless: {entry.fault}"
            where = entry.source or str(entry.folder)
            damaged = entry.fault == DAMAGED
            yield Finding(where, what, MADE_ANEW, (entry.folder,), entry.size_bytes, damaged)


def _left_over(store: Store, name: str, path: Path) -> Finding:
    what = "a download that was stopped" if path.is_file() else "a folder that was never whole"
    what = "a record or manifest that cannot be read" if path.suffix == ".json" else what
    remedy, size = f"`featherbed pull {name}` goes on with it", size_bytes(path)
    lock = partial(store.still, name)
    return Finding(name, what, remedy, (path,), size, False, None, lock, lambda: path in store.left_over(name))


def _useless(store: Store, one: Unlinked) -> Finding:
    """Of real files in place of links."""
    where, what = one.source or f"{one.folder}", f"its real files are useless: {one.fault}"
    lock = partial(store.lock, LINKS)
    return Finding(
        where, what, MADE_ANEW, (one.folder,), one.size_bytes, False, None, lock, lambda: one in all_unlinked(store)
    )


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
        except (InputError, OSError):
            variants = ()
        yield Model(
            record.repository, record.commit, held.revisions, record.kind, variants, held.size_bytes, held.used,
            str(held.folder),
        )  # fmt: skip


def packed() -> Iterator[Packed]:
    """Prepacked weights, by key."""
    for entry in entries(default_cache()):
        yield Packed(str(entry.folder), entry.source, entry.size_bytes, entry.used, entry.fault)


def unlinked() -> Iterator[Unlinked]:
    """Real files of folders elsewhere that are made of links."""
    yield from all_unlinked(Store(default_root()))


def mend(findings: Sequence[Finding], progress: Progress = silent) -> tuple[int, dict[str, InputError]]:
    """Take away what is broken, unfinished or useless, and fetch again what is broken of models.

    What another process is at work on is waited for, and looked at again before it goes. Returns the
    bytes that were taken away, and by Hub id what was refused: it is fetched when it is needed. Raises OutputError when
    the disk refuses.
    """
    taken = 0
    again: dict[tuple[str, tuple[str, ...]], None] = {}
    for finding in findings:
        with finding.lock():
            if finding.still():
                taken += sum(map(_removed, finding.remove))
                again |= {finding.again: None} if finding.again else {}
    failed: dict[str, InputError] = {}
    for source, variants in again:
        try:
            pull(source, variants, progress=progress)
        except InputError as error:  # its manifest may be garbage too; the others are fetched all the same
            failed[source] = error
    return taken, failed


def _removed(path: Path) -> int:
    """Take a file or folder away; its bytes. Raises OutputError."""
    size = size_bytes(path)
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_failed(path, error) from error
    return size


def _of_model(store: Store, held: Held, progress: Progress) -> Iterator[Finding]:
    record = held.record
    name = f"{record.repository}@{record.commit}"
    again, lock = (name, _variants(store, record)), partial(store.still, record.repository)

    def found(path: Path, what: str, still: Callable[[], object]) -> Finding:
        remedy, remove = f"`featherbed pull {name}` fetches it again", () if what == GONE else (path,)
        return Finding(
            f"{path}", what, remedy, remove, size_bytes(path), True, again, lock,
            lambda: store.record(record.repository, record.commit) and still(),
        )  # fmt: skip

    for done, (file, known) in enumerate(sorted(record.files.items())):
        progress(f"read {record.repository}", done, len(record.files))
        if fault := known.fault(held.folder / file):
            yield found(held.folder / file, fault, partial(known.fault, held.folder / file))
    progress(f"read {record.repository}", len(record.files), len(record.files))
    for path, fault in _wrong_manifests(store, record).items():
        yield found(path, fault, lambda: _wrong_manifests(store, record))
    built = store.built(record.repository, record.commit)
    # while a variant may be coming to it, nobody can say
    if not store.busy(record.repository) and (fault := _broken(built)):
        remedy, size = "built again when it is needed", size_bytes(built)
        yield Finding(f"{built}", fault, remedy, (built,), size, True, None, lock, lambda: _broken(built))


def _wrong_manifests(store: Store, record: Record) -> dict[Path, str]:
    """Of a model folder: which manifest in the cache is not as it was fetched, or does not say the same, and why."""
    published = store.published(record.repository, record.commit)
    here = store.folder(record.repository, record.commit) / MANIFEST
    wrong, read = {}, {}
    for path in (here, published) if record.kind == MODEL_FOLDER else ():
        try:
            read[path] = read_manifest(path)
            if path == published and record.manifest and digest(path, len(record.manifest) == 64) != record.manifest:
                wrong[path] = OTHER
        except (InputError, OSError) as error:
            wrong[path] = error.found if isinstance(error, InputError) else f"{UNREADABLE}: {error.strerror}"
    if not wrong and read and read[here] != restricted(read[published], read[here].variants):
        wrong[here] = "it does not say what the published one says"
    return wrong


def _broken(built: Path) -> str:
    """What is wrong with a folder that was built, "" where nothing is, or where it is not there."""
    try:
        if built.is_dir():
            open_folder(built).check_hashes()
    except InputError as error:
        return f"{error.subject}: {error.found}"
    except OSError as error:
        return f"{UNREADABLE}: {error.strerror or error}"
    return ""


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
    size = size_bytes(folder)
    free = shutil.disk_usage(above).free
    return {"path": str(folder), "size_bytes": size, "free_bytes": free, "writable": os.access(above, os.W_OK)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
