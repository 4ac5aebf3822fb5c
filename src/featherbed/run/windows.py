"""Texts without end, a window at a time: tokenized and sorted together, the next one while the last is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress

from featherbed.run.tokens import Tokens, check_texts

PATIENCE_S = 1.0  # for a window to be tokenized: an interrupt is not to wait for standard input
WINDOW_TEXTS, WINDOW_CHARACTERS = 2048, 2**20  # enough to fill batches


def windows(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of WINDOW_TEXTS, fewer where they are long; a text of any length is taken.

    Raises TextError, naming its place, on what is not text.
    """
    rows: list[str] = []
    characters = 0
    for place, text in enumerate(texts):
        check_texts([text], place)
        rows.append(text)
        characters += len(text)
        if len(rows) == WINDOW_TEXTS or characters >= WINDOW_CHARACTERS:
            yield rows
            rows, characters = [], 0
    if rows:
        yield rows


def ahead(items: Iterator[Tokens]) -> Iterator[Tokens]:
    """The same items, the next of them made in a thread while the last is used.

    When the reader goes, the thread ends with the item it is at, or is left to itself: it may wait for input that
    never comes.
    """
    made: queue.SimpleQueue[Tokens | BaseException | None] = queue.SimpleQueue()
    turns, left = threading.Semaphore(1), threading.Event()

    def make() -> None:
        try:
            while turns.acquire() and not left.is_set():
                made.put(next(items, None))
        except BaseException as error:  # carried over to the thread that reads
            made.put(error)

    def get() -> Tokens | BaseException | None:
        while True:  # an interrupt that comes as a wait without end begins would never be seen
            with suppress(queue.Empty):
                return made.get(timeout=PATIENCE_S)

    thread = threading.Thread(target=make, name="featherbed-tokens", daemon=True)
    thread.start()
    try:
        while (item := get()) is not None:
            if isinstance(item, BaseException):
                raise item
            turns.release()
            yield item
    finally:
        left.set()
        turns.release()
        thread.join(PATIENCE_S)
