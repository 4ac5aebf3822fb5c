"""push(): a model folder to the Hub, only what passed its gates, in one commit."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from featherbed.check.page import write_pages
from featherbed.errors import ModelFolderError, OutputError
from featherbed.folder import MANIFEST, REPORTS, Manifest, ModelFolder, dump, open_folder, write_text
from featherbed.hub import upload
from featherbed.recipe import REFERENCE


@dataclass(frozen=True)
class Pushed:
    """What went to the Hub, or would: file → bytes, and the commit's address; "" for a dry run."""

    files: dict[str, int]
    address: str


def push(
    folder: Path | str, name: str, variants: Sequence[str] = (), *, private: bool = False, dry_run: bool = False
) -> Pushed:
    """Put ``variants`` of a model folder (all by default), and fp32, on the Hub as ``owner/name``, in one commit.

    Manifest, card and report there are of what is pushed; the folder here stays as it is. ``dry_run`` does everything
    but go to the Hub. Raises ModelFolderError when a variant was not verified, failed a gate, or has a file that is not
    the manifest's; OptionError on an unknown variant or what is no id; OutputError when the Hub refuses.
    """
    model = open_folder(Path(folder))
    names = [model.variant(one).name for one in variants] or list(model.manifest.variants)
    kept = [one for one in model.manifest.variants if one in names or one == REFERENCE]
    _check_gates(model, kept)
    with _place(model.path) as place:
        _staged(model, kept, place).check_hashes()
        found = sorted(path for path in place.rglob("*") if path.is_file())
        files = {path.relative_to(place).as_posix(): path.stat().st_size for path in found}
        message = f"{model.manifest.name}: {', '.join(kept)} by featherbed {model.manifest.version}"
        return Pushed(files, "" if dry_run else upload(place, name, message, private))


@contextmanager
def _place(folder: Path) -> Iterator[Path]:
    """A folder on the same disk, for hard links, gone afterwards. Raises OutputError."""
    try:
        place = Path(tempfile.mkdtemp(prefix=f".{folder.resolve().name}.push-", dir=folder.resolve().parent))
    except OSError as error:
        raise OutputError(
            f"{folder.resolve().parent}",
            expected="permission to put a folder beside the model's, with links to its files",
            found=f"{error.strerror}",
            remedy="copy the model folder to a place of yours",
        ) from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _check_gates(model: ModelFolder, names: Sequence[str]) -> None:
    failed = [one for one in names if model.manifest.variants[one].passed is False]
    unknown = [one for one in names if model.manifest.variants[one].passed is None]
    if failed or unknown:
        good = ",".join(name for name, one in model.manifest.variants.items() if one.passed)
        said = [f"{', '.join(failed)} failed"] if failed else []
        said += [f"{', '.join(unknown)} not verified"] if unknown else []
        raise ModelFolderError(
            f"{model.path}",
            expected="variants that passed their gates",
            found="; ".join(said),
            remedy="verify with --save" + (f", or push those that did: --variants {good}" if good else ""),
        )


def _staged(model: ModelFolder, names: Sequence[str], place: Path) -> ModelFolder:
    """The folder with these variants only, in another place: links to its files, its own manifest, card and report."""
    gone = [v for v in model.manifest.variants.values() if v.name not in names]
    unwanted = {file for variant in gone for file in variant.files}
    unwanted |= {f"{REPORTS}/{variant.name}.json" for variant in gone}
    manifest = _without(model.manifest, [variant.name for variant in gone], unwanted)
    for file in manifest.files:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        _linked(model.path / file, place / file)
    write_text(place / MANIFEST, dump(manifest.to_json()))
    return write_pages(ModelFolder(place, manifest))


def _without(manifest: Manifest, variants: Sequence[str], files: set[str]) -> Manifest:
    return replace(
        manifest,
        variants={name: one for name, one in manifest.variants.items() if name not in variants},
        files={name: record for name, record in manifest.files.items() if name not in files},
    )


def _linked(source: Path, target: Path) -> None:
    """A hard link, or a copy where the disk has none. Raises ModelFolderError when the file is missing."""
    try:
        os.link(source, target)
    except FileNotFoundError as error:
        raise ModelFolderError(
            f"{source}", expected="a file of the manifest", found="no such file", remedy="build the folder again"
        ) from error
    except OSError:
        shutil.copyfile(source, target)
