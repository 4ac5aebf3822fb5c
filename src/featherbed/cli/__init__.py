"""The command line: one verb a file. Only these rooms print."""

from __future__ import annotations

import io
import os
import sys
import traceback

import typer

import featherbed
from featherbed.cli import (
    bench,
    build,
    card,
    conform,
    doctor,
    embed,
    eval,
    export,
    inspect,
    list,
    prune,
    pull,
    push,
    repair,
    report,
    tune,
    verify,
)

DEFECT = 70  # sysexits.h: EX_SOFTWARE

app = typer.Typer(
    name="featherbed",
    help="Small, fast ONNX files of text-embedding models, each proven against the original.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _verb, _command, _short in (
    ("build", build.command, "Checkpoint or Hub id → model folder, verified."),
    ("verify", verify.command, "Measure variants against fp32, judge by gates."),
    ("inspect", inspect.command, "Say what a model file is."),
    ("bench", bench.command, "Measure speed and memory."),
    ("eval", eval.command, "Try variants on a dataset: retrieval, rated pairs."),
    ("tune", tune.command, "Search mixed precision, add the winner as tuned."),
    ("card", card.command, "Write the folder's README.md from its evidence."),
    ("report", report.command, "Write the folder's report.html from its evidence."),
    ("pull", pull.command, "Hub → cache: what is needed, every byte compared."),
    ("prune", prune.command, "Take variants out of a folder, free their files."),
    ("list", list.command, "What is in the caches, how large, when last used."),
    ("doctor", doctor.command, "This machine, the variant for it, what is broken."),
    ("push", push.command, "Model folder → Hub, what passed its gates."),
    ("conform", conform.command, "Will it load unchanged elsewhere?"),
    ("repair", repair.command, "Mend what a folder says of itself."),
    ("export", export.command, "One variant, laid out for another server."),
    ("embed", embed.command, "Files of texts → vectors."),
):
    app.command(_verb, short_help=_short)(_command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(featherbed.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Small, fast ONNX files of text-embedding models, each proven against the original."""


def main() -> None:
    """The entry point: errors of ours end in one line on standard error and their exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # "≥" on a pipe that is not UTF-8
    try:
        app()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the reader went away: `featherbed inspect … | head`
            os._exit(0)  # nothing is left to write to, not even at exit
        raise
    except featherbed.FeatherbedError as error:
        sys.stderr.write(f"featherbed: {error}\n")
        sys.exit(error.exit_code)
    except Exception:  # a defect of ours: its trace, and not the exit code of a failed gate
        traceback.print_exc()
        sys.exit(DEFECT)
