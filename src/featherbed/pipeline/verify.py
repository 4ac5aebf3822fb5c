"""verify(): variants against the reference, and the evidence kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from featherbed.check.baseline import baseline_gates
from featherbed.check.machine import machine
from featherbed.check.page import write_pages
from featherbed.check.verify import Yardstick, measure
from featherbed.dataset import Search, read_dataset
from featherbed.errors import OptionError
from featherbed.folder import REPORTS, ModelFolder, dump, open_folder, write_text
from featherbed.probe import read_probe, shipped
from featherbed.progress import Progress, silent
from featherbed.recipe import REFERENCE
from featherbed.report import Report, parse_gates


def verify(
    folder: Path | str,
    variants: Sequence[str] = (),
    *,
    gates: Sequence[str] = (),
    probes: Sequence[Path] = (),
    upstream: Path | None = None,
    retrieval: Path | None = None,
    baseline: Path | None = None,
    save: bool = False,
    progress: Progress = silent,
) -> Report:
    """Measure the variants of a model folder again (all by default) and judge them by their gates.

    ``probes`` are files of texts in place of the shipped probe. ``upstream`` is the checkpoint's folder: its
    PyTorch model then computes the same token ids (extra ``reference``). ``retrieval`` is a dataset's folder in BEIR's
    shape, to be searched too. ``baseline`` is a file with what the variants reached before on this kind of
    CPU. ``save`` writes evidence and card.
    Raises OptionError, ProbeError, DatasetError, ModelFolderError, or MissingError without torch.
    """
    model = open_folder(Path(folder))
    names = [model.variant(name).name for name in variants] or list(model.manifest.variants)
    asked = parse_gates(gates)
    probe = read_probe([Path(p) for p in probes]) if probes else shipped()
    search = None if retrieval is None else _search(Path(retrieval))
    before = {} if baseline is None else baseline_gates(Path(baseline), names)
    vectors = None
    if upstream is not None:
        from featherbed.check.reference import upstream_vectors  # the only way to torch: an extra

        vectors = upstream_vectors(model, Path(upstream), probe, progress)
    report = measure(model, names, Yardstick(probe, asked, vectors, search, before), progress)
    if save:
        write_pages(save_evidence(model, report))
    return report


def _search(path: Path) -> Search:
    dataset = read_dataset(path)
    if isinstance(dataset, Search):
        return dataset
    raise OptionError(
        f"--retrieval {path}",
        expected="a folder with corpus.jsonl, queries.jsonl and qrels/test.tsv",
        found="a file of pairs",
        remedy="try pairs with `featherbed eval`",
    )


def save_evidence(model: ModelFolder, report: Report) -> ModelFolder:
    """Write a report's part of each variant into the folder, and the verdicts into its manifest."""
    (model.path / REPORTS).mkdir(exist_ok=True)
    reference = model.manifest.files[model.variant(REFERENCE).files[-1]].sha256
    for name, metrics in report.metrics.items():
        path = model.report_path(name)
        before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        evidence = {
            "variant": name,
            "probe": report.probe,
            "reference_sha256": reference,
            "machine": machine(),
            "metrics": metrics.to_json(),
            "gates": [v.to_json() for v in report.verdicts if v.variant == name],
            **{kept: before[kept] for kept in ("bench", "eval") if kept in before},
        }
        write_text(path, dump(evidence))
    return model.with_evidence({name: report.passed_by(name) for name in report.metrics})
