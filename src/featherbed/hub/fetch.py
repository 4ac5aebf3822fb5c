"""What of a repository is needed, and how it gets into the store: planned first, so that sizes can be shown before."""

from __future__ import annotations

import fnmatch
import shutil
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from featherbed.choice import AUTO, choose
from featherbed.errors import HubError, InputError, OptionError, OutputError, UnreachableError
from featherbed.folder import MANIFEST, Manifest, dump, file_record, read_manifest, write_text
from featherbed.hub.cached import cached
from featherbed.hub.client import download
from featherbed.hub.listing import Listing, Remote, check_digest
from featherbed.hub.names import check_portable
from featherbed.hub.store import CHECKPOINT, MODEL_FOLDER, Record, Store, disk_failed, linked, today
from featherbed.progress import Progress

WANTED = ("*.json", "*.txt", "*.safetensors", "1_Pooling/*", "README.md")  # of a checkpoint
REFUSED = ("onnx/*", "openvino/*", "*.bin", "*.pt", "*.pkl", "*.h5", "*.msgpack", "*.ot")
WEIGHTS = "*.safetensors"
AT_ONCE = 4  # files
HERE, CACHED, PARTLY, AWAY = "here", "in huggingface_hub's cache", "partly here", "to fetch"


@dataclass(frozen=True)
class Step:
    """One file that is needed: where it is now, and how many of its bytes are to be fetched."""

    file: Remote
    state: str
    missing_bytes: int


@dataclass(frozen=True)
class Plan:
    """What will be done: the files that are needed of a listing, and the record that will name them.

    Of a model folder: the variants that were ``chosen``, the manifest of those that will be here, with the ones that
    are here already, and the one of all that are ``published``. None for a checkpoint.
    """

    listing: Listing
    record: Record
    steps: tuple[Step, ...]
    chosen: tuple[str, ...] = ()
    manifest: Manifest | None = None
    published: Manifest | None = None

    @property
    def missing_bytes(self) -> int:
        """What is to be fetched."""
        return sum(step.missing_bytes for step in self.steps)


def planned(store: Store, listing: Listing, variants: Sequence[str]) -> Plan:
    """What is needed of a repository: with a manifest, ``variants`` and what they share; else a checkpoint's files.

    No variants are what "auto" means; ("all",) is every one. Variants that are here already stay. The manifest itself
    is fetched for this. Raises HubError on a repository of neither kind, or one whose parts do not fit each other;
    OptionError on an unknown variant.
    """
    listed = listing.find(MANIFEST)
    if listed is None:
        return _of_checkpoint(store, listing)
    published = _published(store, listing, listed)
    sound = any(one.passed is not False for one in published.variants.values())
    auto = choose(published, listing.repository) if sound or not variants or AUTO in variants else ""
    asked = {"all": list(published.variants), AUTO: [auto]}
    chosen = [name for one in variants or [AUTO] for name in asked.get(one, [one])]
    for name in chosen:
        if name not in published.variants:
            raise OptionError(
                f"variant {name!r} of {listing.repository}",
                expected=f"one of {', '.join(published.variants)}",
                found="no such variant",
                remedy="choose one of these"
                + (f", or build it: featherbed build {base}" if (base := published.origin.base_model) else ""),
            )
    for name, one in published.variants.items():
        if not set(one.files) <= published.files.keys():
            raise HubError(
                f"{MANIFEST} of {listing.repository}",
                expected=f"a hash of every file of {name}",
                found="a file without one",
                remedy="ask its owner to build and push it again",
            )
    manifest = restricted(published, [*chosen, *_here(store, listing, published)])
    files = [_announced(listing, manifest, name) for name in manifest.files]
    record = replace(_record(listing, MODEL_FOLDER, auto), manifest=listed.digest)
    bare = _plan(store, listing, record, files)
    return replace(bare, chosen=tuple(dict.fromkeys(chosen)), manifest=manifest, published=published)


def restricted(manifest: Manifest, names: Iterable[str]) -> Manifest:
    """The manifest with these variants only, and without the files that only the others have, or that are there again:
    nothing is fetched twice."""
    return manifest.without([name for name in manifest.variants if name not in set(names)]).once()


