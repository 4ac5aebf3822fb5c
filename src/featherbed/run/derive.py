"""A file of ours → the graph the engine runs: the same function, prepared for one caller.

    one output      hidden states go, and with them what only they need: in the last layer, all rows but one a text
    row scales      a product followed by ``Mul`` with its rows' scales takes the scales itself: one pass less

Three more forms of it share its weights. ``keys_and_values`` gives what a prompt leaves behind, ``behind_past``
goes on from there, ``for_long`` computes attention in little memory. Each returns a new model; what it was handed
stays as it was.
"""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

HIDDEN, SENTENCE, CODES = "last_hidden_state", "sentence_embedding", "sentence_embedding_quantized"
ATTENTION = "GroupQueryAttention"
PRODUCT = "MatMulIntegerToFloat"
MICROSOFT = "com.microsoft"
ROW_SCALES = (".scale", ".whole")  # [N, 1], made by make/quantize/per_token.py
FREQUENCIES = "rotary.frequencies"  # [1, size / 2], made by make/graph/qwen3.py alone
PAST, PRESENT = "past_key_values", "present"


def engine_graph(model: ModelProto) -> ModelProto:
    """The graph the engine runs, from a file of ours that gives ``sentence_embedding``; else a copy as it is."""
    derived = ModelProto()
    derived.CopyFrom(model)
    graph = derived.graph
    if SENTENCE not in {o.name for o in graph.output}:
        return derived
    for output in [o for o in graph.output if o.name in (HIDDEN, CODES)]:
        graph.output.remove(output)
    _prune(graph)
    _take_scales(graph)
    return derived


def has_past(model: ModelProto) -> bool:
    """Whether the further forms can be had: a decoder of ours, known by its rotary frequencies, in fused operators.

    Where tokens see those behind them, what a prompt leaves behind depends on the text; and for such attention
    onnxruntime 1.31 has no second kernel: ``for_long`` takes as much memory as without.
    """
    dynamic = all(axis.dim_param for port in model.graph.input for axis in port.type.tensor_type.shape.dim)
    found = [node for node in model.graph.node if node.op_type == ATTENTION]
    both_ways = any(a.name == "causal" and a.i == 0 for node in found for a in node.attribute)
    return dynamic and _size(model.graph) > 0 and bool(found) and not both_ways


def _size(graph: GraphProto) -> int:
    """Numbers a head: two a rotary frequency."""
    return next((2 * w.dims[-1] for w in graph.initializer if w.name == FREQUENCIES), 0)


def _heads(attention: NodeProto) -> int:
    return int(next(a.i for a in attention.attribute if a.name == "kv_num_heads"))


def _replace(graph: GraphProto, nodes: list[NodeProto]) -> None:
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _prune(graph: GraphProto) -> None:
    """Drop nodes and weights that no output needs."""
    needed = {o.name for o in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= (set(node.input) | _captured(node)) - {""}
    _replace(graph, kept[::-1])
    for weight in [w for w in graph.initializer if w.name not in needed]:
        graph.initializer.remove(weight)


def _captured(node: NodeProto) -> set[str]:
    """Names that a node's subgraphs read, however deep; those that they make themselves among them."""
    inner = [n for a in node.attribute if a.type == onnx.AttributeProto.GRAPH for n in a.g.node]
    return {name for n in inner for name in (*n.input, *_captured(n))}


def _ones(graph: GraphProto) -> set[str]:
    """Names of the weights that are a single 1."""
    small = (w for w in graph.initializer if list(w.dims) in ([], [1]) and not w.external_data)
    return {w.name for w in small if w.data_type == TensorProto.FLOAT and numpy_helper.to_array(w).item() == 1}


def _take_scales(graph: GraphProto) -> None:
    """Products take their rows' scales [N, 1] as the scale of their left side.

    onnxruntime's kernel multiplies its output by such a scale in place.
    """
    readers = Counter(name for node in graph.node for name in node.input)
    kept = {o.name for o in graph.output}
    ones = _ones(graph)
    products = {
        n.output[0]: n for n in graph.node if n.op_type == PRODUCT and n.output[0] not in kept and n.input[2] in ones
    }
    joined = {
        n.output[0]: products.pop(n.input[0])
        for n in list(graph.node)
        if n.op_type == "Mul"
        and n.input[0] in products
        and readers[n.input[0]] == 1
        and n.input[1].endswith(ROW_SCALES)
    }
    gone = {product.output[0] for product in joined.values()}
    nodes = []
    for node in graph.node:
        if node.output[0] in joined:  # here and not where the product stood: the scale may come in between
            product = NodeProto()
            product.CopyFrom(joined[node.output[0]])
            product.input[2], product.output[0] = node.input[1], node.output[0]
            nodes.append(product)
        elif node.output[0] not in gone:
            nodes.append(node)
    _replace(graph, nodes)


def behind_past(model: ModelProto) -> ModelProto:
    """An engine graph for tokens behind P others, whose keys and values [1, heads, P, size] are inputs.

    One text at a time: onnxruntime's kernel asks for it.
    """
    derived = ModelProto()
    derived.CopyFrom(model)
    graph = derived.graph
    for at, node in enumerate(n for n in graph.node if n.op_type == ATTENTION):
        for slot, kind in ((3, "key"), (4, "value")):
            name = f"{PAST}.{at}.{kind}"
            axes: list[str | int | None] = ["batch_size", _heads(node), "past_length", _size(graph)]
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, axes))
            node.input[slot] = name
        _give_past(node, at)
        node.input[5], node.input[6], node.input[7], node.input[8] = "past.last", "past.total", "past.cos", "past.sin"
    for name, value in (("past.zero", 0), ("past.one", 1), ("past.axis", 2)):
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [], [value]))
    graph.initializer.append(helper.make_tensor("past.column", TensorProto.INT64, [1], [1]))
    source = next(n for n in model.graph.node if n.op_type == ATTENTION)
    first = next(at for at, n in enumerate(graph.node) if n.op_type == ATTENTION)
    nodes = list(graph.node)
    _replace(graph, [*nodes[:first], *_positions(source.input[5], source.input[6]), *nodes[first:]])
    return derived


