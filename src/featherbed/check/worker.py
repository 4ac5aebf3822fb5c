"""One variant in a process of its own, so that its memory is its own: commands in, timings out.

Run by ``bench``: ``python -m featherbed.check.worker DIR VARIANT THREADS POOL_SIZE PROVIDER TOKENS``. Each line of
standard input is a number of texts; each line of standard output one JSON document.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from featherbed.check.memory import memory_mib
from featherbed.errors import FeatherbedError
from featherbed.probe import shipped
from featherbed.run.embedder import Embedder


def rows_of(embedder: Embedder, count: int, tokens: int) -> list[list[int]]:
    """``count`` rows of exactly ``tokens`` ids: the probe's texts laid end to end and cut."""
    stream = [i for row in embedder.ids(shipped().texts) for i in row]
    while len(stream) < count * tokens:
        stream += stream
    return [stream[k * tokens : (k + 1) * tokens] for k in range(count)]


def main(folder: str, variant: str, threads: str, pool_size: str, provider: str, tokens: str) -> None:
    """Load, say how long that took, then answer each line with the seconds of that many texts, and memory after it."""
    started = time.perf_counter()
    embedder = Embedder(
        Path(folder), variant, threads=int(threads) or None, pool_size=int(pool_size) or None, provider=provider
    )
    embedder.encode("ready")
    _say({"load_s": time.perf_counter() - started, "provider": embedder.provider})
    texts: dict[int, list[list[int]]] = {}
    for line in sys.stdin:
        count = int(line)
        if count not in texts:
            texts[count] = rows_of(embedder, count, int(tokens))
        started = time.perf_counter()
        embedder.embed_ids(texts[count])
        _say({"seconds": time.perf_counter() - started, **memory_mib()})


def _say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except FeatherbedError as error:
        parts = {part: getattr(error, part) for part in ("subject", "expected", "found", "remedy")}
        _say({"error": type(error).__name__, "parts": parts})
