"""What huggingface_hub's own cache holds: files that other libraries fetched, and a listing of them. Read only."""

from __future__ import annotations

from pathlib import Path

from featherbed.hub.listing import DIGEST, Listing, Remote
from featherbed.hub.names import COMMIT, HubId, check_inside


def cached(source: Listing, file: Remote) -> Path | None:
    """The file in huggingface_hub's own cache, where other libraries put it, links resolved; None where it is not."""
    from huggingface_hub import try_to_load_from_cache

    # in both layouts, with links and without; or under another commit, by the name of its blob
    found = try_to_load_from_cache(source.repository, file.path, revision=source.commit)
    blob = _home(source.repository) / "blobs" / file.digest if DIGEST.fullmatch(file.digest) else None
    for path in (Path(found) if isinstance(found, str) else None, blob):
        if path is not None and path.is_file():
            return path.resolve()
    return None


def cached_listing(wanted: HubId) -> Listing | None:
    """What huggingface_hub's own cache holds of a revision, when the Hub cannot be asked; None without it.

    Its links are named by the hashes that the Hub gave. Where links cannot be made there are no hashes, and so nothing
    to compare bytes with: None too.
    """
    from huggingface_hub import constants

    commit = wanted.revision if wanted.is_commit else _commit(wanted)
    if commit is None:
        return None
    snapshot = _home(wanted.name) / "snapshots" / commit
    links = {path.relative_to(snapshot).as_posix(): path for path in snapshot.rglob("*") if path.is_symlink()}
    check_inside(links, wanted.name)
    files = {
        name: Remote(name, path.stat().st_size, path.readlink().name)
        for name, path in sorted(links.items())
        if DIGEST.fullmatch(path.readlink().name) and path.is_file()
    }
    known = _names_at(wanted.name, commit)
    whole = bool(known) and known <= files.keys()
    return Listing(wanted.name, commit, constants.ENDPOINT, tuple(files.values()), whole) if files else None


def _home(repository: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def _commit(wanted: HubId) -> str | None:
    """What the cache says that a branch or tag is; None where that is no commit."""
    try:
        commit = (_home(wanted.name) / "refs" / wanted.revision).read_text("utf-8").strip()
    except (OSError, ValueError):  # ValueError: bytes that are no text
        return None
    return commit if COMMIT.fullmatch(commit) else None


def _names_at(repository: str, commit: str) -> set[str]:
    """All names of a commit, where huggingface_hub (2 and newer) noted them; else none."""
    import huggingface_hub

    if not hasattr(huggingface_hub, "get_cached_repo_tree"):
        return set()
    from huggingface_hub import constants
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        found = huggingface_hub.get_cached_repo_tree(repository, revision=commit, cache_dir=constants.HF_HUB_CACHE)
    except CachedRepoTreeNotFoundError:
        return set()
    return {file.path for file in found}
