"""One question about the engine, asked of a fresh process: its answer is one line of JSON.

python -m runners.once QUESTION FOLDER VARIANT [WORD…]      (in the folder benchmarks)

memory POOL BATCHES ROWS    memory after batches of ROWS × 128 ids of the whole vocabulary; POOL 0 is the default
stay POOL                   the same after one batch, then live on until a line is heard
prompt ROUNDS               a query behind its instruction: seconds with and without what is kept of it
long TOKENS                 one text of so many tokens
"""

from __future__ import annotations

import json
import statistics
import sys
import time

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


def prompt(folder: str, variant: str, rounds: int) -> dict[str, float]:
    """Medians of single queries, in turn with and without the kept prompt, and the largest difference of a vector."""
    kept, plain = Embedder(folder, variant), Embedder(folder, variant, memory=Memory(prompts=False))
    times: dict[Embedder, list[float]] = {kept: [], plain: []}
    worst = 0.0
    for number in range(rounds + 1):
        for query in QUERIES:
            vectors = []
            for embedder, seconds in times.items():
                started = time.perf_counter()
                vectors.append(embedder.encode(query, prompt=INSTRUCTION))
                if number:
                    seconds.append(time.perf_counter() - started)
            worst = max(worst, float(np.abs(vectors[0] - vectors[1]).max()))
    count = len(kept.ids([INSTRUCTION])[0]) - 1
    lengths = [len(row) - 1 for row in kept.ids(list(QUERIES))]
    return {
        "prompt_tokens": count,
        "query_tokens": round(statistics.mean(lengths), 1),
        "kept_ms": round(1000 * statistics.median(times[kept]), 2),
        "plain_ms": round(1000 * statistics.median(times[plain]), 2),
        "largest_difference": worst,
        "kept_mib": round(kept.prompts_bytes / 2**20, 2),
    }


def main(question: str, folder: str, variant: str, *words: str) -> dict[str, float]:
    """The answer."""
    if question == "prompt":
        return prompt(folder, variant, int(words[0]))
    if question == "long":
        embedder = Embedder(folder, variant)
        ids = np.random.default_rng(SEED).integers(0, embedder.spec.vocab_size, int(words[0])).tolist()
        started = time.perf_counter()
        embedder.embed_ids([ids])
        return {"seconds": round(time.perf_counter() - started, 1), **memory_mib("self")}
    embedder = Embedder(folder, variant, pool_size=int(words[0]) or None)
    if question == "memory":
        return memory(embedder, int(words[1]), int(words[2]))
    return memory(embedder, 1, 8)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])), flush=True)
    if sys.argv[1] == "stay":
        sys.stdin.readline()
