"""What numpy says that a rounded layer computes, held against what onnxruntime computes of the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from featherbed.make.graph.lower import lower
from featherbed.make.ir import LINEAR, OURS, Array, Graph, Node, Port, constant
from featherbed.make.quantize import apply, blockwise, simulate
from featherbed.make.quantize.columns import round_columns
from featherbed.make.quantize.gptq import Grid, compensated
from featherbed.make.write import model_bytes
from featherbed.recipe import BlockwiseLinear, DynamicLinear, LinearStep, PerTokenLinear

Float = npt.NDArray[np.float32]
F32 = np.dtype(np.float32)
STEPS: dict[str, LinearStep] = {
    "int8": PerTokenLinear(),
    "7 bits": PerTokenLinear(7),
    "int8-dynamic": DynamicLinear(),
    "int8-block": BlockwiseLinear(8, 64, 4),
    "8 bits in float": BlockwiseLinear(8, 32, None),
    "int4": BlockwiseLinear(4, 32, None, searched=True),
    "int4 at level 4": BlockwiseLinear(4, 32, 4, searched=True),
    "q4": BlockwiseLinear(4, 32, None),
}
COMPENSATED = {name: step for name, step in STEPS.items() if not isinstance(step, DynamicLinear)}
WIDTHS = [64, 100, 33, 130, 1]  # most are no multiple of a block
# relative to the output's size: sums in float32 and codes that a last bit tips; the rounding itself is 1 % and more
BOUND = 2e-3


def gaussian(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layer(matrix: Float, gelu: bool) -> Graph:
    """x [n, K] (→ GELU) → a → y [n, N]; both a and y are given."""
    width = matrix.shape[1]
    return Graph(
        "layer",
        21,
        (Node("Gelu" if gelu else "Identity", ("x",), ("a",)), Node(LINEAR, ("a", "w"), ("y",), OURS)),
        {"w": constant("w", matrix, F32)},
        (Port("x", F32, ("n", width)),),
        (Port("a", F32, ("n", width)), Port("y", F32, ("n", len(matrix)))),
    )


def run(graph: Graph, x: Float) -> tuple[Float, Float]:
    """(what the layer reads, what it gives) by onnxruntime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session: Any = ort.InferenceSession(model_bytes(lower(graph)), options, providers=["CPUExecutionProvider"])
    a, y = session.run(["a", "y"], {"x": x})
    return a, y


