"""verify(): variants against the reference, and the evidence kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from featherbed.check.card import render
from featherbed.check.machine import machine
from featherbed.check.verify import Yardstick, measure
from featherbed.folder import CARD, REPORTS, ModelFolder, dump, open_folder, write_text
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
    save: bool = False,
    progress: Progress = silent,
) -> Report:
    """Measure the variants of a model folder again (all by default) and judge them by their gates.

    ``probes`` are files of texts in place of the shipped probe. ``upstream`` is the checkpoint's folder: its
    PyTorch model then computes the same token ids (extra ``reference``). ``save`` writes evidence and card.
    Raises OptionError, ProbeError, ModelFolderError, or MissingError without torch.
    """
    model = open_folder(Path(folder))
    names = [model.variant(name).name for name in variants] or list(model.manifest.variants)
    asked = parse_gates(gates)
    probe = read_probe([Path(p) for p in probes]) if probes else shipped()
    vectors = None
    if upstream is not None:
        from featherbed.check.reference import upstream_vectors  # the only way to torch: an extra

        vectors = upstream_vectors(model, Path(upstream), probe, progress)
    report = measure(model, names, Yardstick(probe, asked, vectors), progress)
    if save:
        model = save_evidence(model, report)
        write_text(model.path / CARD, render(model))
        model.with_evidence({})
    return report


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
            **({"bench": before["bench"]} if "bench" in before else {}),
        }
        write_text(path, dump(evidence))
    return model.with_evidence({name: report.passed_by(name) for name in report.metrics})
