"""featherbed tune"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import featherbed
from featherbed.cli.options import Folder, JsonFlag, print_json, print_table
from featherbed.cli.verify import print_report
from featherbed.progress import bar

if TYPE_CHECKING:
    from featherbed.pipeline.tune import Tuned


def command(
    folder: Folder,
    minimum: Annotated[
        list[str] | None,
        typer.Option("--min", help="cos_min, cos_mean or tokens_per_s, e.g. cos_min=0.98.", metavar="METRIC=N"),
    ] = None,
    maximum: Annotated[
        list[str] | None, typer.Option("--max", help="size_mb or rss_mb, e.g. size_mb=20.", metavar="METRIC=N")
    ] = None,
    goal: Annotated[str, typer.Option(help="Of those within the bounds, the best at: size, speed, fidelity.")] = "size",
    trials: Annotated[int, typer.Option(help="Recipes to make and measure.")] = 10,
    calibration: Annotated[
        Path | None, typer.Option(help="JSON lines of texts to calibrate with, instead of the shipped ones.")
    ] = None,
    probe: Annotated[
        list[Path] | None, typer.Option(help="JSON lines of texts to judge by, instead of the shipped probe.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Search which layer takes how many bits, and add the winner to the folder as the variant tuned.

    What rounding each weight does to the embedding is measured; recipes of 4, 8 and 32 bits are then made, measured
    and compared. All figures, and a picture of the front, are kept in the folder's reports: an interrupted search goes
    on where it stopped. Exit code 1 when no trial is within the bounds.
    """
    with bar() as progress:
        tuned = featherbed.tune(
            folder,
            minimum=minimum or (),
            maximum=maximum or (),
            goal=goal,
            trials=trials,
            calibration=calibration,
            probes=probe or (),
            progress=progress,
        )
    if as_json:
        rows = [{**figures, "front": key in tuned.front} for key, figures in tuned.trials.items()]
        won = None if tuned.winner is None else tuned.trials[tuned.winner]
        report = None if tuned.report is None else tuned.report.to_json()
        print_json({"trials": rows, "winner": won, "report": report, "picture": str(tuned.picture)})
    else:
        _print(tuned)
    if tuned.report is None or not tuned.report.passed:
        raise typer.Exit(1)


def _print(tuned: Tuned) -> None:
    head = [
        "trial",
        "MB",
        "tokens/s",
        "cos mean",
        "cos worst",
        "RSS MiB",
        "at 4 · 8 · 8-block · 32 bits",
        "front",
    ]
    rows: list[list[str]] = []
    for key, f in sorted(tuned.trials.items(), key=lambda item: item[1]["size_mb"]):
        levels = list(f["bits"].values())
        counts = " · ".join(str(levels.count(level)) for level in ("4", "8", "8-block", "32"))
        mark = "winner" if key == tuned.winner else "yes" if key in tuned.front else ""
        speed, mean, worst = f"{f['tokens_per_s']:.0f}", f"{f['cos_mean']:.5f}", f"{f['cos_min']:.4f}"
        rows.append(
            [str(len(rows) + 1), f"{f['size_mb']:.2f}", speed, mean, worst, f"{f['rss_mib']:.0f}", counts, mark]
        )
    print_table("mixed recipes, by size", head, rows)
    typer.echo(f"picture: {tuned.picture}")
    if tuned.report is None:
        typer.echo("no trial is within the bounds: loosen one, or allow more --trials")
    else:
        print_report(tuned.report)
