"""featherbed inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import featherbed
from featherbed.cli.options import JsonFlag, print_json, print_table


def command(
    path: Annotated[
        Path, typer.Argument(help="A model folder, someone else's folder, or an .onnx file.", metavar="PATH")
    ],
    as_json: JsonFlag = False,
) -> None:
    """Say what a model file is: inputs, outputs, operators, how it is quantized, where its bytes are."""
    document = featherbed.inspect(path)
    if as_json:
        print_json(document)
        return
    spec = document["spec"]
    if spec:
        typer.echo(
            f"{document['path']}: {spec['family']}, {spec['dim']} dimensions, {spec['pooling']} pooling, "
            f"up to {spec['max_length']} tokens, vocabulary {spec['vocab_size']}"
        )
        for name, text in spec["prompts"].items():
            typer.echo(f"prompt {name}: {text!r}")
    print_table(
        "files",
        ["file", "MB", "quantization", "table", "opset", "onnxruntime ≥", "batch"],
        [
            [
                f["file"],
                f"{f['size_bytes'] / 1e6:.1f}",
                "\n".join(f["quantization"]),
                f["table"],
                str(f["opset"]),
                f["least_onnxruntime"],
                "static" if f["static_batch"] else "dynamic",
            ]
            for f in document["files"]
        ],
    )
    groups = sorted({g for f in document["files"] for g in f["weights_bytes"]})
    print_table(
        "MB of weights",
        ["file", *groups],
        [[f["file"], *(f"{f['weights_bytes'].get(g, 0) / 1e6:.2f}" for g in groups)] for f in document["files"]],
    )
    for f in document["files"]:
        _print_ports(f)
    for warning in document["warnings"]:
        typer.echo(f"warning: {warning}")


def _print_ports(f: dict[str, Any]) -> None:
    inputs = ", ".join(f"{name} {kind}" for name, kind in f["inputs"].items())
    outputs = ", ".join(f"{name} {kind}" for name, kind in f["outputs"].items())
    census = ", ".join(f"{count} {op}" for op, count in sorted(f["operators"].items(), key=lambda i: -i[1]))
    typer.echo(f"{f['file']}\n  in   {inputs}\n  out  {outputs}\n  ops  {census}")
    for warning in f["warnings"]:
        typer.echo(f"  warning: {warning}")
