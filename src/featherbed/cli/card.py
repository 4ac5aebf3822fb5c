"""featherbed card"""

from __future__ import annotations

import typer

import featherbed
from featherbed.cli.options import Folder, JsonFlag, print_json


def command(folder: Folder, as_json: JsonFlag = False) -> None:
    """Write the folder's README.md from its manifest and evidence, and from nothing else."""
    path = featherbed.card(folder)
    if as_json:
        print_json({"card": str(path)})
    else:
        typer.echo(f"wrote {path}")
