"""featherbed eval"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import featherbed
from featherbed.cli.options import Folder, JsonFlag, Names, names, number, print_json, print_table
from featherbed.progress import bar

if TYPE_CHECKING:
    from featherbed.check.evaluate import Evaluation


def command(
    folder: Folder,
    datasets: Annotated[
        list[Path], typer.Argument(help="Folders in BEIR's shape, or files of rated pairs.", metavar="DATASET")
    ],
    variants: Names = "",
    modes: Annotated[str, typer.Option(help="How to search: dense, lexical, hybrid.", metavar="A,B")] = "dense",
    corpus: Annotated[str | None, typer.Option(help="The folder's file of documents.", metavar="NAME")] = None,
    queries: Annotated[str | None, typer.Option(help="The folder's file of queries.", metavar="NAME")] = None,
    qrels: Annotated[str | None, typer.Option(help="The folder's file of who answers whom.", metavar="NAME")] = None,
    group: Annotated[
        str | None, typer.Option(help="Documents are pieces of the whole that this field names.", metavar="FIELD")
    ] = None,
    titles: Annotated[bool, typer.Option("--titles/--no-titles", help="Put a document's title before it.")] = True,
    save: Annotated[bool, typer.Option(help="Write the figures into evidence and card.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Try variants on a dataset: retrieval (top-1, nDCG@10, MRR@10, recall) or similarity of pairs (Spearman).

    A folder has corpus.jsonl, queries.jsonl and qrels/test.tsv; a file has lines of sentence1, sentence2 and score.
    Queries and documents are embedded behind the model's own prompts.
    """
    from featherbed.dataset import Layout

    with bar() as progress:
        found = featherbed.evaluate(
            folder,
            datasets,
            names(variants),
            modes=names(modes),
            layout=Layout(corpus, queries, qrels, group, titles),
            save=save,
            progress=progress,
        )
    if as_json:
        print_json({"evaluations": [one.to_json() for one in found]})
    else:
        for one in found:
            _print(one)


def _print(found: Evaluation) -> None:
    dataset = found.dataset
    if "pairs" in dataset:
        head = ["variant", "Spearman", "95 %", "Pearson"]
        rows = [
            [name, number(f["spearman"], 4), _between(f, "spearman"), number(f["pearson"], 4)]
            for (name, _), f in found.rows.items()
        ]
        print_table(f"{dataset['name']}: {dataset['pairs']} pairs", head, rows)
        return
    head = ["variant", "search", "top-1", "nDCG@10", "95 %", "MRR@10", "recall@10", "recall@100", "chunks/s"]
    rows = []
    for (name, mode), f in found.rows.items():
        measures = [number(f[key], 4) for key in ("mrr_at_10", "recall_at_10", "recall_at_100")]
        first = [number(f["top_1"], 4), number(f["ndcg_at_10"], 4), _between(f, "ndcg_at_10")]
        rows.append([name or "–", mode, *first, *measures, number(f.get("chunks_per_s"), 1)])
    print_table(f"{dataset['name']}: {dataset['queries']} queries, {dataset['documents']} documents", head, rows)


def _between(figures: dict[str, Any], name: str) -> str:
    low, high = figures["intervals"][name]
    return f"{number(low, 4)}–{number(high, 4)}"
