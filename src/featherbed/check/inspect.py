"""What a model file is: read from the graph itself, weights left on the disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from featherbed.check import pitfalls
from featherbed.errors import FeatherbedError, ModelFolderError
from featherbed.folder import MANIFEST, open_folder
from featherbed.run import foreign, sound
from featherbed.spec import Spec

MICROSOFT, STANDARD = "com.microsoft", "ai.onnx"
CUT = 3  # axes of a table in stretches: row, stretch, column
CONTRIBUTED = {"SimplifiedLayerNormalization"}  # onnxruntime registers it in the standard's domain


@dataclass(frozen=True)
class Inspection:
    """Facts about one .onnx file. ``ports`` map names to "type[axes]"; ``domains`` those of its operators, with their
    versions ("ai.onnx" is the standard's); ``weights_bytes`` is by kind of weight, ``sidecars`` are the files that
    weights are read from, as the graph names them; ``table`` is how the token table is stored; ``warnings`` what is
    wrong or will surprise."""

    file: str
    size_bytes: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    operators: dict[str, int]
    quantization: tuple[str, ...]
    weights_bytes: dict[str, int]
    opset: int
    domains: dict[str, int]
    least_onnxruntime: str
    static_batch: bool
    kv_inputs: int
    metadata: dict[str, str]
    sidecars: tuple[str, ...]
    table: str = ""
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        lists = {name: list(vars(self)[name]) for name in ("quantization", "sidecars", "warnings")}
        return {**vars(self), **lists}


def inspect(path: Path | str) -> dict[str, Any]:
    """The document of ``inspect --json`` for a model folder, someone else's folder or a bare .onnx file.

    ``files`` has an inspection a graph, for a folder with its ``variant``; ``spec`` has pooling, prompts and
    lengths, and is None for a bare file and where the configs are silent; ``warnings`` is of the configs. Raises
    ModelFolderError when there is nothing to read.
    """
    path = Path(path)
    if path.suffix == ".onnx" and not path.is_dir():
        return {"path": path.name, "spec": None, "files": [inspect_file(path).to_json()], "warnings": []}
    if not (path / MANIFEST).is_file() and foreign.graphs(path):
        return _inspect_foreign(path)
    folder = open_folder(path)
    spec: Spec = folder.manifest.spec
    variants = {name: v.files[0] for name, v in folder.manifest.variants.items()}
    files = [{"variant": n, **inspect_file(folder.path / f).to_json()} for n, f in variants.items()]
    first = folder.path / next(iter(variants.values()), "")
    warnings = list(pitfalls.of_configs(first, folder.path))
    named = {"path": folder.manifest.name, "manifest": MANIFEST}
    return {**named, "spec": spec.to_json(), "files": files, "warnings": warnings}


def _inspect_foreign(path: Path) -> dict[str, Any]:
    """Every graph of someone else's folder; one that cannot be read is named with why."""
    files, graphs = list[dict[str, Any]](), foreign.graphs(path)
    warnings = list(pitfalls.of_configs(path / graphs[0], path))
    for name in graphs:
        try:
            files.append({**inspect_file(path / name).to_json(), "file": name})
        except FeatherbedError as error:
            warnings.append(str(error))
    if not files:
        raise ModelFolderError(
            f"{path}", expected="a graph that can be read", found="; ".join(warnings), remedy="fetch it again"
        )
    try:
        spec = foreign.found(path / graphs[0], foreign.Foreign(), path).spec.to_json()
    except FeatherbedError:
        spec = None  # the warnings say why
    return {"path": path.name, "spec": spec, "files": files, "warnings": warnings}


def inspect_file(path: Path) -> Inspection:
    """One .onnx file.

    Raises ModelFolderError when it is missing, empty, a git-lfs pointer, too large, or not ONNX.
    """
    model = _parse(path)
    graph = model.graph
    census = Counter(n.op_type if n.domain in {"", "ai.onnx"} else f"{n.domain}.{n.op_type}" for n in graph.node)
    groups: Counter[str] = Counter()
    sidecars: set[str] = set()
    for tensor in graph.initializer:
        groups[_group(tensor)] += _bytes(tensor)
        sidecars |= {e.value for e in tensor.external_data if e.key == "location"}
    beside = [path.parent / name for name in sidecars if Path(name).name == name]
    inputs = {i.name: _port(i) for i in graph.input}
    return Inspection(
        file=path.name,
        size_bytes=path.stat().st_size + sum(p.stat().st_size for p in beside if p.is_file()),
        inputs=inputs,
        outputs={o.name: _port(o) for o in graph.output},
        operators=dict(sorted(census.items())),
        quantization=quantization(graph),
        weights_bytes=dict(sorted(groups.items())),
        opset=next((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), 0),
        domains=_domains(model),
        least_onnxruntime=least_onnxruntime(graph),
        static_batch=any(
            i.type.tensor_type.shape.dim and i.type.tensor_type.shape.dim[0].HasField("dim_value") for i in graph.input
        ),
        kv_inputs=sum(name.startswith("past_key_values") for name in inputs),
        metadata={p.key: p.value for p in model.metadata_props},
        sidecars=tuple(sorted(sidecars)),
        table=table_kind(graph),
        warnings=pitfalls.of_graph(model, path),
    )


def _parse(path: Path) -> onnx.ModelProto:
    sound.read(path)  # what is no graph, and what lies about its sizes
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's decode errors share no public base
        raise ModelFolderError(
            f"{path}",
            expected="an ONNX model",
            found=f"{type(error).__name__}: {error}",
            remedy="fetch or build it again",
        ) from error


def _domains(model: onnx.ModelProto) -> dict[str, int]:
    """Domains that nodes are really of: what onnxruntime alone has counts as its own, wherever it is registered."""
    used = {MICROSOFT if node.op_type in CONTRIBUTED else node.domain or STANDARD for node in model.graph.node}
    versions = {entry.domain or STANDARD: entry.version for entry in model.opset_import}
    return {name: versions.get(name, 1) for name in sorted(used)}


def _port(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    axes = ", ".join(d.dim_param or str(d.dim_value) for d in kind.shape.dim)
    return f"{helper.tensor_dtype_to_np_dtype(kind.elem_type).name}[{axes}]"


def _bytes(tensor: TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    if tensor.data_type in {TensorProto.INT4, TensorProto.UINT4}:
        return (count + 1) // 2
    return count * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _group(tensor: TensorProto) -> str:
    """The part of a transformer that a weight belongs to, from its upstream name."""
    name = tensor.name
    if "embed_tokens" in name or "word_embeddings" in name:
        return "token table"
    if "position_embeddings" in name or "token_type" in name:
        return "other tables"
    if "norm" in name.lower():
        return "norms"
    if ".attention." in name or "self_attn" in name:
        return "attention"
    if ".mlp." in name or "intermediate" in name or ".output.dense" in name:
        return "feed-forward"
    return "other"


def quantization(graph: onnx.GraphProto) -> tuple[str, ...]:
    """How the weights are stored and multiplied, one phrase a way that occurs."""
    found: list[str] = []
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    producers = {o: n for n in graph.node for o in n.output}
    weights = {w.name: w for w in graph.initializer}
    for node in graph.node:
        values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "MatMulNBits":
            level, zeros = values.get("accuracy_level", 0), ", zero points" if any(node.input[3:4]) else ""
            bits, block = values.get("bits", 4), values["block_size"]
            found.append(f"MatMulNBits {bits} bits, block {block}, level {level}{zeros}")
        elif node.op_type == "GatherBlockQuantized":
            found.append(f"table in {values.get('bits', 4)} bits, block {values.get('block_size', 128)}")
        elif node.op_type == "Gather" and len(_stretches(node.input[0], weights)) == CUT:
            found.append(_table_in_codes(node.input[0], weights))
        elif node.op_type in {"MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul"}:
            source = producers.get(node.input[0])
            per_token = source is not None and source.op_type == "QuantizeLinear"
            found.append("W8A8, an activation scale a token" if per_token else "W8A8, an activation scale a tensor")
            found.append(_codes(node.input[1], weights))
        elif node.op_type == "MatMulBnb4":
            kind = {0: "FP4", 1: "NF4"}.get(values.get("quant_type", 1), "of an unknown kind")
            found.append(f"MatMulBnb4 {kind}, block {values.get('block_size', 64)}")
        elif node.op_type == "DequantizeLinear" and values.get("block_size"):
            word = TensorProto.DataType.Name(kinds.get(node.input[0], TensorProto.UNDEFINED)).lower()
            found.append(f"DequantizeLinear {word}, block {values['block_size']}")
        elif node.op_type == "DequantizeLinear" and node.input[0] in weights:
            found.append("QDQ, static activation scales" if _has_static(graph) else "weights alone, DequantizeLinear")
            found.append(_codes(node.input[0], weights, node.input[1]))
        elif node.op_type == "QLinearMatMul":
            found += ["QLinearMatMul, static activation scales", _codes(node.input[3], weights, node.input[4])]
    if any(w.data_type == TensorProto.FLOAT16 and len(w.dims) == 2 for w in graph.initializer):
        found.append("float16")
    return tuple(phrase for phrase in dict.fromkeys(found) if phrase) or ("none",)


def _has_static(graph: onnx.GraphProto) -> bool:
    """Whether activations are rounded too, by scales that are weights."""
    weights = {w.name for w in graph.initializer}
    return any(n.op_type == "QuantizeLinear" and n.input[1] in weights for n in graph.node)


def _codes(name: str, weights: dict[str, TensorProto], scale: str = "") -> str:
    """ "s8 weights, a scale a channel": the type of a weight in 8 bits, and how many scales it has."""
    if name not in weights or len(weights[name].dims) < 2:
        return ""
    kind = TensorProto.DataType.Name(weights[name].data_type)
    word = {"INT8": "s8", "UINT8": "u8", "INT4": "s4", "UINT4": "u4"}.get(kind, kind.lower())
    base = name.removesuffix("_quantized").removesuffix(".s8").removesuffix(".u8")
    scales = next((weights[n] for n in (scale, f"{base}_scale", f"{base}.scales") if n in weights), None)
    many = "" if scales is None else ", a scale a channel" if max(scales.dims, default=1) > 1 else ", one scale"
    return f"{word} weights{many}"


def _stretches(name: str, weights: dict[str, TensorProto]) -> tuple[int, ...]:
    """The axes of a table whose rows are s8 in stretches that share a scale (``make/graph/rows.py``): three of them."""
    known = name in weights and weights[name].data_type == TensorProto.INT8
    return tuple(weights[name].dims) if known else ()


def _table_in_codes(name: str, weights: dict[str, TensorProto]) -> str:
    """ "table in 8 bits, block 128", or how many scales a row has where blocks do not fit into it."""
    _, many, stretch = _stretches(name, weights)
    scales = weights.get(f"{name.removesuffix('.q8')}.scales")
    if scales is None or len(scales.dims) != CUT:
        return "table in 8 bits"
    blocks = scales.dims[1]
    return f"table in 8 bits, block {stretch}" if blocks == many else f"table in 8 bits, {blocks} scales a row"


def table_kind(graph: onnx.GraphProto) -> str:
    """How the largest table that ids are looked up in is stored; "" where there is none."""
    weights = {w.name: w for w in graph.initializer}
    tables = [weights[n.input[0]] for n in graph.node if "Gather" in n.op_type and n.input[0] in weights]
    if not tables:
        return ""
    largest = max(tables, key=_bytes)
    block = any(n.op_type == "GatherBlockQuantized" and n.input[0] == largest.name for n in graph.node)
    block = block or len(_stretches(largest.name, weights)) == CUT
    return f"{TensorProto.DataType.Name(largest.data_type).lower()}{', in blocks' if block else ''}"


def least_onnxruntime(graph: onnx.GraphProto) -> str:
    """The oldest onnxruntime that runs the graph, as tried with files of ours (docs/lab.md)."""
    least = (1, 20)
    for node in graph.node:
        values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "GroupQueryAttention" and len(node.output) == 1:
            least = max(least, (1, 27))
        if node.op_type == "GroupQueryAttention" and "causal" in values:
            least = max(least, (1, 30))
        if node.op_type in {"MatMulNBits", "GatherBlockQuantized"} and values.get("bits", 4) == 8:
            least = max(least, (1, 22) if node.op_type == "MatMulNBits" else (1, 23))
    return ".".join(map(str, least))
