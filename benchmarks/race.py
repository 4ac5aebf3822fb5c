"""All contenders side by side: a process each, workloads round by round in turn, medians.

Fixed shapes: all processes stay alive from the first round to the last. Mixed texts swell a process by gigabytes, so
there each round of a contender is a process of its own, warmed up with some of them.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from contenders import Contender
from processes import FailedError, Runner
from runners.protocol import FIXED, VECTORS
from workloads import MIXED, SANITY, SHAPES, WARM, Rows

MEMORY_AFTER = "8x128"  # the first shape: what others leave behind does not count
REPEATS = {"1x16": 8, "1x128": 4}  # a round: a percentile needs more than a median
SLOW_S, SPENT_S = 10.0, 60.0  # whose warm-up is slow gets the rounds that fit into SPENT_S, and two at least
LEAST_FREE_MIB = 4096  # the largest needs as much to load; better left out than all killed
MEMORY = ("rss_mib", "rss_private_mib", "rss_file_mib", "rss_peak_mib", "pss_mib")


@dataclass
class Lane:
    """A contender, its process while it lives, and what it has answered."""

    contender: Contender
    python: str
    file: Path  # of the workloads
    runner: Runner | None = None
    result: dict[str, Any] = field(default_factory=dict)
    vector: list[float] = field(default_factory=list)
    first_s: dict[str, float] = field(default_factory=dict)
    rounds_s: dict[str, list[list[float]]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)

    def start(self) -> None:
        """Load."""
        free = available_mib()
        if free < LEAST_FREE_MIB:
            self.result["not_run"] = f"expected {LEAST_FREE_MIB} MiB of free memory, found {free:.0f}; try --only"
            return
        try:
            self.runner = Runner(self.python, self.contender.module, [str(self.file), *self.contender.words])
        except FailedError as error:
            self.result["failed"] = f"did not load: {error}"
            return

    def first_start(self) -> None:
        """Load twice: what is only prepared once, and kept on disk, is a figure of its own.

        The first process embeds the short row, so that the second is measured on batches alone.
        """
        self.start()
        if self.runner is None:
            return
        vectors = self.ask(f"{SANITY} {VECTORS}").get("vectors")
        self.vector = vectors[0] if vectors else []
        if self.runner is None:
            return
        self.result["first_ready_s"] = round(self.runner.ready_s, 3)
        self.stop()
        self.start()
        if self.runner is not None:
            self.result |= {"version": self.runner.version, "load_s": round(self.runner.load_s, 3)}
            self.result["ready_s"] = round(self.runner.ready_s, 3)

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.runner:
            self.runner.close()
        self.runner = None

    def ask(self, line: str) -> dict[str, Any]:
        """The answer; empty once the process has died, and the result says of what."""
        if self.runner is None:
            return {}
        try:
            return self.runner.ask(line)
        except FailedError as error:
            self.result["failed"] = f"at {line}: {error}"
            self.runner = None
            return {}

    def has_turn(self, line: str, number: int, rounds: int) -> bool:
        """Whether a line of its is still run in this round: the slow have fewer."""
        first = self.first_s.get(line, 0.0)
        allowed = rounds if first <= SLOW_S else min(rounds, max(2, int(SPENT_S / first)))
        return line in self.contender.lines and number <= allowed

    def turn(self, line: str, number: int, rounds: int) -> None:
        """One round of a line; number 0 warms up."""
        if not self.has_turn(line, number, rounds):
            return
        if number and line not in REPEATS and not line.startswith(MIXED):
            self.ask(line)  # unmeasured: while others had their turns, the system may have taken mapped pages back
        answers = [self.ask(line) for _ in range(REPEATS.get(line, 1) if number else 1)]
        if not all(answers):
            return
        self.first_s.setdefault(line, answers[0]["seconds"])
        if number == 0:
            return
        self.rounds_s.setdefault(line, []).append([answer["seconds"] for answer in answers])
        if line == MEMORY_AFTER:
            self.memory = {key: answers[-1][key] for key in MEMORY}


def race(
    contenders: Sequence[Contender], pythons: dict[str, str], file: Path, workloads: dict[str, Rows], rounds: int
) -> dict[str, Any]:
    """Contender → its figures, or why it has none. ``file`` holds the workloads for the runners."""
    lanes = [Lane(contender, pythons[contender.python], file) for contender in contenders]
    try:
        for lane in lanes:
            print(f"  loading {lane.contender.name}", file=sys.stderr)
            lane.first_start()
        for shape in (name for name in SHAPES if name in workloads):
            for number in range(rounds + 1):
                for lane in lanes:
                    lane.turn(shape, number, rounds)
                print(f"  {shape} round {number} of {rounds}", file=sys.stderr)
        for lane in lanes:
            lane.stop()
        if MIXED in workloads:
            for number in range(1, rounds + 1):
                for lane in lanes:
                    mixed_round(lane, number, rounds)
                print(f"  {MIXED} round {number} of {rounds}", file=sys.stderr)
    finally:
        for lane in lanes:
            lane.stop()
    return {lane.contender.name: figures(lane, lanes, workloads) for lane in lanes}


def mixed_round(lane: Lane, number: int, rounds: int) -> None:
    """One round of the mixed texts, in a process of its own; nothing for who has failed or has had his rounds."""
    lines = [line for line in (MIXED, f"{MIXED} {FIXED}") if lane.has_turn(line, number, rounds)]
    if not lines or "version" not in lane.result or "failed" in lane.result:
        return
    lane.start()
    for line in lines:
        lane.ask(line.replace(MIXED, WARM))
    for line in lines:
        lane.turn(line, number, rounds)
    lane.stop()


def available_mib() -> float:
    """Memory that a new process could have (Linux); without end where nobody says."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return float("inf")
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / 1024


def figures(lane: Lane, lanes: Sequence[Lane], workloads: dict[str, Rows]) -> dict[str, Any]:
    """What is written of one contender."""
    reference = next((other.vector for other in lanes if other.contender.name == "fp32" and other.vector), None)
    cosine = None
    if reference and lane.vector:
        a, b = np.asarray(lane.vector), np.asarray(reference)
        cosine = round(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), 5)
    runs = {line: speed(times, workloads[line.split()[0]], line in REPEATS) for line, times in lane.rounds_s.items()}
    return {**lane.result, "cosine_to_fp32": cosine, **lane.memory, "workloads": runs}


def speed(rounds_s: list[list[float]], rows: Rows, repeated: bool) -> dict[str, Any]:
    """Medians of all runs; percentiles where a round repeats."""
    times = [seconds for turn in rounds_s for seconds in turn]
    median = statistics.median(times)
    result = {
        "tokens_per_s": round(sum(map(len, rows)) / median, 1),
        "texts_per_s": round(len(rows) / median, 2),
        "seconds": round(median, 4),
        "runs": len(times),
    }
    if repeated:
        result["latency_p50_ms"] = round(1000 * float(np.percentile(times, 50)), 2)
        result["latency_p95_ms"] = round(1000 * float(np.percentile(times, 95)), 2)
    return result
