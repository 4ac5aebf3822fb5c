"""What is wrong with a file or its configs, or will surprise: seen in the graph, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from featherbed.errors import FeatherbedError
from featherbed.folder import sidecar_name
from featherbed.run import foreign, ports, sidecars, sound
from featherbed.run.tokens import Tokenizer
from featherbed.spec import OLD_KEYS, Pooling, read_json

MICROSOFT = "com.microsoft"
NEWEST_COMMON_OPSET = 21  # what engines beside onnxruntime read today
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
ABSURD_TOKENS = 10**6
UNPACKED = "the whole weight is unpacked on every run"


def of_graph(model: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """Warnings about one .onnx file, parsed without its weights."""
    found = [*_blockwise(model.graph), *_integers(model.graph), *_needs(model), *_inputs(model.graph)]
    return tuple(dict.fromkeys([*found, *_outputs(model.graph, path), *_sidecars(path)]))


def of_configs(path: Path, root: Path) -> tuple[str, ...]:
    """Warnings about the files that describe the graph at ``path`` of the repository ``root``."""
    return tuple(dict.fromkeys([*_spec(path, root), *_tokenizer(root), *_pooling(root)]))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _blockwise(graph: onnx.GraphProto) -> Iterator[str]:
    kinds = {w.name: w.data_type for w in graph.initializer}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        values = _attributes(node)
        bits, level = values.get("bits", 4), values.get("accuracy_level", 0)
        if bits == 8 and level != 4:
            yield f"MatMulNBits in 8 bits without accuracy_level 4: {UNPACKED}"
        if bits == 2 and level == 0:
            yield f"MatMulNBits in 2 bits at level 0: {UNPACKED}"
        if len(node.input) > 3 and kinds.get(node.input[3]) in FLOATS:
            yield f"MatMulNBits with zero points in float: {UNPACKED}"
        if len(node.input) > 4 and node.input[4]:
            yield f"MatMulNBits with g_idx, another order of its columns: {UNPACKED}"


def _integers(graph: onnx.GraphProto) -> Iterator[str]:
    kinds = {w.name: w.data_type for w in graph.initializer}
    made = {name: node.op_type for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
            if kinds.get(node.input[1]) == TensorProto.UINT8:
                yield "u8 weights with u8 activations: x86 has no fast product (VNNI) for them"
            if node.op_type == "DynamicQuantizeMatMul" or made.get(node.input[0]) == "DynamicQuantizeLinear":
                yield "one activation scale for the whole batch: a text's vector depends on its company"


def _needs(model: onnx.ModelProto) -> Iterator[str]:
    own = sorted({n.op_type for n in model.graph.node if n.domain == MICROSOFT})
    if own:
        yield f"needs onnxruntime's own operators: {', '.join(own)}"
    others = sorted({n.domain for n in model.graph.node} - {"", "ai.onnx", MICROSOFT})
    if others:
        yield f"operators of {', '.join(others)}, which onnxruntime does not have"
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset > NEWEST_COMMON_OPSET:
        yield f"opset {opset}, newer than the {NEWEST_COMMON_OPSET} that other engines read"


def _inputs(graph: onnx.GraphProto) -> Iterator[str]:
    weights = {w.name for w in graph.initializer}
    given = [i for i in graph.input if i.name not in weights]
    for port in given:
        axes = port.type.tensor_type.shape.dim
        sizes = [a.dim_value if a.HasField("dim_value") else None for a in axes]
        if port.name == "input_ids" and len(sizes) == 2:
            if sizes[0] is not None:
                yield f"takes {sizes[0]} text at a time: the batch is fixed"
            if sizes[1] is not None:
                yield f"takes {sizes[1]} tokens: the length is fixed"
    names = [port.name for port in given]
    if "position_ids" in names:
        yield "position_ids is a required input, which sentence-transformers and fastembed do not feed"
    past = sum(bool(ports.PAST.fullmatch(name)) for name in names)
    if past:
        yield f"{past} inputs for keys and values, to be fed empty"
    if set(names) & set(ports.TASK):
        yield "a task must be chosen: the graph computes other vectors for each"
    strange = [n for n in names if n not in ports.INPUTS and not ports.PAST.fullmatch(n)]
    if strange:
        yield f"inputs that nobody feeds: {', '.join(strange)}"
    if "input_ids" not in names:
        yield "no input_ids"
    half = [p.name for p in (*given, *graph.output) if p.type.tensor_type.elem_type == TensorProto.FLOAT16]
    if half:
        more = f" and {len(half) - 3} more" if len(half) > 3 else ""
        yield f"float16 inputs or outputs: {', '.join(half[:3])}{more}"


def _outputs(graph: onnx.GraphProto, path: Path) -> Iterator[str]:
    known = [o for o in graph.output if o.name in ports.OUTPUTS and o.name not in ports.ASKED_OUTPUTS]
    if not known:
        yield f"no output of a known name among {', '.join(o.name for o in graph.output)}"
    for output in known:
        kind = output.type.tensor_type
        rank = len(kind.shape.dim) if kind.HasField("shape") else None
        expected = 3 if output.name in ports.TOKEN_OUTPUTS else 2 if output.name in ports.VECTOR_OUTPUTS else None
        if rank is not None and expected is not None and rank != expected:
            yield f"{output.name} has {rank} axes, where its name says {expected}"
        if kind.elem_type in ports.CODES:
            scales = sound.read(path).scales
            if output.name not in scales:
                yield f"{output.name} is in 8 bits, and no QuantizeLinear says what they mean"
            else:
                scale, zero = scales[output.name]
                yield f"{output.name} is in 8 bits: value = (code - {zero.item(0)}) x {float(scale.item(0)):.6g}"


def _sidecars(path: Path) -> Iterator[str]:
    graph = sound.read(path)
    names = sorted({w.location or "" for w in graph.outside})
    wanted = sidecar_name(path.name)
    if names and names != [wanted]:
        yield f"weights in {', '.join(names)}, where other libraries look for {wanted}"
    try:
        opened = sidecars.open_all(graph)
    except FeatherbedError as error:
        yield str(error)
        return
    yield from sidecars.oddities(graph.weights, {name: len(one.view) for name, one in opened.items()})


def _spec(path: Path, root: Path) -> Iterator[str]:
    """What a runtime cannot do without: pooling, lengths, ids; and the end token of a decoder."""
    try:
        found = foreign.found(path, foreign.Foreign(), root)
        tokenizer = Tokenizer(found.home, found.spec)
    except FeatherbedError as error:
        yield str(error)
        return
    if found.spec.pooling is Pooling.LAST and tokenizer.appends:
        yield "tokenizer.json puts no end token behind a text, and the last token is pooled: others will miss it"


def _tokenizer(root: Path) -> Iterator[str]:
    values = _json(root / "tokenizer.json")
    if values.get("padding"):
        fixed = values["padding"].get("strategy")
        to = f"to {fixed['Fixed']} tokens" if isinstance(fixed, dict) and "Fixed" in fixed else "to the longest"
        yield f"tokenizer.json itself pads texts, {to}: set that back before use"
    if values.get("truncation"):
        most = values["truncation"].get("max_length")
        yield f"tokenizer.json itself cuts texts, to {most} tokens: set that back before use"
    longest = _json(root / "tokenizer_config.json").get("model_max_length")
    if not isinstance(longest, (int, float)) or longest > ABSURD_TOKENS:
        yield f"model_max_length in tokenizer_config.json is {longest if longest else 'missing'}: fastembed refuses it"


def _pooling(root: Path) -> Iterator[str]:
    path = root / "1_Pooling" / "config.json"
    values = _json(path)
    if values and not any(key in values for key in OLD_KEYS):
        yield "1_Pooling/config.json lacks the old keys (pooling_mode_mean_tokens …), which others need"
    if not (root / "modules.json").is_file():
        yield "no modules.json: sentence-transformers then pools by the mean"


def _json(path: Path) -> dict[str, Any]:
    """A file's values; nothing where it is missing or unusable, which ``_spec`` says."""
    try:
        return read_json(path) if path.is_file() else {}
    except FeatherbedError:
        return {}
