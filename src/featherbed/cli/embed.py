"""featherbed embed"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

import featherbed
from featherbed.cli.options import Folder, JsonFlag, print_json
from featherbed.progress import bar


def command(
    folder: Folder,
    inputs: Annotated[list[str], typer.Argument(help="Files: .txt, .jsonl, .csv; - is standard input.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write: .npy, .jsonl or .parquet.")],
    variant: Annotated[
        str, typer.Option(help="Which file; auto: int8, int8-block or fp32, the first that did not fail its gates.")
    ] = "auto",
    query: Annotated[bool, typer.Option("--query", help="Texts are queries: the query prompt comes first.")] = False,
    field: Annotated[str, typer.Option(help="Where the text is in .jsonl and .csv.")] = "text",
    dim: Annotated[int | None, typer.Option(help="Keep the first components only (Matryoshka models).")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Embed files of texts, in their order, as documents (or queries), with the folder's prompts.

    .txt has a text a line. .npy holds float32 [texts, dimensions]; .jsonl and .parquet carry the texts too.
    """
    from featherbed.run.files import check_output, read_texts, write_vectors  # numpy: not for --help

    check_output(out)
    texts = [text for path in inputs for text in read_texts(path, field)]
    model = featherbed.Embedder(folder, variant)
    started = time.perf_counter()
    with bar() as progress:
        encode = model.encode_query if query else model.encode_document
        vectors = encode(texts, truncate_dim=dim, progress=progress)
    seconds = time.perf_counter() - started
    write_vectors(out, texts, vectors)
    if as_json:
        print_json(
            {
                "out": str(out),
                "variant": model.variant,
                "texts": len(texts),
                "dimensions": vectors.shape[1],
                "seconds": round(seconds, 3),
            }
        )
    else:
        typer.echo(
            f"{len(texts)} texts, {vectors.shape[1]} dimensions, variant {model.variant}, "
            f"{len(texts) / max(seconds, 1e-9):.0f} texts/s: {out}"
        )
