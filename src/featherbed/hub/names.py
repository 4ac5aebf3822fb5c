"""What is a Hub id and what a path; which file names of a repository may become files here. Pure."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from featherbed.errors import HubError, OptionError

COMMIT = re.compile(r"[0-9a-f]{40}")
# names that Windows keeps for devices, whatever stands behind the first dot
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in "123456789")}
LONGEST_PART = 255 - len(".0123456789ab.tmp")  # bytes: what most disks allow, less what we put behind it meanwhile


@dataclass(frozen=True)
class HubId:
    """A repository of the Hub, ``owner/name``, and which revision of it: branch, tag or commit."""

    name: str
    revision: str = "main"

    def __str__(self) -> str:
        """As people type it."""
        return self.name if self.revision == "main" else f"{self.name}@{self.revision}"

    @property
    def is_commit(self) -> bool:
        """Whether the revision names one state for ever."""
        return COMMIT.fullmatch(self.revision) is not None


def hub_id(source: str | Path) -> HubId | None:
    """The id that ``source`` is, or None where it is a path: what exists, or looks like one, is never an id."""
    text = str(source)
    if isinstance(source, Path) and source.is_absolute():
        return None
    if os.path.exists(text):  # Path.exists raises on a name too long for the disk
        return None
    name, _, revision = text.partition("@")
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or text.startswith((".", "~")) or "\\" in text or name.endswith(".onnx"):
        return None
    return HubId(name, revision or "main")


def check_id(name: str) -> None:
    """Raises OptionError on what is no ``owner/name`` to write to."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or "\\" in name or "@" in name:
        raise OptionError(
            f"Hub id {name}", expected="owner/name", found="something else", remedy="for example me/model-onnx"
        )


def check_inside(names: Iterable[str], repository: str) -> None:
    """Raises HubError on a file name that leaves the folder it is put into, on this system or another."""
    for name in names:
        parts = name.split("/")
        if any(ord(c) < 32 or ord(c) == 127 for c in name) or "\\" in name or ":" in name:
            _refuse(name, repository, "a name with a backslash, a colon or a control character")
        if not name or any(part in ("", ".", "..") for part in parts):
            _refuse(name, repository, "a path that is absolute, empty, or climbs")


def check_portable(names: Iterable[str], repository: str) -> None:
    """Raises HubError on file names that some system cannot keep apart, or keeps for itself.

    A name that is the folder of another is one of them, on every system.
    """
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for name in names:
        for part in name.split("/"):
            if part.split(".")[0].lower() in DEVICES:
                _refuse(name, repository, "a name that Windows keeps for a device")
            if part.endswith((".", " ")) or any(c in '<>"|?*' for c in part):
                _refuse(name, repository, "a name that Windows cannot write")
            if len(part.encode("utf-8", "surrogatepass")) > LONGEST_PART:
                _refuse(name[:60] + "…", repository, f"a name of more than {LONGEST_PART} bytes")
        same = unicodedata.normalize("NFC", name).casefold()
        if same in seen:
            _refuse(name, repository, f"a name that is {seen[same]!r} on disks that know no case")
        seen[same] = name
        for folder in PurePosixPath(same).parents:
            folders[str(folder)] = name
    for same, name in seen.items():
        if same in folders:
            _refuse(name, repository, f"a name that is the folder of {folders[same]!r}")


def _refuse(name: str, repository: str, why: str) -> None:
    raise HubError(
        f"file {name!r} of {repository}",
        expected="names below the repository's own folder, which every system can write",
        found=why,
        remedy="do not use this repository, or ask its owner",
    )
