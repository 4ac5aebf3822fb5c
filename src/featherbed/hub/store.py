"""What was fetched, in the user's cache: real files, no links, so that onnxruntime takes a sidecar for the model's own.

    <root>/owner--name/<commit>/           the repository's files, those that were wanted
                       <commit>.json       the record: what came from where; a folder without one is not trusted
                       <commit>.published.json  of a model folder: its manifest as it is there, with all variants
                       <commit>-built/     the model folder that was made of a checkpoint
                       partial/<digest>    what has arrived of a file, to go on with
                       revisions.json      which commit a branch or tag was when it was last asked for
                       .lock               held by the process that fetches, as .build-lock, .revisions-lock are

A file is put into its place by a rename after every byte was hashed, the record after all files: who finds a record
finds what it names. Its time of change is when the model was last used.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from featherbed.errors import HubError, InputError, OutputError
from featherbed.folder import MANIFEST, dump, read_manifest, sync_folder, write_text
from featherbed.hub.listing import Listing, Remote, check_digest, checked
from featherbed.hub.names import COMMIT, check_inside
from featherbed.spec import read_json

BUILT, PUBLISHED = "-built", ".published.json"
PARTIAL, REVISIONS = "partial", "revisions.json"
LOCK, BUILD_LOCK, REVISIONS_LOCK = ".lock", ".build-lock", ".revisions-lock"
LEAST_LINKED_BYTES = 2**20
MODEL_FOLDER, CHECKPOINT = "model folder", "checkpoint"


@dataclass(frozen=True)
class Record:
    """What came from where: files of ``repository`` at ``commit`` that are here, with the hashes they were checked by.

    ``kind`` is MODEL_FOLDER or CHECKPOINT; ``auto`` the variant that "auto" means among all that are published. Not
    ``whole``: taken without asking the Hub, which may have more that is needed. ``manifest`` is the hash of the
    repository's own manifest, "" of a checkpoint and in records of before it was noted.
    """

    repository: str
    commit: str
    endpoint: str
    kind: str
    auto: str = ""
    date: str = ""  # 2026-11-22, UTC: when the last file came
    whole: bool = True
    files: dict[str, Remote] = field(default_factory=dict)
    manifest: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        files = {name: {"size_bytes": f.size_bytes, "digest": f.digest} for name, f in sorted(self.files.items())}
        return {**vars(self), "files": files}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Record:
        """Of ``to_json``. Raises KeyError, TypeError or ValueError on something else."""
        words = {key: str(raw[key]) for key in ("repository", "commit", "endpoint", "kind", "auto", "date")}
        files = {name: checked(name, one["size_bytes"], one["digest"]) for name, one in raw["files"].items()}
        return cls(**words, whole=bool(raw["whole"]), files=files, manifest=str(raw.get("manifest", "")))


@dataclass(frozen=True)
class Held:
    """One commit of a repository in the store: its folder, the bytes in it, when it was last used (POSIX time)."""

    record: Record
    folder: Path
    size_bytes: int
    used: float
    revisions: tuple[str, ...]


@dataclass(frozen=True)
class Store:
    """The folder in which fetched repositories are kept."""

    root: Path

    def home(self, repository: str) -> Path:
        """Where all of a repository is. ``owner/name`` holds no ``--``: the Hub forbids it."""
        return self.root / repository.replace("/", "--")

    def folder(self, repository: str, commit: str) -> Path:
        """Where the files of a commit are."""
        return self.home(repository) / commit

    def built(self, repository: str, commit: str) -> Path:
        """Where the model folder made of a checkpoint is."""
        return self.home(repository) / f"{commit}{BUILT}"

    def published(self, repository: str, commit: str) -> Path:
        """Where the repository's own manifest is, which names variants that are not here too."""
        return self.home(repository) / f"{commit}{PUBLISHED}"

    def partial(self, repository: str, digest: str) -> Path:
        """Where a file grows until it is whole. Raises HubError on what is no hash."""
        check_digest(digest, repository)
        return self.home(repository) / PARTIAL / digest

    def record(self, repository: str, commit: str) -> Record | None:
        """The record of a commit; None where there is none that can be read, and the commit is fetched again.

        One that is of something else, or names files outside its folder, is none: what it names may be taken away.
        """
        path = self._record(repository, commit)
        try:
            found = Record.from_json(read_json(path, HubError)) if path.is_file() else None
            if found is not None:
                check_inside(found.files, repository)
        except (HubError, OSError, KeyError, TypeError, ValueError, AttributeError):
            return None
        return found if found is not None and (found.repository, found.commit) == (repository, commit) else None

    def revision(self, repository: str, revision: str) -> str | None:
        """The commit that a branch or tag was when it was last asked for."""
        return self._revisions(repository).get(revision)

    def remember(self, repository: str, revision: str, commit: str) -> None:
        """Note which commit a branch or tag is; in a cache that cannot be written nothing is noted."""
        if self.revision(repository, revision) == commit:
            return
        # nobody should fail for want of a note: it counts when the Hub cannot be asked
        with suppress(OutputError), self.lock(repository, REVISIONS_LOCK):
            known = self._revisions(repository) | {revision: commit}
            write_text(self.home(repository) / REVISIONS, dump(known))

    def put(self, listing: Listing, file: Remote, part: Path) -> None:
        """Move a whole file, checked by its hash, into its place. Raises OutputError."""
        place = self.folder(listing.repository, listing.commit) / file.path
        self._made(place.parent)
        try:
            if place.is_dir():  # in a file's place: nobody's but ours to take away
                shutil.rmtree(place)
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
            part.replace(place)
        except OSError as error:
            raise disk_failed(place, error) from error

    def finish(self, record: Record) -> Path:
        """Write the record, after all its files; returns their folder. Raises OutputError."""
        folder = self.folder(record.repository, record.commit)
        with suppress(OSError):  # a cache on a file system without fsync is a cache still
            for place in {folder, *((folder / name).parent for name in record.files)}:
                sync_folder(place)
        write_text(self._record(record.repository, record.commit), dump(record.to_json()))
        return folder

    def used(self, record: Record) -> None:
        """Note that a commit was used just now; in a cache that cannot be written nothing is noted."""
        with suppress(OSError):
            os.utime(self._record(record.repository, record.commit))

    @contextmanager
    def lock(self, repository: str, name: str = LOCK) -> Iterator[None]:
        """One process at a time fetches a repository, builds from it (BUILD_LOCK), or notes revisions (REVISIONS_LOCK).

        The system lets go of the lock of a process that is killed.
        """
        from filelock import FileLock  # it brings asyncio, and most who open a model fetch nothing

        self._made(self.home(repository))
        lock = FileLock(self.home(repository) / name)
        try:
            lock.acquire()
        except OSError as error:
            raise disk_failed(self.home(repository), error) from error
        try:
            yield
        finally:
            lock.release()

    def forget_built(self, repository: str, commit: str) -> None:
        """Take away what was built of a checkpoint, its manifest first. Raises OutputError."""
        try:
            (self.built(repository, commit) / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.built(repository, commit), ignore_errors=True)
        except OSError as error:
            raise disk_failed(self.built(repository, commit), error) from error

    @contextmanager
    def still(self, repository: str) -> Iterator[None]:
        """Nobody fetches a repository, nor builds from it: both locks, in the order in which a build takes them."""
        with self.lock(repository, BUILD_LOCK), self.lock(repository):
            yield

    def busy(self, repository: str) -> bool:
        """Whether a process is fetching this repository, or building from it, right now."""
        from filelock import FileLock, Timeout

        for path in (self.home(repository) / name for name in (LOCK, BUILD_LOCK)):
            try:
                if path.is_file():  # nobody who only looks makes a lock
                    with FileLock(path, timeout=0):
                        pass
            except Timeout:
                return True
            except OSError:  # another user's cache: nobody can say, and nothing of it can be taken away either
                return True
        return False

    def held(self) -> Iterator[Held]:
        """Everything that has a record, by name."""
        for path in (path for home in inside(self.root) for path in inside(home)):
            repository = path.parent.name.replace("--", "/")
            found = path.suffix == ".json" and COMMIT.fullmatch(path.stem)
            record = self.record(repository, path.stem) if found else None
            if record is not None:
                folder = self.folder(repository, record.commit)
                names = tuple(sorted(r for r, c in self._revisions(repository).items() if c == record.commit))
                size = size_bytes(folder) + size_bytes(self.built(repository, record.commit))
                with suppress(OSError):  # it went meanwhile
                    yield Held(record, folder, size, path.stat().st_mtime, names)

    def repositories(self) -> Iterator[str]:
        """Names of all repositories of which there is anything, a record or not."""
        yield from (path.name.replace("--", "/") for path in inside(self.root) if "--" in path.name and path.is_dir())

    def left_over(self, repository: str) -> Iterator[Path]:
        """What no record names: files that have not arrived whole, folders whose fetching was stopped."""
        home = self.home(repository)
        yield from (path for path in inside(home / PARTIAL) if path.is_file())
        yield from (path for path in below(home) if ".tmp-" in path.name)
        for path in inside(home):
            commit = path.name.removesuffix(PUBLISHED if path.is_file() else BUILT).removesuffix(".json")
            folder = path.is_dir() and path.name != PARTIAL and not path.name.startswith(".")
            ours = folder or COMMIT.fullmatch(commit)
            if ours and self.record(repository, commit) is None and not _reads(path):
                yield path

    def remove(self, repository: str, commit: str) -> None:
        """Take a commit away, its record first. Raises OutputError."""
        try:
            self._record(repository, commit).unlink(missing_ok=True)
            self.published(repository, commit).unlink(missing_ok=True)
            for folder in (self.folder(repository, commit), self.built(repository, commit)):
                if folder.exists():
                    shutil.rmtree(folder)
        except OSError as error:
            raise disk_failed(self.home(repository), error) from error

    def _record(self, repository: str, commit: str) -> Path:
        return self.home(repository) / f"{commit}.json"

    def _revisions(self, repository: str) -> dict[str, str]:
        path = self.home(repository) / REVISIONS
        try:
            found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        except (OSError, ValueError):
            found = {}  # asked for anew, when there is a network
        commits = found.items() if isinstance(found, dict) else ()
        return {str(k): str(v) for k, v in commits if COMMIT.fullmatch(str(v))}

    def _made(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_failed(folder, error) from error


def today() -> str:
    """The date, UTC."""
    return datetime.now(UTC).date().isoformat()


def _reads(path: Path) -> bool:
    """Whether it is a published manifest that can be read: a plan that nobody carried out yet."""
    try:
        return path.name.endswith(PUBLISHED) and bool(read_manifest(path).variants)
    except InputError:
        return False


def linked(source: Path, target: Path) -> None:
    """A hard link in place of what is at ``target``; a copy of a small file, or where the disk has no links.

    Small files are those that people edit, and an edit would be one of the other name too. Raises OutputError.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if source.stat().st_size < LEAST_LINKED_BYTES:
            shutil.copyfile(source, target)
            return
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
    except OSError as error:
        raise disk_failed(target, error) from error


def inside(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing where there is none, or none that we may look into."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def below(folder: Path) -> list[Path]:
    """All files below a folder, as ``inside``: others may take some away, or the folder, while we look."""
    return [Path(place, name) for place, _, names in os.walk(folder) for name in sorted(names)]


def size_bytes(place: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 of what is not there, or not there any more."""
    total = 0
    for path in (place, *below(place)):
        with suppress(OSError):
            found = path.lstat()
            total += 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return total


def disk_failed(place: Path, error: OSError) -> OutputError:
    """What to raise when a file cannot be written."""
    return OutputError(
        f"{place}",
        expected="room and permission to write there",
        found=f"{error.strerror or error}",
        remedy="free space, or set FEATHERBED_CACHE to another place; what has arrived is kept",
    )
