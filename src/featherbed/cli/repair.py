"""featherbed repair"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherbed.cli.options import Folder, JsonFlag, print_json


def command(
    folder: Folder,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="New folder; what stays is linked.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Change the folder itself, whole or not.")] = False,
    pooling: Annotated[
        str | None, typer.Option(help="mean, cls or lasttoken, where no file says which.", metavar="NAME")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would change; write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Mend what a folder, ours or another's, says of itself, so that every ecosystem reads it; weights stay.

    Pooling in both schemas, tokenizer limits, padding and end token, names of modules, special tokens, names of
    sidecars and what is said of them. Every change is listed with its reason, and what no repair can mend too.
    """
    from featherbed.pipeline.repair import repair

    done = repair(folder, out, in_place=in_place, pooling=pooling, dry_run=dry_run)
    if as_json:
        print_json(done.to_json())
        return
    for change in done.changes:
        typer.echo(f"{change.file}: {change.what} ({change.why})")
    if not done.changes:
        typer.echo("nothing to mend")
    for finding in () if dry_run else done.left:
        if finding.rule.fails:
            where = f"{finding.variant}: " if finding.variant else ""
            typer.echo(f"left as it is: {where}{finding.found}; {finding.rule.remedy} [{finding.rule.id}]")
    if done.folder:
        typer.echo(f"wrote {done.folder}")
