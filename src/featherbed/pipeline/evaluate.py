"""evaluate(): variants on somebody's datasets, and the evidence kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featherbed.check.evaluate import DENSE, Evaluation, evaluated, parse_modes
from featherbed.check.machine import machine
from featherbed.check.page import write_pages
from featherbed.dataset import Layout, read_dataset
from featherbed.folder import REPORTS, ModelFolder, dump, open_folder, write_text
from featherbed.progress import Progress, silent


def evaluate(
    folder: Path | str,
    datasets: Sequence[Path | str],
    variants: Sequence[str] = (),
    *,
    modes: Sequence[str] = (DENSE,),
    layout: Layout | None = None,
    save: bool = False,
    progress: Progress = silent,
) -> list[Evaluation]:
    """The variants of a model folder (all by default) on every dataset.

    A dataset is a folder in BEIR's shape or a file of rated pairs; ``layout`` says where in a folder things are.
    ``modes`` are of dense, lexical and hybrid. ``save`` writes what vectors found into evidence and card.
    Raises OptionError, DatasetError, ModelFolderError, or MissingError without bm25s for words.
    """
    model = open_folder(Path(folder))
    names = [model.variant(name).name for name in variants] or list(model.manifest.variants)
    ways = parse_modes(modes)
    read = [read_dataset(Path(path), layout) for path in datasets]  # all, before anything is embedded
    done = [evaluated(model, names, dataset, ways, progress) for dataset in read]
    if save:
        save_evaluations(model, done)
    return done


def save_evaluations(model: ModelFolder, evaluations: Sequence[Evaluation]) -> None:
    """Write each variant's figures into its evidence, by the datasets' names, and the card anew."""
    (model.path / REPORTS).mkdir(exist_ok=True)
    for name in dict.fromkeys(variant for one in evaluations for variant, _ in one.rows if variant):
        path = model.report_path(name)
        evidence: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {"variant": name}
        kept = evidence.setdefault("eval", {})
        for one in evaluations:
            figures = {mode: row for (variant, mode), row in one.rows.items() if variant in (name, "")}
            kept[one.dataset["name"]] = {"dataset": one.dataset, "machine": machine(), **figures}
        write_text(path, dump(evidence))
    write_pages(model)
