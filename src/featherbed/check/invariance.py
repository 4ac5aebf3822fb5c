"""The same text alone and in company: does its vector change?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featherbed.check.parity import cosines
from featherbed.progress import Progress, silent
from featherbed.run.batches import Batch, collate
from featherbed.run.embedder import Embedder

COMPANY = 64  # texts in the batch
LONGEST = 64  # tokens: a batch of 64 is then 4 k tokens, affordable for a 0.6B reference


@dataclass(frozen=True)
class Drift:
    """Largest 1 − cos between a text's vector alone and among 64: as they come, padded left, in another order."""

    batch: float
    padding: float
    order: float


def company(rows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Up to 64 rows of ids of mixed lengths: evenly spaced among all rows sorted by length, each cut to 64."""
    ordered = sorted(rows, key=lambda row: (len(row), row))
    at = np.linspace(0, len(ordered) - 1, min(COMPANY, len(ordered))).round().astype(int)
    return [_cut(ordered[i]) for i in at]


def _cut(row: Sequence[int]) -> Sequence[int]:
    """At most LONGEST ids, the last one (the end token) kept."""
    return row if len(row) <= LONGEST else [*row[: LONGEST - 1], row[-1]]


def padded_left(batch: Batch, pad_id: int) -> Batch:
    """The same rows with the padding in front."""
    ids, mask = np.full_like(batch.ids, pad_id), np.zeros_like(batch.mask)
    for at, length in enumerate(batch.mask.sum(axis=1)):
        ids[at, ids.shape[1] - length :] = batch.ids[at, :length]
        mask[at, ids.shape[1] - length :] = 1
    return Batch(ids, mask, batch.places)


def invariance(embedder: Embedder, rows: Sequence[Sequence[int]], progress: Progress = silent) -> Drift:
    """How far a row of ids' vector alone is from its vectors in a batch of 64 mixed lengths.

    The batch is run three times: padded right, padded left, and shuffled.
    """
    pad = embedder.spec.pad_id
    rows = company(rows)
    alone = np.empty((len(rows), embedder.spec.dim), np.float32)
    total = len(rows) + 3
    for at, row in enumerate(rows):
        alone[at] = embedder.embed(collate([row], pad))[0]
        progress("invariance", at + 1, total)
    order = np.random.default_rng(64).permutation(len(rows))
    together = collate(rows, pad)
    found = []
    for batch, expected in (
        (together, alone),
        (padded_left(together, pad), alone),
        (collate([rows[i] for i in order], pad), alone[order]),
    ):
        # max keeps NaN; rounding may make 1 − cos slightly negative
        found.append(float(np.maximum(0, np.max(1 - cosines(expected, embedder.embed(batch))))))
        progress("invariance", len(rows) + len(found), total)
    return Drift(*found)
