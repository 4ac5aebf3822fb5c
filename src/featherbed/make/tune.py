"""Which layer in which precision: what rounding each weight alone does to the embedding, and the path of mixed recipes
from the smallest to the most faithful.

The harm of a weight is the mean of 1 − cosine between a text's vector and the same with this weight rounded, all others
in float: what it does to the layer's own output says little about that. Harms of different weights add up nearly, being
small and unrelated, so a path is walked greedily: next comes the change that spares most harm a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from featherbed.make.calibrate.texts import Calibration, reference, sites, vectors
from featherbed.make.calibrate.walk import Float, Layer, Walk, exact
from featherbed.make.ir import LOOKUP, OURS, Graph, Weight
from featherbed.make.quantize import per_token, simulate
from featherbed.make.quantize.table import tables
from featherbed.progress import Progress, silent
from featherbed.recipe import BlockwiseLinear, BlockwiseTable, LinearStep, MixedLinear, PerTokenLinear

SCALE_BITS = 32

SMALLEST = BlockwiseLinear(bits=4, block=32, accuracy_level=None, searched=True, gptq=True)
LEVELS: dict[str, LinearStep | None] = {  # from the smallest to the most faithful
    "4": SMALLEST,
    "8": PerTokenLinear(gptq=True),
    "8-block": BlockwiseLinear(bits=8, block=64, accuracy_level=4, gptq=True),
    "32": None,
}
TABLES: dict[str, BlockwiseTable] = {"4": BlockwiseTable(bits=4, block=32), "8": BlockwiseTable()}
Harms = dict[str, dict[str, float]]  # a weight's name → level → harm
Save = Callable[[Harms], None]


@dataclass(frozen=True)
class Mix:
    """A level for every linear weight and for every embedding table; what it is foreseen to cost."""

    layers: tuple[tuple[str, str], ...]
    tables: tuple[tuple[str, str], ...]
    size_bytes: int
    harm: float

    @property
    def key(self) -> str:
        """The same mix, the same key."""
        return ",".join(f"{name}={level}" for name, level in (*self.layers, *self.tables))

    def linear(self) -> MixedLinear:
        """The step for the linear layers."""
        return MixedLinear(tuple((name, LEVELS[level]) for name, level in self.layers))

    def table(self) -> BlockwiseTable:
        """The step for the embedding table."""
        return TABLES[self.tables[0][1]]


def weight_bytes(weight: Weight, step: LinearStep | BlockwiseTable | None) -> int:
    """What a weight [N, K] takes in a file: codes, scales, zero points."""
    rows, columns = weight.shape
    if step is None:
        return weight.size_bytes
    if isinstance(step, BlockwiseLinear | BlockwiseTable):
        blocks = -(-columns // step.block)
        zeros = rows * -(-blocks * step.bits // 8) if isinstance(step, BlockwiseLinear) and step.searched else 0
        return rows * blocks * step.block * step.bits // 8 + rows * blocks * SCALE_BITS // 8 + zeros
    return rows * columns * step.weight_bits // 8 + rows * SCALE_BITS // 8


def table_names(graph: Graph) -> list[str]:
    """The embedding tables."""
    return list(dict.fromkeys(n.inputs[1] for n in graph.nodes if (n.domain, n.op) == (OURS, LOOKUP)))


def harms(
    graph: Graph, texts: Calibration, known: Harms, save: Save = lambda _: None, progress: Progress = silent
) -> Harms:
    """The harm of every weight at every level. ``known`` ones are not measured again; ``save`` is told each new one.

    Raises EngineError when onnxruntime refuses a piece of the graph.
    """
    found: Harms = {name: dict(levels) for name, levels in known.items()}
    wanted = set(LEVELS) - {"32"}
    if all(wanted <= found.get(name, {}).keys() for name in graph.linear_names()) and all(
        set(TABLES) <= found.get(name, {}).keys() for name in table_names(graph)
    ):
        return found
    truth = reference(graph, texts, "reference", progress)
    for name in table_names(graph):
        for level, step in TABLES.items():
            if level not in found.setdefault(name, {}):
                walk = Walk(replace(graph, weights=graph.weights | tables(graph, step)), texts.batches)
                found[name][level] = _harm(walk, truth, {})
                save(found)
    behind = per_token.behind_gelu(graph)
    for walk in sites(Walk(graph, texts.batches), "harm of each weight", progress):
        assert walk.site is not None
        for name in walk.site.weights:
            values = np.asarray(graph.weights[name].array(), np.float32)
            for level in (level for level in LEVELS if level in wanted and level not in found.setdefault(name, {})):
                rounded = simulate.weight(values, LEVELS[level])
                found[name][level] = _harm(walk.fork(), truth, {name: (LEVELS[level], walk.site.x in behind, rounded)})
                save(found)
        walk.go({name: exact(graph.weights[name]) for name in walk.site.weights})
    return found


def _harm(walk: Walk, truth: Float, rounded: dict[str, tuple[LinearStep | None, bool, Float]]) -> float:
    """Mean of 1 − cosine at the end of a walk that goes on with these layers rounded."""
    while walk.site is not None:
        layers: dict[str, Layer] = {}
        for name in walk.site.weights:
            if name not in rounded:
                layers[name] = exact(walk.graph.weights[name])
                continue
            step, bounded, matrix = rounded[name]
            layers[name] = simulate.layer(matrix, step, bounded)
        walk.go(layers)
    return float(max(0.0, 1 - (vectors(walk) * truth).sum(axis=1, dtype=np.float64).mean()))


def path(graph: Graph, found: Harms) -> Iterator[Mix]:
    """Mixes from the smallest on, each with one weight finer than the one before: the one that spares most a byte."""
    names, embeddings = list(dict.fromkeys(graph.linear_names())), table_names(graph)
    sizes = {name: {k: weight_bytes(graph.weights[name], step) for k, step in LEVELS.items()} for name in names}
    sizes |= {name: {k: weight_bytes(graph.weights[name], step) for k, step in TABLES.items()} for name in embeddings}
    harm = {name: {**found[name], **({"32": 0.0} if name in names else {})} for name in sizes}
    others = sum(w.size_bytes for name, w in graph.weights.items() if name not in sizes)
    level = {name: min(of, key=of.__getitem__) for name, of in sizes.items()}

    def mix() -> Mix:
        return Mix(
            tuple((name, level[name]) for name in names),
            tuple((name, level[name]) for name in embeddings),
            others + sum(sizes[name][at] for name, at in level.items()),
            sum(harm[name][at] for name, at in level.items()),
        )

    yield mix()
    while True:
        steps = [
            ((harm[name][now] - harm[name][k]) / (sizes[name][k] - sizes[name][now]), name, k)
            for name, now in level.items()
            for k in sizes[name]
            if sizes[name][k] > sizes[name][now] and harm[name][k] < harm[name][now]
        ]
        if not steps:
            return
        _, name, finer = max(steps)
        level[name] = finer
        yield mix()


def uniform(graph: Graph, found: Harms, level: str) -> Mix:
    """Every linear layer at one level, the tables in 8 bits."""
    names, embeddings = list(dict.fromkeys(graph.linear_names())), table_names(graph)
    chosen = {name: weight_bytes(graph.weights[name], LEVELS[level]) for name in names}
    chosen |= {name: weight_bytes(graph.weights[name], TABLES["8"]) for name in embeddings}
    others = sum(w.size_bytes for name, w in graph.weights.items() if name not in chosen)
    harm = sum(found[name][level] for name in names) + sum(found[name]["8"] for name in embeddings)
    return Mix(
        tuple((name, level) for name in names),
        tuple((name, "8") for name in embeddings),
        others + sum(chosen.values()),
        harm,
    )


def spread(mixes: list[Mix], count: int) -> list[Mix]:
    """``count`` of the mixes, evenly spaced by size, first and last among them."""
    if len(mixes) <= count:
        return mixes
    targets = np.linspace(mixes[0].size_bytes, mixes[-1].size_bytes, count)
    sizes = np.asarray([mix.size_bytes for mix in mixes])
    at = sorted({int(np.abs(sizes - target).argmin()) for target in targets})
    return [mixes[i] for i in at]