def fetch(store: Store, plan: Plan, progress: Progress) -> Path:
    """Do what was planned; returns the folder, which was never half-written: the record comes last.

    Only one process fetches a repository at a time; what another has fetched meanwhile is taken. Raises HubError when
    the Hub refuses or what came is not what it announced, OutputError when the disk is full or fails.
    """
    repository, commit = plan.listing.repository, plan.listing.commit
    with store.lock(repository):
        folder = store.folder(repository, commit)
        # where each is was planned without the lock: another process may have fetched some since
        if missing := sum(_step(store, plan.listing, step.file).missing_bytes for step in plan.steps):
            _check_room(store.home(repository), missing)
        _get(store, plan, _Told(progress, f"fetch {repository}", sum(step.file.size_bytes for step in plan.steps)))
        record, before = plan.record, store.record(repository, commit)
        if plan.manifest is not None and plan.published is not None:
            _check_small(folder, plan)
            # another process may have fetched others since this was planned
            here = _here(store, plan.listing, plan.published)
            manifest = restricted(plan.published, [*plan.manifest.variants, *here])
            others = before.files if before else {}
            record = replace(record, files={n: f for n, f in (others | record.files).items() if n in manifest.files})
            write_text(folder / MANIFEST, dump(manifest.to_json()))
        elif before is not None and not before.whole and before.files.keys() != record.files.keys():
            store.forget_built(repository, commit)  # it was made of less than there is
        return store.finish(record)


def _get(store: Store, plan: Plan, told: _Told) -> None:
    """All files in their places, some at a time. Raises as ``fetch``, and what the Progress raised."""
    alike: dict[str, list[Remote]] = {}  # files of one content grow in one place: one after the other
    for step in plan.steps:
        alike.setdefault(step.file.digest, []).append(step.file)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(_have_all, store, plan.listing, files, told) for files in alike.values()]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            told.stopped.set()  # those that are under way end at their next bytes, and keep what has arrived
            pool.shutdown(cancel_futures=True)
            if told.failed is not None:  # the caller's own: no error of the Hub's
                raise told.failed from None
            raise


def _of_checkpoint(store: Store, listing: Listing) -> Plan:
    files = [f for f in listing.files if _matches(f.path, WANTED) and not _matches(f.path, REFUSED)]
    if not listing.whole:  # without its pooling or prompts it would give other vectors, and nobody would know
        raise UnreachableError(
            f"Hub id {listing.repository}",
            expected="all files of the checkpoint",
            found="the Hub cannot be asked, and huggingface_hub's cache may have only a part of them",
            remedy="pull it once with a network",
        )
    if not any(_matches(f.path, (WEIGHTS,)) for f in files):
        kinds = sorted({Path(f.path).suffix for f in listing.files if f.size_bytes > 2**20})
        raise HubError(
            f"Hub id {listing.repository}",
            expected=f"a model folder with {MANIFEST}, or a checkpoint with safetensors",
            found=f"neither{': ' + ', '.join(kinds) if kinds else ''}",
            remedy="ask for the repository of the original weights; pickled ones (.bin, .pt) can run code: never read",
        )
    return _plan(store, listing, _record(listing, CHECKPOINT), files)


def _record(listing: Listing, kind: str, auto: str = "") -> Record:
    return Record(listing.repository, listing.commit, listing.endpoint, kind, auto, today(), listing.whole)


def _plan(store: Store, listing: Listing, record: Record, files: list[Remote]) -> Plan:
    check_portable([*(file.path for file in files), MANIFEST], listing.repository)
    steps = tuple(_step(store, listing, file) for file in files)
    return Plan(listing, replace(record, files={f.path: f for f in files}), steps)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _step(store: Store, listing: Listing, file: Remote) -> Step:
    """Where a file seems to be, by its size: bytes are compared when it is taken."""
    place = store.folder(listing.repository, listing.commit) / file.path
    if place.is_file() and place.stat().st_size == file.size_bytes:
        return Step(file, HERE, 0)
    if any(path.is_file() for path in _others(store, listing, file)):
        return Step(file, HERE, 0)
    found = cached(listing, file)
    if found is not None and found.stat().st_size == file.size_bytes:
        return Step(file, CACHED, 0)
    part = store.partial(listing.repository, file.digest)
    begun = part.stat().st_size if part.is_file() else 0
    return (
        Step(file, PARTLY, file.size_bytes - begun)
        if 0 < begun <= file.size_bytes
        else Step(file, AWAY, file.size_bytes)
    )


def _others(store: Store, listing: Listing, file: Remote) -> Iterable[Path]:
    """The same file under other commits of the repository."""
    for path in store.home(listing.repository).glob("*.json"):
        record = store.record(listing.repository, path.stem)
        if record is not None and record.commit != listing.commit:
            folder = store.folder(listing.repository, record.commit)
            yield from (folder / name for name, known in record.files.items() if known.digest == file.digest)


def _published(store: Store, listing: Listing, file: Remote) -> Manifest:
    """The repository's own manifest, fetched if need be and kept beside the folder; the folder's is of what is here."""
    place = store.published(listing.repository, listing.commit)
    if file.matches(place):
        return read_manifest(place)
    with store.lock(listing.repository):
        if not file.matches(place):  # or another process or thread was faster
            other = cached(listing, file)
            if other is not None and file.matches(other):
                linked(other, store.partial(listing.repository, file.digest))  # ours alone while we hold the lock
            part = _arrived(store, listing, file, _Told(lambda *_: None, "", 0))
            try:
                part.replace(place)
            except OSError as error:
                raise disk_failed(place, error) from error
    return read_manifest(place)


