"""Memory that was freed and is still ours: the C library keeps it for the next call unless told otherwise."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

MAP_FROM, TRIM_FROM = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc's malloc.h
BLOCK_BYTES = 4 * 2**20  # below it: weights' scales, ids; above it: what a run of many tokens takes


@cache
def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc; None on systems whose C library has none of that name."""
    if not sys.platform.startswith("linux"):
        return None
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return function


@cache
def map_large_blocks() -> None:
    """From now on, blocks of BLOCK_BYTES and more go back to the system when they are freed, once a process.

    Left alone, glibc raises that size with every large block that is freed, up to 32 MiB, and keeps twice as much at
    the end of the heap of each thread, where ``malloc_trim`` does not reach: 20 to 50 MB after batches of 1,024
    tokens.
    """
    if mallopt := _glibc("mallopt"):
        mallopt(MAP_FROM, BLOCK_BYTES)
        mallopt(TRIM_FROM, BLOCK_BYTES)


def give_back() -> None:
    """Hand all freed pages to the system: after reading a tokenizer, 40 MB; after a large batch, what it took."""
    if trim := _glibc("malloc_trim"):
        trim(0)
