"""Linear weights in 8 bits with one scale an output column: what both W8A8 ways share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from featherbed.make.ir import Array, Weight

Float = npt.NDArray[np.float32]
TINY = 1e-30  # scales below it would leave float32's normal range
Codes = npt.NDArray[np.int8]
Ready = Mapping[str, tuple[Array, ...]]  # of weights by name, the arrays that stand for them, rounded already


def round_columns(rows: Float, limit: int) -> tuple[Codes, Float]:
    """rows [N, K], a row an output → codes [N, K] in ±limit and scales [N] with rows ≈ codes · scales.

    scale = max|row| / limit, codes rounded half to even; a row of zeros, or of nothing above 1e-30, has
    scale 1 and codes of zero.
    """
    peak = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    scales = np.where(peak > TINY, peak / np.float32(limit), np.float32(1)).astype(np.float32)
    scaled = rows / scales[:, None]
    np.rint(scaled, out=scaled)  # within ±limit: the largest is peak / (peak / limit)
    return scaled.astype(np.int8), scales


def column_weights(weight: Weight, bits: int, ready: tuple[Array, ...] | None = None) -> tuple[Weight, Weight]:
    """(codes [K, N] s8 as MatMulInteger reads them, scales [N] f32) of a float weight [N, K].

    The two are written one after the other; the rounding is kept for the second and then forgotten. ``ready`` are the
    two where the weight was rounded before.
    """
    limit = 2 ** (bits - 1) - 1

    @lru_cache(maxsize=1)
    def rounded() -> tuple[Array, ...]:
        if ready is not None:
            return ready
        codes, scales = round_columns(np.asarray(weight.array(), np.float32), limit)
        return np.ascontiguousarray(codes.T), scales

    def read_codes() -> Iterator[Array]:
        yield rounded()[0]

    def read_scales() -> Iterator[Array]:
        yield rounded()[1]
        rounded.cache_clear()

    rows, columns = weight.shape
    return (
        Weight(f"{weight.name}.s8", np.dtype(np.int8), (columns, rows), read_codes),
        Weight(f"{weight.name}.scales", np.dtype("<f4"), (rows,), read_scales),
    )
