"""Length-sorted, token-budgeted batches: little padding, bounded memory; who called gets the order back
because a batch carries the places of its texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
LEAST_SPLIT_TOKENS = 128  # smaller runs read all weights for little
LONG_TOKENS = 768  # longer texts have attention kernels of their own, and so batches of their own


@dataclass(frozen=True)
class Batch:
    """ids and mask [B, T], padded right; ``places`` [B] are the rows' places among the texts."""

    ids: Ids
    mask: Ids
    places: npt.NDArray[np.intp]


def collate(rows: Sequence[Sequence[int]], pad_id: int, places: npt.NDArray[np.intp] | None = None) -> Batch:
    """Rows of ids as one batch, padded right to the longest."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
        mask[at, : len(row)] = 1
    return Batch(ids, mask, np.arange(len(rows)) if places is None else places)


def fitted(batch: Batch, shape: tuple[int, int], pad_id: int = 0) -> Iterator[tuple[Batch, int]]:
    """A batch in pieces of exactly ``shape``, more padding at the right; of each piece, how many rows are the batch's.

    The last piece is filled up with its own last row.
    """
    rows, tokens = shape
    wider = ((0, 0), (0, max(0, tokens - batch.ids.shape[1])))
    for start in range(0, len(batch.ids), rows):
        taken = np.arange(start, min(start + rows, len(batch.ids)))
        filled = np.append(taken, [taken[-1]] * (rows - len(taken))).astype(int)
        ids = np.pad(batch.ids[filled], wider, constant_values=pad_id)
        yield Batch(ids, np.pad(batch.mask[filled], wider), batch.places[taken]), len(taken)


def plan(lengths: Sequence[int], budget: int) -> list[npt.NDArray[np.intp]]:
    """Places of the texts, longest first, cut so that rows × longest row ≤ ``budget`` tokens.

    A text longer than the budget is a batch of its own.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    cuts: list[npt.NDArray[np.intp]] = []
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, lengths[int(order[start])]))
        cuts.append(order[start : start + rows])
        start += rows
    return cuts


def batches(rows: Sequence[Sequence[int]], pad_id: int, budget: int, runs: int = 1) -> Iterator[Batch]:
    """All rows, in batches of ``plan``, of which ``runs`` are run at a time.

    The budget is for all that runs at once; little work is cut so that every run has a part.
    """
    lengths = np.asarray([len(row) for row in rows], np.int64)
    share = -(-int(lengths.sum()) // runs)
    budget = max(1, min(budget // runs, max(share, LEAST_SPLIT_TOKENS)))
    # a text's vector must not depend on its company: what decides on the kernel is its own length
    for group in (np.flatnonzero(lengths > LONG_TOKENS), np.flatnonzero(lengths <= LONG_TOKENS)):
        for cut in plan([int(n) for n in lengths[group]], budget):
            places = group[cut]
            yield collate([rows[int(p)] for p in places], pad_id, places)
