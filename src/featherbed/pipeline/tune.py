"""tune(): which layer in how many bits, found on the model itself and measured, not believed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featherbed.check.bench import TOKENS, Load, bench_file
from featherbed.check.front import front_of, front_svg
from featherbed.check.inspect import inspect_file
from featherbed.check.machine import machine
from featherbed.check.parity import Vectors, agreement
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import ONNX, REPORTS, ModelFolder, Variant, dump, graph_name, open_folder, write_text
from featherbed.make import tune as search
from featherbed.make.calibrate.texts import Calibration
from featherbed.make.calibrate.texts import calibration as calibrate
from featherbed.make.ir import Graph
from featherbed.make.read import read_graph
from featherbed.make.tune import Mix
from featherbed.make.variant import chosen_alpha, prepared
from featherbed.pipeline.variants import Writer, Written, added, calibration_tokens, unnamed
from featherbed.pipeline.verify import verify
from featherbed.probe import Probe, read_probe, shipped, shipped_calibration
from featherbed.progress import Progress, silent
from featherbed.recipe import REFERENCE, TUNED, Explicit, Recipe, Rotate, Shelf, Smooth
from featherbed.report import Bound, Report, parse_bounds
from featherbed.run.batches import batches
from featherbed.run.embedder import Embedder
from featherbed.run.session import Memory
from featherbed.run.tokens import Tokenizer
from featherbed.spec import read_json
from featherbed.steps import Standard, Static

HARM_TOKENS = 1024  # of the calibration texts, for the harm of one weight
WORK = "tune.work"  # inside the model folder while it lasts: the trial at hand, and the best so far
EVIDENCE, PICTURE = "tune.json", "tune.svg"
GOALS = ("size", "speed", "fidelity")
ROUNDS = 5
LEAST_TRIALS = 4  # both ends of the path, and both uniform recipes


@dataclass(frozen=True)
class Wish:
    """What a tuned variant must hold, and what it should be best at among those that hold it."""

    bounds: tuple[Bound, ...] = ()
    goal: str = "size"
    trials: int = 10


@dataclass(frozen=True)
class Tuned:
    """All trials with their figures, those on the Pareto front, and the winner's key and report; None where no trial
    held every bound."""

    trials: dict[str, dict[str, Any]]
    front: list[str]
    winner: str | None
    report: Report | None
    picture: Path


def tune(
    folder: Path | str,
    *,
    minimum: Sequence[str] = (),
    maximum: Sequence[str] = (),
    goal: str = "size",
    trials: int = 10,
    calibration: Path | None = None,
    probes: Sequence[Path] = (),
    progress: Progress = silent,
) -> Tuned:
    """Search a recipe of 4, 8 and 32 bits for a model folder; the best that holds every bound becomes ``tuned``.

    ``minimum`` and ``maximum`` are words such as "cos_min=0.98" and "size_mb=20". ``goal`` is what counts among
    those that hold: "size", "speed" or "fidelity". ``trials`` recipes are made and measured. What was measured is
    kept in the folder's reports, so a search that was interrupted goes on where it stopped.
    Raises OptionError on an unknown bound or goal, or on a folder for another engine's operators or in fixed shapes;
    ModelFolderError when the folder has no ``fp32``.
    """
    if goal not in GOALS or trials < LEAST_TRIALS:
        raise OptionError(
            "tune",
            expected=f"a goal of {', '.join(GOALS)} and at least {LEAST_TRIALS} trials",
            found=f"{goal!r} and {trials}",
            remedy="leave them out",
        )
    wish = Wish(parse_bounds(minimum, maximum), goal, trials)
    work = _Search(open_folder(Path(folder)), wish, calibration, probes, progress)
    return work.run()


class _Search:
    """A search at work: its folder, its reference, and what it has measured so far."""

    def __init__(
        self, folder: ModelFolder, wish: Wish, calibration: Path | None, probes: Sequence[Path], progress: Progress
    ) -> None:
        if REFERENCE not in folder.manifest.variants:
            raise ModelFolderError(
                f"{folder.path}",
                expected=f"the reference variant {REFERENCE}, whose weights are tuned",
                found=", ".join(folder.manifest.variants),
                remedy="build the folder again with fp32",
            )
        steps = {str(step.get("step")) for step in folder.variant(REFERENCE).recipe.get("steps", ())}
        if steps & {Standard.__name__, Static.__name__}:
            raise OptionError(
                f"tune {folder.path}",
                expected="a folder in onnxruntime's operators, with dynamic shapes",
                found=f"one built for another engine ({', '.join(sorted(steps))})",
                remedy="build it without --operators and --static, and tune that",
            )
        self.folder, self.wish, self.progress = folder, wish, progress
        folder.check_hashes(iter(folder.variant(REFERENCE).files))
        self.reference: Graph = read_graph(folder.graph_path(REFERENCE))
        self.probe: Probe = read_probe(probes) if probes else shipped()
        spec = folder.manifest.spec
        texts = read_probe([calibration]) if calibration else shipped_calibration()
        tokens = calibration_tokens(self.reference)
        self.texts: Calibration = calibrate(texts, Tokenizer(folder.path, spec), spec, tokens)
        self.path = folder.path / REPORTS / EVIDENCE
        self.state = self._resumed()
        self._vectors: Vectors | None = None
        self._transformed: Graph | None = None

    def _resumed(self) -> dict[str, Any]:
        """What an earlier search on the same weights, texts and version found; else nothing."""
        files = [self.folder.manifest.files[name].sha256 for name in self.folder.variant(REFERENCE).files]
        levels = [repr(search.LEVELS), repr(search.TABLES), self.folder.manifest.version]
        about = json.dumps([files, levels, self.texts.probe, self.probe.sha256])
        key = hashlib.sha256(about.encode()).hexdigest()
        for path in (self.folder.path / WORK / EVIDENCE, self.path):
            state = read_json(path) if path.is_file() else {}
            if state.get("about") == key:
                return state
        return {"about": key, "calibration": self.texts.probe, "probe": self.probe.to_json(), "harms": {}, "trials": {}}

    def _keep(self) -> None:
        """Beside the folder's files until the end: the manifest must not name what still changes."""
        work = self.folder.path / WORK
        work.mkdir(exist_ok=True)
        write_text(work / EVIDENCE, dump(self.state))

    def run(self) -> Tuned:
        """Harms, path, trials, winner."""
        steps = (Rotate(), Smooth(explicit=Explicit.NOT_GELU), search.SMALLEST)
        if "alpha" not in self.state:
            self.state["alpha"] = chosen_alpha(self.reference, steps, self.texts, self.progress)
            self._keep()
        smooth = Smooth(self.state["alpha"], Explicit.NOT_GELU)
        graph = self._prepared(smooth)
        part = self.texts.part(HARM_TOKENS)
        found = search.harms(graph, part, self.state["harms"], self._harms, self.progress)
        mixes = list(search.path(graph, found))
        uniform = [search.uniform(graph, found, level) for level in ("8", "8-block")]
        first = max(2, self.wish.trials - len(uniform) - self.wish.trials // 3)
        try:
            for mix in [*search.spread(mixes, first), *uniform]:
                self._try(mix, smooth)
            while len(self._tried(mixes)) + len(uniform) < self.wish.trials:
                between = self._between(mixes)
                if between is None:
                    break
                self._try(between, smooth)
            return self._end({mix.key: mix for mix in (*mixes, *uniform)}, smooth)
        finally:
            shutil.rmtree(self.folder.path / WORK / "trial", ignore_errors=True)

    def _prepared(self, smooth: Smooth) -> Graph:
        """The reference after the transforms that all mixes share."""
        if self._transformed is None:
            self._transformed = prepared(self.reference, (Rotate(), smooth), self.texts, self.progress)
        return self._transformed

    def _harms(self, found: search.Harms) -> None:
        self.state["harms"] = found
        self._keep()

    def _tried(self, mixes: list[Mix]) -> list[Mix]:
        return [mix for mix in mixes if mix.key in self.state["trials"]]

    def _between(self, mixes: list[Mix]) -> Mix | None:
        """The mix halfway between the largest that breaks a bound and the smallest above it that holds all."""
        at = {mix.key: place for place, mix in enumerate(mixes)}
        tried = [(at[mix.key], self._holds(self.state["trials"][mix.key])) for mix in self._tried(mixes)]
        held = min((place for place, holds in tried if holds), default=None)
        if held is None:
            return None
        broken = max((place for place, holds in tried if not holds and place < held), default=None)
        if broken is None or held - broken < 2:
            return None
        return mixes[(held + broken) // 2]

    def _holds(self, figures: dict[str, Any]) -> bool:
        return all(bound.holds(figures) for bound in self.wish.bounds)

    def _rank(self, figures: dict[str, Any]) -> float:
        """Larger is better, by the goal."""
        by = {"size": -figures["size_mb"], "speed": figures["tokens_per_s"], "fidelity": figures["cos_min"]}
        return float(by[self.wish.goal])

    def _best(self) -> str | None:
        held = {key: self._rank(f) for key, f in self.state["trials"].items() if self._holds(f)}
        return max(held, key=held.__getitem__) if held else None

    def _recipe(self, mix: Mix, smooth: Smooth) -> Recipe:
        steps = (Rotate(), smooth, mix.linear(), mix.table())
        return Recipe(TUNED, f"_{TUNED}", Shelf.OURS, steps, "found by featherbed tune")

    def _write(self, mix: Mix, smooth: Smooth, stage: str) -> tuple[Path, Written]:
        """A mix's files under WORK/trial."""
        place = self.folder.path / WORK / "trial"
        shutil.rmtree(place, ignore_errors=True)
        (place / ONNX).mkdir(parents=True)
        for file in sorted(self.folder.path.glob("*.json")):
            shutil.copyfile(file, place / file.name)  # what an Embedder needs beside a bare .onnx file
        for name in ("1_Pooling", *self.folder.manifest.spec.dense):
            if (self.folder.path / name).is_dir():
                shutil.copytree(self.folder.path / name, place / name)

        def staged(what: str, done: int, total: int) -> None:
            self.progress(f"{stage}: {what.removeprefix(f'{TUNED}: ')}", done, total)

        writer = Writer(place, self.folder.manifest.spec, self.texts, staged)
        recipe = self._recipe(mix, smooth)
        return place, writer.variant(self._prepared(smooth), recipe, len(recipe.steps) - 2)

    def _try(self, mix: Mix, smooth: Smooth) -> None:
        if mix.key in self.state["trials"]:
            return
        stage = f"trial {len(self.state['trials']) + 1}"
        place, written = self._write(mix, smooth, stage)
        file = place / graph_name(f"_{TUNED}")
        truth = self._truth()
        kept = agreement(self._embed(file, stage), truth)
        load = Load(tokens=min(TOKENS, self.folder.manifest.spec.max_length), rounds=ROUNDS)
        size = sum(record.size_bytes for record in written.records.values())
        self.state["trials"][mix.key] = {
            "size_mb": round(size / 1e6, 3),
            "cos_mean": kept.mean,
            "cos_min": kept.worst,
            **bench_file(file, load),
            "foreseen_harm": mix.harm,
            "bits": dict(mix.layers) | dict(mix.tables),
        }
        self._keep()
        if self._best() == mix.key:  # kept, so that the winner need not be made again
            best = self.folder.path / WORK / "best"
            shutil.rmtree(best, ignore_errors=True)
            place.rename(best)
            write_text(best / "mix.json", dump({"mix": mix.key, "recipe": written.recipe}))

    def _truth(self) -> Vectors:
        if self._vectors is None:
            self._vectors = self._embed(self.folder.graph_path(REFERENCE), "reference")
        return self._vectors

    def _embed(self, file: Path, stage: str) -> Vectors:
        """Vectors of the probe's texts by one file, judged as it is: nothing comes from a cache."""
        embedder = Embedder(file, memory=Memory(cache=False))
        rows = embedder.ids(self.probe.texts)
        vectors = np.empty((len(rows), embedder.spec.dim), np.float32)
        done = 0
        for batch in batches(rows, embedder.spec.pad_id, embedder.batch_tokens):
            vectors[batch.places] = embedder.embed(batch)
            done += len(batch.places)
            self.progress(f"{stage}: vectors", done, len(rows))
        return vectors

    def _end(self, mixes: dict[str, Mix], smooth: Smooth) -> Tuned:
        trials = self.state["trials"]
        winner = self._best()
        self.state |= {
            "front": front_of(trials),
            "winner": winner,
            "bounds": [vars(bound) for bound in self.wish.bounds],
            "goal": self.wish.goal,
            "machine": machine(),
        }
        self.path.parent.mkdir(exist_ok=True)
        picture = self.path.with_name(PICTURE)
        unnamed(open_folder(self.folder.path), [f"{REPORTS}/{path.name}" for path in (self.path, picture)])
        write_text(self.path, dump(self.state))
        write_text(picture, front_svg(trials, self.state["front"], winner, self.wish.bounds))
        open_folder(self.folder.path).with_evidence({})  # the manifest knows the evidence
        report = None if winner is None else self._adopt(mixes[winner], smooth)
        shutil.rmtree(self.folder.path / WORK, ignore_errors=True)
        return Tuned(trials, self.state["front"], winner, report, picture)

    def _adopt(self, mix: Mix, smooth: Smooth) -> Report:
        """The winner's files become the variant ``tuned``, verified and judged by what was asked for."""
        best = self.folder.path / WORK / "best"
        mark = best / "mix.json"
        if not mark.is_file() or json.loads(mark.read_text("utf-8"))["mix"] != mix.key:
            place, written = self._write(mix, smooth, "winner")
            recipe = written.recipe
        else:
            place, recipe = best, json.loads(mark.read_text("utf-8"))["recipe"]
        names = sorted(p.name for p in (place / ONNX).iterdir())
        mark.unlink(missing_ok=True)  # stopped from here on, the winner is made again: its files are on their way
        opened = open_folder(self.folder.path).without(TUNED)  # a folder never names files that are half there
        for name in names:
            (place / ONNX / name).replace(opened.path / ONNX / name)
        least = inspect_file(opened.path / graph_name(f"_{TUNED}")).least_onnxruntime
        added(opened, Variant(TUNED, recipe, tuple(f"{ONNX}/{name}" for name in names), least, None))
        gates = [f"{b.metric}={b.value}" for b in self.wish.bounds if b.metric in ("cos_min", "cos_mean")]
        return verify(opened.path, [TUNED], gates=gates, save=True, progress=self.progress)
