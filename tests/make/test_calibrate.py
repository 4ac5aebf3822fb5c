"""Calibration texts and walks: padding never counts, and what a walk sees is what onnxruntime computes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherbed.errors import EngineError
from featherbed.make.calibrate.texts import (
    LONGEST,
    Calibration,
    calibration,
    ends,
    reference,
    row_weights,
    sites,
    vectors,
)
from featherbed.make.calibrate.walk import Site, Walk, exact, pruned, real_rows, texts_of
from featherbed.make.ir import LINEAR, LOOKUP, OURS, Array, Graph, Node, Port, Weight, constant
from featherbed.probe import Probe, shipped, shipped_calibration
from featherbed.run.batches import batches, collate
from featherbed.run.tokens import Tokenizer
from featherbed.spec import Pooling, Spec, read_spec
from tests.conftest import FIXTURES, NAMES, ran, reference_of, texts_for, upstream

F32 = np.dtype(np.float32)
INT64 = np.dtype(np.int64)


def probe_of(*texts: str) -> Probe:
    return Probe("some", "7", "0" * 64, texts, ())


def opened(name: str, **changes: int) -> tuple[Tokenizer, Spec]:
    spec = replace(read_spec(FIXTURES / name), **changes)  # type: ignore[arg-type]
    return Tokenizer(FIXTURES / name, spec), spec


def rows_of(found: Calibration) -> list[tuple[int, ...]]:
    """The ids of every text, by batch."""
    return [
        tuple(row[mask > 0].tolist())
        for batch in found.batches
        for row, mask in zip(batch.ids, batch.mask, strict=True)
    ]


lengths_of = st.lists(st.integers(1, 9), min_size=1, max_size=6)


# what a row counts


@given(lengths=lengths_of, pooling=st.sampled_from(Pooling))
def test_a_text_counts_one_and_padding_nothing(lengths: list[int], pooling: Pooling) -> None:
    batch = collate([[5] * length for length in lengths], 0)
    count, width = batch.ids.shape
    plain = row_weights(batch, count * width, pooling, ends=False).reshape(count, width)
    tails = row_weights(batch, count * width, pooling, ends=True).reshape(count, width)
    assert plain.dtype == np.float32
    for row, length, tail in zip(plain, lengths, tails, strict=True):
        assert row.sum() == pytest.approx(1, abs=1e-6)
        assert row[:length] == pytest.approx(1 / length)
        assert not row[length:].any()
        more = tail - row
        at = {Pooling.LAST: [length - 1], Pooling.CLS: [0], Pooling.MEAN: []}[pooling]
        assert np.flatnonzero(more).tolist() == at
        assert more[at] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("late", [False, True])
def test_rows_of_one_a_text_count_one_each(pooling: Pooling, late: bool) -> None:
    batch = collate([[5] * length for length in (3, 1, 4)], 0)
    assert row_weights(batch, 3, pooling, late).tolist() == [1, 1, 1]
    assert real_rows(batch, 3).tolist() == [True, True, True]


@given(lengths=lengths_of)
def test_real_rows_are_those_in_front_of_the_padding(lengths: list[int]) -> None:
    batch = collate([[5] * length for length in lengths], 0)
    count, width = batch.ids.shape
    found = real_rows(batch, count * width)
    assert found.tolist() == [at < length for length in lengths for at in range(width)]
    slices = list(texts_of(batch, count * width))
    assert [found[part].sum() for part in slices] == lengths


@pytest.mark.parametrize("name", NAMES)
def test_only_layers_behind_the_last_attention_are_read_at_the_end_as_well(name: str) -> None:
    graph = reference_of(FIXTURES / name)
    found = ends(graph)
    if name == "bert-mean":
        assert found == frozenset()
        return
    last = "encoder.layer.0" if name == "bert-cls" else "layers.1"
    assert found
    assert all(key.startswith(last) for key in found)
    assert not [key for key in found if any(part in key for part in ("q_proj", "k_proj", "v_proj", "qkv"))]


# which texts


@pytest.mark.parametrize("name", NAMES)
def test_prompts_take_turns_and_none_is_one_of_them(name: str) -> None:
    tokenizer, spec = opened(name)
    assert sorted(spec.prompts.values()) == ["", "find: "]
    texts = [f"rain {number}" for number in range(7)]
    found = calibration(probe_of(*texts), tokenizer, spec, 10_000)
    expected = [tuple(tokenizer.encode([text], ("", "find: ")[at % 2]).ids[0]) for at, text in enumerate(texts)]
    assert Counter(rows_of(found)) == Counter(expected)
    assert found.pooling is spec.pooling


@pytest.mark.parametrize("name", NAMES)
def test_a_long_text_is_cut_and_keeps_its_end(name: str) -> None:
    tokenizer, spec = opened(name, max_length=4096)
    found = rows_of(calibration(probe_of("rain " * 1000, "rain"), tokenizer, spec, 10_000))
    long, short = (
        tokenizer.encode([text], prompt).ids[0] for text, prompt in (("rain " * 1000, ""), ("rain", "find: "))
    )
    assert len(long) > LONGEST
    assert sorted(found, key=len) == [tuple(short), (*long[: LONGEST - 1], long[-1])]
    assert len(max(found, key=len)) == LONGEST
    if spec.pooling is Pooling.LAST:
        assert all(row[-1] == tokenizer.eos_id for row in found)


def test_what_was_seen_is_named_and_counted() -> None:
    tokenizer, spec = opened("qwen3-tied")
    found = calibration(probe_of("rain", "a fox", "soft"), tokenizer, spec, 10_000)
    assert found.probe == {
        "name": "some", "version": "7", "sha256": "0" * 64, "texts": 3, "tokens": sum(map(len, rows_of(found))),
    }  # fmt: skip
    json.dumps(found.probe)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40),
    tokens=st.integers(1, 300),
)
def test_a_part_is_of_whole_texts_evenly_spaced_and_never_empty(lengths: list[int], tokens: int) -> None:
    rows = [[at + 1] * length for at, length in enumerate(lengths)]
    whole = Calibration({"name": "x"}, tuple(batches(rows, 0, 64)), Pooling.LAST)
    part = whole.part(tokens)
    assert part.probe == whole.probe
    assert part.pooling is whole.pooling
    found, every = rows_of(part), rows_of(whole)
    assert not Counter(found) - Counter(every)
    assert found
    if sum(lengths) <= tokens:
        assert part is whole
    else:
        assert len(found) == max(1, len(every) * tokens // sum(lengths))
        # evenly: no text is left out beside another that is left out much longer
        places = sorted(every.index(row) for row in found)
        gaps = np.diff(places)
        assert not len(gaps) or gaps.max() - gaps.min() <= 1
        assert len(found) == 1 or (places[0], places[-1]) == (0, len(every) - 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_texts_give_the_same_batches(name: str) -> None:
    first, second = (calibration(shipped_calibration(), *opened(name), 3000) for _ in range(2))
    assert first.probe == second.probe
    assert 2000 < first.probe["tokens"] <= 3000 * 1.1
    for one, two in zip(first.batches, second.batches, strict=True):
        assert np.array_equal(one.ids, two.ids)
        assert np.array_equal(one.mask, two.mask)


def plain_text(text: str) -> str:
    return " ".join(text.lower().split())


def test_the_texts_that_are_calibrated_on_are_not_those_that_are_judged_by() -> None:
    seen, judged = shipped_calibration(), shipped()
    assert not {plain_text(text) for text in seen.texts} & {plain_text(text) for text in judged.texts}
    assert len({plain_text(text) for text in seen.texts}) == len(seen.texts)
    assert len(seen.texts) >= 500
    assert seen.triplets == ()
    assert (seen.name, seen.sha256) != (judged.name, judged.sha256)
    assert shipped_calibration() == seen


# walks


def of_all_rows(graph: Graph, name: str, output: str) -> list[Array]:
    """onnxruntime's own values of a graph's output, for the batches of its fixture's calibration."""
    place = ("last_hidden_state", "sentence_embedding").index(output)
    return [ran(graph, batch.ids, batch.mask)[place] for batch in texts_for(FIXTURES / name).batches]


