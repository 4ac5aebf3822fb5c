"""featherbed conform"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featherbed.cli.options import Folder, JsonFlag, Names, names, print_json, print_table
from featherbed.progress import bar

if TYPE_CHECKING:
    from featherbed.check.conform import Conformance, Finding


def command(
    folder: Folder,
    variants: Names = "",
    load: Annotated[
        bool,
        typer.Option("--load/--no-load", help="Load it where a library is installed, or judge by rules only."),
    ] = True,
    python: Annotated[
        Path | None,
        typer.Option("--python", help="A Python that has the libraries; by default our own.", metavar="PATH"),
    ] = None,
    node: Annotated[
        Path | None,
        typer.Option("--node", help="A folder with node_modules/@huggingface/transformers.", metavar="FOLDER"),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say whether a folder, ours or another's, loads unchanged elsewhere.

    In sentence-transformers (ONNX backend), fastembed, transformers.js, text-embeddings-inference and Optimum: by rules
    always, and by loading it in a process of its own where the library is. Exit code 1 when it does not.
    """
    from featherbed.check.conform import Peers, conform

    peers = Peers(python or Path(sys.executable), node) if load else None
    with bar() as progress:
        found = conform(folder, names(variants), peers, progress)
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)
    if not found.passed:
        raise typer.Exit(1)


def _print(found: Conformance) -> None:
    from featherbed.check.rules import ECOSYSTEMS

    for variant in found.variants:
        rows = [
            [ecosystem, found.verdict(ecosystem, variant), _tried(found, ecosystem, variant)]
            for ecosystem in ("onnxruntime", *ECOSYSTEMS)
        ]
        print_table(variant, ["ecosystem", "verdict", "loaded"], rows)
    for finding in found.findings:
        typer.echo(_line(finding))
    typer.echo("conforms" if found.passed else "does not conform")


def _tried(found: Conformance, ecosystem: str, variant: str) -> str:
    seen = next((t for t in found.tried if (t.peer, t.variant) == (ecosystem, variant)), None)
    if seen is None:
        return "not tried"
    if seen.missing:
        return f"not tried: {seen.missing} is not installed"
    if seen.why:
        return seen.why.splitlines()[0][:110]
    return "with vectors" if seen.cosine is None else f"cosine to ours {seen.cosine:.7f}"


def _line(finding: Finding) -> str:
    rule = finding.rule
    head = "fails" if rule.fails else "note"
    where = f"{finding.variant}: " if finding.variant else ""
    return f"{head}: {where}{finding.found} ({', '.join(rule.concerns)}): {rule.otherwise}; {rule.remedy} [{rule.id}]"
