"""A folder's file once more, in a folder that is being made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from featherbed.errors import ModelFolderError, OutputError


def link(source: Path, target: Path) -> None:
    """A hard link to what ``source`` leads to, or a copy where the disk has none.

    Raises ModelFolderError when the file is missing, OutputError.
    """
    try:
        os.link(source.resolve(strict=True), target)
    except FileNotFoundError as error:
        raise ModelFolderError(
            f"{source}",
            expected="a file of the folder",
            found="a link that leads nowhere" if source.is_symlink() else "no such file",
            remedy="fetch or build the folder again",
        ) from error
    except OSError:
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise OutputError(
                f"{target}", expected="room for a copy", found=f"{error.strerror or error}", remedy="free space"
            ) from error
