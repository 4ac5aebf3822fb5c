"""MatMulNBits: codes and scales against onnxruntime's own quantizer and, where zero points are searched, against plain
loops; products against the plain matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from featherbed.folder import graph_name
from featherbed.make.graph.lower import lower
from featherbed.make.ir import LINEAR, OURS, Graph, Node, Port, constant
from featherbed.make.quantize import apply
from featherbed.make.quantize.blockwise import DRAWN, block_weights, pack, pack_zeros, round_blocks, search_blocks
from featherbed.make.write import write_graph
from featherbed.recipe import RECIPES, BlockwiseLinear
from tests.conftest import NAMES

Float = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
F32 = np.dtype(np.float32)
EPSILON = float(np.finfo(np.float32).eps)
STEPS = {
    name: step for name, found in RECIPES.items() for step in found.steps if isinstance(step, BlockwiseLinear)
}  # fmt: skip
SHAPES = [(1, 16), (3, 32), (7, 48), (5, 100), (16, 128), (4, 33), (2, 1), (9, 200)]


def gaussian(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def awkward(outputs: int, width: int) -> Float:
    """Weights with blocks of zeros, ties between codes, and a largest value that occurs with both signs."""
    rows: list[npt.NDArray[Any]] = [
        gaussian(width, seed=1),
        np.zeros(width),
        np.where(np.arange(width) < 16, 0, gaussian(width, seed=2)),
        np.where(np.arange(width) % 2, 1, -1),
        np.where(np.arange(width) % 2, -1, 1),
        np.arange(width) % 17 - 8,
        (np.arange(width) % 33 - 16) / 2,
        (np.arange(width) % 513 - 256) / 2,
        gaussian(width, seed=3) * 1e-6,
        -np.abs(gaussian(width, seed=4)),
        np.abs(gaussian(width, seed=5)) * 1e6,
    ]
    return np.stack([rows[at % len(rows)] for at in range(outputs)]).astype(np.float32)


def theirs(matrix: Float, bits: int, block: int) -> tuple[Codes, Float]:
    """onnxruntime's bytes [N, blocks, bytes] and scales [N, blocks] of a matrix [N, K], symmetric."""
    outputs, width = matrix.shape
    blocks, packed = -(-width // block), 8 // bits
    padded = np.pad(matrix, ((0, 0), (0, blocks * block - width)))
    codes = np.zeros((outputs, blocks, block // packed), np.uint8)
    zeros = np.zeros((outputs, -(-blocks // packed)), np.uint8)
    scales = np.zeros((outputs, blocks), np.float32)
    quantizer = {4: quantize_matmul_4bits, 8: quantize_matmul_8bits}[bits]
    quantizer(codes, np.ascontiguousarray(padded.T), scales, zeros, block, outputs, padded.shape[1], True)
    return codes, scales


def unpacked(codes: Codes, bits: int) -> Codes:
    """bytes [N, blocks, bytes] → codes [N, blocks · block], one byte at a time."""
    rows = []
    for row in codes.reshape(len(codes), -1):
        rows.append([part for byte in row for part in ((byte & 15, byte >> 4) if bits == 4 else (byte,))])
    return np.array(rows, np.uint8)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("outputs", "width"), SHAPES)
@pytest.mark.parametrize("kind", ["gaussian", "awkward"])
def test_bytes_and_scales_are_onnxruntimes_own(kind: str, outputs: int, width: int, bits: int, block: int) -> None:
    matrix = gaussian(outputs, width) if kind == "gaussian" else awkward(max(outputs, 11), width)
    codes, scales = round_blocks(matrix, bits, block)
    expected_codes, expected_scales = theirs(matrix, bits, block)
    assert np.array_equal(scales.view(np.uint32), expected_scales.view(np.uint32))
    assert np.array_equal(pack(codes, bits), expected_codes)


finite = st.floats(-1e4, 1e4, width=32).map(lambda v: v if abs(v) > 1e-20 else 0.0)
rows_of_numbers = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=finite)


@given(matrix=rows_of_numbers, bits=st.sampled_from([4, 8]), block=st.sampled_from([16, 32]))
def test_any_matrix_is_rounded_as_onnxruntime_rounds_it(matrix: Float, bits: int, block: int) -> None:
    codes, scales = round_blocks(matrix, bits, block)
    expected_codes, expected_scales = theirs(matrix, bits, block)
    assert np.array_equal(scales, expected_scales)
    assert np.array_equal(pack(codes, bits), expected_codes)


def plain_block(values: list[float], bits: int) -> tuple[list[int], float]:
    """One block, one value at a time: the largest magnitude lands on code 0."""
    zero, peak = 2 ** (bits - 1), 0.0
    for value in values:
        if abs(value) > abs(peak) or (abs(value) == abs(peak) and value < 0):
            peak = value
    scale = np.float32(peak) / np.float32(-zero)
    inverse = np.float32(1) / scale if scale else np.float32(0)
    codes = []
    for value in values:
        shifted = np.float32(np.float32(value) * inverse) + np.float32(zero)
        codes.append(min(max(int(np.floor(shifted + np.float32(0.5))), 0), 2 * zero - 1))
    return codes, float(scale)


@given(
    values=st.lists(finite, min_size=16, max_size=16),
    bits=st.sampled_from([4, 8]),
)
def test_a_block_is_rounded_as_plain_loops_round_it(values: list[float], bits: int) -> None:
    codes, scales = round_blocks(np.array([values], np.float32), bits, 16)
    expected, scale = plain_block(values, bits)
    assert codes[0, 0].tolist() == expected
    assert scales[0, 0] == scale


@given(matrix=rows_of_numbers, bits=st.sampled_from([4, 8]), block=st.sampled_from([16, 32, 128]))
@example(matrix=np.array([[1, -1, 0.5, -0.5]], np.float32), bits=4, block=16)
def test_rounding_moves_a_weight_by_half_a_step_at_most_and_the_far_end_by_one(
    matrix: Float, bits: int, block: int
) -> None:
    codes, scales = round_blocks(matrix, bits, block)
    zero, width = 2 ** (bits - 1), matrix.shape[1]
    back = (codes.astype(np.float64) - zero) * scales[:, :, None]
    error = np.abs(back.reshape(len(matrix), -1)[:, :width] - matrix)
    step = np.repeat(np.abs(scales.astype(np.float64)), block, axis=1)[:, :width]
    clipped = codes.reshape(len(matrix), -1)[:, :width] == 2 * zero - 1  # −peak has no code of its own
    slack = 1 + 4 * zero * EPSILON
    assert np.all(error[~clipped] <= step[~clipped] * slack / 2)
    assert np.all(error[clipped] <= step[clipped] * slack)
    assert not (codes.reshape(len(matrix), -1)[:, width:] != zero).any()  # what pads a row is zero


@pytest.mark.parametrize("size", [1e-45, 3e-44, 1e-42, 1e-39, 1e-38])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_too_small_for_a_normal_scale_is_rounded_quietly(bits: int, size: float) -> None:
    matrix = np.zeros((2, 32), np.float32)
    matrix[0, :3] = size, -size / 2, 0
    matrix[1] = 1
    with np.errstate(all="raise", under="ignore"):
        codes, scales = round_blocks(matrix, bits, 16)
    back = (codes.astype(np.float64) - 2 ** (bits - 1)) * scales[:, :, None]
    assert np.all(np.abs(back.reshape(2, -1) - matrix) <= [[1e-36], [2.0 ** (1 - bits)]])


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_packed_with_the_first_in_the_low_half(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 2, 32)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 2, 32 * bits // 8)
    assert np.array_equal(unpacked(packed, bits), codes.reshape(3, -1))
    if bits == 4:
        assert packed[0, 0, 0] == codes[0, 0, 0] + 16 * codes[0, 0, 1]


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_come_in_the_shapes_that_were_announced_as_often_as_asked(bits: int) -> None:
    matrix = gaussian(6, 100)
    codes, scales = block_weights(constant("w", matrix, F32), BlockwiseLinear(bits, 32, None))
    expected, by_block = round_blocks(matrix, bits, 32)
    assert codes.dtype == np.uint8
    assert codes.shape == (6, 4, 4 * bits)
    assert scales.dtype == np.float32
    assert scales.shape == (24,)
    for weight in (codes, scales, scales, codes, codes, scales):
        wanted = pack(expected, bits) if weight is codes else by_block.ravel()
        assert np.array_equal(weight.array(), wanted)
        assert weight.array().nbytes == weight.size_bytes


# searched zero points


@dataclass(frozen=True)
class Grid:
    """A block on one grid: codes, scale and zero point, and the length of the error in float64."""

    codes: list[int]
    scale: float
    zero: int
    error: float


def plain_grids(values: list[float], bits: int) -> list[Grid]:
    """One block on every grid that is tried, one value at a time; the widest first."""
    most, grids = 2**bits - 1, []
    high, low = np.float32(max(*values, 0)), np.float32(min(*values, 0))
    for factor in DRAWN:
        scale = np.float32((high - low) * np.float32(factor)) / np.float32(most)
        scale = scale if scale > 1e-30 else np.float32(1)
        zero = round(float(np.float32(-low * np.float32(factor)) / scale))
        codes = [min(max(round(float(np.float32(value) / scale)) + zero, 0), most) for value in values]
        error = math.dist(values, [(code - zero) * float(scale) for code in codes])
        grids.append(Grid(codes, float(scale), zero, error))
    return grids


def slack(values: list[float], least: float) -> float:
    """How far float32 may misjudge the length of an error: a rounding a value, and a sum of that many."""
    return 4 * EPSILON * (math.sqrt(len(values)) * max(map(abs, values)) + len(values) * least)


sizeable = st.floats(-1e4, 1e4, width=32).map(lambda v: v if abs(v) > 1e-12 else 0.0)  # squares that float32 can hold
some_values = st.lists(sizeable, min_size=16, max_size=16)


@given(values=some_values, bits=st.sampled_from([4, 8]))
@example(values=[0.0] * 16, bits=4)
@example(values=[1.0] * 16, bits=4)
@example(values=[-3.0] * 16, bits=4)
@example(values=[*[0.1, -0.1] * 7, 0.15, -1.0], bits=4)  # one far end: worth clipping
@example(values=[float(value) for value in range(16)], bits=4)  # the widest grid has no error
def test_a_searched_block_is_on_the_plain_grid_that_loses_least(values: list[float], bits: int) -> None:
    codes, scales, zeros = search_blocks(np.array([values], np.float32), bits, 16)
    grids = plain_grids(values, bits)
    found = [g for g in grids if (g.codes, g.scale, g.zero) == (codes[0, 0].tolist(), scales[0, 0], zeros[0, 0])]
    assert found
    least = min(grid.error for grid in grids)
    assert found[0].error <= least + slack(values, least)


def test_one_block_keeps_its_whole_range_and_another_draws_it_in() -> None:
    kept = set()
    for values in np.concatenate([gaussian(100, 64, seed=3), gaussian(100, 64, seed=4) ** 3]):
        (scale,) = search_blocks(values[None], 4, 64)[1][0]
        kept.add([grid.scale for grid in plain_grids(values.tolist(), 4)].index(scale))
    assert len(kept) >= 3


@given(matrix=rows_of_numbers, bits=st.sampled_from([4, 8]), block=st.sampled_from([16, 32, 128]))
def test_a_searched_block_never_loses_more_than_half_a_step_of_its_widest_grid_a_weight(
    matrix: Float, bits: int, block: int
) -> None:
    codes, scales, zeros = search_blocks(matrix, bits, block)
    width, blocks = matrix.shape[1], codes.shape[1]
    assert codes.max() < 2**bits
    padded = np.pad(matrix, ((0, 0), (0, blocks * block - width))).reshape(codes.shape).astype(np.float64)
    back = (codes.astype(np.float64) - zeros[:, :, None]) * scales[:, :, None]
    error = np.linalg.norm(back - padded, axis=2)
    step = (np.maximum(padded.max(axis=2), 0) - np.minimum(padded.min(axis=2), 0)) / (2**bits - 1)
    real = np.minimum(width - block * np.arange(blocks), block)  # weights of a block that are not padding
    bound = np.sqrt(real) * step / 2
    assert np.all(error <= bound + 4 * EPSILON * (np.sqrt(block) * np.abs(padded).max(axis=2) + block * bound) + 1e-18)
    assert not (back.reshape(len(matrix), -1)[:, width:]).any()  # what pads a row is zero


@pytest.mark.parametrize("block", [16, 32, 64])
def test_searched_zero_points_lose_less_than_symmetric_rounding(block: int) -> None:
    matrix = gaussian(64, 256, seed=7)
    codes, scales, zeros = search_blocks(matrix, 4, block)
    searched = ((codes.astype(np.float64) - zeros[:, :, None]) * scales[:, :, None]).reshape(matrix.shape)
    assert np.linalg.norm(searched - matrix) < 0.95 * np.linalg.norm(dequantized(matrix, 4, block) - matrix)


@pytest.mark.parametrize("size", [1e-45, 3e-44, 1e-42, 1e-39, 1e-38])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_too_small_to_search_is_zero(bits: int, size: float) -> None:
    matrix = np.zeros((2, 32), np.float32)
    matrix[0, :3] = size, -size / 2, 0
    matrix[1] = 1
    with np.errstate(all="raise", under="ignore"):
        codes, scales, zeros = search_blocks(matrix, bits, 16)
    back = (codes.astype(np.float64) - zeros[:, :, None]) * scales[:, :, None]
    assert not back[0].any()
    assert np.abs(back[1] - 1).max() <= 4 * EPSILON


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_are_packed_row_by_row_with_the_first_in_the_low_half(bits: int, blocks: int) -> None:
    zeros = np.random.default_rng(blocks).integers(0, 2**bits, (5, blocks)).astype(np.uint8)
    packed = pack_zeros(zeros, bits)
    assert packed.shape == (5, -(-blocks * bits // 8))
    assert np.array_equal(unpacked(packed, bits)[:, :blocks], zeros)
    assert not unpacked(packed, bits)[:, blocks:].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_searched_weights_come_in_the_shapes_that_were_announced_as_often_as_asked(bits: int) -> None:
    matrix = gaussian(6, 80)  # three blocks: half a byte is left over in each row's zero points
    parts = block_weights(constant("w", matrix, F32), BlockwiseLinear(bits, 32, None, searched=True))
    codes, scales, zeros = search_blocks(matrix, bits, 32)
    expected = (pack(codes, bits), scales.ravel(), pack_zeros(zeros, bits).ravel())
    for at in (0, 1, 2, 2, 0, 0, 1, 0, 2, 1):
        found = parts[at].array()
        assert np.array_equal(found, expected[at])
        assert (found.dtype, found.shape) == (parts[at].dtype, parts[at].shape)


# the operator


def linear(matrix: Float) -> Graph:
    """x [n, K] → y [n, N] for a matrix [N, K]."""
    outputs, width = matrix.shape
    return Graph(
        "linear",
        21,
        (Node(LINEAR, ("x", "w"), ("y",), OURS),),
        {"w": constant("w", matrix, F32)},
        (Port("x", F32, ("n", width)),),
        (Port("y", F32, ("n", outputs)),),
    )


def run(folder: Path, step: BlockwiseLinear, matrix: Float, x: Float) -> Float:
    write_graph(lower(apply(linear(matrix), step)), folder / "model.onnx", {})
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session: Any = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def dequantized(matrix: Float, bits: int, block: int, searched: bool = False) -> npt.NDArray[np.float64]:
    """What the codes stand for [N, K], one weight at a time."""
    if searched:
        found, scales, zeros = search_blocks(matrix, bits, block)
        flat = found.reshape(len(matrix), -1)
    else:
        packed, scales = theirs(matrix, bits, block)
        flat, zeros = unpacked(packed, bits), np.full(scales.shape, 2 ** (bits - 1), np.uint8)
    return np.array(
        [
            [(int(flat[n, k]) - int(zeros[n, k // block])) * float(scales[n, k // block]) for k in range(len(row))]
            for n, row in enumerate(matrix)
        ]
    )


@pytest.mark.parametrize("tokens", [1, 2, 19])
@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize(("outputs", "width"), [(5, 64), (8, 100), (33, 33), (16, 200)])
def test_a_product_in_float_is_that_of_the_dequantized_matrix(
    tmp_path: Path, outputs: int, width: int, block: int, searched: bool, tokens: int
) -> None:
    matrix, x = gaussian(outputs, width, seed=1) + np.float32(0.3), gaussian(tokens, width, seed=2)
    found = run(tmp_path, BlockwiseLinear(4, block, None, searched), matrix, x)
    plain = dequantized(matrix, 4, block, searched)
    expected = x.astype(np.float64) @ plain.T
    limit = (width + 2) * EPSILON * (np.abs(x).astype(np.float64) @ np.abs(plain).T)  # a sum of that many terms
    assert np.all(np.abs(found - expected) <= limit)


@pytest.mark.parametrize("tokens", [1, 2, 19])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize(("outputs", "width"), [(5, 64), (8, 100), (33, 33), (16, 200)])
def test_a_product_at_level_4_errs_by_half_a_step_of_its_input_a_block(
    tmp_path: Path, outputs: int, width: int, block: int, searched: bool, bits: int, tokens: int
) -> None:
    matrix, x = gaussian(outputs, width, seed=1) + np.float32(0.3), gaussian(tokens, width, seed=2)
    x[:, 3] *= 20
    found = run(tmp_path, BlockwiseLinear(bits, block, 4, searched), matrix, x)
    plain = dequantized(matrix, bits, block, searched)
    limit = np.zeros((tokens, outputs))
    for start in range(0, width, block):
        at = slice(start, start + block)
        step = np.abs(x[:, at]).max(axis=1, keepdims=True).astype(np.float64) / 127
        limit += step / 2 @ np.abs(plain[:, at]).sum(axis=1, keepdims=True).T
    assert np.all(np.abs(found - x.astype(np.float64) @ plain.T) <= limit * (1 + 1e-3))


def test_a_block_of_zeros_adds_nothing(tmp_path: Path) -> None:
    matrix, x = gaussian(4, 64), gaussian(3, 64, seed=1)
    matrix[:, :32] = 0
    other = x.copy()
    other[:, :32] *= 7
    step = BlockwiseLinear(8, 32, 4)
    assert np.array_equal(run(tmp_path, step, matrix, x), run(tmp_path, step, matrix, other))


@pytest.mark.parametrize("recipe", STEPS)
def test_a_token_alone_is_the_token_in_company(tmp_path: Path, recipe: str) -> None:
    matrix, x = gaussian(48, 320), gaussian(17, 320, seed=1)
    together = run(tmp_path, STEPS[recipe], matrix, x)
    for start, count in ((0, 1), (9, 1), (16, 1), (3, 2), (5, 3), (1, 16)):
        few, same = run(tmp_path, STEPS[recipe], matrix, x[start : start + count]), together[start : start + count]
        if STEPS[recipe].accuracy_level == 4:
            assert np.array_equal(few, same)  # the next layer rounds its input: what moved a bit would flip a code
        else:
            scale = np.abs(x[start : start + count]).astype(np.float64) @ np.abs(matrix).T
            assert np.all(np.abs(few - same) <= 2 * (320 + 2) * EPSILON * scale)  # two sums of that many terms


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", STEPS)
def test_every_file_has_the_attributes_that_keep_the_fast_kernels(
    folders: dict[str, Path], name: str, recipe: str
) -> None:
    step = STEPS[recipe]
    bits, block, level = step.bits, step.block, step.accuracy_level
    model = onnx.load(str(folders[name] / graph_name(RECIPES[recipe].suffix)), load_external_data=False)
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert nodes
    for node in nodes:
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        outputs, width = values.pop("N"), values.pop("K")
        assert values == {"bits": bits, "block_size": block, **({} if level is None else {"accuracy_level": level})}
        assert len(node.input) == 3 + step.searched  # x, codes, scales, zero points: no g_idx, no bias
        blocks = -(-width // block)
        assert all(shapes[zeros] == [outputs * -(-blocks * bits // 8)] for zeros in node.input[3:])
        assert shapes[node.input[1]] == [outputs, blocks, block * bits // 8]
        assert shapes[node.input[2]] == [outputs * blocks]
