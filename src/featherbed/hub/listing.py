"""What a repository holds at a commit: names, sizes, and the hashes that decide whether a file is the one meant."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from featherbed.errors import HubError

BLOCK_BYTES = 2**20
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
OTHER, GONE, UNREADABLE = "its bytes are not those that were fetched", "it is gone", "it cannot be read"


@dataclass(frozen=True)
class Remote:
    """A file as the Hub lists it. ``digest`` is its sha256 for large files, git's sha1 of the blob for the others."""

    path: str
    size_bytes: int
    digest: str

    def matches(self, file: Path) -> bool:
        """Whether the file on disk is this one: size first, then every byte. False where there is none to read."""
        return not self.fault(file)

    def fault(self, file: Path) -> str:
        """Why the file on disk is not this one, "" where it is."""
        try:
            if not file.is_file():
                return OTHER if file.exists() else GONE
            same = file.stat().st_size == self.size_bytes and digest(file, len(self.digest) == 64) == self.digest
        except FileNotFoundError:  # it went while we looked
            return GONE
        except OSError as error:
            return f"{UNREADABLE}: {error.strerror or error}"
        return "" if same else OTHER


@dataclass(frozen=True)
class Listing:
    """The files of ``repository`` at ``commit``, as ``endpoint`` told: all of them, or not the ``whole`` list."""

    repository: str
    commit: str
    endpoint: str
    files: tuple[Remote, ...]
    whole: bool = True

    def find(self, path: str) -> Remote | None:
        """The file at ``path``, or None."""
        return next((file for file in self.files if file.path == path), None)


def checked(path: object, size_bytes: object, digest: object) -> Remote:
    """A file as a server listed it. Raises ValueError on what is no name, size or hash: hashes name files here."""
    named = isinstance(path, str) and path == path.encode("utf-8", "ignore").decode()  # no half of a character
    sized = isinstance(size_bytes, int) and not isinstance(size_bytes, bool) and size_bytes >= 0
    if not (named and sized and isinstance(digest, str) and DIGEST.fullmatch(digest)):
        raise ValueError(f"a file listed as {path!r}, {size_bytes!r} bytes, hash {digest!r}")
    assert isinstance(path, str)
    assert isinstance(size_bytes, int)
    return Remote(path, size_bytes, digest)


def check_digest(digest: str, repository: str) -> None:
    """Raises HubError on what is no hash: a manifest may say anything, and hashes name files here."""
    if not DIGEST.fullmatch(digest):
        raise HubError(
            f"a file of {repository}",
            expected="a hash of 40 or 64 digits",
            found=repr(digest),
            remedy="do not use this repository, or ask its owner",
        )


def digest(file: Path, large: bool) -> str:
    """sha256 of a file's bytes; git's hash of a blob, sha1 of ``blob SIZE NUL bytes``, where ``large`` is False."""
    # git names blobs by sha1: there is nothing better to compare a small file with
    sha = hashlib.sha256() if large else hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            sha.update(block)
    return sha.hexdigest()
