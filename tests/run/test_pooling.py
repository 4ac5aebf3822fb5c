"""Pooling against plain loops, under every padding side."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from featherbed.errors import TextError
from featherbed.run.pooling import check_mask, normalize, pool
from featherbed.spec import Pooling

Vectors = npt.NDArray[np.float32]
Mask = npt.NDArray[np.int64]
EPSILON = float(np.finfo(np.float32).eps)
MODERATE = st.floats(-1e3, 1e3, width=32)
SIDES = ("left", "right", "mixed", "both")


def plain(hidden: Vectors, mask: Mask, pooling: Pooling) -> npt.NDArray[np.float64]:
    """[B, T, D], [B, T] → [B, D] with loops in float64."""
    rows = []
    for states, real in zip(hidden.tolist(), mask.tolist(), strict=True):
        kept = [state for state, flag in zip(states, real, strict=True) if flag]
        if pooling is Pooling.MEAN:
            rows.append([sum(column) / len(kept) for column in zip(*kept, strict=True)])
        else:
            rows.append(kept[-1] if pooling is Pooling.LAST else kept[0])
    return np.array(rows)


def laid_out(texts: list[Vectors], side: str, width: int, noise: np.random.Generator) -> tuple[Vectors, Mask]:
    """Hidden states of texts, each [t, D], in one batch of ``width`` tokens; the padding holds noise."""
    hidden = noise.normal(0, 100, (len(texts), width, texts[0].shape[1])).astype(np.float32)
    mask = np.zeros((len(texts), width), np.int64)
    for at, text in enumerate(texts):
        spare = width - len(text)
        starts = {"left": spare, "right": 0, "mixed": spare * (at % 2), "both": spare // 2}
        hidden[at, starts[side] : starts[side] + len(text)] = text
        mask[at, starts[side] : starts[side] + len(text)] = 1
    return hidden, mask


@st.composite
def batch(draw: st.DrawFn) -> tuple[Vectors, Mask]:
    rows, width, dim = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    hidden = draw(arrays(np.float32, (rows, width, dim), elements=MODERATE))
    mask = draw(arrays(np.int64, (rows, width), elements=st.integers(0, 1)))
    mask[~mask.any(axis=1), draw(st.integers(0, width - 1))] = 1
    return hidden, mask


@settings(deadline=None)
@given(case=batch())
@pytest.mark.parametrize("pooling", Pooling)
def test_pooling_is_what_plain_loops_say_for_any_mask(pooling: Pooling, case: tuple[Vectors, Mask]) -> None:
    hidden, mask = case
    pooled = pool(hidden, mask, pooling)
    assert pooled.shape == (len(hidden), hidden.shape[2])
    assert pooled.dtype == np.float32
    error = np.abs(pooled - plain(hidden, mask, pooling))
    bound = (hidden.shape[1] + 1) * EPSILON * np.abs(hidden).max() if pooling is Pooling.MEAN else 0.0
    assert error.max() <= bound


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=st.integers(0, 99), spare=st.integers(0, 5))
@pytest.mark.parametrize("pooling", Pooling)
def test_padding_side_changes_nothing(pooling: Pooling, lengths: list[int], seed: int, spare: int) -> None:
    noise = np.random.default_rng(seed)
    texts = [noise.normal(size=(length, 4)).astype(np.float32) for length in lengths]
    alone = np.concatenate([pool(text[None], np.ones((1, len(text)), np.int64), pooling) for text in texts])
    largest = max(float(np.abs(text).max()) for text in texts)
    for side in SIDES:
        hidden, mask = laid_out(texts, side, max(lengths) + spare, noise)
        bound = 2 * 13 * EPSILON * largest if pooling is Pooling.MEAN else 0.0
        assert np.abs(pool(hidden, mask, pooling) - alone).max() <= bound, side


def test_the_rule_of_others_is_caught_by_left_padding() -> None:
    text = np.arange(12, dtype=np.float32).reshape(3, 4)
    hidden, mask = laid_out([text], "left", 5, np.random.default_rng(0))
    assert not np.array_equal(hidden[0, mask[0].sum() - 1], text[-1])
    assert np.array_equal(pool(hidden, mask, Pooling.LAST)[0], text[-1])


def test_a_pad_that_is_the_end_token_does_no_harm() -> None:
    pad = end = 0
    ids = np.array([[5, end, pad, pad], [pad, 6, 7, end]])
    mask = np.array([[1, 1, 0, 0], [0, 1, 1, 1]])
    hidden = np.arange(8, dtype=np.float32).reshape(2, 4, 1)
    by_id = [hidden[row, np.flatnonzero(ids[row] != pad)[-1], 0] for row in range(2)]
    assert by_id == [0, 6]
    assert pool(hidden, mask, Pooling.LAST)[:, 0].tolist() == [1, 7]


@pytest.mark.parametrize("pooling", Pooling)
def test_a_row_without_a_real_token_is_an_error(pooling: Pooling) -> None:
    mask = np.array([[1, 0], [0, 0], [0, 1]])
    with pytest.raises(TextError, match=r"^row 1 of the batch: .*attention mask of zeros"):
        pool(np.zeros((3, 2, 4), np.float32), mask, pooling)


def test_a_mask_with_a_real_token_in_every_row_passes() -> None:
    check_mask(np.array([[0, 1], [1, 0]]))
    with pytest.raises(TextError, match=r"^row 0 "):
        check_mask(np.array([[0, 0], [1, 0]]))


@settings(deadline=None)
@given(
    vectors=arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 8)),
        elements=st.one_of(st.just(0.0), st.floats(2**-13, 1e3, width=32), st.floats(-1e3, -(2**-13), width=32)),
    )
)
def test_rows_have_length_one_and_zero_rows_stay(vectors: Vectors) -> None:
    before = vectors.copy()
    unit = normalize(vectors)
    assert unit.dtype == np.float32
    assert np.array_equal(vectors, before)
    for row, found in zip(vectors.astype(np.float64), unit, strict=True):
        length = float(sum(v * v for v in row.tolist())) ** 0.5
        if length == 0:
            assert not found.any()
        else:
            assert np.abs(found - row / length).max() <= (len(row) + 2) * EPSILON


def test_a_single_vector_is_normalised_too() -> None:
    assert normalize(np.array([3, 4], np.float32)).tolist() == pytest.approx([0.6, 0.8], abs=EPSILON)
