"""Memory that was freed and is still ours: the C library keeps it for the next call unless told otherwise."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None on systems whose allocator has none."""
    if not sys.platform.startswith("linux"):
        return None
    function: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return function


def give_back() -> None:
    """Hand all freed pages to the system: after reading a tokenizer, 40 MB; after a large batch, what it took."""
    if trim := _trim():
        trim(0)
