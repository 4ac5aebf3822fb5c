"""pull(): a Hub id to a folder in the cache, only what is needed, every byte compared."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featherbed.choice import AUTO
from featherbed.errors import CheckpointError, HubError, InputError, OptionError, UnreachableError
from featherbed.folder import MANIFEST, dump, file_record, open_folder, publish, read_manifest, write_text
from featherbed.hub.cached import cached_listing
from featherbed.hub.client import default_root, listing, resolve
from featherbed.hub.fetch import Plan, fetch, planned, restricted
from featherbed.hub.listing import Listing, Remote, check_digest, digest
from featherbed.hub.names import HubId, hub_id
from featherbed.hub.store import CHECKPOINT, MODEL_FOLDER, Record, Store, linked
from featherbed.progress import Progress, silent

LOG = logging.getLogger("featherbed")


def pull(
    source: str, variants: Sequence[str] = (), out: Path | str | None = None, *, progress: Progress = silent
) -> Path:
    """Fetch ``owner/name[@revision]`` into the cache; returns the folder there or, with ``out``, a copy at that place.

    Of a model folder: ``variants``, or the one that "auto" means, or all with ("all",), and what they share. Of a
    checkpoint: configs, tokenizer and safetensors. What has arrived is kept when it is stopped, and gone on with.
    Raises HubError on what is not there, not ours to see or not what the Hub announced, UnreachableError where the Hub
    cannot be asked and the cache has not all, OutputError when the disk fails.
    """
    return carried_out(plan(source, variants), out, progress)


def plan(source: str, variants: Sequence[str] = ()) -> Plan:
    """What ``pull`` will do: which files, how large, where each is now. Raises as ``pull``."""
    wanted = hub_id(source)
    if wanted is None:
        raise OptionError(
            f"Hub id {source}",
            expected="owner/name or owner/name@revision",
            found="a path that is here" if os.path.exists(source) else "something else",
            remedy="check the id",
        )
    store = Store(default_root())
    known = plan_of(store, wanted, *commit_of(store, wanted), variants)
    if variants and known.record.kind == CHECKPOINT:
        raise OptionError(
            f"variants of {wanted}",
            expected=f"a model folder with {MANIFEST}",
            found="a checkpoint, which has no variants",
            remedy=f"make them: featherbed build {wanted} --variants {','.join(variants)}",
        )
    return known


def plan_of(store: Store, wanted: HubId, commit: str, failed: UnreachableError | None, variants: Sequence[str]) -> Plan:
    """The plan for a commit; where the Hub cannot be asked, or has ``failed`` before, one of what is here already.

    Raises as ``pull``.
    """
    try:
        if failed is not None:
            raise failed
        return planned(store, listing(wanted, commit), variants)
    except UnreachableError as error:
        record = store.record(wanted.name, commit)
        here = _here(store, record) if record else cached_listing(HubId(wanted.name, commit))
        if here is None:
            raise
        known = planned(store, here, variants)
        missing = [step.file.path for step in known.steps if step.missing_bytes]
        if not missing:
            return known
        raise UnreachableError(
            f"Hub id {wanted}",
            expected=f"{', '.join(missing)}, not in the cache yet",
            found=error.found,
            remedy=error.remedy,
        ) from error


def carried_out(known: Plan, out: Path | str | None = None, progress: Progress = silent) -> Path:
    """Do what a plan says; returns the folder in the cache, or ``out`` with a copy. Raises as ``pull``."""
    store = Store(default_root())
    folder = fetch(store, known, progress)
    return folder if out is None else copied(folder, Path(out), known.record, known.chosen)


def copied(folder: Path, out: Path, record: Record, variants: Sequence[str]) -> Path:
    """What ``record`` names of a folder, of a model folder these variants only, at ``out``: links where there can be.

    Raises OptionError when something else is at ``out``, OutputError when it cannot be written.
    """
    names = [record.auto if name == AUTO else name for name in variants]
    manifest = restricted(open_folder(folder).manifest, names) if record.kind == MODEL_FOLDER else None
    with publish(out.absolute()) as place:
        for name in manifest.files if manifest else record.files:
            linked(folder / name, place / name)
        if manifest:
            write_text(place / MANIFEST, dump(manifest.to_json()))
    return out


@dataclass(frozen=True)
class Located:
    """A folder to build from: a checkpoint's or, with a record that says so, a model folder's that is ready.

    ``name`` is what the model is called; ``record`` is of a Hub id, None for a folder of the user's own.
    """

    folder: Path
    name: str
    record: Record | None = None

    @property
    def ready(self) -> bool:
        """Whether there is nothing to build."""
        return self.record is not None and self.record.kind == MODEL_FOLDER


def locate(source: Path | str, variants: Sequence[str], progress: Progress = silent) -> Located:
    """The folder that ``source`` is, or what a Hub id holds, fetched: of ready variants those that are asked for.

    Raises CheckpointError where there is neither, and as ``pull``.
    """
    wanted = hub_id(source)
    if wanted is not None:
        store = Store(default_root())
        commit, failed = commit_of(store, wanted)
        record = fetched(store, wanted, commit, failed, variants, progress)
        return Located(store.folder(wanted.name, commit), wanted.name.partition("/")[2], record)
    if os.path.exists(source):
        return Located(Path(source), Path(source).resolve().name)
    raise CheckpointError(
        f"checkpoint {source}",
        expected="a folder, or a Hub id such as owner/name or owner/name@revision",
        found="nothing there",
        remedy="check the path",
    )


def fetched(
    store: Store,
    wanted: HubId,
    commit: str,
    failed: UnreachableError | None,
    variants: Sequence[str],
    progress: Progress,
) -> Record:
    """The record of a commit, after what is asked for is here. Raises as ``pull``."""
    record = store.record(wanted.name, commit)
    if record is None or not satisfied(store, record, variants):
        known = plan_of(store, wanted, commit, failed, variants)
        fetch(store, known, progress)
        record = known.record
    store.used(record)
    return record


def commit_of(store: Store, wanted: HubId) -> tuple[str, UnreachableError | None]:
    """(commit, None) of a revision as the Hub says now; where it cannot be asked, what it said last, and why.

    Raises HubError, UnreachableError where nobody ever asked.
    """
    if wanted.is_commit:
        return wanted.revision, None
    known = store.revision(wanted.name, wanted.revision)
    try:
        commit = resolve(wanted, patient=known is None)
    except UnreachableError as error:
        other = cached_listing(wanted)
        commit = known or (other.commit if other else "")
        if not commit:
            raise
        why = error.found.partition(" (")[0]
        LOG.warning("%s: %s; taking it as it was last seen, commit %s", wanted, why, commit[:7])
        return commit, error
    store.remember(wanted.name, wanted.revision, commit)
    return commit, None


def _here(store: Store, record: Record) -> Listing:
    """A listing from what is here: the record's files and, of a model folder, what its published manifest names."""
    files = dict(record.files)
    if record.kind == MODEL_FOLDER:
        published = store.published(record.repository, record.commit)
        if not published.is_file():
            raise HubError(
                f"{published}",
                expected="the manifest that was fetched",
                found="no such file",
                remedy="pull again with a network, or see `featherbed doctor`",
            )
        known = file_record(published)
        if record.manifest and digest(published, len(record.manifest) == 64) != record.manifest:
            raise HubError(
                f"{published}",
                expected="the manifest that was fetched",
                found="another one: it was changed on the disk",
                remedy="pull again with a network, or see `featherbed doctor`",
            )
        files[MANIFEST] = Remote(MANIFEST, known.size_bytes, known.sha256)
        for name, one in read_manifest(published).files.items():
            check_digest(one.sha256, record.repository)
            files.setdefault(name, Remote(name, one.size_bytes, one.sha256))
    return Listing(record.repository, record.commit, record.endpoint, tuple(files.values()), record.whole)


def satisfied(store: Store, record: Record, variants: Sequence[str]) -> bool:
    """Whether all that is asked of a commit is here, by names and sizes."""
    if not record.whole:
        return False
    folder = store.folder(record.repository, record.commit)
    for name, file in record.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file.size_bytes:
            return False
    if record.kind != MODEL_FOLDER:
        return True
    try:
        here = open_folder(folder).manifest.variants
    except InputError:  # fetched again, then
        return False
    return all((record.auto if name == AUTO else name) in here for name in variants)
