"""featherbed list"""

from __future__ import annotations

from datetime import UTC, datetime

import typer

from featherbed.cli.options import JsonFlag, print_json, print_table

LONGEST = 72  # characters of a path in the table


def command(as_json: JsonFlag = False) -> None:
    """Say what is in the caches: models of the Hub with their variants, prepacked weights, and real files for links.

    Everything listed may be deleted: it is fetched, built or prepacked again when it is needed.
    """
    from featherbed.pipeline.doctor import models, packed, unlinked

    held, entries, real = list(models()), list(packed()), list(unlinked())
    if as_json:
        linked = [{**vars(one), "folder": str(one.folder)} for one in real]
        print_json(
            {"models": [vars(one) for one in held], "prepacked": [vars(one) for one in entries], "linked": linked}
        )
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
    rows = [[_tail(one.source or str(one.folder)), _mb(one.size_bytes), one.fault or "–"] for one in real]
    if rows:
        print_table("real files of folders made of links", ["of", "MB", "useless, because"], rows)
    sizes = [[one.size_bytes for one in held], [one.size_bytes for one in entries], [one.size_bytes for one in real]]
    linked_too = f", {len(real)} of folders made of links" if real else ""
    typer.echo(f"{len(held)} of the Hub, {len(entries)} prepacked{linked_too}: {_mb(sum(map(sum, sizes)))} MB")


def _tail(path: str) -> str:
    """The end of a path, which tells models apart."""
    return path if len(path) <= LONGEST else f"…{path[1 - LONGEST :]}"


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f}"


def _date(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M")
