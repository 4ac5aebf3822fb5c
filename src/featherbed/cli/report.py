"""featherbed report"""

from __future__ import annotations

import typer

from featherbed.cli.options import Folder, JsonFlag, print_json


def command(folder: Folder, as_json: JsonFlag = False) -> None:
    """Write the folder's report.html from its manifest and evidence: tables and figures on one self-contained page."""
    from featherbed.check.page import report

    path = report(folder)
    if as_json:
        print_json({"report": str(path)})
    else:
        typer.echo(f"wrote {path}")
