"""Variants against the reference, on a probe: every metric of every variant, then the gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featherbed.check.evaluate import by_vectors, described
from featherbed.check.inspect import inspect_file
from featherbed.check.invariance import Drift, company, invariance
from featherbed.check.parity import agreement, anisotropy, margins, neighbourhood, unit_norm_error
from featherbed.check.retrieval import Found
from featherbed.check.statistics import Floats, mean_interval
from featherbed.check.tokens import check_tokens
from featherbed.dataset import Search
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import ModelFolder
from featherbed.probe import Probe
from featherbed.progress import Progress, silent
from featherbed.recipe import REFERENCE, recorded
from featherbed.report import WITH, Gate, Metrics, Report, Verdict, gates_for
from featherbed.run.batches import batches, collate
from featherbed.run.embedder import Embedder
from featherbed.run.pooling import normalize
from featherbed.run.session import Memory

Vectors = npt.NDArray[np.float32]
SHOWN = ("top_1", "ndcg_at_10", "mrr_at_10")  # of a search
PERCENTILES = (1, 5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Yardstick:
    """What to hold variants against: texts, the gates that were asked for beside the default ones, upstream's own
    vectors of the probe's texts [N, D] where they were computed, a dataset to search where one was given, and gates of
    single variants."""

    probe: Probe
    gates: tuple[Gate, ...] = ()
    upstream: Vectors | None = None
    search: Search | None = None
    single: Mapping[str, tuple[Gate, ...]] = field(default_factory=dict)


def measure(folder: ModelFolder, variants: Sequence[str], yardstick: Yardstick, progress: Progress = silent) -> Report:
    """The report of ``variants`` (the reference is always measured, and judged when it is among them).

    Raises ModelFolderError when the folder has no reference, or a file differs from its manifest's hash,
    TokenizerError when the tokenizer gives other ids than when the folder was made.
    """
    if REFERENCE not in folder.manifest.variants:
        raise ModelFolderError(
            f"{folder.path}",
            expected=f"the reference variant {REFERENCE}",
            found=", ".join(folder.manifest.variants) or "no variants",
            remedy="build the folder again with fp32",
        )
    _check_gates(yardstick)
    graphs = {file for name in folder.manifest.variants for file in folder.manifest.all_files(name)}
    folder.check_hashes(name for name in folder.manifest.files if name not in graphs)
    check_tokens(folder)
    names = tuple(dict.fromkeys((REFERENCE, *variants)))
    metrics: dict[str, Metrics] = {}
    verdicts: list[Verdict] = []
    reference: Vectors | None = None
    for name in names:
        folder.check_hashes(iter(folder.manifest.all_files(folder.variant(name).name)))
        _check_sidecars(folder, name)
        metrics[name], reference = _measure(folder, name, reference, yardstick, progress)
        made_by = recorded(folder.variant(name).recipe)
        gates = gates_for(made_by, yardstick.gates, yardstick.upstream is not None)
        verdicts += [gate.judge(name, metrics[name]) for gate in (*gates, *yardstick.single.get(name, ()))]
    shown = [n for n in names if n in variants] or list(names)
    named = {} if yardstick.search is None else {"retrieval": described(yardstick.search)}
    return Report(
        yardstick.probe.to_json() | named,
        {n: metrics[n] for n in shown},
        tuple(v for v in verdicts if v.variant in shown),
    )


def _check_gates(yardstick: Yardstick) -> None:
    measured = {"--reference": yardstick.upstream is not None, "--retrieval": yardstick.search is not None}
    for gate in yardstick.gates:
        option = WITH.get(gate.metric)
        if option is not None and not measured[option]:
            raise OptionError(
                f"--gate {gate.metric}",
                expected=f"{option}, which measures it",
                found="none",
                remedy="give a checkpoint's folder" if option == "--reference" else "give a dataset's folder",
            )


def _check_sidecars(folder: ModelFolder, name: str) -> None:
    """Every file that the graph reads weights from is one of the variant's, and so has the hash that was checked."""
    graph = folder.graph_path(name)
    known = {Path(file).name for file in folder.variant(name).files}
    for sidecar in inspect_file(graph).sidecars:
        if sidecar not in known:
            raise ModelFolderError(
                f"{graph}",
                expected=f"weights in a file of the variant ({', '.join(sorted(known))})",
                found=f"weights that it looks for in {sidecar}",
                remedy="build the folder again; or, if the file was renamed, give it that name back",
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
    search = None if yardstick.search is None else by_vectors(embedder, yardstick.search, name, progress)
    alone = _Alone(drift, _pooling_error(embedder, rows), folder.manifest.size_bytes(name), search)
    return _metrics(vectors, reference, alone, yardstick), reference


@dataclass(frozen=True)
class _Alone:
    """What is measured of a variant by itself."""

    drift: Drift
    pooling_max_error: float
    size_bytes: int
    retrieval: Found | None


def _pooling_error(embedder: Embedder, rows: list[list[int]]) -> float:
    """Largest difference of a component between the graph's vectors and its hidden states, pooled as the spec says."""
    batch = collate(company(rows)[::8], embedder.spec.pad_id)
    return float(np.abs(embedder.embed(batch) - normalize(embedder.embed(batch, unit=False))).max())


def _metrics(vectors: Vectors, reference: Vectors, alone: _Alone, yardstick: Yardstick) -> Metrics:
    kept, near = agreement(vectors, reference), neighbourhood(vectors, reference)
    gaps = margins(vectors, yardstick.probe.triplets)
    upstream = None if yardstick.upstream is None else float(np.abs(vectors - yardstick.upstream).max())
    sampled = {"cos_mean": kept.rows, "neighbours_at_10": near.neighbours, "triplet_margin_mean": gaps}
    sampled["triplet_accuracy"] = np.asarray(gaps > 0, np.float64)
    searched = {f"retrieval_{key}": alone.retrieval.measures[key] for key in SHOWN} if alone.retrieval else {}
    sampled |= searched
    return Metrics(
        n=len(vectors),
        cos_mean=kept.mean,
        cos_p1=kept.percentile(1),
        cos_min=kept.worst,
        pearson=near.pearson,
        spearman=near.spearman,
        neighbours_at_10=_mean(near.neighbours),
        invariance_batch=alone.drift.batch,
        invariance_padding=alone.drift.padding,
        invariance_order=alone.drift.order,
        triplets_correct=int((gaps > 0).sum()),
        triplets_total=len(gaps),
        triplet_margin_mean=_mean(gaps),
        anisotropy=anisotropy(vectors),
        unit_norm_max_error=unit_norm_error(vectors),
        pooling_max_error=alone.pooling_max_error,
        not_finite=int((~np.isfinite(vectors).all(axis=1)).sum()),
        size_bytes=alone.size_bytes,
        reference_max_error=upstream,
        **{name: _mean(values) for name, values in searched.items()},
        intervals={name: mean_interval(values) for name, values in sampled.items() if len(values) > 1},
        percentiles={f"{percent}": kept.percentile(percent) for percent in PERCENTILES},
        worst=kept.worst_places,
    )


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan
