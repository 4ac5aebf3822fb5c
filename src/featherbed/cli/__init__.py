"""The command line: one verb a file. Only these rooms print."""

from __future__ import annotations

import io
import os
import sys

import typer

import featherbed
from featherbed.cli import bench, build, card, embed, inspect, verify

app = typer.Typer(
    name="featherbed",
    help="Small, fast ONNX files of text-embedding models, each proven against the original.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("build")(build.command)
app.command("verify")(verify.command)
app.command("inspect")(inspect.command)
app.command("bench")(bench.command)
app.command("card")(card.command)
app.command("embed")(embed.command)


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
