"""build(): the whole river on one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import featherbed
from featherbed.check.inspect import inspect_file
from featherbed.check.invariance import company
from featherbed.check.page import write_pages
from featherbed.check.range import check_range
from featherbed.check.tokens import probe_ids_sha256
from featherbed.check.verify import Yardstick, measure
from featherbed.choice import AUTO
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import (
    MANIFEST,
    ONNX,
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
from featherbed.make.assemble import write_configs
from featherbed.make.calibrate.texts import calibration as calibrate
from featherbed.make.checkpoint import Checkpoint, open_checkpoint
from featherbed.origin import read_origin
from featherbed.pipeline.graphs import opened, torch_only
from featherbed.pipeline.pull import copied, locate
from featherbed.pipeline.variants import Writer, Written, calibration_tokens, graphs_of, name_sidecars
from featherbed.pipeline.verify import save_evidence
from featherbed.probe import read_probe, shipped, shipped_calibration
from featherbed.progress import Progress, silent
from featherbed.recipe import DEFAULT, REFERENCE, recipes
from featherbed.report import Report, parse_gates
from featherbed.run.pooling import Vectors
from featherbed.run.tokens import Tokenizer
from featherbed.spec import Spec, read_spec
from featherbed.target import FUSED, parse_target

WRITERS = 2  # variants written at a time; each holds a few blocks of 16 MB


@dataclass(frozen=True)
class Outcome:
    """A published model folder, and the report of its variants where they were verified.

    ``made`` False: nothing was built, for a Hub id had the variants ready.
    """

    folder: Path
    report: Report | None
    made: bool = True


def build(
    source: Path | str,
    out: Path | str | None = None,
    variants: Sequence[str] = DEFAULT,
    *,
    gates: Sequence[str] = (),
    pooling: str | None = None,
    check: bool = True,
    calibration: Path | None = None,
    base_model: str = "",
    operators: str = FUSED,
    static: str = "",
    progress: Progress = silent,
) -> Outcome:
    """Checkpoint folder or Hub id → model folder with ``variants``, each verified, with card and manifest.

    ``out`` defaults to ``<name>-onnx`` here. ``pooling`` is for checkpoints whose files do not say. A variant
    whose gate fails is kept and marked so; "auto" never takes it. ``check`` False leaves verifying for later.
    ``calibration`` is a file of texts in place of those that ship, for the recipes that look at activations.
    ``base_model`` is the Hub id of what a folder holds, for the card; a Hub id as ``source`` says it itself.
    ``operators`` "standard" writes all variants in operators of the ONNX standard, ``static`` ("1x128") all with fixed
    shapes, for texts and tokens.
    Raises an InputError on what cannot be built, OutputError when it cannot be written: nothing is half-written.
    """
    engine, asked = parse_target(operators, static), parse_gates(gates)
    chosen = tuple(map(engine.recipe, recipes(variants)))
    # of an id with ready variants, when nobody names any: the reference and the best for use
    names = [REFERENCE, AUTO] if tuple(variants) == DEFAULT else [r.name for r in chosen]
    found = locate(source, names, progress)
    checkpoint_folder, name = found.folder, found.name
    target = Path(out) if out is not None else Path(f"{name.removesuffix('-onnx')}-onnx")
    if found.record is not None and found.ready:
        said = {"--gate": gates, "--pooling": pooling, "--calibration": calibration, "--base-model": base_model}
        _check_options(found.name, {**said, "--operators": operators != FUSED, "--static": static})
        return Outcome(copied(found.folder, target, found.record, names), None, made=False)
    known = read_origin(checkpoint_folder, base_model or (found.record.repository if found.record else ""))
    spec = read_spec(checkpoint_folder, pooling, any_family=True)
    checkpoint = open_checkpoint(checkpoint_folder)
    tokenizer = Tokenizer(checkpoint_folder, spec)
    tokenizer.check_table()
    spec = replace(spec, eos_id=tokenizer.eos_id, max_length=engine.length(spec.max_length))
    tokenizer = Tokenizer(checkpoint_folder, spec)
    report = None
    with opened(checkpoint, spec) as graph, publish(target.absolute()) as folder:
        texts = None
        if any(r.calibrated for r in chosen):
            probe = read_probe([calibration]) if calibration else shipped_calibration()
            texts = calibrate(probe, tokenizer, spec, calibration_tokens(graph))
        write_configs(checkpoint_folder, folder, spec, tokenizer.appends)
        (folder / ONNX).mkdir()
        write = Writer(folder, spec, texts, progress)
        at_once = [r for r in chosen if not r.calibrated]
        with ThreadPoolExecutor(WRITERS) as pool:  # numpy, hashing and writing let go of the interpreter
            jobs = {r.name: pool.submit(write.variant, graph, r) for r in at_once}
            written = {name: job.result() for name, job in jobs.items()}
        # those that look at activations keep all cores and much memory busy: one after the other
        written |= {r.name: write.variant(graph, r) for r in chosen if r.calibrated}
        for one in (r for r in chosen if r.half):
            check_range(folder / graph_name(one.suffix), company(tokenizer.encode(shipped().texts).ids), spec.pad_id)
        manifest = _manifest(folder, name, spec, [written[r.name] for r in chosen], checkpoint)
        model = _placed(folder, replace(manifest, origin=known), target)
        if check:
            exact = _torch_vectors(model, checkpoint_folder, progress) if torch_only(spec) else None
            report = measure(model, [r.name for r in chosen], Yardstick(shipped(), asked, exact), progress)
            model = save_evidence(model, report)
        write_pages(model)
    return Outcome(target, report)


def _torch_vectors(model: ModelFolder, checkpoint: Path, progress: Progress) -> Vectors:
    """Upstream's vectors of the shipped probe: what an exporter wrote is not believed."""
    from featherbed.check.reference import upstream_vectors  # torch is there: it was the exporter

    return upstream_vectors(model, checkpoint, shipped(), progress)


