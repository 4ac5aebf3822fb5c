"""One question about the engine, asked of a fresh process: its answer is one line of JSON.

python -m runners.once QUESTION FOLDER VARIANT [WORD…]      (in the folder benchmarks)

memory POOL BATCHES ROWS    memory after batches of ROWS × 128 ids of the whole vocabulary; POOL 0 is the default
stay POOL                   the same after one batch, and again after another at every line that says so
prompt MODE ROUNDS          a query behind its instruction, of which something is kept or nothing (plain)
long TOKENS                 one text of so many tokens
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from typing import Any

import numpy as np
from memory import memory_mib

from featherbed import Embedder
from featherbed.run.session import Memory

TOKENS = 128
SEED = 20261121
INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
QUERIES = (
    "how long does sourdough keep",
    "what is the boiling point of water at altitude",
    "cheap ways to insulate an old wooden window",
    "who painted the ceiling of the chapel",
    "symptoms of iron deficiency in adults",
    "train from the airport to the old town",
    "difference between a comet and an asteroid",
    "can tomatoes be planted next to beans",
)


def memory(embedder: Embedder, batches: int, rows: int) -> dict[str, float]:
    """Speed and memory after ``batches`` calls of ``rows`` texts each."""
    rng = np.random.default_rng(SEED)
    times = []
    for _ in range(batches):
        ids = rng.integers(0, embedder.spec.vocab_size, (rows, TOKENS)).tolist()
        started = time.perf_counter()
        embedder.embed_ids(ids)
        times.append(time.perf_counter() - started)
    return {"tokens_per_s": round(rows * TOKENS / statistics.median(times), 1), **memory_mib("self")}


def prompt(folder: str, variant: str, mode: str, rounds: int) -> dict[str, Any]:
    """Seconds of single queries, and a digest of their vectors. ``mode`` kept or plain: what the prompt leaves."""
    embedder = Embedder(folder, variant, memory=Memory(prompts=mode == "kept"))
    seconds, digest = [], hashlib.sha256()
    for number in range(rounds + 1):
        for query in QUERIES:
            started = time.perf_counter()
            vector = embedder.encode(query, prompt=INSTRUCTION)
            if number:
                seconds.append(time.perf_counter() - started)
            digest.update(vector.tobytes())
    lengths = [len(row) - 1 for row in embedder.ids(list(QUERIES))]
    return {
        "prompt_tokens": len(embedder.ids([INSTRUCTION])[0]) - 1,
        "query_tokens": round(statistics.mean(lengths), 1),
        "kept_mib": round(embedder.prompts_bytes / 2**20, 2),
        "seconds": seconds,
        "digest": digest.hexdigest(),
    }


def main(question: str, folder: str, variant: str, *words: str) -> dict[str, Any]:
    """The answer."""
    if question == "prompt":
        return prompt(folder, variant, words[0], int(words[1]))
    if question == "long":
        embedder = Embedder(folder, variant)
        ids = np.random.default_rng(SEED).integers(0, embedder.spec.vocab_size, int(words[0])).tolist()
        started = time.perf_counter()
        embedder.embed_ids([ids])
        return {"seconds": round(time.perf_counter() - started, 1), **memory_mib("self")}
    embedder = Embedder(folder, variant, pool_size=int(words[0]) or None)
    if question == "memory":
        return memory(embedder, int(words[1]), int(words[2]))
    while say(memory(embedder, 1, 8)) == "again":
        pass
    return {}


def say(answer: dict[str, Any]) -> str:
    """One line out, one line in: the next word, nothing at the end."""
    print(json.dumps(answer), flush=True)
    return sys.stdin.readline().strip()


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])), flush=True)
