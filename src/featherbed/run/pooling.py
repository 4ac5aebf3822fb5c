"""Hidden states and mask → vectors, in numpy; right for every padding side.

The graphs pool inside as well; this is for files that do not, and for vectors that are not normalised.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featherbed.errors import TextError
from featherbed.spec import Pooling

EPSILON = 1e-5  # torch's own
Vectors = npt.NDArray[np.float32]


def pool(hidden: Vectors, mask: npt.NDArray[np.int64], pooling: Pooling) -> Vectors:
    """hidden [B, T, D] and mask [B, T] → [B, D], not normalised.

    Raises TextError when a row of the mask has no real token: there is nothing to pool.
    """
    real = mask != 0
    check_mask(real)
    if pooling is Pooling.MEAN:
        weights = real.astype(np.float32)
        summed = np.einsum("btd,bt->bd", hidden, weights)
        return np.asarray(summed / weights.sum(axis=1, keepdims=True), np.float32)
    first, last = np.argmax(real, axis=1), real.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)
    at = last if pooling is Pooling.LAST else first  # by the mask, not by the id: the pad may be the EOS
    return np.asarray(hidden[np.arange(len(hidden)), at], np.float32)


def layer_norm(vectors: Vectors) -> Vectors:
    """Rows with mean 0 and variance 1, as torch's layer_norm without weights."""
    centred = vectors - vectors.mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + EPSILON), np.float32)


def cut(vectors: Vectors, width: int, norm_first: bool, unit: bool) -> Vectors:
    """The first ``width`` components of each row, behind a layer norm if ``norm_first``, at length 1 if ``unit``."""
    kept = (layer_norm(vectors) if norm_first else vectors)[..., :width]
    return normalize(kept) if unit else np.asarray(kept, np.float32)


def check_mask(mask: npt.NDArray[np.generic]) -> None:
    """Raises TextError when a row of the mask [B, T] is all zero."""
    empty = np.flatnonzero(~np.any(mask, axis=1))
    if empty.size:
        raise TextError(
            f"row {empty[0]} of the batch",
            expected="at least one real token",
            found="an attention mask of zeros",
            remedy="leave empty rows out",
        )


def dequantized(codes: npt.NDArray[np.uint8], scale: float, zero_point: int) -> Vectors:
    """What u8 codes of vectors stand for: (code − zero_point) · scale. Cosines of the codes themselves are wrong."""
    return np.asarray((codes.astype(np.float32) - np.float32(zero_point)) * np.float32(scale), np.float32)


def normalize(vectors: Vectors) -> Vectors:
    """Rows at length 1; a row of zeros stays as it is."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)
