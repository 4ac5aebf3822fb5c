"""featherbed verify"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import featherbed
from featherbed.cli.options import Folder, Gates, JsonFlag, Names, names, number, print_json, print_table
from featherbed.errors import OptionError, OutputError
from featherbed.folder import write_text
from featherbed.progress import bar

if TYPE_CHECKING:
    from featherbed.report import Report


def print_report(report: Report) -> None:
    """The table of a report, then every gate that failed."""
    probe = report.probe
    head = ["variant", "MB", "mean", "p1", "worst", "Spearman", "near@10", "invariance", "triplets", "gates"]
    rows = []
    for name, m in report.metrics.items():
        values = m.to_json()
        rows.append(
            [
                name,
                f"{m.size_bytes / 1e6:.1f}",
                number(values["cos_mean"], 5),
                number(values["cos_p1"], 4),
                number(values["cos_min"], 4),
                number(values["spearman"], 4),
                number(values["neighbours_at_10"], 3),
                "–" if values["invariance_max"] is None else f"{m.invariance_max:.1e}",
                f"{m.triplets_correct}/{m.triplets_total}",
                "passed" if report.passed_by(name) else "FAILED",
            ]
        )
    title = f"cosine to fp32 and more, on {probe['texts']} texts of probe {probe['name']} {probe['version']}".rstrip()
    print_table(title, head, rows)
    for v in report.verdicts:
        if not v.passed:
            typer.echo(f"gate failed: {v}")
    for name, m in report.metrics.items():
        if m.retrieval_top_1 is not None:
            values = m.to_json()
            figures = (number(values[f"retrieval_{key}"], 4) for key in ("top_1", "ndcg_at_10", "mrr_at_10"))
            said = "top-1 {}, nDCG@10 {}, MRR@10 {}".format(*figures)
            typer.echo(f"{name} on {probe['retrieval']['name']}: {said}")
    errors = [m.reference_max_error for m in report.metrics.values()]
    for name, error in zip(report.metrics, errors, strict=True):
        if error is not None:
            typer.echo(f"{name} against upstream's PyTorch model: largest difference of a component {error:.2e}")


def command(
    folder: Folder,
    variants: Names = "",
    gate: Gates = None,
    probe: Annotated[
        list[Path] | None, typer.Option(help="JSON lines of texts or triplets instead of the shipped probe.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The checkpoint's folder: compare with its PyTorch model too.", metavar="DIR")
    ] = None,
    retrieval: Annotated[
        Path | None, typer.Option(help="A dataset's folder in BEIR's shape: search it too.", metavar="DATASET")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="What the variants reached before, a kind of CPU each.", metavar="FILE")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Put this run's figures down in the baseline, and do not judge by it.")
    ] = False,
    junit: Annotated[Path | None, typer.Option(help="Write the gates as JUnit XML, for CI.", metavar="FILE")] = None,
    save: Annotated[bool, typer.Option(help="Write evidence, verdicts and card into the folder.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure the variants of a model folder against fp32 and judge them by their gates.

    Default gates: worst cosine 0.9999 (fp32), 0.98 (8 bits), 0.93 (4 bits); batch invariance and unit norm
    1e-4. Exit code 1 when one fails: this is the step for your CI.
    """
    if record and baseline is None:
        raise OptionError(
            "--record", expected="--baseline FILE", found="none", remedy="say where to put the figures down"
        )
    if junit is not None and not junit.absolute().parent.is_dir():
        raise OutputError(
            f"--junit {junit}",
            expected="a file in a folder that is there",
            found="no such folder",
            remedy="make it first",
        )
    from featherbed.check.baseline import record as put_down

    with bar() as progress:
        report = featherbed.verify(
            folder,
            names(variants),
            gates=gate or (),
            probes=probe or (),
            upstream=reference,
            retrieval=retrieval,
            baseline=None if record else baseline,
            save=save,
            progress=progress,
        )
    if record and baseline is not None and report.passed:  # what failed is nothing to hold others to
        put_down(baseline, report)
    if junit is not None:
        write_text(junit, report.to_junit())
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report)
    if not report.passed:
        raise typer.Exit(1)
