"""What others ask of a folder's graphs, as rules: names, types and axes of ports, sidecars, the files' own names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from featherbed.check.facts import Facts, GraphFile
from featherbed.check.inspect import Inspection
from featherbed.check.rules import ECOSYSTEMS, FASTEMBED, JS, OPTIMUM, REPAIR, ST, TEI, Found, Rule
from featherbed.check.usage import DTYPES
from featherbed.folder import ONNX, sidecar_name

FED = ("input_ids", "attention_mask", "token_type_ids")  # what everybody feeds
KV = ("past_key_values", "past_key.", "past_value.", "past.")
POSITIONS = "position_ids"
TEI_NAMES = ("model.onnx", f"{ONNX}/model.onnx")  # its OrtBackend looks here, in this order
# its Cargo.lock has ort 2.0.0-rc.10, which wraps and downloads onnxruntime 1.22.0 (ort-sys/dist.txt); tried with 1.22.1
TEI_ONNXRUNTIME = (1, 22)
NOT_IN_BROWSERS = {"GatherBlockQuantized"}  # onnxruntime-web 1.31 with WebGPU has no kernel for the CPU
DEFAULT_ON_THE_WEB = f"{ONNX}/model_quantized.onnx"
REBUILD = "build it anew with featherbed"


def _each(look: Callable[[GraphFile, Inspection], Iterator[str]]) -> Callable[[Facts], Iterator[Found]]:
    """A look at one graph as a look at all of them that can be read."""

    def every(facts: Facts) -> Iterator[Found]:
        for graph in facts.graphs:
            if graph.seen is not None:
                yield from ((graph.variant, text) for text in look(graph, graph.seen))

    return every


def _unreadable(facts: Facts) -> Iterator[Found]:
    yield from ((graph.variant, f"{graph.file}: {graph.why}") for graph in facts.graphs if graph.seen is None)


def _inputs(_: GraphFile, seen: Inspection) -> Iterator[str]:
    others = [name for name in seen.inputs if name not in FED and name != POSITIONS and not name.startswith(KV)]
    if others:
        yield f"inputs that nobody feeds: {', '.join(others)}"
    wrong = {name: kind for name, kind in seen.inputs.items() if name in FED and not kind.startswith("int64")}
    if wrong:
        yield f"inputs of another type than int64: {', '.join(f'{n} {k}' for n, k in wrong.items())}"
    if "input_ids" not in seen.inputs:
        yield "no input input_ids"


def _positions(_: GraphFile, seen: Inspection) -> Iterator[str]:
    if POSITIONS in seen.inputs:
        yield f"the input {POSITIONS}"


def _kv(_: GraphFile, seen: Inspection) -> Iterator[str]:
    found = [name for name in seen.inputs if name.startswith(KV)]
    if found:
        yield f"{len(found)} inputs for keys and values, {found[0]} first"


def _half_kv(graph: GraphFile, seen: Inspection) -> Iterator[str]:
    found = [k for name, k in seen.inputs.items() if name.startswith(KV) and not k.startswith("float32")]
    if found and graph.file in TEI_NAMES:
        yield f"keys and values of type {found[0].partition('[')[0]}"


def _hidden(_: GraphFile, seen: Inspection) -> Iterator[str]:
    kind = seen.outputs.get("last_hidden_state")
    if kind is None:
        yield f"the outputs {', '.join(seen.outputs)}, and no last_hidden_state"
    elif kind.count(",") != 2:
        yield f"last_hidden_state {kind}, which is not [batch, sequence, width]"


def _tei_output(graph: GraphFile, seen: Inspection) -> Iterator[str]:
    names = ("sentence_embedding", "last_hidden_state", "token_embeddings")
    first = next((name for name in names if name in seen.outputs), None)
    if graph.file in TEI_NAMES and (first is None or not seen.outputs[first].startswith("float32")):
        yield f"{first} {seen.outputs[first]}" if first else f"the outputs {', '.join(seen.outputs)}"


def _static(_: GraphFile, seen: Inspection) -> Iterator[str]:
    for name, kind in seen.inputs.items():
        axes = kind.partition("[")[2].rstrip("]").split(", ")
        if name in FED and any(axis.isdigit() and axis != "0" for axis in axes):
            yield f"{name} {kind}"


def _sidecar_there(facts: Facts) -> Iterator[Found]:
    for graph in facts.graphs:
        for name in graph.seen.sidecars if graph.seen else ():
            if Path(name).name != name:
                yield graph.variant, f"weights in {name!r}, outside the graph's folder"
            elif not (facts.path / graph.file).with_name(name).is_file():
                yield graph.variant, f"weights in {name!r}, which is not there"


def _sidecar_name(graph: GraphFile, seen: Inspection) -> Iterator[str]:
    wanted = sidecar_name(Path(graph.file).name)
    odd = [name for name in seen.sidecars if name != wanted]
    if odd:
        yield f"weights in {', '.join(map(repr, odd))} instead of {wanted!r}"


def _data_format(facts: Facts) -> Iterator[Found]:
    said = facts.said("config.json").get("transformers.js_config") or {}
    said = said.get("use_external_data_format") if isinstance(said, dict) else None
    for graph in facts.graphs:
        has = bool(graph.seen and graph.seen.sidecars)
        name = Path(graph.file).name
        stem = re.sub(r"(_fp16|_quantized|_int8|_uint8|_q4|_q4f16|_bnb4)?\.onnx$", "", name)
        told = bool(said.get(name, said.get(stem))) if isinstance(said, dict) else bool(said)
        if graph.seen and has and not told:
            yield graph.variant, f"{name} has a sidecar, and config.json does not tell"
        elif graph.seen and told and not has:
            yield graph.variant, f"{name} has no sidecar, and config.json says that it has"


def _in_onnx(graph: GraphFile, _: Inspection) -> Iterator[str]:
    if not graph.file.startswith(f"{ONNX}/"):
        yield f"{graph.file} is not in {ONNX}/"


def _suffix(graph: GraphFile, _: Inspection) -> Iterator[str]:
    name = Path(graph.file).name
    if not (name.startswith("model") and name.removeprefix("model").removesuffix(".onnx") in DTYPES):
        yield f"no dtype is called as {name}"


def _web_default(facts: Facts) -> Iterator[Found]:
    if not (facts.path / DEFAULT_ON_THE_WEB).is_file():
        yield "", f"no {DEFAULT_ON_THE_WEB}"


def _web_kernels(_: GraphFile, seen: Inspection) -> Iterator[str]:
    if found := sorted(NOT_IN_BROWSERS & seen.operators.keys()):
        yield ", ".join(found)


def _tei_file(facts: Facts) -> Iterator[Found]:
    if not any((facts.path / name).is_file() for name in TEI_NAMES):
        yield "", "neither model.onnx nor onnx/model.onnx"
    elif all((facts.path / name).is_file() for name in TEI_NAMES):
        yield "", "model.onnx and onnx/model.onnx: it takes the first"


def _tei_only(graph: GraphFile, _: Inspection) -> Iterator[str]:
    if graph.file not in TEI_NAMES:
        yield f"{graph.file} is not model.onnx, the only one it runs"


def newer(seen: Inspection, than: tuple[int, int]) -> bool:
    """Whether a graph has operators that this onnxruntime has not."""
    return tuple(int(part) for part in seen.least_onnxruntime.split(".")[:2]) > than


def _tei_age(graph: GraphFile, seen: Inspection) -> Iterator[str]:
    if graph.file in TEI_NAMES and newer(seen, TEI_ONNXRUNTIME):
        yield f"operators of onnxruntime {seen.least_onnxruntime}, and it has {'.'.join(map(str, TEI_ONNXRUNTIME))}"


EXPORT = "featherbed export DIR --layout tei --variant NAME"
GRAPH_RULES = (
    Rule("graph", "the .onnx file", ECOSYSTEMS, "it is no graph", "fetch or build it again", _unreadable, mends=False),
    Rule("inputs", "names and types of inputs", ECOSYSTEMS, "the run ends for want of an input", REBUILD,
         _each(_inputs), mends=False),
    Rule("positions", "the input position_ids", (ST, FASTEMBED, JS, OPTIMUM),
         "the run ends: only text-embeddings-inference feeds it", REBUILD, _each(_positions), mends=False),
    Rule("kv-inputs", "inputs for keys and values", (ST, FASTEMBED, JS, OPTIMUM),
         "the run ends: only text-embeddings-inference feeds them", REBUILD, _each(_kv), mends=False),
    Rule("half-kv", "the type of these inputs", (TEI,), "it feeds float32", REBUILD, _each(_half_kv), mends=False),
    Rule("hidden-output", "the output last_hidden_state", (ST, OPTIMUM), "Optimum reads that name", REBUILD,
         _each(_hidden), mends=False),
    Rule("float-output", "the output that is read", (TEI,), "it reads float32 only", REBUILD, _each(_tei_output),
         mends=False),
    Rule("static-axes", "axes of inputs", ECOSYSTEMS, "no other batch and no other length runs", REBUILD,
         _each(_static), mends=False),
    Rule("sidecar", "files that weights lie in", ECOSYSTEMS, "the graph does not open", "fetch it too",
         _sidecar_there, mends=False),
    Rule("sidecar-name", "the sidecar's name", (JS, OPTIMUM, TEI),
         "it is not fetched: NAME.onnx_data is, and no other", REPAIR, _each(_sidecar_name)),
    Rule("data-format", "config.json, transformers.js_config.use_external_data_format", (JS,),
         "the sidecar is not fetched, or one that is not there", REPAIR, _data_format),
    Rule("onnx-folder", "the graph's folder", (JS,), 'load it with { subfolder: "" }', "move it into onnx/",
         _each(_in_onnx), fails=False, mends=False),
    Rule("suffix", "the graph's name", (JS,), 'load it with { dtype: "fp32", model_file_name: NAME without .onnx }',
         "nothing is wrong", _each(_suffix), fails=False, mends=False),
    Rule("web-default", "onnx/model_quantized.onnx", (JS,), "a browser asks for it unless told a dtype",
         "say a dtype", _web_default, fails=False, mends=False),
    Rule("web-kernel", "operators", (JS,), "in a browser without a GPU the graph does not open", REBUILD,
         _each(_web_kernels), fails=False, mends=False),
    Rule("tei-file", "model.onnx", (TEI,), "it runs no other name", EXPORT, _tei_file, mends=False),
    Rule("tei-name", "the graph's name", (TEI,), "another file is run", EXPORT, _each(_tei_only), fails=False,
         mends=False),
    Rule("tei-onnxruntime", "operators of model.onnx", (TEI,), "the graph does not open",
         EXPORT, _each(_tei_age), mends=False),
)  # fmt: skip