def _give_past(attention: NodeProto, at: int) -> None:
    """Name the present keys and values: without them the kernel of onnxruntime 1.31 does not look at a past.

    With them it would be the kernel of ``for_long``, which rounds otherwise; a model in 8 bits can make 1e-4 of
    that. Asking for the scores as well keeps the engine graph's own kernel, bit for bit.
    """
    del attention.output[1:]
    attention.output.extend(f"{PRESENT}.{at}.{kind}" for kind in ("key", "value", "scores"))
    others = [a for a in attention.attribute if a.name != "qk_output"]  # onnxruntime writes defaults out
    del attention.attribute[:]
    attention.attribute.extend([*others, helper.make_attribute("qk_output", 1)])


def _positions(last: str, total: str) -> list[NodeProto]:
    """Lengths with the past's P added, and the rotary tables of P + T positions."""
    return [
        helper.make_node("Shape", [f"{PAST}.0.key"], ["past.shape"]),
        helper.make_node("Gather", ["past.shape", "past.axis"], ["past.length"], axis=0),
        helper.make_node("Cast", ["past.length"], ["past.length32"], to=TensorProto.INT32),
        helper.make_node("Add", [last, "past.length32"], ["past.last"]),
        helper.make_node("Add", [total, "past.length32"], ["past.total"]),
        helper.make_node("Cast", ["past.total"], ["past.end"], to=TensorProto.INT64),
        helper.make_node("Range", ["past.zero", "past.end", "past.one"], ["past.places"]),
        helper.make_node("Cast", ["past.places"], ["past.numbers"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["past.numbers", "past.column"], ["past.rows"]),
        helper.make_node("Mul", ["past.rows", FREQUENCIES], ["past.angles"]),
        helper.make_node("Cos", ["past.angles"], ["past.cos"]),
        helper.make_node("Sin", ["past.angles"], ["past.sin"]),
    ]


def keys_and_values(model: ModelProto) -> ModelProto:
    """An engine graph whose outputs are the keys and values of all tokens, turned to their positions."""
    derived = ModelProto()
    derived.CopyFrom(model)
    graph = derived.graph
    del graph.output[:]
    for at, node in enumerate(n for n in graph.node if n.op_type == ATTENTION):
        names = [f"{PRESENT}.{at}.{kind}" for kind in ("key", "value")]
        _give_past(node, at)
        axes: list[str | int | None] = ["batch_size", None, "total_length", None]
        graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, axes) for n in names)
    _prune(graph)
    return derived


def for_long(model: ModelProto) -> ModelProto:
    """An engine graph whose attention takes memory in proportion to T, and not to T².

    onnxruntime 1.31 has two kernels behind one operator. The one for attention whose present keys and values are
    wanted goes over the keys block by block; from about a thousand tokens on it is the faster one too.
    """
    derived = ModelProto()
    derived.CopyFrom(model)
    graph = derived.graph
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == ATTENTION:
            nodes += _let_go(node)
    graph.initializer.append(helper.make_tensor("long.zero", TensorProto.INT64, [1], [0]))
    _replace(graph, nodes)
    return derived


def _let_go(attention: NodeProto) -> list[NodeProto]:
    """Name the present keys and values, and read nothing of them: what nobody reads lives until the run ends.

    Nothing is their first 0 rows; its sum, 0, is added to the attention's own output, so that it is not left out.
    """
    own = attention.output[0]
    names = [f"{own}.{kind}" for kind in ("key", "value")]
    del attention.output[:]
    attention.output.extend([f"{own}.seen", *names])
    zero = ["long.zero"] * 3  # starts, ends, axes
    return [
        *(helper.make_node("Slice", [name, *zero], [f"{name}.none"]) for name in names),
        helper.make_node("Concat", [f"{name}.none" for name in names], [f"{own}.none"], axis=0),
        helper.make_node("ReduceSum", [f"{own}.none"], [f"{own}.nothing"], keepdims=0),
        helper.make_node("Add", [f"{own}.seen", f"{own}.nothing"], [own]),
    ]
