"""SmoothQuant: the function stays, outliers go; one factor a channel, folded where nothing must divide at run time."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from featherbed.make.ir import Array, Graph
from featherbed.make.transforms import smooth
from featherbed.make.transforms.smooth import Group, Peaks
from featherbed.recipe import Explicit
from tests.conftest import CALIBRATION, FIXTURES, NAMES, assert_same_function, planted, reference_of, texts_for

Float = npt.NDArray[np.float32]
ALPHAS = (0.0, 0.5, 0.8, 1.0)
QWEN3 = ("qwen3-tied", "qwen3-biased")
LAYERS = {"bert-mean": 2, "bert-cls": 1, "qwen3-tied": 2, "qwen3-biased": 2}
HEADS = {"qwen3-tied": (4, 2), "qwen3-biased": (4, 1)}  # query heads, key-value heads
PLANTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(QWEN3, ("norms", "down", "values")),
    **dict.fromkeys(("bert-mean", "bert-cls"), ("values",)),
}


@cache
def seen(folder: Path) -> tuple[Graph, dict[Group, Peaks]]:
    """A checkpoint's graph, and the peaks of its layers."""
    graph = reference_of(folder)
    return graph, smooth.peaks(graph, texts_for(folder, CALIBRATION), "look")


def smoothed(folder: Path, alpha: float, explicit: Explicit = Explicit.ANYWHERE) -> Graph:
    return smooth.apply(seen(folder)[0], alpha, explicit, seen(folder)[1])


def arrays_of(graph: Graph) -> dict[str, Array]:
    return {name: weight.array() for name, weight in graph.weights.items()}


# the function stays


@pytest.mark.parametrize("explicit", Explicit)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", NAMES)
def test_smoothing_changes_no_vector_and_no_hidden_state(name: str, alpha: float, explicit: Explicit) -> None:
    graph = seen(FIXTURES / name)[0]
    found = smoothed(FIXTURES / name, alpha, explicit)
    assert any((found.weights[key].array() != weight.array()).any() for key, weight in graph.weights.items())
    assert_same_function(found, graph, name)


def test_a_factor_that_is_not_divided_again_is_noticed() -> None:
    graph, found = seen(FIXTURES / "qwen3-tied")
    broken = smooth.apply(graph, 0.5, Explicit.ANYWHERE, found)
    gain = "layers.0.input_layernorm.weight"
    broken.weights[gain] = graph.weights[gain]
    with pytest.raises(AssertionError):
        assert_same_function(broken, graph, "qwen3-tied")


def test_the_graph_handed_in_stays_as_it_was() -> None:
    graph = reference_of(FIXTURES / "bert-cls")
    nodes, weights, before = graph.nodes, dict(graph.weights), arrays_of(graph)
    smooth.apply(graph, 0.5, Explicit.ANYWHERE, seen(FIXTURES / "bert-cls")[1])
    assert (graph.nodes, graph.weights) == (nodes, weights)
    assert all(np.array_equal(weight.array(), before[name]) for name, weight in graph.weights.items())


