"""push(): a model folder to the Hub, only what passed its gates, in one commit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from featherbed.errors import ModelFolderError, OutputError
from featherbed.folder import ModelFolder, open_folder
from featherbed.hub.client import upload
from featherbed.pipeline.stage import Weights, staged
from featherbed.recipe import REFERENCE


@dataclass(frozen=True)
class Pushed:
    """What went to the Hub, or would: file → bytes, and the commit's address; "" for a dry run."""

    files: dict[str, int]
    address: str


def push(
    folder: Path | str,
    name: str,
    variants: Sequence[str] = (),
    *,
    weights: Weights = Weights.AS_BUILT,
    private: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Put ``variants`` of a model folder (all by default), and fp32, on the Hub as ``owner/name``, in one commit.

    ``weights`` says whether each graph has its weights in its own file or in a sidecar there. Manifest, card and report
    there are of what is pushed; the folder here stays as it is. ``dry_run`` does everything but go to the Hub.
    Raises ModelFolderError when a variant was not verified, failed a gate, or has a file that is not the manifest's;
    OptionError on an unknown variant, what is no id, or more weights than one file holds; OutputError when the Hub
    refuses, or there is no room for files whose weights move.
    """
    model = open_folder(Path(folder))
    names = [model.variant(one).name for one in variants] or list(model.manifest.variants)
    kept = [one for one in model.manifest.variants if one in names or one == REFERENCE]
    _check_gates(model, kept)
    with _place(model.path) as place:
        staged(model, kept, weights, place).check_hashes()
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
