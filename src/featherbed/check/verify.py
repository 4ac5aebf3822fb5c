"""Variants against the reference, on a probe: every metric of every variant, then the gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherbed.check.invariance import invariance
from featherbed.check.parity import agreement, anisotropy, triplets, unit_norm_error
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import ModelFolder
from featherbed.probe import Probe
from featherbed.progress import Progress, silent
from featherbed.recipe import REFERENCE, recorded
from featherbed.report import Gate, Metrics, Report, Verdict, gates_for
from featherbed.run.batches import batches
from featherbed.run.embedder import Embedder
from featherbed.run.session import Memory

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Yardstick:
    """What to hold variants against: texts, the gates that were asked for beside the default ones, and
    upstream's own vectors of the probe's texts [N, D] where they were computed."""

    probe: Probe
    gates: tuple[Gate, ...] = ()
    upstream: Vectors | None = None


def measure(folder: ModelFolder, variants: Sequence[str], yardstick: Yardstick, progress: Progress = silent) -> Report:
    """The report of ``variants`` (the reference is always measured, and judged when it is among them).

    Raises ModelFolderError when the folder has no reference, or a file differs from its manifest's hash.
    """
    if REFERENCE not in folder.manifest.variants:
        raise ModelFolderError(
            f"{folder.path}",
            expected=f"the reference variant {REFERENCE}",
            found=", ".join(folder.manifest.variants) or "no variants",
            remedy="build the folder again with fp32",
        )
    if yardstick.upstream is None and any(gate.metric == "reference_max_error" for gate in yardstick.gates):
        raise OptionError(
            "--gate reference_max_error",
            expected="--reference, which measures it",
            found="none",
            remedy="give the checkpoint's folder with --reference",
        )
    graphs = {file for variant in folder.manifest.variants.values() for file in variant.files}
    folder.check_hashes(name for name in folder.manifest.files if name not in graphs)
    names = tuple(dict.fromkeys((REFERENCE, *variants)))
    metrics: dict[str, Metrics] = {}
    verdicts: list[Verdict] = []
    reference: Vectors | None = None
    for name in names:
        folder.check_hashes(iter(folder.variant(name).files))
        metrics[name], reference = _measure(folder, name, reference, yardstick, progress)
        made_by = recorded(folder.variant(name).recipe)
        gates = gates_for(made_by, yardstick.gates, yardstick.upstream is not None)
        verdicts += [gate.judge(name, metrics[name]) for gate in gates]
    shown = [n for n in names if n in variants] or list(names)
    return Report(
        yardstick.probe.to_json(),
        {n: metrics[n] for n in shown},
        tuple(v for v in verdicts if v.variant in shown),
    )


def _measure(
    folder: ModelFolder, name: str, reference: Vectors | None, yardstick: Yardstick, progress: Progress
) -> tuple[Metrics, Vectors]:
    """Metrics of one variant, and the reference's vectors; the session ends here, before the next one loads."""
    # the file itself is judged, not what a cache made of it; the reference stays mapped: a 0.6B model would
    # otherwise be copied into memory for one pass
    embedder = Embedder(folder.path, name, memory=Memory(cache=False, prepack=name != REFERENCE))
    rows = embedder.ids(yardstick.probe.texts)
    vectors = np.empty((len(rows), embedder.spec.dim), np.float32)
    done = 0
    for batch in batches(rows, embedder.spec.pad_id, embedder.batch_tokens):
        vectors[batch.places] = embedder.embed(batch)
        done += len(batch.places)
        progress(f"verify {name}", done, len(rows))
    reference = vectors if reference is None else reference
    drift = invariance(embedder, rows, lambda _, at, of: progress(f"invariance {name}", at, of))
    return _metrics(vectors, reference, drift, yardstick, folder.manifest.size_bytes(name)), reference


def _metrics(vectors: Vectors, reference: Vectors, drift: float, yardstick: Yardstick, size_bytes: int) -> Metrics:
    kept = agreement(vectors, reference)
    correct, margin = triplets(vectors, yardstick.probe.triplets)
    upstream = None if yardstick.upstream is None else float(np.abs(vectors - yardstick.upstream).max())
    return Metrics(
        n=len(vectors),
        cos_mean=kept.mean,
        cos_min=kept.worst,
        invariance_max=drift,
        triplets_correct=correct,
        triplets_total=len(yardstick.probe.triplets),
        triplet_margin_mean=margin,
        anisotropy=anisotropy(vectors),
        unit_norm_max_error=unit_norm_error(vectors),
        size_bytes=size_bytes,
        reference_max_error=upstream,
    )
