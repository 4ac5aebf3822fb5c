"""export(): one variant of a folder, laid out where another server looks for its only model, in operators it has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from featherbed.check.conform import RULES, Finding
from featherbed.check.facts import Facts, facts
from featherbed.check.graph_rules import TEI_ONNXRUNTIME, newer
from featherbed.check.inspect import Inspection
from featherbed.check.rules import JS, TEI
from featherbed.check.tries import TEXTS, cosine, ours
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import CARD, MANIFEST, ONNX, dump, publish, sidecar_name, write_text
from featherbed.make.relocate import name_sidecar, relocate
from featherbed.make.rewrite import rewrite
from featherbed.pipeline.links import link
from featherbed.spec import read_json


@dataclass(frozen=True)
class Layout:
    """The graph's name, whose rules count, and the onnxruntime that is there; None where it is as new as ours."""

    graph: str
    ecosystem: str
    onnxruntime: tuple[int, int] | None = None


# text-embeddings-inference opens model.onnx, or else onnx/model.onnx (OrtBackend::new in backends/ort/src/lib.rs), and
# of a repository fetches onnx/model.onnx first, with files that begin with that name (download_onnx in
# backends/src/lib.rs): a sidecar must be model.onnx_data. transformers.js in a browser asks for _quantized (q8).
LAYOUTS = {
    "tei": Layout(f"{ONNX}/model.onnx", TEI, TEI_ONNXRUNTIME),
    "browser": Layout(f"{ONNX}/model_quantized.onnx", JS),
}
NOT_OURS_TO_TELL = (MANIFEST, CARD, "report.html")  # of the folder with all its variants
CONFIG = "config.json"
CLOSE = 0.99999  # the same operators, or sums of floats in another order
# Other operators for attention add in another order, so an activation is now and then rounded to the next code. Seen
# between two onnxruntimes (docs/lab.md): up to 2e-4 off with a scale a token or block, 4e-3 with one a tensor.
FLIPS = {"an activation scale a token": 0.999, "level 4": 0.999, "activation scale": 0.99}


@dataclass(frozen=True)
class Exported:
    """The folder, the graph in it, what its ecosystem will not like, and the worst cosine to the variant it was.

    ``least`` is what that must reach; ``rewritten`` says that the graph has other operators than it had.
    """

    folder: Path
    graph: str
    findings: tuple[Finding, ...]
    cosine: float
    least: float = CLOSE
    rewritten: bool = False

    @property
    def passed(self) -> bool:
        """Whether it will load there, and gives the vectors it gave."""
        return self.cosine >= self.least and not any(finding.rule.fails for finding in self.findings)


def export(folder: Path | str, variant: str, out: Path | str, layout: str = "tei") -> Exported:
    """Lay out ``variant`` as the only model of the new folder ``out``: hard links, and a graph that names its sidecar.

    A graph with operators that are newer than the server's onnxruntime is written again in others. It is opened in its
    new place and compared with what it was. Raises OptionError on an unknown layout or variant, on operators that
    nothing stands for, or when ``out`` is in use; ModelFolderError, EngineError, OutputError.
    """
    if layout not in LAYOUTS:
        raise OptionError(
            f"--layout {layout}", expected=f"one of {', '.join(LAYOUTS)}", found="another", remedy="choose one of these"
        )
    path, out, plan = Path(folder), Path(os.path.abspath(out)), LAYOUTS[layout]  # noqa: PTH100  # a link stays one
    found = facts(path, [variant])
    seen = _seen(found)
    new = plan.onnxruntime is not None and newer(seen, plan.onnxruntime)
    expected = ours(found, found.graphs[0], TEXTS)
    with publish(out) as place:
        _lay_files(found, place, plan.graph)
        _lay_graph(found, place / plan.graph, new)
        _tell_config(place, Path(plan.graph).name)
        laid = facts(place)
        worst = cosine(ours(laid, laid.graphs[0], TEXTS), expected)
        findings = tuple(
            Finding(rule, of, text) for rule in RULES if plan.ecosystem in rule.concerns for of, text in rule.look(laid)
        )
    least = bound(seen) if new else CLOSE
    return Exported(out, plan.graph, findings, worst if worst is not None else 0.0, least, new)


def bound(seen: Inspection) -> float:
    """The cosine that a graph in other operators must reach to what it was."""
    ways = (next((least for words, least in FLIPS.items() if words in way), CLOSE) for way in seen.quantization)
    return min(ways, default=CLOSE)


def _seen(found: Facts) -> Inspection:
    graph = found.graphs[0]
    if graph.seen is None:
        source = found.path / graph.file
        raise ModelFolderError(f"{source}", expected="an ONNX model", found=graph.why, remedy="fetch or build it again")
    return graph.seen


def _lay_files(found: Facts, place: Path, name: str) -> None:
    """Configs and tokenizer: everything that is no graph and tells of no other variant."""
    (place / name).parent.mkdir()
    for file in sorted(found.path.rglob("*")):
        inside = file.relative_to(found.path)
        hidden = any(part.startswith(".") for part in inside.parts)
        elsewhere = len(inside.parts) > 1 and inside.parts[0] in (ONNX, "reports")
        graphs = ".onnx" in file.name or file.suffix in (".safetensors", ".bin", ".h5", ".msgpack")
        if file.is_file() and not (hidden or elsewhere or graphs or inside.as_posix() in NOT_OURS_TO_TELL):
            (place / inside).parent.mkdir(parents=True, exist_ok=True)
            link(file, place / inside)


def _lay_graph(found: Facts, target: Path, new: bool) -> None:
    """The one graph under its new name; ``new`` has it written in operators that are older."""
    source, seen = found.path / found.graphs[0].file, _seen(found)
    beside = target.with_name(sidecar_name(target.name))
    if new:
        _rewrite(source, target, seen)
    elif not seen.sidecars:
        link(source, target)
    elif len(seen.sidecars) == 1:
        link(source.with_name(seen.sidecars[0]), beside)
        name_sidecar(source, target, beside.name)
    else:
        relocate(source, target, beside=True, anyhow=True)


def _rewrite(source: Path, target: Path, seen: Inspection) -> None:
    try:
        rewrite(source, target, seen.metadata)
    except OptionError as error:  # it speaks of build's option
        raise OptionError(
            f"{source}, which needs onnxruntime {seen.least_onnxruntime}",
            expected="operators that the standard's can stand for",
            found=f"{error.subject.rpartition(': ')[2]}: {error.found}",
            remedy="choose another variant",
        ) from error


def _tell_config(place: Path, name: str) -> None:
    """Have config.json speak of the graph that is here, and of no other."""
    if not (place / CONFIG).is_file():
        return
    config = read_json(place / CONFIG, ModelFolderError)
    told = {key: value for key, value in config.items() if key != "transformers.js_config"}
    if (place / ONNX / sidecar_name(name)).is_file():
        told["transformers.js_config"] = {"use_external_data_format": {name: True}}
    if told != config:
        write_text(place / CONFIG, dump(told))