@pytest.mark.parametrize("name", NAMES)
def test_a_walk_in_float_ends_in_onnxruntimes_own_outputs(name: str) -> None:
    graph, texts = reference_of(FIXTURES / name), texts_for(FIXTURES / name)
    assert any((batch.mask == 0).any() for batch in texts.batches)
    walk = Walk(graph, texts.batches)
    walk.finish()
    assert walk.site is None
    for output in ("sentence_embedding", "last_hidden_state"):
        for found, expected, batch in zip(
            walk.outputs(output), of_all_rows(graph, name, output), texts.batches, strict=True
        ):
            assert found.shape == expected.shape
            real = batch.mask > 0 if output == "last_hidden_state" else slice(None)
            assert np.abs(found[real] - expected[real]).max() <= 1e-5 * max(1, np.abs(expected[real]).max())


@pytest.mark.parametrize("name", NAMES)
def test_a_reference_has_upstreams_vectors(name: str) -> None:
    known = upstream(name)
    texts = Calibration({}, (collate(known.rows, 0),), read_spec(FIXTURES / name).pooling)
    assert np.abs(reference(reference_of(FIXTURES / name), texts, "reference") - known.unit).max() <= 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_each_site_is_visited_once_with_all_layers_that_read_it(name: str) -> None:
    graph = reference_of(FIXTURES / name)
    walk, visited = Walk(graph, texts_for(FIXTURES / name).batches), list[Site]()
    while walk.site is not None:
        visited.append(walk.site)
        for x, weights in ((x, walk.site.weights) for x in walk.inputs):
            assert all(x.shape[1] == graph.weights[key].shape[1] for key in weights)
        walk.go({key: exact(graph.weights[key]) for key in walk.site.weights})
    assert len({site.x for site in visited}) == len(visited)
    for site in visited:
        readers = [n.inputs[1] for n in graph.nodes if n.op == LINEAR and n.inputs[0] == site.x]
        assert list(site.weights) == readers
    assert Counter(key for site in visited for key in site.weights) == Counter(graph.linear_names())


def test_progress_counts_each_weight_once() -> None:
    graph = reference_of(FIXTURES / "qwen3-tied")
    told: list[tuple[str, int, int]] = []
    walk = Walk(graph, texts_for(FIXTURES / "qwen3-tied").batches)
    for at in sites(walk, "look", lambda *row: told.append(row)):
        assert at.site is not None
        at.go({key: exact(graph.weights[key]) for key in at.site.weights})
    total = len(set(graph.linear_names()))
    assert told[0] == ("look", 0, total)
    assert told[-1] == ("look", total, total)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


@pytest.mark.parametrize("name", ["qwen3-tied", "bert-mean"])
def test_a_fork_goes_on_by_itself(name: str) -> None:
    graph, texts = reference_of(FIXTURES / name), texts_for(FIXTURES / name)
    expected = reference(graph, texts, "reference")
    walk = Walk(graph, texts.batches)
    for _ in range(3):
        assert walk.site is not None
        walk.go({key: exact(graph.weights[key]) for key in walk.site.weights})
    site, inputs = walk.site, [x.copy() for x in walk.inputs]
    assert site is not None
    other = walk.fork()
    assert other.site == site
    other.go({key: lambda x, key=key: 0.5 * exact(graph.weights[key])(x) for key in site.weights})  # type: ignore[misc]
    other.finish()
    assert walk.site == site
    assert all(np.array_equal(x, before) for x, before in zip(walk.inputs, inputs, strict=True))
    walk.finish()
    assert np.array_equal(vectors(walk), expected)
    assert np.abs(vectors(other) - expected).max() > 1e-3


# by hand


def rows_in_blocks(table: npt.NDArray[np.float32], size: int) -> Weight:
    def read() -> Iterator[Array]:
        yield from (table[at : at + size] for at in range(0, len(table), size))

    return Weight("table", F32, table.shape, read)


@cache
def table_of(rows: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)


