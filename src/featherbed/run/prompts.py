"""Prompts a decoder has seen: their tokens are computed once, and every text behind them goes on from there.

A token sees only what stands before it, so what a prompt leaves behind in a decoder, the keys and values of its
tokens, is the same for every text. Encoders look both ways: nothing of theirs can be kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherbed.run.tokens import Tokenizer

Past = dict[str, npt.NDArray[np.float32]]
MOST_PROMPTS = 8
LEAST_TOKENS, MOST_TOKENS = 4, 256  # a shorter one is not worth a run a text; a longer one takes too much memory
ENDINGS = (
    "a",
    " a",
    "A",
    "7",
    "\n",
    ".",
    "中",
    "",
)  # what may follow a prompt, each joined by the tokenizer its own way


@dataclass(frozen=True)
class Seen:
    """A prompt's first tokens, the same before any text, and the keys and values they leave."""

    ids: list[int]
    past: Past

    @property
    def size_bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(array.nbytes for array in self.past.values())


class Prompts:
    """The last MOST_PROMPTS prompts of a session. Safe to use from many threads."""

    def __init__(self, tokenizer: Tokenizer, compute: Callable[[list[int]], Past]) -> None:
        self._tokenizer, self._compute = tokenizer, compute
        self._seen: OrderedDict[str, Seen | None] = OrderedDict()
        self._once: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, prompt: str, texts: int) -> Seen | None:
        """What ``prompt`` leaves behind; None for the very first text and for prompts too short to keep.

        A first text alone may be the last: it is computed whole, and the prompt by itself when more come.
        """
        with self._lock:
            if prompt not in self._seen:
                if texts == 1 and prompt not in self._once:
                    self._once[prompt] = None
                    if len(self._once) > MOST_PROMPTS:
                        self._once.popitem(last=False)
                    return None
                ids = stable(self._tokenizer, prompt)
                self._seen[prompt] = Seen(ids, self._compute(ids)) if LEAST_TOKENS <= len(ids) <= MOST_TOKENS else None
                self._once.pop(prompt, None)
                if len(self._seen) > MOST_PROMPTS:
                    self._seen.popitem(last=False)
            self._seen.move_to_end(prompt)
            return self._seen[prompt]

    @property
    def size_bytes(self) -> int:
        """Memory of all prompts that are kept."""
        with self._lock:
            return sum(seen.size_bytes for seen in self._seen.values() if seen)


def stable(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens that begin every text behind ``prompt``: its last ones may melt into what follows."""
    rows = [tokenizer.encode([text], prompt).ids[0][:-1] for text in ENDINGS]  # the last is the end token
    length = 0
    while all(len(row) > length and row[length] == rows[0][length] for row in rows):
        length += 1
    return rows[0][:length]
