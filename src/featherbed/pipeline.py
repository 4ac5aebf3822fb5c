"""build() and verify(): the whole river on one screen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import featherbed
from featherbed.check.card import render
from featherbed.check.inspect import inspect_file
from featherbed.check.machine import machine
from featherbed.check.verify import Yardstick, measure
from featherbed.folder import (
    CARD,
    ONNX,
    REPORTS,
    FileRecord,
    Manifest,
    ModelFolder,
    Variant,
    dump,
    file_record,
    graph_name,
    open_folder,
    publish,
    write_text,
)
from featherbed.hub import locate
from featherbed.make import quantize
from featherbed.make.assemble import write_configs
from featherbed.make.checkpoint import Checkpoint, open_checkpoint
from featherbed.make.graph import reference_graph
from featherbed.make.graph.lower import lower
from featherbed.make.ir import Graph
from featherbed.make.write import write_graph
from featherbed.probe import read_probe, shipped
from featherbed.progress import Progress, silent
from featherbed.recipe import DEFAULT, REFERENCE, Recipe, recipes
from featherbed.report import Report, parse_gates
from featherbed.run.tokens import Tokenizer
from featherbed.spec import Spec, read_spec

WRITERS = 2  # variants written at a time; each holds a few blocks of 16 MB


@dataclass(frozen=True)
class Outcome:
    """A published model folder, and the report of its variants where they were verified."""

    folder: Path
    report: Report | None


def build(
    source: Path | str,
    out: Path | str | None = None,
    variants: Sequence[str] = DEFAULT,
    *,
    gates: Sequence[str] = (),
    pooling: str | None = None,
    check: bool = True,
    progress: Progress = silent,
) -> Outcome:
    """Checkpoint folder or Hub id → model folder with ``variants``, each verified, with card and manifest.

    ``out`` defaults to ``<name>-onnx`` here. ``pooling`` is for checkpoints whose files do not say. A variant
    whose gate fails is kept and marked so; "auto" never takes it. ``check`` False leaves verifying for later.
    Raises an InputError on what cannot be built, OutputError when it cannot be written: nothing is half-written.
    """
    chosen, asked = recipes(variants), parse_gates(gates)
    checkpoint_folder = locate(str(source))
    name = checkpoint_folder.resolve().name if Path(source).exists() else str(source).partition("@")[0].split("/")[-1]
    spec = read_spec(checkpoint_folder, pooling)
    checkpoint = open_checkpoint(checkpoint_folder)
    graph = reference_graph(checkpoint, spec)
    tokenizer = Tokenizer(checkpoint_folder, spec)
    tokenizer.check_table()
    spec = replace(spec, eos_id=tokenizer.eos_id)
    target = Path(out) if out is not None else Path(f"{name}-onnx")
    report = None
    with publish(target.absolute()) as folder:
        write_configs(checkpoint_folder, folder, spec, tokenizer.appends)
        (folder / ONNX).mkdir()
        with ThreadPoolExecutor(WRITERS) as pool:  # numpy, hashing and writing let go of the interpreter
            jobs = {r.name: pool.submit(_write_variant, graph, r, folder, spec, progress) for r in chosen}
            records = {name: job.result() for name, job in jobs.items()}
        model = _manifest(folder, name, spec, chosen, records, checkpoint)
        if check:
            report = measure(model, [r.name for r in chosen], Yardstick(shipped(), asked), progress)
            model = save_evidence(model, report)
        write_text(folder / CARD, render(model))
        model.with_evidence({})
    return Outcome(target, report)


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


def _write_variant(graph: Graph, recipe: Recipe, folder: Path, spec: Spec, progress: Progress) -> dict[str, FileRecord]:
    """One variant's files; their records by name inside the folder, the graph first."""
    for step in recipe.steps:
        graph = quantize.apply(graph, step)
    if recipe.steps and graph.linear_names() and recipe.linear_bits < 32:
        raise AssertionError(f"{recipe.name} left {graph.linear_names()[0]} in float")
    graph = lower(graph)
    total, done = sum(w.size_bytes for w in graph.weights.values()), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(f"write {recipe.name}", min(done, total), total)

    metadata = {
        "featherbed.version": featherbed.__version__,
        "featherbed.recipe": json.dumps(recipe.to_json(), sort_keys=True),
        "featherbed.spec": json.dumps(spec.to_json(), sort_keys=True),
    }
    path = folder / graph_name(recipe.suffix)
    records = write_graph(graph, path, metadata, advance)
    progress(f"write {recipe.name}", total, total)
    return {f"{ONNX}/{name}": records[name] for name in sorted(records)}


def _manifest(
    folder: Path, name: str, spec: Spec, chosen: tuple[Recipe, ...], records: dict[str, dict[str, FileRecord]],
    checkpoint: Checkpoint,
) -> ModelFolder:  # fmt: skip
    variants = {
        r.name: Variant(
            r.name, r.to_json(), tuple(records[r.name]), inspect_file(folder / graph_name(r.suffix)).least_onnxruntime
        )
        for r in chosen
    }
    if any(len(v.files) > 1 for v in variants.values()):  # transformers.js must be told of sidecars
        path = folder / "config.json"
        sidecars = {f"model{r.suffix}.onnx": True for r in chosen if len(variants[r.name].files) > 1}
        config = json.loads(path.read_text("utf-8"))
        write_text(path, dump({**config, "transformers.js_config": {"use_external_data_format": sidecars}}))
    files = {n: record for group in records.values() for n, record in group.items()}
    others = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.parent.name != ONNX)
    files |= {p.relative_to(folder).as_posix(): file_record(p) for p in others}
    sources = {e.path for e in checkpoint.entries.values()} | {checkpoint.folder / "config.json"}
    source = {p.name: file_record(p).sha256 for p in sorted(sources)}
    manifest = Manifest(name, featherbed.__version__, source, spec, variants, files)
    write_text(folder / "featherbed.json", dump(manifest.to_json()))
    return ModelFolder(folder, manifest)
