"""The harm of weights, and the path of mixes from the smallest to the most faithful."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherbed.make.calibrate.texts import Calibration
from featherbed.make.checkpoint import open_checkpoint
from featherbed.make.graph import reference_graph
from featherbed.make.ir import Graph
from featherbed.make.quantize.blockwise import block_weights
from featherbed.make.quantize.columns import column_weights
from featherbed.make.quantize.table import table_weights
from featherbed.make.tune import LEVELS, TABLES, Harms, Mix, harms, path, spread, table_names, uniform, weight_bytes
from featherbed.make.variant import made
from featherbed.recipe import BlockwiseLinear, MixedLinear, PerTokenLinear
from featherbed.run.batches import batches
from featherbed.spec import read_spec
from tests.conftest import FIXTURES, upstream


def graph_of(name: str) -> Graph:
    return reference_graph(open_checkpoint(FIXTURES / name), read_spec(FIXTURES / name))


def texts_of(name: str) -> Calibration:
    return Calibration({}, tuple(batches(upstream(name).rows, 0, 64)), read_spec(FIXTURES / name).pooling)


def invented(graph: Graph, seed: int) -> Harms:
    rng = np.random.default_rng(seed)
    found: Harms = {}
    for name in (*graph.linear_names(), *table_names(graph)):
        found[name] = {level: float(h) for level, h in zip(LEVELS, rng.exponential(size=4), strict=True)}
    return found


@pytest.mark.parametrize("name", ["bert-mean", "qwen3-tied"])
def test_a_size_is_that_of_the_written_arrays(name: str) -> None:
    graph = graph_of(name)
    for weight in (graph.weights[n] for n in graph.linear_names()):
        for step in LEVELS.values():
            if isinstance(step, BlockwiseLinear):
                assert weight_bytes(weight, step) == sum(w.size_bytes for w in block_weights(weight, step))
            elif isinstance(step, PerTokenLinear):
                assert weight_bytes(weight, step) == sum(w.size_bytes for w in column_weights(weight, 8))
            else:
                assert weight_bytes(weight, step) == weight.size_bytes
    table = graph.weights[table_names(graph)[0]]
    for of in TABLES.values():
        if table.shape[1] % of.block == 0:
            assert weight_bytes(table, of) == sum(w.size_bytes for w in table_weights(table, of.bits, of.block))


@given(seed=st.integers(0, 2**16))
@settings(max_examples=25)
def test_along_the_path_mixes_grow_and_harm_shrinks(seed: int) -> None:
    graph = graph_of("qwen3-tied")
    mixes = list(path(graph, invented(graph, seed)))
    assert all(level == "4" for _, level in (*mixes[0].layers, *mixes[0].tables))
    for one, finer in pairwise(mixes):
        assert finer.size_bytes > one.size_bytes
        assert finer.harm < one.harm
        changed = [a for a, b in zip((*one.layers, *one.tables), (*finer.layers, *finer.tables), strict=True) if a != b]
        assert len(changed) == 1
    assert all(level == "32" for _, level in mixes[-1].layers)  # the end of the path harms nothing but the table


def test_the_first_change_spares_most_harm_a_byte() -> None:
    graph = graph_of("bert-mean")
    found = invented(graph, 3)
    worst = graph.linear_names()[2]
    found[worst] = {"4": 50.0, "8": 1e-3, "8-block": 1e-4, "32": 0.0}
    first, second, *_ = path(graph, found)
    assert dict(first.layers)[worst] == "4"
    assert dict(second.layers)[worst] == "8"


def test_a_spread_has_both_ends_and_no_doubles() -> None:
    mixes = [Mix((), (), size, 0.0) for size in (10, 11, 12, 50, 90, 100)]
    assert [m.size_bytes for m in spread(mixes, 3)] == [10, 50, 100]
    assert spread(mixes, 10) == mixes


@pytest.mark.parametrize("name", ["bert-mean", "qwen3-tied"])
def test_harm_grows_with_fewer_bits_and_known_harm_is_not_measured_again(name: str) -> None:
    graph, texts, saved = graph_of(name), texts_of(name), []
    found = harms(graph, texts, {}, lambda h: saved.append(sum(map(len, h.values()))))
    assert set(found) == {*graph.linear_names(), *table_names(graph)}
    assert saved == list(range(1, len(saved) + 1))  # one at a time: an interrupted search loses one
    fewer = sum(of["4"] for weight, of in found.items() if weight in graph.linear_names())
    more = sum(of["8-block"] for weight, of in found.items() if weight in graph.linear_names())
    assert fewer > 10 * more
    marked = {weight: dict.fromkeys(levels, 7.0) for weight, levels in found.items()}
    assert harms(graph, texts, marked) == marked


def test_the_harm_of_a_weight_is_that_of_the_model_with_it_rounded() -> None:
    """The slow way: the whole graph with one layer at 4 bits, through another walk."""
    from featherbed.make.calibrate.texts import reference
    from featherbed.make.variant import nearest

    graph, texts = graph_of("qwen3-biased"), texts_of("qwen3-biased")
    truth = reference(graph, texts, "")
    found = harms(graph, texts, {})
    for weight in graph.linear_names():
        alone = nearest(graph, {weight: LEVELS["4"]}.get, texts)
        assert found[weight]["4"] == pytest.approx(1 - float((alone * truth).sum(axis=1).mean()), abs=2e-7)


def test_a_uniform_mix_is_a_recipe_by_hand() -> None:
    graph, texts = graph_of("qwen3-tied"), texts_of("qwen3-tied")
    mix = uniform(graph, invented(graph, 0), "8")
    mixed, plain = (made(graph, (step,), texts).graph for step in (mix.linear(), LEVELS["8"]) if step is not None)
    assert isinstance(mix.linear(), MixedLinear)
    assert [n.op for n in mixed.nodes] == [n.op for n in plain.nodes]
    for name, weight in plain.weights.items():
        assert np.array_equal(mixed.weights[name].array(), weight.array()), name


def test_layers_of_one_input_may_be_compensated_or_not() -> None:
    graph, texts = graph_of("qwen3-tied"), texts_of("qwen3-tied")
    gate, up = (f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    mixed = MixedLinear(((gate, PerTokenLinear()), (up, PerTokenLinear(gptq=True))))
    nodes = made(graph, (mixed,), texts).graph.nodes
    outputs = [name for node in nodes for name in node.outputs]
    assert len(outputs) == len(set(outputs))
    assert sum(node.op == "QuantizeLinear" for node in nodes) == 1
