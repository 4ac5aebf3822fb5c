"""One variant in a process of its own, so that its memory is its own: commands in, timings out.

Run by ``bench``: ``python -m featherbed.check.worker DIR VARIANT THREADS TOKENS``. Each line of standard
input is a number of texts; each line of standard output one JSON document.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from featherbed.check.memory import memory_mib
from featherbed.probe import shipped
from featherbed.run.batches import Batch, collate
from featherbed.run.embedder import Embedder


def rows_of(embedder: Embedder, count: int, tokens: int) -> Batch:
    """``count`` rows of exactly ``tokens`` real ids: the probe's texts laid end to end and cut."""
    stream = [i for row in embedder.ids(shipped().texts) for i in row]
    while len(stream) < count * tokens:
        stream += stream
    return collate([stream[k * tokens : (k + 1) * tokens] for k in range(count)], embedder.spec.pad_id)


def main(folder: str, variant: str, threads: str, tokens: str) -> None:
    """Load, say how long that took, then answer each line with the seconds of one run, and memory at the end."""
    started = time.perf_counter()
    embedder = Embedder(Path(folder), variant, threads=int(threads) or None)
    embedder.encode("ready")
    _say({"load_s": time.perf_counter() - started})
    batches: dict[int, Batch] = {}
    for line in sys.stdin:
        count = int(line)
        if count not in batches:
            batches[count] = rows_of(embedder, count, int(tokens))
        started = time.perf_counter()
        embedder.embed(batches[count])
        _say({"seconds": time.perf_counter() - started, **memory_mib()})


def _say(document: dict[str, float]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
