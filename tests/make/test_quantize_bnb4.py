"""bnb4 against onnxruntime's own quantizer and its MatMulBnb4."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.capi._pybind_state import quantize_matmul_bnb4

from featherbed.make.graph.lower import lower
from featherbed.make.ir import LINEAR, OURS, Graph, Node, Port, constant
from featherbed.make.quantize import apply
from featherbed.make.quantize.bnb4 import BETWEEN, NF4, VALUES, normal_weights, round_normal
from featherbed.make.write import model_bytes
from featherbed.steps import NormalFloatLinear

Float = npt.NDArray[np.float32]
F32 = np.dtype(np.float32)


def gaussian(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


Rounded = tuple[npt.NDArray[np.uint8], Float]


def same(found: Rounded, expected: Rounded) -> bool:
    return np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])


def theirs(matrix: Float, block: int) -> Rounded:
    """Pairs of codes and largest magnitudes from onnxruntime's kernel."""
    packed = np.zeros((matrix.size + 1) // 2, np.uint8)
    peaks = np.zeros(-(-matrix.size // block), np.float32)
    quantize_matmul_bnb4(packed, np.ascontiguousarray(matrix), peaks, block, NF4, *matrix.shape)
    return packed, peaks


def ours(matrix: Float, block: int) -> Rounded:
    packed, peaks = normal_weights(constant("w", matrix, F32), NormalFloatLinear(block))
    assert packed.array().dtype == np.uint8
    return packed.array(), peaks.array()


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("shape", [(24, 64), (5, 33), (1, 1), (7, 100), (3, 2)], ids=str)
def test_codes_and_magnitudes_are_onnxruntimes(shape: tuple[int, int], block: int) -> None:
    for seed in range(4):
        matrix = gaussian(*shape, seed=seed) * np.float32(10.0 ** (seed - 2))
        matrix[seed % len(matrix)] *= seed != 3  # a row of zeros
        assert same(ours(matrix, block), theirs(matrix, block))


@pytest.mark.parametrize("direction", [-np.inf, 0.0, np.inf])
def test_values_between_two_codes_fall_to_the_side_that_onnxruntime_takes(direction: float) -> None:
    between = BETWEEN
    row = np.concatenate([np.nextafter(between, np.float32(direction)) if direction else between, VALUES])[None]
    assert same(ours(row, 64), theirs(row, 64))


def plain(values: list[float], block: int) -> list[float]:
    """Numbers rounded and back, one at a time: the nearest of the sixteen."""
    back: list[float] = []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        peak = max(abs(value) for value in part)
        for value in part:
            far = [abs(float(one) - value / peak) if peak else 1.0 for one in VALUES]
            back.append(float(VALUES[far.index(min(far))]) * peak)
    return back


@given(st.lists(st.floats(-100, 100, width=32).map(lambda v: v if abs(v) > 1e-20 else 0.0), min_size=1, max_size=40))
def test_each_number_takes_the_nearest_of_sixteen(values: list[float]) -> None:
    codes, peaks = round_normal(np.asarray(values, np.float32), 16)
    back = VALUES[codes] * np.repeat(peaks, 16)[: len(values)]
    expected = plain([float(np.float32(value)) for value in values], 16)
    lost = [abs(a - b) for a, b in zip(back, values, strict=True)]
    best = [abs(a - b) for a, b in zip(expected, values, strict=True)]
    assert np.allclose(lost, best, rtol=1e-4, atol=1e-5)  # a tie may go to either side


@pytest.mark.parametrize(("rows", "width"), [(12, 64), (8, 96), (5, 32)])
def test_onnxruntime_multiplies_with_what_the_codes_stand_for(rows: int, width: int) -> None:
    matrix, x = gaussian(rows, width, seed=1), gaussian(6, width, seed=2)
    ports = (Port("x", F32, ("n", width)),), (Port("y", F32, ("n", rows)),)
    graph = Graph("one", 21, (Node(LINEAR, ("x", "w"), ("y",), OURS),), {"w": constant("w", matrix, F32)}, *ports)
    session: Any = ort.InferenceSession(
        model_bytes(lower(apply(graph, NormalFloatLinear()))), providers=["CPUExecutionProvider"]
    )
    codes, peaks = round_normal(matrix, 64)
    back = (VALUES[codes] * np.repeat(peaks, 64)[: matrix.size]).reshape(rows, width)
    assert np.allclose(session.run(None, {"x": x})[0], x @ back.T, atol=1e-5)


def test_the_bounds_are_the_middles_of_neighbours() -> None:
    assert np.allclose(BETWEEN, (VALUES[1:] + VALUES[:-1]) / 2, atol=6e-8)
