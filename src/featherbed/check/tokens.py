"""Token ids: are they those that the folder was made with, and do texts end as the model wants them to?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from featherbed.errors import TokenizerError
from featherbed.folder import ModelFolder
from featherbed.probe import shipped
from featherbed.run.tokens import Tokenizer

AND_NOTHING = ("",)  # a text of no tokens but the special ones


def ids_sha256(rows: Sequence[Sequence[int]]) -> str:
    """One hash of rows of token ids."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray([len(row), *row], "<i8").tobytes())
    return digest.hexdigest()


def probe_ids_sha256(tokenizer: Tokenizer) -> str:
    """The hash of the shipped probe's token ids."""
    return ids_sha256(tokenizer.encode([*shipped().texts, *AND_NOTHING]).ids)


def check_tokens(folder: ModelFolder) -> None:
    """Raises TokenizerError when the folder's tokenizer gives other ids than when it was made, or no end token."""
    tokenizer = Tokenizer(folder.path, folder.manifest.spec)
    subject = f"{folder.path / 'tokenizer.json'}"
    if tokenizer.appends:
        raise TokenizerError(
            subject,
            expected=f"a tokenizer that ends each text with the id {folder.manifest.spec.eos_id}",
            found="none at the end: ours would put it there, other programs would pool another token",
            remedy="build the folder again, or fetch its tokenizer.json again",
        )
    recorded = folder.manifest.token_ids_sha256
    found = probe_ids_sha256(tokenizer) if recorded else ""
    if found != recorded:
        raise TokenizerError(
            subject,
            expected=f"the token ids that the folder was made with (sha256 {recorded[:12]}…)",
            found=f"others for the shipped probe ({found[:12]}…): another file, or another version of tokenizers",
            remedy="fetch the folder's tokenizer.json again, or build the folder again",
        )