def _check_options(name: str, said: Mapping[str, object]) -> None:
    """Raises OptionError on what only building can do, where nothing is built."""
    words = [word for word, value in said.items() if value]
    if words:
        raise OptionError(
            ", ".join(words),
            expected="a checkpoint to build from",
            found=f"{name}, a model folder whose variants are ready",
            remedy="leave it out, or build from the original weights; `featherbed verify` judges by other gates",
        )


def _manifest(folder: Path, name: str, spec: Spec, written: Sequence[Written], checkpoint: Checkpoint) -> Manifest:
    variants = {
        w.name: Variant(
            w.name, w.recipe, tuple(w.records), inspect_file(folder / graph_name(w.suffix)).least_onnxruntime,
            again=tuple(w.again),
        )
        for w in written
    }  # fmt: skip
    name_sidecars(folder, graphs_of(variants.values()))
    files = {n: record for w in written for n, record in (w.records | w.again).items()}
    others = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.parent.name != ONNX)
    files |= {p.relative_to(folder).as_posix(): file_record(p) for p in others}
    sources = {e.path for e in checkpoint.entries.values()} | {checkpoint.folder / "config.json"}
    source = {p.relative_to(checkpoint.folder).as_posix(): file_record(p).sha256 for p in sorted(sources)}
    ids = probe_ids_sha256(Tokenizer(folder, spec))
    return Manifest(name, featherbed.__version__, source, spec, variants, files, ids)


def _placed(folder: Path, manifest: Manifest, target: Path) -> ModelFolder:
    """The folder with its manifest, which goes on with the history of the folder that it will replace."""
    if (target / MANIFEST).is_file():
        with suppress(ModelFolderError):  # one that cannot be read has no history to go on with
            manifest = manifest.following(open_folder(target).manifest)
    write_text(folder / MANIFEST, dump(manifest.to_json()))
    return ModelFolder(folder, manifest)
