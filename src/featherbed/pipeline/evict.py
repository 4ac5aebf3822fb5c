"""evict(): what was fetched from the Hub, out of the cache again, whole or by variants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from featherbed.errors import HubError
from featherbed.folder import MANIFEST, dump, open_folder, write_text
from featherbed.hub.client import default_root
from featherbed.hub.fetch import restricted
from featherbed.hub.names import HubId
from featherbed.hub.store import CHECKPOINT, Record, Store, disk_failed
from featherbed.pipeline.prune import Pruned, prune


def evict(
    wanted: HubId, keep: Sequence[str], *, everything: bool = False, force: bool = False, dry_run: bool = False
) -> Pruned:
    """Take every variant but ``keep`` of a Hub id out of the cache or, without any, all that is there of it.

    ``everything``: where nothing is kept, every commit goes, and not only the revision's. The Hub is not asked; what
    went is fetched, or built, again when it is needed, so that ``fp32`` needs no ``force`` but for a folder that was
    built here. Raises HubError when the cache has nothing of it, OptionError on an unknown variant, OutputError.
    """
    store = Store(default_root())
    records = _records(store, wanted, everything and not keep)
    if not records:
        raise HubError(
            f"Hub id {wanted}", expected="something of it in the cache", found="nothing", remedy="see `featherbed list`"
        )
    with store.lock(wanted.name):
        if not keep:
            return _gone(store, records, dry_run)
        (record,) = records
        if record.kind == CHECKPOINT:
            return prune(store.built(record.repository, record.commit), keep, force=force, dry_run=dry_run)
        return _fewer(store, record, keep, dry_run)


def _records(store: Store, wanted: HubId, everything: bool) -> list[Record]:
    """Of a revision, or of all commits."""
    if everything:
        return [held.record for held in store.held() if held.record.repository == wanted.name]
    commit = wanted.revision if wanted.is_commit else store.revision(wanted.name, wanted.revision)
    record = store.record(wanted.name, commit) if commit else None
    return [record] if record else []


def _gone(store: Store, records: Sequence[Record], dry_run: bool) -> Pruned:
    freed: dict[str, int] = {}
    for record in records:
        home = store.home(record.repository)
        for folder in (store.folder(record.repository, record.commit), store.built(record.repository, record.commit)):
            freed |= {path.relative_to(home).as_posix(): path.stat().st_size for path in _files(folder)}
        if not dry_run:
            store.remove(record.repository, record.commit)
    return Pruned(freed, (), (), ())


def _fewer(store: Store, record: Record, keep: Sequence[str], dry_run: bool) -> Pruned:
    """Manifest and record first, files last: a run that is stopped leaves files too many, and the next takes them."""
    model = open_folder(store.folder(record.repository, record.commit))
    kept = [model.variant(name).name for name in keep]
    left = restricted(model.manifest, kept)
    unwanted = [path for path in _files(model.path) if path.relative_to(model.path).as_posix() not in left.files]
    freed = {path.relative_to(model.path).as_posix(): path.stat().st_size for path in unwanted if path.name != MANIFEST}
    if freed and not dry_run:
        write_text(model.path / MANIFEST, dump(left.to_json()))
        store.finish(replace(record, files={name: one for name, one in record.files.items() if name in left.files}))
        for name in freed:
            try:
                (model.path / name).unlink(missing_ok=True)
            except OSError as error:
                raise disk_failed(model.path / name, error) from error
    left_over = tuple(name for name in freed if name not in model.manifest.files)
    return Pruned(freed, left_over, tuple(v for v in model.manifest.variants if v not in kept), tuple(left.variants))


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file())