@given(
    drawn=st.lists(st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=5), min_size=1), min_size=1, max_size=3),
    size=st.integers(1, 30),
)
def test_rows_of_the_table_are_found_whatever_ids_repeat_and_whatever_blocks_it_comes_in(
    drawn: list[list[list[int]]], size: int
) -> None:
    graph = Graph(
        "table",
        21,
        (Node(LOOKUP, ("input_ids", "table"), ("y",), OURS),),
        {"table": rows_in_blocks(table_of(23), size)},
        (Port("input_ids", INT64, ("b", "t")),),
        (Port("y", F32, ("b", "t", 4)),),
    )
    given_batches = [collate(rows, 22) for rows in drawn]
    walk = Walk(graph, given_batches)
    assert walk.site is None
    for batch, found in zip(given_batches, walk.outputs("y"), strict=True):
        assert np.array_equal(found, table_of(23)[batch.ids])


def chain() -> Graph:
    """ids → rows → two layers on the same rows → their difference, and a third one that nobody reads."""
    eye = np.eye(4, dtype=np.float32)
    return Graph(
        "chain",
        21,
        (
            Node(LOOKUP, ("input_ids", "table"), ("rows",), OURS),
            Node("Reshape", ("rows", "shape"), ("x",)),
            Node(LINEAR, ("x", "twice"), ("a",), OURS),
            Node(LINEAR, ("x", "unread"), ("nobody",), OURS),
            Node(LINEAR, ("x", "once"), ("b",), OURS),
            Node("Sub", ("a", "b"), ("c",)),
            Node(LINEAR, ("c", "twice"), ("y",), OURS),
        ),
        {
            "table": rows_in_blocks(table_of(23), 5),
            "shape": constant("shape", [-1, 4], np.int64),
            "twice": constant("twice", 2 * eye, np.float32),
            "once": constant("once", eye, np.float32),
            "unread": constant("unread", eye, np.float32),
        },
        (Port("input_ids", INT64, ("b", "t")),),
        (Port("y", F32, ("n", 4)),),
    )


def test_a_walk_by_hand() -> None:
    graph, batch = chain(), collate([[3, 3, 7], [1]], 0)
    x = table_of(23)[batch.ids].reshape(-1, 4)
    walk = Walk(graph, [batch])
    assert walk.site == Site("x", ("twice", "unread", "once"))
    assert np.array_equal(walk.inputs[0], x)
    layers = {name: exact(graph.weights[name]) for name in ("twice", "once", "unread")}
    walk.go(layers)
    assert walk.site == Site("c", ("twice",))
    assert np.allclose(walk.inputs[0], x)
    walk.go({"twice": lambda rows: rows * np.float32(10)})  # whatever takes the layer's place is what counts
    assert walk.site is None
    assert np.allclose(walk.outputs("y")[0], 10 * x)


def test_a_pruned_graph_has_one_output_and_what_it_needs() -> None:
    graph = reference_of(FIXTURES / "qwen3-tied")
    found = pruned(graph, "sentence_embedding")
    assert [port.name for port in found.outputs] == ["sentence_embedding"]
    assert len(found.linear_names()) == len(set(found.linear_names())) == len(set(graph.linear_names()))
    known = upstream("qwen3-tied")
    walk = Walk(found, (collate(known.rows, 0),))
    walk.finish()
    assert np.abs(vectors(walk) - known.unit).max() <= 2e-5


def test_a_piece_that_onnxruntime_refuses_is_an_engine_error() -> None:
    graph = chain()
    nodes = [replace(node, op="NoSuchOperator") if node.op == "Sub" else node for node in graph.nodes]
    walk = Walk(graph.replaced(nodes, graph.weights), [collate([[1]], 0)])
    with pytest.raises(EngineError, match="a part of the graph"):
        walk.finish()


def test_shapes_that_do_not_fit_are_an_engine_error_at_run_time() -> None:
    graph = chain()
    weights = {**graph.weights, "once": constant("once", np.ones((3, 4)), np.float32)}
    walk = Walk(replace(graph, weights=weights), [collate([[1, 2]], 0)])
    with pytest.raises(EngineError, match="a part of the graph"):
        walk.finish()
