"""featherbed pull"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherbed.cli.options import JsonFlag, names, print_json
from featherbed.progress import bar


def command(
    source: Annotated[str, typer.Argument(help="A Hub id: owner/name[@revision].", metavar="ID")],
    variants: Annotated[
        str,
        typer.Option(help="Comma-separated variants, or all; by default the one that auto means.", metavar="A,B"),
    ] = "",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Put a copy here.", metavar="DIR")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what is needed; fetch nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Fetch a model folder, or a checkpoint, from the Hub into the cache: only the files that are needed.

    Every file is compared with the hash that the Hub lists. What has arrived is kept when it is stopped: run it again.
    Endpoint, token, places and offline mode are huggingface_hub's own: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE.
    """
    from featherbed.pipeline.pull import carried_out, plan

    known = plan(source, names(variants))
    document = {
        "repository": known.record.repository,
        "commit": known.record.commit,
        "kind": known.record.kind,
        "variants": list(known.chosen),
        "files": {s.file.path: {"size_bytes": s.file.size_bytes, "state": s.state} for s in known.steps},
        "missing_bytes": known.missing_bytes,
    }
    if not as_json:
        for step in known.steps:
            typer.echo(f"{step.file.size_bytes:>14,}  {step.file.path:<44} {step.state}")
        whole = sum(step.file.size_bytes for step in known.steps)
        typer.echo(
            f"{known.record.kind} {known.record.repository} at {known.record.commit[:7]}: {len(known.steps)} files, "
            f"{whole / 1e6:.1f} MB, {known.missing_bytes / 1e6:.1f} MB to fetch"
        )
        if known.published is not None and known.manifest is not None:
            others = [name for name in known.published.variants if name not in known.manifest.variants]
            sizes = [f"{name} {known.published.size_bytes(name) / 1e6:.1f} MB" for name in others]
            typer.echo(f"not asked for: {', '.join(sizes) or 'nothing, these are all'}")
    folder = None
    if not dry_run:
        with bar() as progress:
            folder = carried_out(known, out, progress)
    if as_json:
        print_json({**document, "folder": None if folder is None else str(folder)})
    elif folder is None:
        typer.echo("not fetched, as asked")
    else:
        typer.echo(f"{folder}")
        if known.manifest is None:
            typer.echo(f"a checkpoint: build it with `featherbed build {source}`")
