"""Variants against the reference, on a probe: every metric of every variant, then the gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherbed.check.invariance import invariance
from featherbed.check.parity import agreement, anisotropy, triplets, unit_norm_error
from featherbed.errors import ModelFolderError
from featherbed.folder import ModelFolder
from featherbed.probe import Probe
from featherbed.progress import Progress, silent
from featherbed.recipe import RECIPES, REFERENCE
from featherbed.report import Gate, Metrics, Report, Verdict, gates_for
from featherbed.run.embedder import Embedder

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Bar:
    """What to hold variants against: texts, the gates that were asked for beside the default ones, and
    upstream's own vectors of the probe's texts [N, D] where they were computed."""

    probe: Probe
    gates: tuple[Gate, ...] = ()
    upstream: Vectors | None = None


def measure(folder: ModelFolder, variants: Sequence[str], bar: Bar, progress: Progress = silent) -> Report:
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
    names = tuple(dict.fromkeys((REFERENCE, *variants)))
    metrics: dict[str, Metrics] = {}
    verdicts: list[Verdict] = []
    reference: Vectors | None = None
    for name in names:
        folder.check_hashes(iter(folder.variant(name).files))
        # the reference stays mapped: a 0.6B model would otherwise be copied into memory for one pass
        embedder = Embedder(folder.path, name, prepack=name != REFERENCE)
        vectors = embedder.encode(bar.probe.texts, prompt="", progress=_staged(progress, f"verify {name}"))
        reference = vectors if reference is None else reference
        metrics[name] = _metrics(embedder, vectors, reference, bar, folder.manifest.size_bytes(name))
        recipe = RECIPES.get(folder.variant(name).recipe["name"], RECIPES[REFERENCE])
        verdicts += [gate.judge(name, metrics[name]) for gate in gates_for(recipe, bar.gates)]
        progress(f"verify {name}", len(bar.probe.texts), len(bar.probe.texts))
    shown = [n for n in names if n in variants] or list(names)
    return Report(
        bar.probe.to_json(),
        {n: metrics[n] for n in shown},
        tuple(v for v in verdicts if v.variant in shown),
    )


def _staged(progress: Progress, stage: str) -> Progress:
    """``progress`` under another stage's name."""
    return lambda _, done, total: progress(stage, done, total)


def _metrics(embedder: Embedder, vectors: Vectors, reference: Vectors, bar: Bar, size_bytes: int) -> Metrics:
    kept = agreement(vectors, reference)
    correct, margin = triplets(vectors, bar.probe.triplets)
    upstream = None if bar.upstream is None else float(np.abs(vectors - bar.upstream).max())
    return Metrics(
        n=len(vectors),
        cos_mean=kept.mean,
        cos_min=kept.worst,
        invariance_max=invariance(embedder, bar.probe.texts),
        triplets_correct=correct,
        triplets_total=len(bar.probe.triplets),
        triplet_margin_mean=margin,
        anisotropy=anisotropy(vectors),
        unit_norm_max_error=unit_norm_error(vectors),
        size_bytes=size_bytes,
        reference_max_error=upstream,
    )
