"""prune(): a model folder with fewer variants, and without the files that only the others had."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from featherbed.check.card import render
from featherbed.check.page import write_pages
from featherbed.errors import OptionError, OutputError
from featherbed.folder import (
    CARD,
    MANIFEST,
    PAGE,
    REPORTS,
    Manifest,
    ModelFolder,
    dump,
    file_record,
    graph_name,
    open_folder,
    sidecar_name,
    sync_folder,
    write_text,
)
from featherbed.pipeline.tune import EVIDENCE, PICTURE
from featherbed.pipeline.variants import CONFIG, graphs_of, misnamed_sidecars, name_sidecars
from featherbed.recipe import RECIPES, REFERENCE, TUNED

# of the graphs that we write, by variant
SUFFIXES = {one.name: (one.suffix, one.again) if one.again else (one.suffix,) for one in RECIPES.values()}
SUFFIXES[TUNED] = (f"_{TUNED}",)
SEARCH = (f"{REPORTS}/{EVIDENCE}", f"{REPORTS}/{PICTURE}")  # how ``tuned`` was found
TOLD = (CONFIG, CARD, PAGE)  # files that tell which variants there are


@dataclass(frozen=True)
class Pruned:
    """What went, or would: file → bytes (``freeing``), and the variants gone and kept.

    ``left_over`` are those of the files that no manifest named any more: a run before this one was stopped.
    """

    freed: dict[str, int]
    left_over: tuple[str, ...]
    gone: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def freed_bytes(self) -> int:
        """Bytes of all files that went, or would."""
        return sum(self.freed.values())


def prune(folder: Path | str, keep: Sequence[str], *, force: bool = False, dry_run: bool = False) -> Pruned:
    """Take every variant but those of ``keep`` out of a model folder, with its files and its evidence.

    ``fp32`` goes only by ``force``. ``dry_run`` tells what would go and writes nothing. Stopped at any point, it leaves
    a folder that is whole: what that has too much of, the next run takes away.
    Raises OptionError on an unknown variant, on none, or without ``fp32``; ModelFolderError on evidence that cannot be
    read; OutputError when the folder cannot be changed.
    """
    model = open_folder(Path(folder))
    kept = _kept(model, keep, force)
    gone = tuple(name for name in model.manifest.variants if name not in kept)
    left = _without(model, gone)
    left_over = tuple(sorted({*_left_over(model, left)}))
    names = sorted({*(model.manifest.files.keys() - left.files.keys()), *left_over})
    freed = freeing(model.path, [name for name in names if (model.path / name).is_file()])
    stopped = any(name not in left.files for name in TOLD if (model.path / name).is_file())
    render(ModelFolder(model.path, left))  # evidence that cannot be read is said before anything goes
    if not dry_run and (gone or freed or stopped):
        _carry_out(model.path, left, tuple(freed))
    return Pruned(freed, left_over, gone, kept)


def freeing(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes that the disk gets back with each of these files when all go: 0 where another name of the file stays.

    Of a file with many names among them, the last has its bytes.
    """
    freed: dict[str, int] = {}
    seen: Counter[tuple[int, int]] = Counter()
    for name in names:
        try:
            found = (folder / name).lstat()
        except FileNotFoundError:  # it went meanwhile
            continue
        seen[found.st_dev, found.st_ino] += 1
        freed[name] = found.st_size if seen[found.st_dev, found.st_ino] >= found.st_nlink else 0
    return freed


def _kept(model: ModelFolder, keep: Sequence[str], force: bool) -> tuple[str, ...]:
    """Names of ``keep`` in the folder's order. Raises OptionError."""
    wanted = {model.variant(name).name for name in keep}
    if not wanted:
        raise OptionError(
            "--keep",
            expected=f"some of {', '.join(model.manifest.variants)}",
            found="no variant",
            remedy="name at least one: a model folder without any is of no use",
        )
    if REFERENCE in model.manifest.variants and REFERENCE not in wanted and not force:
        raise OptionError(
            f"--keep {','.join(keep)}",
            expected=f"{REFERENCE} among them: verify and tune measure against it, and no other variant can replace it",
            found=f"a list without {REFERENCE}",
            remedy=f"add {REFERENCE} to --keep, or lose it with --force",
        )
    return tuple(name for name in model.manifest.variants if name in wanted)


def _without(model: ModelFolder, gone: Sequence[str]) -> Manifest:
    """The manifest of what is kept, with a line of history for each variant that goes."""
    before = model.manifest
    left = before.without(gone)
    searched = SEARCH if TUNED in gone else ()
    past = {change.variant for change in before.history} - left.variants.keys()
    # evidence of a variant gone before, which something that ran in between took down again
    stale = {f"{REPORTS}/{name}.json" for name in past}
    files = {name: one for name, one in left.files.items() if name not in searched and name not in stale}
    return replace(left, files=files, history=(*before.history, *map(before.change, gone)))


def _left_over(model: ModelFolder, left: Manifest) -> Iterator[str]:
    """Files of ours on the disk that the manifest does not name: a run was stopped before it had removed them.

    Only of variants that there were: a model_fp16.onnx that somebody else made here is somebody else's. A sidecar whose
    graph is still there is none of them: the graph may read it.
    """
    past = {change.variant for change in left.history} - left.variants.keys()
    names = [graph_name(suffix) for name in past for suffix in SUFFIXES.get(name, ())]
    names = [name for name in names if name not in left.files]
    names += [sidecar_name(name) for name in names]
    names += [f"{REPORTS}/{path.name}" for path in (model.path / REPORTS).glob("*.json") if path.stem in past]
    names += SEARCH if TUNED in past else ()
    yield from (name for name in names if name not in model.manifest.files and (model.path / name).is_file())


def _carry_out(path: Path, left: Manifest, freed: Sequence[str]) -> None:
    """Write ``left`` and remove files, in an order in which the manifest never names what is not there, or is another.

    While card, report and config.json are written it does not name them. Graphs go last: until they do, nothing is
    lost but time. Raises OutputError.
    """
    graphs = graphs_of(left.variants.values())
    evidence = [name for name in freed if name.startswith(f"{REPORTS}/")]
    others = [name for name in freed if name not in evidence]
    names = [*(graph_name(suffix) for suffixes in SUFFIXES.values() for suffix in suffixes), *others]
    misnamed = misnamed_sidecars(path, {Path(name).name: False for name in names} | graphs)
    told = {CARD, PAGE, CONFIG} if misnamed else {CARD, PAGE}
    files = {name: record for name, record in left.files.items() if name not in told}
    try:
        write_text(path / MANIFEST, dump(replace(left, files=files).to_json()))
        sync_folder(path)  # after a power cut, too, the manifest is the one without what goes
        for name in evidence:  # or write_pages would take it down again
            (path / name).unlink(missing_ok=True)
        if misnamed:
            name_sidecars(path, misnamed)
        if CONFIG not in files and (path / CONFIG).is_file():
            files[CONFIG] = file_record(path / CONFIG)
        write_pages(ModelFolder(path, replace(left, files=files)))
        for name in others:
            (path / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path}",
            expected="permission to change files and to remove them",
            found=f"{error.strerror or error}",
            remedy="give it, and prune again: the folder is whole, with files too many",
        ) from error
