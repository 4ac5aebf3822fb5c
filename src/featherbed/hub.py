"""The only room with a network: a Hub id becomes a folder on disk, and a folder a repository on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from featherbed.errors import CheckpointError, FeatherbedError, OptionError, OutputError

WANTED = ["*.json", "*.txt", "*.safetensors", "1_Pooling/*", "README.md"]
REFUSED = ["onnx/*", "openvino/*", "*.bin", "*.pt", "*.pkl", "*.h5", "*.msgpack", "*.ot"]


def locate(source: str) -> Path:
    """The folder of a checkpoint: ``source`` itself, or the files of a Hub id ``owner/name[@revision]``.

    Only safetensors weights and configs are fetched, through huggingface_hub and its cache. A path that
    exists, or looks like one, is never taken for an id.
    Raises CheckpointError when there is neither, or the Hub refuses.
    """
    path = Path(source)
    if os.path.exists(path):  # Path.exists raises on a name too long for the disk
        return path
    name, _, revision = source.partition("@")
    if name.count("/") != 1 or source.startswith((".", "/", "~")) or "\\" in source:
        raise CheckpointError(
            f"checkpoint {source}",
            expected="a folder, or a Hub id such as owner/name or owner/name@revision",
            found="nothing there",
            remedy="check the path",
        )
    return _fetch(name, revision or None)


def upload(folder: Path, name: str, message: str, private: bool) -> str:
    """Put a folder on the Hub as ``owner/name``, in one commit; returns the commit's address.

    The repository is made where there is none. Of an older model folder there, graphs and reports that this one lacks
    are taken away in the same commit. Raises OptionError on what is no id, OutputError when the Hub refuses.
    """
    from huggingface_hub import HfApi  # 0.2 s to import

    if name.count("/") != 1 or name.startswith((".", "/", "~")) or "\\" in name or "@" in name:
        raise OptionError(
            f"Hub id {name}", expected="owner/name", found="something else", remedy="for example me/model-onnx"
        )
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, delete_patterns=["onnx/*", "reports/*"]
        )
    except Exception as error:  # huggingface_hub, httpx and the disk: no common base
        raise _translated(error, name, OutputError, "a place to write to", None) from error
    return str(done.commit_url)


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # 0.2 s to import, needed for ids only

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, ignore_patterns=REFUSED))
    except Exception as error:  # huggingface_hub, httpx and the disk: no common base
        raise _translated(error, name, CheckpointError, "files of a checkpoint", revision) from error


def _translated(
    error: Exception, name: str, kind: type[FeatherbedError], expected: str, revision: str | None
) -> FeatherbedError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    remedies: tuple[tuple[type[Exception], str, str], ...] = (
        (GatedRepoError, "a gated repository", "accept its terms on the Hub and set HF_TOKEN"),
        (RepositoryNotFoundError, "no such repository, or a private one", "check the id, or set HF_TOKEN"),
        (RevisionNotFoundError, f"no revision {revision}", "check the part behind the @"),
        (LocalEntryNotFoundError, "no connection and nothing in the cache", "go online, or set HF_ENDPOINT"),
        (LocalTokenNotFoundError, "no token", "set HF_TOKEN, or log in with `hf auth login`"),
        (OfflineModeIsEnabled, "offline mode", "unset HF_HUB_OFFLINE, or take what is in the cache"),
        (HFValidationError, "an id the Hub does not allow", "check the id"),
        (EntryNotFoundError, "a file missing on the Hub", "check the revision"),
        (HfHubHTTPError, "an answer that is no success", "try again later"),
        (OSError, "a connection or disk that failed", "check the network and the free space"),
    )
    # an answer that is no success hides behind "nothing in the cache": the cause tells
    told = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    found, remedy = next((r[1:] for r in remedies if isinstance(told, r[0])), (type(error).__name__, "try again later"))
    status = told.response.status_code if isinstance(told, HfHubHTTPError) and told.response is not None else None
    if status in (401, 403) and found == "an answer that is no success":
        found, remedy = f"{status}: not allowed", "set HF_TOKEN to a token that may do this"
    said = str(told).splitlines()[0] if str(told) else type(told).__name__
    return kind(f"Hub id {name}", expected=expected, found=f"{found} ({said})", remedy=remedy)
