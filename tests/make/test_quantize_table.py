"""The embedding table in 8 or 4 bits: looked up rows against plain dequantized ones, streamed or whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from featherbed.make.graph.lower import lower
from featherbed.make.ir import LOOKUP, OURS, Graph, Node, Port, Weight, constant
from featherbed.make.quantize import apply
from featherbed.make.quantize.table import table_weights
from featherbed.make.write import write_graph
from featherbed.recipe import BlockwiseTable

Float = npt.NDArray[np.float32]
F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
EPSILON = float(np.finfo(np.float32).eps)


def gaussian(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def streamed(table: Float, sizes: list[int]) -> Weight:
    """A table that comes in blocks of these many rows, and the rest."""

    def read() -> Iterator[Float]:
        start = 0
        for size in [*sizes, len(table)]:
            if start < len(table):
                yield table[start : start + size]
                start += size

    return Weight("table", F32, table.shape, read)


def lookup(table: Float) -> Graph:
    return Graph(
        "lookup",
        21,
        (Node(LOOKUP, ("ids", "table"), ("rows",), OURS),),
        {"table": constant("table", table, F32)},
        (Port("ids", I64, ("b", "t")),),
        (Port("rows", F32, ("b", "t", table.shape[1])),),
    )


def plain_row(row: Float, bits: int, block: int) -> list[float]:
    """One row through ``bits``, one value at a time: the largest of a block lands on code 0, zero on the middle one."""
    back: list[float] = []
    zero = 2 ** (bits - 1)
    for start in range(0, len(row), block):
        values = row[start : start + block]
        peak = max((float(value) for value in values), key=lambda value: (abs(value), -value))
        scale = np.float32(peak) / np.float32(-zero)
        inverse = np.float32(1) / scale if scale else np.float32(0)
        for value in values:
            shifted = np.float32(value * inverse) + np.float32(zero)
            code = min(max(int(np.floor(shifted + np.float32(0.5))), 0), 2 * zero - 1)
            back.append((code - zero) * float(scale))
    return back


def unpacked(codes: npt.NDArray[Any], bits: int) -> npt.NDArray[np.int64]:
    """bytes [V, D · bits / 8] → codes [V, D], one byte at a time, the first of a pair in the low half."""
    pairs = ([part for byte in row for part in ((byte & 15, byte >> 4) if bits == 4 else (byte,))] for row in codes)
    return np.array(list(pairs), np.int64)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("width", [16, 48, 128, 200, 72, 384])
def test_rows_are_those_of_the_plain_dequantized_table(tmp_path: Path, width: int, block: int, bits: int) -> None:
    table = gaussian(37, width)
    table[5] = 0
    table[6, : min(block, width)] = 0
    table[7] *= 1000
    write_graph(lower(apply(lookup(table), BlockwiseTable(bits, block))), tmp_path / "model.onnx", {})
    session: Any = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(1).permutation(np.repeat(np.arange(37), 2)).reshape(2, 37)
    found = session.run(None, {"ids": ids})[0]
    plain = np.array([plain_row(row, bits, block) for row in table])[ids]
    assert found.shape == (2, 37, width)
    assert np.all(np.abs(found - plain) <= EPSILON * np.abs(plain))
    assert not found[ids == 5].any()


def fused(table: Float, block: int) -> bytes:
    """The table's 8 bits in GatherBlockQuantized."""
    parts = [(part.name, part.array()) for part in table_weights(constant("table", table, F32), 8, block)]
    (codes, _), (scales, _) = parts
    node = helper.make_node("GatherBlockQuantized", [codes, "ids", scales], ["rows"], domain="com.microsoft")
    for key, value in (("bits", 8), ("block_size", block), ("gather_axis", 0), ("quantize_axis", 1)):
        node.attribute.append(helper.make_attribute(key, value))
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "t"])
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["b", "t", table.shape[1]])
    graph = helper.make_graph([node], "fused", [ids], [rows], [numpy_helper.from_array(a, name) for name, a in parts])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("width", [16, 48, 128, 200, 384])
