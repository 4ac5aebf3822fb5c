"""built(): the model folder of a checkpoint from the Hub, made in the cache once, a variant at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path

from featherbed.check.page import write_pages
from featherbed.choice import AUTO, PREFERENCE
from featherbed.folder import CARD, MANIFEST, PAGE, REPORTS, ModelFolder, open_folder
from featherbed.hub.store import BUILD_LOCK, Record, Store
from featherbed.pipeline.build import build
from featherbed.pipeline.variants import added, unnamed
from featherbed.progress import Progress


def built(store: Store, record: Record, variant: str, progress: Progress) -> Path:
    """The model folder made of a checkpoint in the cache, with ``variant`` among the others; "auto" wants the best."""
    out = store.built(record.repository, record.commit)
    source, wanted = f"{record.repository}@{record.commit}", PREFERENCE[0] if variant == AUTO else variant
    if _has(out, wanted):  # nobody waits for another variant, and a cache that cannot be written serves too
        return out
    with store.lock(record.repository, BUILD_LOCK):  # who comes second finds it made
        if not (out / MANIFEST).is_file():
            build(source, out, [wanted], progress=progress)
        elif not _has(out, wanted):
            with tempfile.TemporaryDirectory(prefix=f"{out.name}.tmp-", dir=out.parent) as place:
                _move(open_folder(build(source, Path(place) / "more", [wanted], progress=progress).folder), wanted, out)
    return out


def _has(out: Path, variant: str) -> bool:
    """Whether it is made. Raises ModelFolderError on a folder that cannot be read."""
    return (out / MANIFEST).is_file() and variant in open_folder(out).manifest.variants


def _move(source: ModelFolder, name: str, out: Path) -> None:
    """Take a variant and its evidence from one folder into another of the same checkpoint; its files come first."""
    variant = source.variant(name)
    for file in (*variant.files, *variant.again):
        (source.path / file).replace(out / file)
    if source.report_path(name).is_file():
        source.report_path(name).replace(out / REPORTS / f"{name}.json")
    write_pages(unnamed(added(open_folder(out), variant), [CARD, PAGE]))
