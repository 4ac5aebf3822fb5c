"""Dense modules behind the pooling: part of ``sentence_embedding``, and of no hidden state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from featherbed.errors import SpecError
from featherbed.make.checkpoint import Checkpoint
from featherbed.make.ir import LINEAR, OURS, Graph, Node, Weight, constant
from featherbed.modules import Dense

SENTENCE = "sentence_embedding"


def apply(graph: Graph, checkpoint: Checkpoint, modules: tuple[Dense, ...]) -> Graph:
    """The graph with ``modules`` between its pooling and the normalisation that it ends in.

    Raises CheckpointError when a tensor is missing or of another shape, SpecError when the first module does not
    take what is pooled.
    """
    if not modules:
        return graph
    *before, last = graph.nodes
    if last.op != "LpNormalization" or last.outputs != (SENTENCE,):
        raise AssertionError(f"a graph that ends in {last.op}")
    width = next(port.axes[-1] for port in graph.outputs if port.name != SENTENCE)
    if modules[0].inputs != width:
        raise SpecError(
            f"{Path(modules[0].folder) / 'config.json'}, key 'in_features'",
            expected=f"{width}, the size of hidden states",
            found=str(modules[0].inputs),
            remedy="fetch the checkpoint again",
        )
    weights = dict(graph.weights)
    # a row without tokens is NaN, which rounding to integers would not hand on
    nothing = constant("dense.nothing", 0, "<f4")
    axis = constant("dense.axis", [-1], "<i8")
    total = Node("ReduceSum", (last.inputs[0], axis.name), ("dense.sum",), "", (("keepdims", 1),))
    nodes = [*before, total, Node("Mul", (total.outputs[0], nothing.name), ("dense.mark",))]
    weights |= {nothing.name: nothing, axis.name: axis}
    x = last.inputs[0]
    for module in modules:
        x = _module(nodes, weights, checkpoint, module, x)
    nodes.append(Node("Add", (x, "dense.mark"), ("dense.marked",)))
    nodes.append(replace(last, inputs=("dense.marked",)))
    sized = tuple(
        replace(port, axes=(*port.axes[:-1], modules[-1].outputs)) if port.name == SENTENCE else port
        for port in graph.outputs
    )
    return replace(graph, outputs=sized).replaced(nodes, weights)


def _module(nodes: list[Node], weights: dict[str, Weight], checkpoint: Checkpoint, module: Dense, x: str) -> str:
    """One module's nodes and weights, added; returns the name of what it gives."""

    def weight(name: str, *shape: int) -> str:
        full = f"{module.folder}/linear.{name}"
        weights[full] = checkpoint.weight(full, shape)
        return full

    y = f"{module.folder}.out"
    nodes.append(Node(LINEAR, (x, weight("weight", module.outputs, module.inputs)), (y,), OURS))
    if module.bias:
        nodes.append(Node("Add", (y, weight("bias", module.outputs)), (f"{y}.shifted",)))
        y = f"{y}.shifted"
    if module.tanh:
        nodes.append(Node("Tanh", (y,), (f"{y}.tanh",)))
        y = f"{y}.tanh"
    return y