def _announced(listing: Listing, manifest: Manifest, name: str) -> Remote:
    """The file of the listing that a manifest names. Raises HubError when it is another, or none."""
    file, record = listing.find(name), manifest.files[name]
    check_digest(record.sha256, listing.repository)
    if file is None and not listing.whole:
        return Remote(name, record.size_bytes, record.sha256)  # to be fetched, when there is a network
    other = file is not None and len(file.digest) == len(record.sha256) and file.digest != record.sha256
    if file is None or other or file.size_bytes != record.size_bytes:
        raise HubError(
            f"file {name} of {listing.repository}",
            expected=f"{record.size_bytes} bytes, sha256 {record.sha256[:12]}…, as {MANIFEST} there says",
            found="no such file" if file is None else f"{file.size_bytes} bytes, hash {file.digest[:12]}…",
            remedy="the repository was changed after it was pushed: ask its owner, or take another revision",
        )
    return file


class _Told:
    """Bytes of all files together, told to a Progress; whether to stop, and with what the Progress failed."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self.stopped = threading.Event()
        self.failed: Exception | None = None
        self._progress, self._stage, self._total, self._done = progress, stage, total, 0
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            if not self.stopped.is_set():
                try:
                    self._progress(self._stage, self._done, self._total)
                except Exception as error:  # anything at all: it is the caller's
                    self.failed = error
                    self.stopped.set()
        self.pause(0)

    def pause(self, seconds: float) -> None:
        """Wait, unless the others stop. Raises OutputError then."""
        if self.stopped.wait(seconds) if seconds else self.stopped.is_set():
            raise OutputError(self._stage, expected="all files", found="one that failed", remedy="see its own error")


def _have_all(store: Store, listing: Listing, files: Sequence[Remote], told: _Told) -> None:
    first = store.folder(listing.repository, listing.commit) / files[0].path
    for file in files:
        _have(store, listing, file, told, first)


def _have(store: Store, listing: Listing, file: Remote, told: _Told, alike: Path) -> None:
    """A file in its place, every byte compared: taken from where it is (``alike`` has the same bytes), or fetched.

    Raises HubError, OutputError.
    """
    place = store.folder(listing.repository, listing.commit) / file.path
    if file.matches(place):
        told(file.size_bytes)
        return
    for other in (alike, *_others(store, listing, file), cached(listing, file)):
        if other is not None and file.matches(other):
            part = store.partial(listing.repository, file.digest)
            linked(other, part)
            if file.matches(part):
                told(file.size_bytes)
                store.put(listing, file, part)
                return
    store.put(listing, file, _arrived(store, listing, file, told))


def _arrived(store: Store, listing: Listing, file: Remote, told: _Told) -> Path:
    """The whole file in its partial place. What was there may have been wrong, so there is one try from the start."""
    part = store.partial(listing.repository, file.digest)
    for resumed in (True, False):
        told(part.stat().st_size if part.is_file() else 0)
        download(listing, file, part, told, told.pause)
        if file.matches(part):
            return part
        told(-file.size_bytes)
        part.unlink()
        if not resumed:
            break
    raise HubError(
        f"file {file.path} of {listing.repository}",
        expected=f"{file.size_bytes} bytes with the hash {file.digest[:12]}…, as the Hub lists them",
        found="as many other ones, twice",
        remedy="a proxy or mirror between here and the Hub changes files: try without it; nothing was kept",
    )


def _check_room(place: Path, missing_bytes: int) -> None:
    free = shutil.disk_usage(place).free
    if free < missing_bytes:
        raise OutputError(
            f"{place}",
            expected=f"room for {missing_bytes / 1e6:.0f} MB",
            found=f"{free / 1e6:.0f} MB free",
            remedy="free space, take fewer variants, or set FEATHERBED_CACHE (or HF_HOME) to another disk",
        )


def _check_small(folder: Path, plan: Plan) -> None:
    """Files that the Hub lists by git's hash are compared with the manifest's sha256 too."""
    assert plan.manifest is not None
    small = [name for name, file in plan.record.files.items() if len(file.digest) != 64]
    for name in small:
        if file_record(folder / name) != plan.manifest.files[name]:
            raise HubError(
                f"file {name} of {plan.listing.repository}",
                expected=f"what {MANIFEST} there says",
                found="another file, as the Hub has it",
                remedy="the repository was changed after it was pushed: ask its owner, or take another revision",
            )


def _here(store: Store, listing: Listing, published: Manifest) -> Iterable[str]:
    """The variants that were fetched before."""
    folder = store.folder(listing.repository, listing.commit)
    known = store.record(listing.repository, listing.commit)
    try:
        return read_manifest(folder / MANIFEST).variants if known else ()
    except InputError:  # it is written anew, with all whose files are here
        return [v.name for v in published.variants.values() if known and known.files.keys() >= set(v.files)]
