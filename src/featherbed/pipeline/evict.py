"""evict(): what was fetched from the Hub, out of the cache again, whole or by variants."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

from featherbed.errors import HubError
from featherbed.folder import MANIFEST, dump, open_folder, write_text
from featherbed.hub.client import default_root
from featherbed.hub.fetch import restricted
from featherbed.hub.names import HubId
from featherbed.hub.store import CHECKPOINT, Record, Store, below, disk_failed
from featherbed.pipeline.prune import Pruned, freeing, prune


def evict(
    wanted: HubId, keep: Sequence[str], *, everything: bool = False, force: bool = False, dry_run: bool = False
) -> Pruned:
    """Take every variant but ``keep`` of a Hub id out of the cache or, without any, all that is there of it.

    ``everything``: where nothing is kept, every commit goes, and not only the revision's. The Hub is not asked; what
    went is fetched, or built, again when it is needed, so that ``fp32`` needs no ``force`` but for a folder that was
    built here. A build or fetch that is under way is waited for. Raises HubError when the cache has nothing of it,
    OptionError on an unknown variant, OutputError.
    """
    store, everything = Store(default_root()), everything and not keep
    records = _records(store, wanted, everything)  # where there is nothing, no lock is made either
    with nullcontext() if dry_run else store.still(wanted.name):
        if not dry_run:
            records = _records(store, wanted, everything)  # what was built or fetched while we waited goes too
        if not keep:
            return _gone(store, records, dry_run)
        (record,) = records
        if record.kind == CHECKPOINT:
            return prune(store.built(record.repository, record.commit), keep, force=force, dry_run=dry_run)
        return _fewer(store, record, keep, dry_run)


def _records(store: Store, wanted: HubId, everything: bool) -> list[Record]:
    """Of a revision, or of all commits. Raises HubError where there is none."""
    commit = wanted.revision if wanted.is_commit else store.revision(wanted.name, wanted.revision)
    one = store.record(wanted.name, commit) if commit and not everything else None
    held = (held.record for held in store.held() if held.record.repository == wanted.name) if everything else ()
    records = [one] if one else list(held)
    if not records:
        raise HubError(
            f"Hub id {wanted}", expected="something of it in the cache", found="nothing", remedy="see `featherbed list`"
        )
    return records


def _gone(store: Store, records: Sequence[Record], dry_run: bool) -> Pruned:
    home = store.home(records[0].repository)
    folders = [place(one.repository, one.commit) for one in records for place in (store.folder, store.built)]
    freed = freeing(home, [path.relative_to(home).as_posix() for folder in folders for path in below(folder)])
    for record in records if not dry_run else ():
        store.remove(record.repository, record.commit)
    return Pruned(freed, (), (), ())


def _fewer(store: Store, record: Record, keep: Sequence[str], dry_run: bool) -> Pruned:
    """Manifest and record first, files last: a run that is stopped leaves files too many, and the next takes them."""
    model = open_folder(store.folder(record.repository, record.commit))
    kept = [model.variant(name).name for name in keep]
    left = restricted(model.manifest, kept)
    names = (path.relative_to(model.path).as_posix() for path in sorted(below(model.path)))
    freed = freeing(model.path, [name for name in names if name not in left.files and name != MANIFEST])
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
