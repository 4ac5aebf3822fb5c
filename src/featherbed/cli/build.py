"""featherbed build"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import featherbed
from featherbed.cli.options import Gates, JsonFlag, names, print_json
from featherbed.cli.verify import print_report
from featherbed.progress import bar
from featherbed.recipe import DEFAULT, GROUPS, RECIPES, REFERENCE
from featherbed.target import FUSED


def command(
    source: Annotated[str, typer.Argument(help="A checkpoint folder, or a Hub id: owner/name[@revision].")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Model folder to write; NAME-onnx here.")] = None,
    variants: Annotated[
        str, typer.Option(help=f"Of {', '.join(RECIPES)}; {' or '.join(GROUPS)}; {REFERENCE} is always built.")
    ] = ",".join(DEFAULT),
    gate: Gates = None,
    pooling: Annotated[
        str | None, typer.Option(help="mean, cls or lasttoken: only where the checkpoint does not say.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="JSON lines of texts for recipes that look at activations, instead of the shipped ones."),
    ] = None,
    base_model: Annotated[
        str, typer.Option(help="The Hub id of what the folder holds, for the card.", metavar="OWNER/NAME")
    ] = "",
    operators: Annotated[
        str, typer.Option(help="fused for onnxruntime, or standard: of the ONNX standard only, for every engine.")
    ] = FUSED,
    static: Annotated[
        str, typer.Option(help="Fixed shapes for all variants: texts x tokens, as 1x128.", metavar="BATCHxTOKENS")
    ] = "",
    verify: Annotated[bool, typer.Option(help="Measure each variant against fp32 and judge it.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Turn a checkpoint (safetensors) into a model folder: ONNX variants, verified, with manifest and card.

    Families: bert (MiniLM, bge, e5), xlm-roberta, mpnet, nomic_bert, modernbert, gemma3_text (EmbeddingGemma), qwen2
    and qwen3 (Qwen3-Embedding, Octen, F2LLM) need no torch; any other goes through it, where it is installed.
    Exit code 1 when a gate fails: the variant is kept and marked.
    """
    with bar() as progress:
        outcome = featherbed.build(
            source,
            out,
            names(variants),
            gates=gate or (),
            pooling=pooling,
            check=verify,
            calibration=calibration,
            base_model=base_model,
            operators=operators,
            static=static,
            progress=progress,
        )
    report = outcome.report
    if as_json:
        known = report.to_json() if report else {"passed": None}
        print_json({"folder": str(outcome.folder), "built": outcome.made, **known})
    else:
        if report:
            print_report(report)
        typer.echo(f"{'built' if outcome.made else 'not built, its variants were ready:'} {outcome.folder}")
    if report and not report.passed:
        raise typer.Exit(1)
