"""Processes that are measured: a command watched until it ends, and a runner that stays and answers line by line."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from memory import memory_mib

HERE = Path(__file__).parent
SAMPLE_S = 0.02
SHARE = 0.02  # of the time that looking may take: it walks the process' page tables, which then waits for its own


class FailedError(Exception):
    """A process ended that should not have; the message is the last it said."""


def watched(words: Sequence[str], out: Path = Path(os.devnull)) -> dict[str, float]:
    """Run a command; wall seconds, peak RSS and the largest private memory seen, in MiB. Raises FailedError.

    What it prints goes to the file ``out``.
    """
    private = peak = 0.0
    # not a pipe: it would fill up while nobody reads
    with tempfile.TemporaryFile("w+") as errors, out.open("w") as printed:
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=printed, stderr=errors, text=True, cwd=HERE)
        while process.poll() is None:
            began = time.perf_counter()
            now = memory_mib(process.pid)
            private, peak = max(private, now["rss_private_mib"]), max(peak, now["rss_peak_mib"])
            time.sleep(max(SAMPLE_S, (time.perf_counter() - began) / SHARE))
        seconds = time.perf_counter() - started
        if process.returncode:
            raise FailedError(last_words(errors))
    return {"seconds": round(seconds, 2), "private_peak_mib": private, "rss_peak_mib": peak}


def commit() -> str:
    """Of this repository."""
    words = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def last_words(errors: IO[str]) -> str:
    """The last line a process wrote: of a traceback, the one that tells."""
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    return lines[-1][:400] if lines else "it vanished without a word, perhaps for lack of memory"


class Runner:
    """One model in a process of its own, which answers each line with a line (see runners/protocol.py)."""

    def __init__(self, python: str, module: str, words: Sequence[str]) -> None:
        """Start ``module`` and wait until it has loaded. Raises FailedError."""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [python, "-m", module, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=HERE,
        )
        loaded = self._answer()
        self.ready_s: float = time.perf_counter() - started
        self.load_s: float = loaded["load_s"]
        self.version: str = loaded["version"]

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to a line. Raises FailedError when the process ends instead."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone: reading tells why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            reason = last_words(self._errors)
            self.close()
            raise FailedError(reason)
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
