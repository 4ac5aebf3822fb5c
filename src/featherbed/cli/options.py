"""What several verbs share: option types and how a document or a table is printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")]
Folder = Annotated[Path, typer.Argument(help="A model folder.", metavar="DIR")]
Model = Annotated[str, typer.Argument(help="A model folder, or a Hub id: owner/name[@revision].", metavar="DIR")]
Names = Annotated[
    str, typer.Option("--variants", help="Comma-separated variants; all of the folder by default.", metavar="A,B")
]
Gates = Annotated[
    list[str] | None, typer.Option("--gate", help="A bound, e.g. cos_min=0.98; may be repeated.", metavar="METRIC=N")
]
Threads = Annotated[int, typer.Option("--threads", help="Cores to keep busy; 0 is all.")]
PoolSize = Annotated[
    int, typer.Option("--pool-size", help="Batches to run at a time; 0 goes by the work at hand.", metavar="N")
]
Provider = Annotated[
    str, typer.Option("--provider", help="cpu, cuda, coreml, openvino; auto: CUDA where there is one, else the CPU.")
]


def names(text: str) -> list[str]:
    """ "a, b" as ["a", "b"]."""
    return [word.strip() for word in text.split(",") if word.strip()]


def print_json(document: object) -> None:
    """The machine's last line."""
    sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """A table for people, on standard output; plain when that is not a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for at, name in enumerate(head):
        table.add_column(name, justify="right" if at else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # without a terminal there is no width to fit into: let lines be as long as they are
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)  # a table's own title is cut
    console.print(table)


def number(value: Any, digits: int) -> str:
    """A figure of a table; what is not finite is a dash."""
    return "–" if value is None else f"{value:.{digits}f}"
