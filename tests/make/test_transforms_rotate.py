"""Rotation of the residual stream: the function stays, channels that stand out do not."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from featherbed.make.ir import Graph
from featherbed.make.transforms import rotate, smooth
from featherbed.make.transforms.smooth import Group, Peaks
from featherbed.recipe import Explicit
from tests.conftest import FIXTURES, assert_same_function, planted, reference_of, texts_for

WIDTHS = [*range(1, 65), 256, 384, 768, 1024, 2560]
QWEN3 = ("qwen3-tied", "qwen3-biased")
QKV: Group = tuple(f"layers.0.self_attn.{part}_proj.weight" for part in "qkv")


@cache
def turned(folder: Path) -> Graph:
    return rotate.apply(reference_of(folder))


def peaks(graph: Graph, folder: Path) -> dict[Group, Peaks]:
    return smooth.peaks(graph, texts_for(folder), "look")


# the matrix


@pytest.mark.parametrize("width", WIDTHS)
def test_the_matrix_is_orthogonal_and_no_entry_is_much_larger_than_the_others(width: int) -> None:
    turn = rotate.rotation(width)
    assert turn.shape == (width, width)
    assert np.abs(turn @ turn.T - np.eye(width)).max() < 1e-10
    if width & (width - 1) == 0:
        assert np.abs(np.abs(turn) - 1 / np.sqrt(width)).max() < 1e-15
    else:
        assert np.abs(turn).max() <= np.sqrt(2 / width) + 1e-12  # √(2 / m) of the cosines, √(1 / 2^k) of Hadamard


def plain_entry(width: int, row: int, column: int) -> float:
    """One entry: Sylvester's sign from the bits that both places share, and a cosine of what is odd."""
    odd = width
    while odd % 2 == 0:
        odd //= 2
    sign = (-1) ** ((row // odd) & (column // odd)).bit_count()
    wave = np.cos(np.pi * (2 * (column % odd) + 1) * (row % odd) / (2 * odd)) * np.sqrt(2 if row % odd else 1)
    return float(sign * wave / np.sqrt(width))


@pytest.mark.parametrize("width", [1, 2, 3, 8, 9, 24, 48, 72, 80])
def test_each_entry_is_a_sign_of_hadamards_times_a_cosine(width: int) -> None:
    plain = np.array([[plain_entry(width, row, column) for column in range(width)] for row in range(width)])
    assert np.abs(rotate.rotation(width) - plain).max() < 1e-12


def test_the_widths_of_the_fixtures_can_tell_a_rotation_from_its_inverse() -> None:
    for name in QWEN3:
        width = reference_of(FIXTURES / name).weights["norm.weight"].shape[0]
        turn = rotate.rotation(width)
        assert np.abs(turn - turn.T).max() > 0.01


# the graph


@pytest.mark.parametrize("name", QWEN3)
def test_rotation_changes_every_layer_of_the_stream_and_neither_output(name: str) -> None:
    graph, found = reference_of(FIXTURES / name), turned(FIXTURES / name)
    for key in graph.linear_names():
        assert not np.allclose(found.weights[key].array(), graph.weights[key].array(), atol=1e-2), key
    assert_same_function(found, graph, name)


@pytest.mark.parametrize("name", QWEN3)
@pytest.mark.parametrize("part", ["embed_tokens", "o_proj", "down_proj", "gate_proj", "norm.weight.back"])
def test_a_weight_that_is_turned_the_wrong_way_is_noticed(name: str, part: str) -> None:
    graph = turned(FIXTURES / name)
    broken = rotate.apply(reference_of(FIXTURES / name))
    key = next(key for key in graph.weights if part in key)
    again = rotate.rotation(reference_of(FIXTURES / name).weights["norm.weight"].shape[0])
    axis = 0 if part in ("o_proj", "down_proj", "norm.weight.back") else 1
    whole = graph.weights[key].array()
    other = (again @ again @ whole if axis == 0 else whole @ again.T @ again.T).astype(np.float32)
    weight = graph.weights[key]
    broken.weights[key] = type(weight)(weight.name, weight.dtype, weight.shape, lambda: iter((other,)))
    with pytest.raises(AssertionError):
        assert_same_function(broken, reference_of(FIXTURES / name), name)


@pytest.mark.parametrize("name", ["bert-mean", "bert-cls"])
def test_a_stream_that_layer_norms_read_is_left_alone(name: str) -> None:
    graph = reference_of(FIXTURES / name)
    assert not rotate.fits(graph)
    assert rotate.apply(graph) is graph


@pytest.mark.parametrize("name", QWEN3)
def test_the_graph_handed_in_stays_as_it_was(name: str) -> None:
    graph = reference_of(FIXTURES / name)
    nodes, weights = graph.nodes, dict(graph.weights)
    before = {key: weight.array() for key, weight in weights.items()}
    rotate.apply(graph)
    assert rotate.fits(graph)
    assert (graph.nodes, graph.weights) == (nodes, weights)
    assert all(np.array_equal(weight.array(), before[key]) for key, weight in graph.weights.items())


@pytest.mark.parametrize("name", QWEN3)
@pytest.mark.parametrize("alpha", [0.3, 0.8])
def test_rotated_and_then_smoothed_is_still_the_same_function(name: str, alpha: float) -> None:
    graph = turned(FIXTURES / name)
    found = peaks(graph, FIXTURES / name)
    for explicit in Explicit:
        both = smooth.apply(graph, alpha, explicit, found)
        assert both.nodes == graph.nodes  # each norm has a gain of its own still, and takes its factors
        assert_same_function(both, reference_of(FIXTURES / name), name)


# outliers


def prominence(values: npt.NDArray[np.float32]) -> float:
    return float(values.max() / values.mean())


@pytest.mark.parametrize("name", QWEN3)
def test_outliers_of_norms_are_spread_over_all_channels(name: str) -> None:
    folder = planted(name, "norms")
    loud, quiet = peaks(reference_of(folder), folder)[QKV], peaks(turned(folder), folder)[QKV]
    assert prominence(loud.inputs) > 5
    assert prominence(quiet.inputs) < 2


@pytest.mark.parametrize("name", QWEN3)
def test_a_gain_goes_into_the_weights_so_that_planted_ones_leave_no_trace(name: str) -> None:
    found, expected = turned(planted(name, "norms")), turned(FIXTURES / name)
    assert found.nodes == expected.nodes
    for key, weight in expected.weights.items():
        value = weight.array()
        assert np.abs(found.weights[key].array() - value).max() <= 1e-5 * max(np.abs(value).max(), 1e-30), key