def some_inputs(width: int) -> Float:
    x = gaussian(23, width, seed=1) * np.exp(gaussian(23, 1, seed=2))
    x[:, width // 2] *= 8  # an outlier channel
    x[5] = 0
    return x


def tame(outputs: int, width: int) -> Float:
    """Weights that no CPU's 16-bit sums saturate on: see tests/make/test_quantize_per_token.py."""
    matrix = np.clip(gaussian(outputs, width, seed=3) / 6, -0.49, 0.49)
    matrix[:, :2] = 0
    matrix[:, 0] = np.where(np.arange(outputs) % 2, -1, 1)
    return matrix.astype(np.float32)


@pytest.mark.parametrize("gelu", [False, True], ids=["any input", "behind a GELU"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", STEPS)
def test_a_rounded_layer_computes_what_onnxruntime_computes(name: str, width: int, gelu: bool) -> None:
    step, matrix = STEPS[name], tame(17, width)
    a, y = run(apply(layer(matrix, gelu), step), some_inputs(width))
    bounded = gelu and isinstance(step, PerTokenLinear)
    found = simulate.inputs(a, step, bounded) @ simulate.weight(matrix, step).T
    assert np.abs(found - y).max() <= BOUND * np.abs(y).max()
    if not isinstance(step, DynamicLinear):  # a row has its own scale: small rows are as exact
        small = np.abs(y).max(axis=1)
        assert (np.abs(found - y).max(axis=1) <= 5 * BOUND * small + 1e-30).all()
    lost = np.abs(a @ matrix.T - y).max()
    assert width == 1 or lost > 2 * np.abs(found - y).max()  # there was something to simulate


@pytest.mark.parametrize("name", STEPS)
def test_a_layer_in_float_is_left_in_float(name: str) -> None:
    x, matrix = gaussian(5, 40), gaussian(7, 40)
    assert simulate.inputs(x, None, bounded=name == "int8") is x
    assert simulate.weight(matrix, None) is matrix


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_inputs_behind_a_gelu_have_codes_for_its_least_value_and_steps_nearly_half_as_wide(size: float) -> None:
    x = np.abs(gaussian(9, 50, seed=4)) * np.float32(size)
    x[:, 7] = -0.16997
    seen = simulate.inputs(x, PerTokenLinear(), bounded=True)
    for row, rounded in zip(x, seen, strict=True):
        step = max(float(row.max()) / 235, 0.17 / 20)
        assert np.abs(row - rounded).max() <= step / 2 * 1.001
        assert len(np.unique(rounded)) <= 256


# codes that were chosen before


def rounded_by(step: LinearStep, matrix: Float) -> tuple[npt.NDArray[np.int16], list[Grid]]:
    """Codes and grids of GPTQ without anything to make up for."""
    return compensated(
        matrix,
        np.eye(matrix.shape[1], dtype=np.float32),
        simulate.block_of(step, matrix.shape[1]),
        simulate.fit_of(step, matrix),
    )


def read_back(parts: tuple[Array, ...], step: LinearStep, width: int) -> npt.NDArray[np.float64]:
    """What packed arrays stand for [N, K], one code at a time."""
    if not isinstance(step, BlockwiseLinear):
        codes, scales = parts
        return np.asarray([[float(c) * float(s) for c in column] for column, s in zip(codes.T, scales, strict=True)])
    packed, scales, *zeros = parts
    rows, blocks, _ = packed.shape
    found = np.zeros((rows, width))
    for row in range(rows):
        for column in range(width):
            block, place = divmod(column, step.block)
            scale = float(scales[row * blocks + block])
            if step.bits == 8:
                code, zero = int(packed[row, block, place]), 128
                if zeros:
                    zero = int(zeros[0][row * blocks + block])
            else:
                code = int(packed[row, block, place // 2]) >> 4 * (place % 2) & 15
                zero = 8
                if zeros:
                    bytes_a_row = (blocks + 1) // 2
                    zero = int(zeros[0][row * bytes_a_row + block // 2]) >> 4 * (block % 2) & 15
            found[row, column] = (code - zero) * scale
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", COMPENSATED)
def test_packed_arrays_stand_for_the_values_they_were_made_of(name: str, width: int) -> None:
    step, matrix = COMPENSATED[name], gaussian(9, width, seed=5) + np.float32(0.2)
    codes, grids = rounded_by(step, matrix)
    parts = simulate.arrays(codes, grids, step)
    values = simulate.values(codes, grids, simulate.block_of(step, width))
    assert np.abs(read_back(parts, step, width) - values).max() <= 1e-6 * np.abs(values).max()


@pytest.mark.parametrize("name", COMPENSATED)
@pytest.mark.parametrize("width", WIDTHS)
def test_with_nothing_to_make_up_for_codes_are_those_of_plain_rounding(name: str, width: int) -> None:
    step, matrix = COMPENSATED[name], gaussian(9, width, seed=6)
    codes, grids = rounded_by(step, matrix)
    values = simulate.values(codes, grids, simulate.block_of(step, width))
    expected = simulate.weight(matrix, step)
    steps = np.stack([grid.scale for grid in grids], axis=1)[:, np.arange(width) // simulate.block_of(step, width)]
    differs = np.abs(values - expected) > 1e-6 * np.abs(steps)
    assert differs.mean() <= 0.01  # ties: up in the one, to even in the other
    assert (np.abs(values - expected) <= np.abs(steps) * 1.001).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", COMPENSATED)
def test_a_file_with_codes_that_were_chosen_before_computes_with_their_values(name: str, width: int) -> None:
    step, matrix = COMPENSATED[name], tame(17, width)
    codes, grids = rounded_by(step, np.roll(matrix, 1, axis=0))  # of another matrix: nothing else can have made them
    ready = {"w": simulate.arrays(codes, grids, step)}
    graph = apply(layer(matrix, gelu=False), step, ready)
    a, y = run(graph, some_inputs(width))
    values = simulate.values(codes, grids, simulate.block_of(step, width))
    found = simulate.inputs(a, step, bounded=False) @ values.T
    assert np.abs(found - y).max() <= BOUND * np.abs(y).max()
    for weight in graph.weights.values():
        assert weight.array().nbytes == weight.size_bytes
        assert (weight.array().dtype, weight.array().shape) == (weight.dtype, weight.shape)


def test_grids_of_a_row_of_zeros_are_finite_in_every_way_of_rounding() -> None:
    matrix = gaussian(4, 64, seed=7)
    matrix[1], matrix[2, :32] = 0, 0
    for step in COMPENSATED.values():
        codes, grids = rounded_by(step, matrix)
        values = simulate.values(codes, grids, simulate.block_of(step, 64))
        assert not values[1].any()
        assert not values[2, :32].any()
        assert np.isfinite(values).all()


def test_twins_of_the_kernels_are_used_and_not_copies_of_them() -> None:
    matrix = gaussian(5, 64)
    codes, scales = round_columns(matrix, 127)
    assert np.array_equal(simulate.weight(matrix, PerTokenLinear()), codes * scales[:, None])
    searched, sizes, zeros = blockwise.search_blocks(matrix, 4, 32)
    whole = ((searched - zeros[:, :, None].astype(np.float32)) * sizes[:, :, None]).reshape(5, 64)
    assert np.array_equal(simulate.weight(matrix, STEPS["int4"]), whole)
