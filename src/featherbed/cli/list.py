"""featherbed list"""

from __future__ import annotations

from datetime import UTC, datetime

import typer

from featherbed.cli.options import JsonFlag, print_json, print_table

LONGEST = 72  # characters of a path in the table


def command(as_json: JsonFlag = False) -> None:
    """Say what is in the caches: models of the Hub with their variants, prepacked weights; sizes, and when last used.

    Everything listed may be deleted: it is fetched, built or prepacked again when it is needed.
    """
    from featherbed.pipeline.doctor import models, packed

    held, entries = list(models()), list(packed())
    if as_json:
        print_json({"models": [vars(one) for one in held], "prepacked": [vars(one) for one in entries]})
        return
    rows = [
        [
            f"{one.repository}@{', '.join(one.revisions) or one.commit[:7]}",
            one.kind,
            ", ".join(one.variants) or "–",
            _mb(one.size_bytes),
            _date(one.used),
        ]
        for one in held
    ]
    if rows:
        print_table("models of the Hub", ["id", "kind", "variants", "MB", "last used"], rows)
    rows = [
        [_tail(one.source or one.folder), _mb(one.size_bytes), _date(one.used), one.fault or "–"] for one in entries
    ]
    if rows:
        print_table("prepacked weights", ["of", "MB", "last used", "useless, because"], rows)
    total = sum(one.size_bytes for one in held) + sum(one.size_bytes for one in entries)
    typer.echo(f"{len(held)} of the Hub, {len(entries)} prepacked: {_mb(total)} MB")


def _tail(path: str) -> str:
    """The end of a path, which tells models apart."""
    return path if len(path) <= LONGEST else f"…{path[1 - LONGEST :]}"


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f}"


def _date(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M")