# where the factors go


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", QWEN3)
def test_every_factor_of_a_decoder_is_folded_and_shared_weights_take_theirs_once(name: str, alpha: float) -> None:
    graph, found = seen(FIXTURES / name)
    before, after = arrays_of(graph), arrays_of(smoothed(FIXTURES / name, alpha))
    heads, shared = HEADS[name]
    counts = Counter(graph.linear_names())
    last = f"layers.{LAYERS[name] - 1}"
    assert {key for key in counts if counts[key] == 2} == {
        f"{last}.{part}_proj.weight" for part in ("self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    expected = dict(before)
    for layer in range(LAYERS[name]):
        at = f"layers.{layer}"
        q, k, v, o = (f"{at}.self_attn.{part}_proj.weight" for part in "qkvo")
        gate, up, down = (f"{at}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        into, middle, below = (found[group].factors(alpha) for group in ((q, k, v), (gate, up), (down,)))
        for key in (q, k, v):  # one s for the three
            expected[key] = expected[key] * into
        for key in (gate, up):
            expected[key] = expected[key] * middle
        expected[f"{at}.input_layernorm.weight"] = before[f"{at}.input_layernorm.weight"] / into
        expected[f"{at}.post_attention_layernorm.weight"] = before[f"{at}.post_attention_layernorm.weight"] / middle
        expected[up] = expected[up] / below[:, None]
        expected[down] = before[down] * below
        # a row of the values is read by every query head of its group: one factor for all of them
        size = found[(o,)].inputs.size // heads
        small = np.ones(shared * size, np.float32)
        for head in range(shared):
            for place in range(size):
                readers = [q_head * size + place for q_head in range(heads) if q_head * shared // heads == head]
                peaks = Peaks(*(np.array([max(of[readers])]) for of in (found[(o,)].inputs, found[(o,)].weights)))
                small[head * size + place] = peaks.factors(alpha)[0]
                expected[o] = expected[o].copy()
                expected[o][:, readers] *= small[head * size + place]
        expected[v] = expected[v] / small[:, None]
        if f"{at}.self_attn.v_proj.bias" in before:
            expected[f"{at}.self_attn.v_proj.bias"] = before[f"{at}.self_attn.v_proj.bias"] / small
    assert after.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(after[key], value, rtol=2e-6, atol=0, err_msg=key)


@pytest.mark.parametrize("name", QWEN3)
@pytest.mark.parametrize("explicit", Explicit)
def test_a_decoder_needs_no_operator_more(name: str, explicit: Explicit) -> None:
    assert smoothed(FIXTURES / name, 0.5, explicit).nodes == seen(FIXTURES / name)[0].nodes


@pytest.mark.parametrize("name", ["bert-mean", "bert-cls"])
def test_bert_divides_only_where_a_norm_feeds_the_residual_too_and_behind_the_gelu(name: str) -> None:
    graph = seen(FIXTURES / name)[0]
    made = {node.outputs[0]: node.op for node in graph.nodes}
    tails = LAYERS[name] + (name == "bert-cls")  # the last tail a second time, for the pooled token
    for explicit, gelus in ((Explicit.ANYWHERE, tails), (Explicit.NOT_GELU, 0)):
        found = smoothed(FIXTURES / name, 0.5, explicit)
        muls = [node for node in found.nodes if node not in graph.nodes and node.op == "Mul"]
        before = Counter(made[node.inputs[0]] for node in muls)
        # before q, k and v, the first of them behind a new shape, and before the feed-forward
        assert before == Counter({"Reshape": 1, "LayerNormalization": LAYERS[name] - 1 + tails, "Gelu": gelus})
        assert len(found.nodes) == len(graph.nodes) + len(muls)
    assert smoothed(FIXTURES / name, 0.5, Explicit.NOWHERE).nodes == graph.nodes


@pytest.mark.parametrize("name", ["bert-mean", "bert-cls"])
def test_factors_that_are_divided_at_run_time_meet_each_weight_of_bert_once(name: str) -> None:
    graph, found = seen(FIXTURES / name)
    before, after = arrays_of(graph), arrays_of(smoothed(FIXTURES / name, 0.5))
    for (key,), peaks in found.items():
        if "attention.output" in key or "qkv" in key:
            continue  # the values, which are rows of the one and columns of the other
        np.testing.assert_allclose(after[key], before[key] * peaks.factors(0.5), rtol=2e-6, err_msg=key)
        np.testing.assert_allclose(after[f"{key}.smooth"], 1 / peaks.factors(0.5), rtol=2e-6, err_msg=key)


# the factors


def plain_factors(inputs: list[float], weights: list[float], alpha: float) -> list[float]:
    """One channel at a time."""
    found = []
    for x, w in zip(inputs, weights, strict=True):
        if x <= 1e-12 or w <= 1e-12:
            found.append(1.0)  # never used
        else:
            found.append(min(max(x**alpha / w ** (1 - alpha), 1e-4), 1e4))
    return found


sizes = st.one_of(st.just(0.0), st.floats(-15, 8).map(lambda power: float(np.float32(10**power))))
peaks_of = arrays(np.float32, (2, 5), elements=sizes.map(np.float32))


@given(drawn=peaks_of, alpha=st.floats(0, 1))
@example(drawn=np.array([[0, 1, 0, 1e-13, 3], [1, 0, 0, 1, 1e-13]], np.float32), alpha=0.5)
@example(drawn=np.array([[1e8, 1e-11, 1e8, 1e-11, 1], [1e-11, 1e8, 1, 1, 1]], np.float32), alpha=0.5)
@example(drawn=np.array([[0, 1, 0, 1e-13, 3], [1, 0, 0, 1, 1e-13]], np.float32), alpha=0.0)
@example(drawn=np.array([[0, 1, 0, 1e-13, 3], [1, 0, 0, 1, 1e-13]], np.float32), alpha=1.0)
def test_factors_are_those_of_the_formula_and_1_for_a_channel_that_is_never_used(drawn: Float, alpha: float) -> None:
    with np.errstate(all="raise", under="ignore"):
        found = Peaks(drawn[0], drawn[1]).factors(alpha)
    expected = plain_factors(drawn[0].tolist(), drawn[1].tolist(), alpha)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_peaks_are_those_of_the_real_tokens_and_of_all_layers_that_read_them() -> None:
    name = "qwen3-tied"
    graph, found = seen(FIXTURES / name)
    norm = next(n for n in graph.nodes if n.inputs[1:] == ("layers.0.input_layernorm.weight",))
    table, gain = (graph.weights[key].array().astype(np.float64) for key in ("embed_tokens.weight", norm.inputs[1]))
    epsilon = float(str(dict(norm.attributes)["epsilon"]))
    largest = np.zeros(table.shape[1])
    for batch in texts_for(FIXTURES / name).batches:
        for row, mask in zip(batch.ids, batch.mask, strict=True):
            for token in row[mask > 0]:
                x = table[token]
                largest = np.maximum(largest, np.abs(x / np.sqrt((x * x).mean() + epsilon) * gain))
    group = tuple(f"layers.0.self_attn.{part}_proj.weight" for part in "qkv")
    np.testing.assert_allclose(found[group].inputs, largest, rtol=1e-5)
    columns = np.max([np.abs(graph.weights[key].array()).max(axis=0) for key in group], axis=0)
    assert np.array_equal(found[group].weights, columns)


# outliers


def assert_agree(folder: Path, name: str, alpha: float, parts: tuple[str, ...]) -> None:
    """Smoothed weights of a planted checkpoint and of the plain one, as far as they are named."""
    before, plain = arrays_of(seen(folder)[0]), arrays_of(seen(FIXTURES / name)[0])
    after, expected = arrays_of(smoothed(folder, alpha)), arrays_of(smoothed(FIXTURES / name, alpha))
    chosen = [key for key in expected if not parts or any(part in key for part in parts)]
    assert any(key in plain and not np.allclose(before[key], plain[key], rtol=1e-3) for key in chosen)
    for key in chosen:
        assert np.abs(after[key] - expected[key]).max() <= 1e-4 * np.abs(expected[key]).max(), key


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", QWEN3)
def test_outliers_of_norms_are_undone(name: str, alpha: float) -> None:
    assert_agree(planted(name, "norms"), name, alpha, ())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    ("name", "where", "readers"),
    [(name, "down", "mlp.down_proj") for name in QWEN3]
    + [(name, "values", "self_attn.o_proj") for name in QWEN3]
    + [(name, "values", "attention.output.dense.weight") for name in ("bert-mean", "bert-cls")],
)
def test_outliers_of_up_projections_and_values_are_undone_in_the_layers_that_read_them(
    name: str, where: str, readers: str, alpha: float
) -> None:
    assert_agree(planted(name, where), name, alpha, (readers,))


@pytest.mark.parametrize("name", NAMES)
def test_at_alpha_1_every_outlier_that_was_planted_is_undone(name: str) -> None:
    assert_agree(planted(name, *PLANTED[name]), name, 1.0, ())
