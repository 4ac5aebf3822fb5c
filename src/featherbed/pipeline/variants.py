"""One variant, made and written into a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import featherbed
from featherbed.folder import (
    MANIFEST,
    ONNX,
    FileRecord,
    ModelFolder,
    Variant,
    dump,
    file_record,
    graph_name,
    sync_folder,
    write_text,
)
from featherbed.make.calibrate.texts import Calibration
from featherbed.make.ir import Graph
from featherbed.make.variant import made
from featherbed.make.write import write_again, write_graph
from featherbed.progress import Progress
from featherbed.recipe import Recipe
from featherbed.spec import Spec, read_json

CONFIG = "config.json"
MOST_TOKENS, LEAST_TOKENS = 65_536, 8_192  # of calibration texts
WORK = 2**41  # tokens times linear weights that calibration may take: some minutes on two cores


def calibration_tokens(graph: Graph) -> int:
    """How many tokens of text to calibrate with: fewer for larger models."""
    weights = sum(math.prod(graph.weights[name].shape) for name in set(graph.linear_names()))
    return max(LEAST_TOKENS, min(MOST_TOKENS, WORK // weights))


@dataclass(frozen=True)
class Written:
    """A variant on disk: its recipe as plain values, and its files' records by name inside the folder, graph first.

    ``again`` are the records of files that are there once more, under the recipe's other suffix.
    """

    name: str
    suffix: str
    recipe: dict[str, Any]
    records: dict[str, FileRecord]
    again: dict[str, FileRecord] = field(default_factory=dict)


@dataclass(frozen=True)
class Writer:
    """Where variants are written, and the texts that some of them look at."""

    folder: Path
    spec: Spec
    texts: Calibration | None
    progress: Progress

    def variant(self, graph: Graph, recipe: Recipe, begun: int = 0) -> Written:
        """One variant from the reference graph, or from what it is after the first ``begun`` steps."""

        def staged(stage: str, done: int, total: int) -> None:
            self.progress(f"{recipe.name}: {stage}", done, total)

        result = made(graph, recipe.steps[begun:], self.texts, staged)
        plain = replace(recipe, steps=recipe.steps[:begun] + result.steps).to_json()
        if recipe.calibrated and self.texts is not None:
            plain["calibration"] = self.texts.probe
        total, done = sum(w.size_bytes for w in result.graph.weights.values()), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(f"write {recipe.name}", min(done, total), total)

        metadata = {
            "featherbed.version": featherbed.__version__,
            "featherbed.recipe": json.dumps(plain, sort_keys=True),
            "featherbed.spec": json.dumps(self.spec.to_json(), sort_keys=True),
        }
        records = write_graph(result.graph, self.folder / graph_name(recipe.suffix), metadata, advance)
        self.progress(f"write {recipe.name}", total, total)
        more: dict[str, FileRecord] = {}
        if recipe.again:
            more = write_again(self.folder / graph_name(recipe.suffix), self.folder / graph_name(recipe.again))
        return Written(recipe.name, recipe.suffix, plain, _in_folder(records), _in_folder(more))


def _in_folder(records: dict[str, FileRecord]) -> dict[str, FileRecord]:
    return {f"{ONNX}/{name}": records[name] for name in sorted(records)}


def graphs_of(variants: Iterable[Variant]) -> dict[str, bool]:
    """The file names of variants' graphs, with whether each has a sidecar."""
    files = (some for one in variants for some in (one.files, one.again) if some)
    return {Path(some[0]).name: len(some) > 1 for some in files}


def misnamed_sidecars(folder: Path, graphs: dict[str, bool]) -> dict[str, bool]:
    """Those of ``graphs`` (file name → whether it has a sidecar) of which the folder's config.json says otherwise."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    before = _by_graph(_said(read_json(path)))
    return {name: has for name, has in graphs.items() if bool(before.get(name)) != has}


def name_sidecars(folder: Path, graphs: dict[str, bool]) -> None:
    """Tell transformers.js, in config.json, which graphs (by file name) have a sidecar."""
    path = folder / CONFIG
    config = read_json(path)
    said = _said(config)
    sidecars = {name: True for name, has in ({**_by_graph(said), **graphs}).items() if has}
    if sidecars or said:
        write_text(path, dump({**config, "transformers.js_config": {"use_external_data_format": sidecars}}))


def unnamed(model: ModelFolder, names: Collection[str]) -> ModelFolder:
    """A folder whose manifest does not name these files, written to disk: they are about to become others."""
    files = {name: record for name, record in model.manifest.files.items() if name not in names}
    if files == model.manifest.files:
        return model
    left = replace(model.manifest, files=files)
    write_text(model.path / MANIFEST, dump(left.to_json()))
    sync_folder(model.path)  # after a power cut too
    return ModelFolder(model.path, left)


def added(model: ModelFolder, variant: Variant) -> ModelFolder:
    """A folder with a variant whose files lie in it already, and with a config.json that says whether it has a sidecar.

    While that is written the manifest does not name it, so that at no moment it names what is another: whoever is
    stopped in between leaves a folder that is whole. Raises OutputError.
    """
    graphs = graphs_of([variant])
    if misnamed_sidecars(model.path, graphs):
        model = unnamed(model, [CONFIG])
        name_sidecars(model.path, graphs)
    there = (model.path / CONFIG).is_file()
    files = model.manifest.files | ({CONFIG: file_record(model.path / CONFIG)} if there else {})
    return ModelFolder(model.path, replace(model.manifest, files=files)).adding(variant)


def _said(config: dict[str, Any]) -> Any:
    return config.get("transformers.js_config", {}).get("use_external_data_format", {})


def _by_graph(said: Any) -> dict[str, Any]:
    """A checkpoint's own config may have one word for all graphs: it is of other files than ours."""
    return said if isinstance(said, dict) else {}
