"""What the engine takes beside time: memory, pools, prompts, cold starts, many texts. Each in fresh processes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory import memory_mib
from processes import HERE, FailedError, watched

SMALL, LARGE = 1_000, 100_000
STARTS, FEWS = 5, 5
POOL = 4
LONG_TOKENS = 8192
TURNS, QUERY_ROUNDS = 4, 5
COLD = "import sys; from featherbed import Embedder; Embedder(sys.argv[1], sys.argv[2]).encode('a first text')"


@dataclass(frozen=True)
class Costs:
    """Whose Python, which folders: of the 0.6B shape, and of MiniLM where there is one; and texts, one a line."""

    python: str
    folder: Path
    minilm: Path | None
    texts: Path | None

    def all(self) -> dict[str, Any]:
        """Every figure, None where there is nothing to measure it with."""
        measures: dict[str, Callable[[], Any]] = {
            "memory": self.memory,
            "pool": self.pool,
            "processes": self.processes,
            "prompt": self.prompt,
            "cold_start_s": self.cold,
            "many_texts": self.many,
            "long_text": lambda: {"tokens": LONG_TOKENS, **self.once("long", "int8", LONG_TOKENS)},
        }
        found: dict[str, Any] = {}
        for name, measure in measures.items():
            print(f"  {name.replace('_', ' ')}", file=sys.stderr)
            found[name] = measure()
        return found

    def words(self, question: str, variant: str, *words: object) -> list[str]:
        """The command line of runners/once.py."""
        return [self.python, "-m", "runners.once", question, str(self.folder), variant, *map(str, words)]

    def once(self, question: str, variant: str, *words: object) -> dict[str, Any]:
        """Its answer. Raises CalledProcessError."""
        command = self.words(question, variant, *words)
        done = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, text=True, check=True)
        return dict(json.loads(done.stdout))

    def memory(self) -> dict[str, Any]:
        """After four batches of 1,024 tokens with ids of the whole vocabulary."""
        return {name: self.once("memory", name, 0, 4, 8) for name in ("int8", "int4", "int4-small")}

    def prompt(self) -> dict[str, Any]:
        """A query behind a prompt that is kept, against one that is not: in turn, in processes of their own."""
        times: dict[str, list[float]] = {"kept": [], "plain": []}
        same = True
        for _ in range(TURNS):
            found = {mode: self.once("prompt", "int8", mode, QUERY_ROUNDS) for mode in times}
            for mode, seconds in times.items():
                seconds += found[mode].pop("seconds")
            same &= found["kept"].pop("digest") == found["plain"].pop("digest")
        kept, plain = (1000 * statistics.median(seconds) for seconds in times.values())
        return {
            **found["kept"],
            "kept_ms": round(kept, 2),
            "plain_ms": round(plain, 2),
            "ratio": round(kept / plain, 3),
            "same_vectors": same,
        }

    def pool(self) -> dict[str, Any]:
        """One run at a time against POOL of them, on the same work."""
        one, many = (self.once("memory", "int8", size, 4, 32) for size in (1, POOL))
        return {"1": one, str(POOL): many, "rss_ratio": round(many["rss_mib"] / one["rss_mib"], 3)}

    def processes(self) -> dict[str, Any]:
        """POOL processes, each with its own embedder, against one: proportional set sizes."""
        one = self._alive(1)[0]
        all_of_them = self._alive(POOL)
        return {
            "pss_mib_one": one,
            "pss_mib_all": round(sum(all_of_them), 1),
            "ratio": round(sum(all_of_them) / one, 3),
        }

    def _alive(self, count: int) -> list[float]:
        running = [
            subprocess.Popen(
                self.words("stay", "int8", 1), cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(count)
        ]
        try:
            for _ in range(2):  # the second time all are alive, and have just used all of what they map
                for process in running:
                    assert process.stdin is not None
                    assert process.stdout is not None
                    if not process.stdout.readline():
                        raise FailedError("a process of several ended before it had answered")
                    process.stdin.write("again\n")
                    process.stdin.flush()
            for process in running:
                assert process.stdout is not None
                process.stdout.readline()
            return [memory_mib(process.pid)["pss_mib"] for process in running]
        finally:
            for process in running:
                process.communicate("\n")

    def cold(self) -> dict[str, float]:
        """From the start of Python to the first vector: with nothing prepared for this CPU, and ever after."""
        times = []
        for _ in range(STARTS + 1):
            started = time.perf_counter()
            subprocess.run([self.python, "-c", COLD, str(self.folder), "int8"], cwd=HERE, check=True)
            times.append(time.perf_counter() - started)
        return {"median": round(statistics.median(times[1:]), 3), "least": round(min(times[1:]), 3)}

    def many(self) -> dict[str, Any] | None:
        """``featherbed embed`` of SMALL and LARGE numbers of texts with MiniLM: speed and peak memory."""
        if self.minilm is None or self.texts is None:
            return None
        few = [self._embedded(SMALL) for _ in range(FEWS)]
        many = self._embedded(LARGE)
        few += [self._embedded(SMALL) for _ in range(FEWS)]
        least = {key: statistics.median(one[key] for one in few) for key in many}
        return {
            str(SMALL): least,
            str(LARGE): many,
            "speed_ratio": round(many["texts_per_s"] / least["texts_per_s"], 3),
            "rss_ratio": round(many["rss_peak_mib"] / least["rss_peak_mib"], 3),
        }

    def _embedded(self, count: int) -> dict[str, float]:
        assert self.texts is not None
        lines = self.texts.read_text("utf-8").splitlines()
        source, out = self.texts.with_name(f"many-{count}.txt"), self.texts.with_name("many.npy")
        if not source.is_file():
            source.write_text("".join(f"{lines[at % len(lines)]}\n" for at in range(count)), "utf-8")
        answer = self.texts.with_name("many.json")
        verb = [self.python, "-m", "featherbed.cli", "embed", str(self.minilm), str(source)]
        found = watched([*verb, "-o", str(out), "--variant", "int8", "--json"], answer)
        document = json.loads(answer.read_text("utf-8"))
        return {
            "texts_per_s": round(document["texts"] / document["seconds"], 1),
            "rss_peak_mib": found["rss_peak_mib"],
            "private_peak_mib": found["private_peak_mib"],
        }
