"""export(): one variant of a folder, laid out where another server looks for its only model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from featherbed.check.conform import RULES, Finding
from featherbed.check.facts import Facts, facts
from featherbed.check.rules import JS, TEI
from featherbed.check.tries import TEXTS, cosine, ours
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import CARD, MANIFEST, ONNX, dump, publish, sidecar_name, write_text
from featherbed.make.relocate import name_sidecar, relocate
from featherbed.pipeline.repair import link
from featherbed.spec import read_json

# text-embeddings-inference opens model.onnx, or else onnx/model.onnx (OrtBackend::new in backends/ort/src/lib.rs), and
# of a repository fetches onnx/model.onnx first, with files that begin with that name (download_onnx in
# backends/src/lib.rs): a sidecar must be model.onnx_data. transformers.js in a browser asks for _quantized (q8).
LAYOUTS = {"tei": (f"{ONNX}/model.onnx", TEI), "browser": (f"{ONNX}/model_quantized.onnx", JS)}
NOT_OURS_TO_TELL = (MANIFEST, CARD, "report.html")  # of the folder with all its variants
CONFIG = "config.json"
CLOSE = 0.99999


@dataclass(frozen=True)
class Exported:
    """The folder, the graph in it, what its ecosystem will not like, and the worst cosine to the variant it was."""

    folder: Path
    graph: str
    findings: tuple[Finding, ...]
    cosine: float

    @property
    def passed(self) -> bool:
        """Whether it will load there, and gives the vectors it gave."""
        return self.cosine >= CLOSE and not any(finding.rule.fails for finding in self.findings)


def export(folder: Path | str, variant: str, out: Path | str, layout: str = "tei") -> Exported:
    """Lay out ``variant`` as the only model of the new folder ``out``: hard links, and a graph that names its sidecar.

    It is opened there and compared with what it was. Raises OptionError on an unknown layout or variant or when ``out``
    is in use, ModelFolderError, EngineError, OutputError.
    """
    if layout not in LAYOUTS:
        raise OptionError(
            f"--layout {layout}", expected=f"one of {', '.join(LAYOUTS)}", found="another", remedy="choose one of these"
        )
    path, out = Path(folder), Path(os.path.abspath(out))  # noqa: PTH100  # a link stays one
    found = facts(path, [variant])
    name, ecosystem = LAYOUTS[layout]
    expected = ours(found, found.graphs[0], TEXTS)
    with publish(out) as place:
        _lay_out(found, place, name)
        laid = facts(place)
        worst = cosine(ours(laid, laid.graphs[0], TEXTS), expected)
        findings = tuple(
            Finding(rule, of, text) for rule in RULES if ecosystem in rule.concerns for of, text in rule.look(laid)
        )
    return Exported(out, name, findings, worst if worst is not None else 0.0)


def _lay_out(found: Facts, place: Path, name: str) -> None:
    """Configs and the one graph, under its new name."""
    graph = found.graphs[0]
    source, target = found.path / graph.file, place / name
    if graph.seen is None:
        raise ModelFolderError(f"{source}", expected="an ONNX model", found=graph.why, remedy="fetch or build it again")
    target.parent.mkdir()
    for file in sorted(found.path.rglob("*")):
        inside = file.relative_to(found.path)
        hidden = any(part.startswith(".") for part in inside.parts)
        elsewhere = len(inside.parts) > 1 and inside.parts[0] in (ONNX, "reports")
        graphs = ".onnx" in file.name or file.suffix in (".safetensors", ".bin", ".h5", ".msgpack")
        if file.is_file() and not (hidden or elsewhere or graphs or inside.as_posix() in NOT_OURS_TO_TELL):
            (place / inside).parent.mkdir(parents=True, exist_ok=True)
            link(file, place / inside)
    beside = target.with_name(sidecar_name(target.name))
    if not graph.seen.sidecars:
        link(source, target)
    elif len(graph.seen.sidecars) == 1:
        link(source.with_name(graph.seen.sidecars[0]), beside)
        name_sidecar(source, target, beside.name)
    else:
        relocate(source, target, beside=True, anyhow=True)
    _tell_config(place, target.name, bool(graph.seen.sidecars))


def _tell_config(place: Path, name: str, sidecar: bool) -> None:
    """Have config.json speak of the graph that is here, and of no other."""
    if not (place / CONFIG).is_file():
        return
    config = read_json(place / CONFIG, ModelFolderError)
    told = {key: value for key, value in config.items() if key != "transformers.js_config"}
    if sidecar:
        told["transformers.js_config"] = {"use_external_data_format": {name: True}}
    if told != config:
        write_text(place / CONFIG, dump(told))