def test_rows_of_8_bits_are_the_fused_operators_bit_for_bit(tmp_path: Path, width: int, block: int) -> None:
    table = gaussian(50, width, seed=width) * np.float32(10.0) ** np.arange(-25, 25, dtype=np.float32)[:, None]
    graph = lower(apply(lookup(table), BlockwiseTable(8, block)))
    assert {node.domain for node in graph.nodes} == {""}  # what any engine and any build of onnxruntime has
    write_graph(graph, tmp_path / "model.onnx", {})
    ids = np.random.default_rng(1).integers(0, 50, (3, 40))
    ours, theirs = (
        ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"ids": ids})[0]
        for model in (str(tmp_path / "model.onnx"), fused(table, block))
    )
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_onnxruntime_keeps_the_table_in_8_bits(tmp_path: Path) -> None:
    write_graph(lower(apply(lookup(gaussian(300, 128)), BlockwiseTable())), tmp_path / "model.onnx", {})
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    weights = onnx.load(str(tmp_path / "optimized.onnx")).graph.initializer
    sizes = {weight.name: numpy_helper.to_array(weight).nbytes for weight in weights}
    assert sizes.pop("table.q8") == 300 * 128
    assert sum(sizes.values()) < 300 * 8  # the scales, and a shape


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 35).map(lambda half: 2 * half),  # a width is a multiple of 8: its heads'
    sizes=st.lists(st.integers(1, 15), max_size=6),
    seed=st.integers(0, 99),
    bits=st.sampled_from([4, 8]),
)
def test_a_table_that_comes_in_blocks_of_rows_gives_what_the_whole_one_gives(
    rows: int, width: int, sizes: list[int], seed: int, bits: int
) -> None:
    table = gaussian(rows, width, seed=seed)
    codes, scales = table_weights(streamed(table, sizes), bits, 32)
    whole_codes, whole_scales = table_weights(constant("table", table, F32), bits, 32)
    assert np.array_equal(codes.array(), whole_codes.array())
    assert np.array_equal(scales.array(), whole_scales.array())
    assert codes.array().shape == codes.shape == (rows, width * bits // 8)
    assert scales.array().shape == scales.shape == (rows, -(-width // 32))


@pytest.mark.parametrize("order", ["cs", "sc", "css", "scs", "ccs", "sscc"])
def test_codes_and_scales_may_be_read_in_any_order_and_again(order: str) -> None:
    table = gaussian(20, 40)
    expected = {
        kind: weight.array() for kind, weight in zip("cs", table_weights(streamed(table, [7, 7]), 8, 16), strict=True)
    }
    weights = dict(zip("cs", table_weights(streamed(table, [7, 7]), 8, 16), strict=True))
    for kind in order:
        assert np.array_equal(weights[kind].array(), expected[kind])


def test_scales_are_whole_after_codes_that_were_left_halfway() -> None:
    table = gaussian(20, 40)
    codes, scales = table_weights(streamed(table, [7, 7]), 8, 16)
    expected = table_weights(constant("table", table, F32), 8, 16)[1].array()
    assert len(next(codes.read())) == 7
    assert np.array_equal(scales.array(), expected)


def test_codes_come_block_by_block_as_the_table_does() -> None:
    alive = 0

    def read() -> Iterator[Float]:
        nonlocal alive
        for at in range(8):
            alive += 1
            yield gaussian(5, 64, seed=at)

    codes, _ = table_weights(Weight("table", F32, (40, 64), read), 8, 32)
    for seen, block in enumerate(codes.read(), 1):
        assert alive == seen  # none is read ahead
        assert block.shape == (5, 64)
    assert alive == 8


@pytest.mark.parametrize(("bits", "block", "cosine"), [(8, 128, 0.9999), (4, 32, 0.99)])
def test_a_row_of_gaussian_weights_keeps_its_direction(bits: int, block: int, cosine: float) -> None:
    table = gaussian(500, 384)
    back = np.array([plain_row(row, bits, block) for row in table])
    cosines = (back * table).sum(axis=1) / np.linalg.norm(back, axis=1) / np.linalg.norm(table, axis=1)
    codes, scales = table_weights(constant("table", table, F32), bits, block)
    ours = (unpacked(codes.array(), bits) - 2.0 ** (bits - 1)) * np.repeat(scales.array(), block, axis=1)
    assert np.array_equal(ours, back)
    assert cosines.min() > cosine


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_moves_a_value_by_half_a_step_at_most_and_the_far_end_by_one(bits: int) -> None:
    table = gaussian(60, 200)
    table[:, 17] = -table[:, 16]
    parts = table_weights(constant("table", table, F32), bits, 32)
    codes, scales = (
        unpacked(parts[0].array(), bits),
        np.repeat(parts[1].array().astype(np.float64), 32, axis=1)[:, :200],
    )
    step = np.abs(scales)
    error = np.abs((codes - 2.0 ** (bits - 1)) * scales - table)
    far = codes == 2**bits - 1
    assert np.all(error[~far] <= step[~far] * (0.5 + 256 * EPSILON))
    assert np.all(error[far] <= step[far] * (1 + 256 * EPSILON))
