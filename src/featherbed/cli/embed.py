"""featherbed embed"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

import featherbed
from featherbed.cli.options import JsonFlag, Model, PoolSize, Provider, Threads, print_json
from featherbed.progress import bar


def command(
    folder: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write: .npy, .jsonl or .parquet.")],
    inputs: Annotated[list[str] | None, typer.Argument(help="Files: .txt, .jsonl, .csv; - is standard input.")] = None,
    variant: Annotated[
        str, typer.Option(help="Which file; auto: int8, int8-block or fp32, the first that did not fail its gates.")
    ] = "auto",
    query: Annotated[bool, typer.Option("--query", help="Texts are queries: the query prompt comes first.")] = False,
    field: Annotated[str, typer.Option(help="Where the text is in .jsonl and .csv.")] = "text",
    dim: Annotated[int | None, typer.Option(help="Keep the first components only (Matryoshka models).")] = None,
    threads: Threads = 0,
    pool_size: PoolSize = 0,
    provider: Provider = "auto",
    pooling: Annotated[
        str | None, typer.Option(help="Files of others whose configs do not say it: mean, cls or lasttoken.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Files of others that want one: a task's name or number.")] = None,
    output: Annotated[str | None, typer.Option(help="Files of others: the output to read.")] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="A featherbed.toml that names the model; DIR is an input then.", metavar="FILE"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Instead of DIR, and of the file's; DIR is an input then.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts of 128 tokens at a time; 0 is our choice.", metavar="N")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Embed files of texts, in their order, as documents (or queries), with the folder's prompts.

    .txt has a text a line. .npy holds float32 [texts, dimensions]; .jsonl and .parquet carry the texts too.
    Texts are read and vectors written as they come: memory does not grow with the files.
    """
    from featherbed.choice import AUTO
    from featherbed.pipeline.configured import TEXT_TOKENS, configured
    from featherbed.run.embedder import DOCUMENT_PROMPTS, QUERY_PROMPTS  # here: --help must not wait for numpy
    from featherbed.run.files import VectorFile, check_inputs, check_output, read_texts
    from featherbed.run.foreign import Foreign
    from featherbed.settings import Embedding, read_embedding

    told = config is not None or model is not None
    files = ([folder] if told else []) + (inputs or [])
    if not files:
        raise typer.BadParameter("no input: name files of texts, or - for standard input")
    check_output(out)
    check_inputs(files)
    other = Foreign(pooling, output, int(task) if task and task.isdecimal() else task)
    with bar() as progress:
        if told:
            said = Embedding(model=model, batch_size=batch_size or None, pool_size=pool_size or None)
            embedder = configured(
                read_embedding(config, said),
                "" if variant == AUTO else variant,
                threads=threads or None,
                provider=provider,
                foreign=None if other == Foreign() else other,
                progress=progress,
            )
        else:
            embedder = featherbed.Embedder(
                folder,
                variant,
                threads=threads or None,
                pool_size=pool_size or None,
                provider=provider,
                batch_tokens=batch_size * TEXT_TOKENS if batch_size else None,
                foreign=None if other == Foreign() else other,
                progress=progress,
            )
    width = embedder.spec.dim if dim is None else dim
    waiting: deque[str] = deque()  # texts that were read, and have no vector yet

    def texts() -> Iterator[str]:
        for path in files:
            for text in read_texts(path, field):
                waiting.append(text)
                yield text

    names = QUERY_PROMPTS if query else DOCUMENT_PROMPTS
    prompt = next((name for name in names if name in embedder.spec.prompts), None)
    started = time.perf_counter()
    with bar() as progress, VectorFile(out, width) as file:
        for vectors in embedder.stream(texts(), prompt, truncate_dim=dim, progress=progress):
            file.write([waiting.popleft() for _ in vectors], vectors)
        progress("embed", file.rows, file.rows)
    seconds = time.perf_counter() - started
    if as_json:
        print_json(
            {
                "out": str(out),
                "variant": embedder.variant,
                "provider": embedder.provider,
                "texts": file.rows,
                "dimensions": width,
                "seconds": round(seconds, 3),
            }
        )
    else:
        typer.echo(
            f"{file.rows} texts, {width} dimensions, variant {embedder.variant} on {embedder.provider}, "
            f"{file.rows / max(seconds, 1e-9):.0f} texts/s: {out}"
        )
