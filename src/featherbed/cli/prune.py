"""featherbed prune"""

from __future__ import annotations

from typing import Annotated

import typer

from featherbed.cli.options import JsonFlag, Model, names, print_json


def command(
    folder: Model,
    keep: Annotated[
        str,
        typer.Option("--keep", help="Comma-separated variants that stay; an id without it goes whole.", metavar="A,B"),
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Let fp32 go too: no more verify, no more tune.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Take variants out of a model folder: their files, their evidence, their rows on card and report.

    The manifest is written before a file goes: a run that is stopped leaves a folder that is whole, and the next one
    removes what it left over. Of a Hub id, what is in the cache goes: it is fetched again when it is needed.
    """
    from featherbed.hub.names import hub_id
    from featherbed.pipeline.evict import evict
    from featherbed.pipeline.prune import prune

    wanted = hub_id(folder)
    if wanted is None:
        pruned = prune(folder, names(keep), force=force, dry_run=dry_run)
    else:
        pruned = evict(wanted, names(keep), everything="@" not in folder, force=force, dry_run=dry_run)
    if as_json:
        document = {key: list(getattr(pruned, key)) for key in ("gone", "kept", "left_over")}
        print_json({"freed": pruned.freed, **document, "freed_bytes": pruned.freed_bytes})
        return
    kept = f"{', '.join(pruned.kept) or 'nothing'} {'stay' if len(pruned.kept) > 1 else 'stays'}"
    if not pruned.freed:
        typer.echo(f"nothing to free: {kept}")
        return
    for file, size in pruned.freed.items():
        note = "  left over by a run that was stopped" if file in pruned.left_over else ""
        typer.echo(f"{size:>14,}  {file}{note}")
    total = f"{len(pruned.freed)} file{'s' if len(pruned.freed) > 1 else ''}, {pruned.freed_bytes / 1e6:.1f} MB"
    typer.echo(f"{total} {'would be ' if dry_run else ''}freed: {kept}")
