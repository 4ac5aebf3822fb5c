"""featherbed export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherbed.cli.options import Folder, JsonFlag, print_json


def command(
    folder: Folder,
    out: Annotated[Path, typer.Option("-o", "--out", help="New folder; configs and weights are linked.")],
    variant: Annotated[str, typer.Option(help="Which variant; of another's folder the file, e.g. onnx/model.onnx.")],
    layout: Annotated[
        str, typer.Option(help="tei: as model.onnx; browser: as model_quantized.onnx.", metavar="NAME")
    ] = "tei",
    as_json: JsonFlag = False,
) -> None:
    """Lay out one variant where another server looks for its only model.

    text-embeddings-inference runs model.onnx and no other file. The new folder is opened and its vectors compared with
    the variant's. Exit code 1 when they differ, or when a rule says that it will not load there.
    """
    from featherbed.pipeline.export import export

    done = export(folder, variant, out, layout)
    if as_json:
        findings = [finding.to_json() for finding in done.findings]
        document = {"folder": str(done.folder), "graph": done.graph, "layout": layout, "cosine": done.cosine}
        print_json({**document, "passed": done.passed, "findings": findings})
    else:
        for finding in done.findings:
            head = "fails" if finding.rule.fails else "note"
            typer.echo(f"{head}: {finding.found}: {finding.rule.otherwise}; {finding.rule.remedy} [{finding.rule.id}]")
        typer.echo(f"wrote {done.folder}: {variant} is {done.graph}, cosine to what it was {done.cosine:.7f}")
    if not done.passed:
        raise typer.Exit(1)
