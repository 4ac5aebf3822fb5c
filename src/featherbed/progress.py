"""Long work tells how far it is: a stage's name, how much is done, how much there is; 0 where nobody knows.

A Progress is any callable; ``silent`` ignores it. ``bar`` draws on standard error, for those who asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Ignore progress."""


def _short(count: int) -> str:
    """A count as it fits beside a bar: millions are enough of bytes."""
    return f"{count / 1e6:.1f}M" if count >= 10**6 else f"{count}"


@contextmanager
def bar() -> Iterator[Progress]:
    """Bars on standard error, one a stage, for as long as the context lasts."""
    from rich.console import Console  # drawn only on demand: the library itself never prints
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(32),
        TextColumn("{task.fields[share]:>4}"),
        TextColumn("{task.fields[amount]:>13}"),
        TimeElapsedColumn(),
    )
    bars = Bars(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def advance(stage: str, done: int, total: int) -> None:
        share, amount = (f"{100 * done // total}%", f"{_short(done)}/{_short(total)}") if total else ("", _short(done))
        if stage not in tasks:
            bars.start()  # with the first bar: an error before it then stands alone on its line
            tasks[stage] = bars.add_task(stage, total=None, share=share, amount=amount)
        bars.update(tasks[stage], completed=done, total=total or None, share=share, amount=amount)

    try:
        yield advance
    finally:
        if tasks:
            bars.stop()
