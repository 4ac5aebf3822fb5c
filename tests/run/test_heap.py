"""Freed memory goes back to the system, in processes of their own: what is set there is set for good."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from featherbed.run import heap
from featherbed.run.session import Engine, Memory, Session

# asked of Python, not of the room that is tested: what it fails to find must fail here
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library here is not glibc")

# A thread takes four blocks of 6 MiB, uses and frees them, as a run in a lane does. A freed block of 30 MiB before it
# has taught glibc to keep such blocks in its heap.
SCRIPT = """
import ctypes, sys, threading
from featherbed.run import heap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def private_mib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

def use(count, mib):
    blocks = [libc.malloc(mib << 20) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, mib << 20)
    for block in blocks:
        libc.free(block)

def run():
    use(1, 30)
    use(4, 6)

if sys.argv[1] == "mapped":
    heap.map_large_blocks()
before = private_mib()
thread = threading.Thread(target=run)
thread.start()
thread.join()
heap.give_back()
print(private_mib() - before)
"""


def kept_mib(mode: str) -> float:
    """Private memory that a process has kept of what its thread freed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", SCRIPT, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


@glibc
def test_large_blocks_that_a_thread_has_freed_are_no_longer_ours() -> None:
    assert kept_mib("mapped") < 8


@glibc
def test_left_alone_the_c_library_keeps_them() -> None:
    """The reason why the size is fixed: without it this test's twin above shows nothing."""
    assert kept_mib("left alone") > 16


@pytest.mark.parametrize(("memory", "asked"), [(Memory(), 1), (Memory(give_back=False), 0)])
def test_a_session_asks_for_it_unless_told_to_leave_the_c_library_alone(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, memory: Memory, asked: int
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(heap, "map_large_blocks", lambda: calls.append(True))
    Session(folders["bert-mean"] / "onnx" / "model.onnx", Engine(memory=memory))
    assert len(calls) == asked


def test_where_the_c_library_has_no_such_calls_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    heap._glibc.cache_clear()
    heap.map_large_blocks.cache_clear()
    try:
        heap.map_large_blocks()
        heap.give_back()
    finally:
        monkeypatch.undo()
        heap._glibc.cache_clear()
        heap.map_large_blocks.cache_clear()
