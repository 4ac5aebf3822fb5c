"""What push sends, in a place of its own: some variants of a folder, their weights where they are wanted."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from featherbed.check.page import write_pages
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import MANIFEST, ONNX, FileRecord, Manifest, ModelFolder, Variant, dump, file_record, write_text
from featherbed.make.relocate import relocate
from featherbed.make.write import write_again
from featherbed.pipeline.links import link
from featherbed.pipeline.variants import CONFIG, graphs_of, misnamed_sidecars, name_sidecars
from featherbed.recipe import REFERENCE
from featherbed.spec import read_json

Records = dict[str, FileRecord]


class Weights(StrEnum):
    """Where weights lie: where the folder has them, inside the graph's one file, or in a sidecar beside it."""

    AS_BUILT = "as-built"
    INSIDE = "inside"
    BESIDE = "beside"


def parse_weights(word: str) -> Weights:
    """The place of that name. Raises OptionError when it is none."""
    if word in {one.value for one in Weights}:
        return Weights(word)
    raise OptionError(
        f"--weights {word}", expected=", ".join(Weights), found="another word", remedy="choose among these"
    )


def staged(model: ModelFolder, names: Collection[str], weights: Weights, place: Path) -> ModelFolder:
    """The folder with these variants only, in the empty folder ``place``: its own manifest, card and report.

    Files are links to those of ``model``, or written anew where weights move; ``model`` stays as it is. What was said
    of files that are others now is said of these, or not at all. Raises ModelFolderError on a file that is missing or
    not the manifest's, OptionError when a graph would be more than one file holds, OutputError.
    """
    _check_config(model)
    left = model.manifest.without([name for name in model.manifest.variants if name not in names])
    (place / ONNX).mkdir()
    moved = {
        name: records for name in left.variants if (records := _moved(model, name, weights, place / ONNX)) is not None
    }
    again = {name: _again(left.variants[name], place) for name in moved}
    manifest = _with_files(left, moved, again)
    for file in manifest.files:
        if not any(file in records for records in (*moved.values(), *again.values())):
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            link(model.path / file, place / file)
    write_text(place / MANIFEST, dump(manifest.to_json()))
    new = _tell_config(ModelFolder(place, manifest), model)
    _tell_evidence(new, model.manifest, moved)
    return write_pages(new)


def _check_config(model: ModelFolder) -> None:
    if (model.path / CONFIG).is_file() and CONFIG not in model.manifest.files:
        raise ModelFolderError(
            f"{model.path / MANIFEST}",
            expected=f"a record of {CONFIG}",
            found="none: a prune was stopped",
            remedy=f"end it with `featherbed prune --keep {','.join(model.manifest.variants)}`",
        )


def _moved(model: ModelFolder, name: str, weights: Weights, onnx: Path) -> Records | None:
    """Records, by name inside the folder, of a variant's files with its weights moved; None where they lie right."""
    if weights is Weights.AS_BUILT:
        return None
    graph = model.graph_path(name)
    model.check_hashes(iter(model.variant(name).files))  # before they become others, which no hash vouches for
    written = relocate(graph, onnx / graph.name, weights is Weights.BESIDE)
    return None if written is None else {f"{ONNX}/{file}": record for file, record in written.items()}


def _again(variant: Variant, place: Path) -> Records:
    """The files that a moved variant has under its other name, written for its files in ``place``."""
    if not variant.again:
        return {}
    written = write_again(place / variant.files[0], place / variant.again[0])
    return {f"{ONNX}/{file}": record for file, record in written.items()}


def _with_files(manifest: Manifest, moved: dict[str, Records], again: dict[str, Records]) -> Manifest:
    """The manifest with other files for the variants that moved."""
    variants = {
        name: replace(one, files=tuple(moved[name]), again=tuple(again[name])) if name in moved else one
        for name, one in manifest.variants.items()
    }
    gone = {file for name in moved for file in manifest.all_files(name)}
    files = {name: record for name, record in manifest.files.items() if name not in gone}
    for records in (*moved.values(), *again.values()):
        files |= records
    return replace(manifest, variants=variants, files=files)


def _tell_config(new: ModelFolder, model: ModelFolder) -> ModelFolder:
    """Have config.json name the graphs that have a sidecar now, and no others."""
    graphs = dict.fromkeys(graphs_of(model.manifest.variants.values()), False) | graphs_of(
        new.manifest.variants.values()
    )
    misnamed = misnamed_sidecars(new.path, graphs)
    if not misnamed:
        return new
    model.check_hashes(iter([CONFIG]))
    name_sidecars(new.path, misnamed)
    files = new.manifest.files | {CONFIG: file_record(new.path / CONFIG)}
    return ModelFolder(new.path, replace(new.manifest, files=files))


def _tell_evidence(new: ModelFolder, before: Manifest, moved: Collection[str]) -> None:
    """Have the evidence name the files that lie here; quality is of weights, and they are the same.

    Speed, loading and memory were measured on the other files: of a variant that moved they are left out.
    """
    for name in new.manifest.variants:
        path = new.report_path(name)
        if not path.is_file() or not moved:
            continue
        found = read_json(path, ModelFolderError)
        told = _told(found, name, new.manifest) if name in moved else dict(found)
        if REFERENCE in moved and found.get("reference_sha256") == _weights_sha256(before):
            told["reference_sha256"] = _weights_sha256(new.manifest)
        if told != found:
            write_text(path, dump(told))


def _weights_sha256(manifest: Manifest) -> str:
    return manifest.files[manifest.variants[REFERENCE].files[-1]].sha256


def _told(found: dict[str, Any], name: str, manifest: Manifest) -> dict[str, Any]:
    """A variant's evidence, of its files here. Raises ModelFolderError when they are larger than its gate allows."""
    size = manifest.size_bytes(name)
    told = {key: value for key, value in found.items() if key != "bench"}
    if "metrics" in told:
        told["metrics"] = told["metrics"] | {"size_bytes": size}
    if "gates" in told:
        told["gates"] = [_judged(gate, name, size) for gate in told["gates"]]
    return told


def _judged(gate: dict[str, Any], name: str, size: int) -> dict[str, Any]:
    if gate["metric"] != "size_bytes":
        return gate
    if size > gate["bound"]:
        raise ModelFolderError(
            f"{name} with its weights moved",
            expected=f"at most {gate['bound']:.0f} bytes, its gate",
            found=f"{size} bytes",
            remedy="leave the weights as built, or verify with another --gate size_bytes",
        )
    return {**gate, "value": float(size)}
