"""featherbed push"""

from __future__ import annotations

from typing import Annotated

import typer

from featherbed.cli.options import Folder, JsonFlag, Names, names, print_json


def command(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="A Hub id: owner/name.", metavar="ID")],
    variants: Names = "",
    weights: Annotated[
        str, typer.Option(help="Where weights lie there: as-built, inside the .onnx, or beside it.", metavar="PLACE")
    ] = "as-built",
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is new.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go; do not go to the Hub.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Put a model folder on the Hub, in one commit: only variants that passed their gates, fp32 always among them.

    Manifest, card and report there are of the variants that are pushed. Tokens and endpoint are huggingface_hub's own:
    HF_TOKEN, HF_ENDPOINT.
    """
    from featherbed.pipeline.push import push
    from featherbed.pipeline.stage import parse_weights

    pushed = push(folder, name, names(variants), weights=parse_weights(weights), private=private, dry_run=dry_run)
    if as_json:
        print_json({"files": pushed.files, "commit": pushed.address or None})
        return
    for file, size in pushed.files.items():
        typer.echo(f"{size:>14,}  {file}")
    total = f"{len(pushed.files)} files, {sum(pushed.files.values()) / 1e6:.1f} MB"
    typer.echo(f"{total}: {pushed.address or 'not pushed, as asked'}")
