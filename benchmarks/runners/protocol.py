"""What a runner hears and says, and the little that all of them need. Runs in every environment: numpy only.

    python -m runners.NAME WORKLOADS.json MODEL [WORD…]        (in the folder benchmarks)

WORKLOADS.json: name → rows of token ids. The first line a runner says is {"load_s", "version"}. Each line it hears
is the name of a workload, perhaps with a flag; it embeds the rows and answers {"seconds", "rss_mib", …}, and
"vectors" too when the flag is "vectors".
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from memory import memory_mib

Rows = list[list[int]]
Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Embed = Callable[[Rows, str], Vectors]
BATCH = 32  # texts a batch of those who leave batching to their user
FIXED, VECTORS = "fixed", "vectors"
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def serve(load: Callable[[list[str]], Embed], *packages: str) -> None:
    """Load, then answer line by line. ``packages`` are those whose versions count."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    started = time.perf_counter()
    embed = load(sys.argv[2:])
    load_s = time.perf_counter() - started
    print(
        json.dumps({"load_s": load_s, "version": ", ".join(f"{p} {version(p)}" for p in packages)}),
        file=answers,
        flush=True,
    )
    workloads: dict[str, Rows] = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    for line in sys.stdin:
        name, _, flag = line.strip().partition(" ")
        started = time.perf_counter()
        vectors = embed(workloads[name], flag)
        answer: dict[str, object] = {"seconds": time.perf_counter() - started, **memory_mib("self")}
        if flag == VECTORS:
            answer["vectors"] = np.asarray(vectors, np.float64).tolist()
        print(json.dumps(answer), file=answers, flush=True)


def chunks(rows: Rows) -> Iterator[Rows]:
    """Fixed batches in arrival order."""
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


def padded(rows: Rows) -> tuple[Ids, Ids]:
    """ids and mask [B, T], padded right."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
        mask[at, : len(row)] = 1
    return ids, mask


def pooled(hidden: Vectors, mask: Ids, pooling: str) -> Vectors:
    """hidden [B, T, D] → vectors [B, D] of length 1; ``pooling`` is lasttoken or mean."""
    if pooling == "lasttoken":
        vectors = hidden[np.arange(len(hidden)), mask.sum(axis=1) - 1]
    else:
        vectors = (hidden * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)
