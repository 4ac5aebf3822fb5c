"""featherbed bench"""

from __future__ import annotations

from typing import Annotated

import typer

import featherbed
from featherbed.cli.options import (
    Folder,
    JsonFlag,
    Names,
    PoolSize,
    Provider,
    Threads,
    names,
    print_json,
    print_table,
)
from featherbed.progress import bar


def command(
    folder: Folder,
    variants: Names = "",
    tokens: Annotated[
        int | None, typer.Option(help="Tokens a text; 128, or the model's longest if that is less.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Texts a batch.")] = 8,
    rounds: Annotated[int, typer.Option(help="Measured rounds; the median counts.")] = 7,
    threads: Threads = 0,
    pool_size: PoolSize = 0,
    provider: Provider = "auto",
    save: Annotated[bool, typer.Option(help="Write the figures into the folder's evidence and card.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure speed and memory of the variants, each in a process of its own, in turn.

    Private memory is what the process owns; the rest of its memory is mapped from files and shared.
    """
    from featherbed.check.bench import Load  # here and not above: --help must not wait for numpy

    load = Load(tokens, batch, rounds, threads, pool_size, provider)
    with bar() as progress:
        document = featherbed.bench(folder, names(variants), load, save=save, progress=progress)
    if as_json:
        print_json(document)
        return
    machine, size = document["machine"], f"{batch} × {document['load']['tokens']} tokens"
    title = (
        f"{size} on {machine['cpu']}, {machine['cores']} cores, onnxruntime {machine['onnxruntime']}, "
        f"provider {document['load']['provider']}"
    )
    print_table(
        title,
        ["variant", "MB", "tokens/s", "texts/s", "1 text p50 ms", "p95 ms", "load s", "RSS MiB", "private", "peak"],
        [
            [
                name,
                f"{row['size_bytes'] / 1e6:.1f}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['texts_per_s']:.1f}",
                f"{row['latency_p50_ms']:.1f}",
                f"{row['latency_p95_ms']:.1f}",
                f"{row['load_s']:.2f}",
                f"{row['rss_mib']:.0f}",
                f"{row['rss_private_mib']:.0f}",
                f"{row['rss_peak_mib']:.0f}",
            ]
            for name, row in document["variants"].items()
        ],
    )
