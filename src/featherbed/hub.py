"""The only room with a network: a Hub id becomes a folder on disk."""

from __future__ import annotations

import os
from pathlib import Path

from featherbed.errors import CheckpointError

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


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # 0.2 s to import, needed for ids only
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    remedies: tuple[tuple[type[Exception], str, str], ...] = (
        (GatedRepoError, "a gated repository", "accept its terms on the Hub and set HF_TOKEN"),
        (RepositoryNotFoundError, "no such repository, or a private one", "check the id, or set HF_TOKEN"),
        (RevisionNotFoundError, f"no revision {revision}", "check the part behind the @"),
        (LocalEntryNotFoundError, "no connection and nothing in the cache", "go online, or set HF_ENDPOINT"),
        (OfflineModeIsEnabled, "offline mode and nothing in the cache", "unset HF_HUB_OFFLINE"),
        (HFValidationError, "an id the Hub does not allow", "check the id"),
        (EntryNotFoundError, "a file missing on the Hub", "check the revision"),
        (HfHubHTTPError, "an answer that is no success", "try again later"),
        (OSError, "a connection or disk that failed", "check the network and the free space"),
    )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, ignore_patterns=REFUSED))
    except Exception as error:  # huggingface_hub, httpx and the disk: no common base
        unforeseen = (type(error).__name__, "try again later")
        # an answer that is no success hides behind "nothing in the cache": the cause tells
        told = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        found, remedy = next((r[1:] for r in remedies if isinstance(told, r[0])), unforeseen)
        raise CheckpointError(
            f"Hub id {name}",
            expected="files of a checkpoint",
            found=f"{found} ({str(told).splitlines()[0] if str(told) else type(told).__name__})",
            remedy=remedy,
        ) from error
