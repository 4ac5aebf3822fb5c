"""Batches: every text once, no more tokens than the budget, a part for every run, right padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherbed.run.batches import LEAST_SPLIT_TOKENS, LONG_TOKENS, Batch, batches, collate, fitted, plan

LENGTHS = st.lists(st.integers(1, 80), max_size=60)
BUDGETS = st.integers(1, 400)
ROWS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=20)
RUNS = st.integers(1, 6)
MIXED = st.lists(st.integers(1, 60) | st.integers(LONG_TOKENS - 2, LONG_TOKENS + 200), max_size=30)


def made(lengths: list[int], budget: int, runs: int) -> list[Batch]:
    """Batches of rows of these lengths, each of its own place's number."""
    return list(batches([[place] * length for place, length in enumerate(lengths)], -1, budget, runs))


@settings(deadline=None)
@given(lengths=LENGTHS, budget=BUDGETS)
def test_every_place_is_in_exactly_one_batch(lengths: list[int], budget: int) -> None:
    places = [int(p) for cut in plan(lengths, budget) for p in cut]
    assert sorted(places) == list(range(len(lengths)))


@settings(deadline=None)
@given(lengths=LENGTHS, budget=BUDGETS)
def test_rows_times_the_longest_stay_in_the_budget_unless_one_row_is_longer(lengths: list[int], budget: int) -> None:
    for cut in plan(lengths, budget):
        assert len(cut) >= 1
        assert len(cut) == 1 or len(cut) * max(lengths[int(p)] for p in cut) <= budget


@settings(deadline=None)
@given(lengths=LENGTHS, budget=BUDGETS)
def test_a_batch_is_full_before_the_next_one_starts(lengths: list[int], budget: int) -> None:
    cuts = plan(lengths, budget)
    for cut in cuts[:-1]:
        assert (len(cut) + 1) * max(lengths[int(p)] for p in cut) > budget


@settings(deadline=None)
@given(lengths=LENGTHS, budget=BUDGETS)
def test_longest_come_first_and_equals_keep_their_order(lengths: list[int], budget: int) -> None:
    places = [int(p) for cut in plan(lengths, budget) for p in cut]
    assert places == sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))


def test_a_plan_worked_out_by_hand() -> None:
    assert [cut.tolist() for cut in plan([3, 9, 5, 2, 2], 10)] == [[1], [2, 0], [3, 4]]


@settings(deadline=None)
@given(rows=ROWS, pad_id=st.integers(0, 9))
def test_collate_pads_right_to_the_longest(rows: list[list[int]], pad_id: int) -> None:
    batch = collate(rows, pad_id)
    width = max(map(len, rows))
    assert batch.ids.dtype == batch.mask.dtype == np.int64
    assert batch.ids.tolist() == [row + [pad_id] * (width - len(row)) for row in rows]
    assert batch.mask.tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    assert batch.places.tolist() == list(range(len(rows)))


def test_collate_carries_the_places_it_was_given() -> None:
    assert collate([[1], [2, 3]], 0, np.array([7, 4])).places.tolist() == [7, 4]


@settings(deadline=None)
@given(rows=ROWS, budget=BUDGETS, runs=RUNS)
def test_batches_carry_each_row_to_its_place(rows: list[list[int]], budget: int, runs: int) -> None:
    seen: dict[int, list[int]] = {}
    for batch in batches(rows, 9, budget, runs):
        for ids, mask, place in zip(batch.ids, batch.mask, batch.places, strict=True):
            assert int(place) not in seen
            seen[int(place)] = ids[mask == 1].tolist()
    assert [seen[place] for place in range(len(rows))] == rows


@given(lengths=MIXED, budget=st.integers(1, 20_000), runs=RUNS)
def test_all_that_runs_at_a_time_stays_in_the_budget_but_for_single_texts(
    lengths: list[int], budget: int, runs: int
) -> None:
    sizes = sorted(batch.ids.size for batch in made(lengths, budget, runs) if len(batch.ids) > 1)
    assert sum(sizes[-runs:]) <= budget
    assert all(size <= budget // runs for size in sizes)


@given(lengths=MIXED, budget=st.integers(1, 20_000), runs=RUNS)
def test_long_texts_share_no_batch_with_others(lengths: list[int], budget: int, runs: int) -> None:
    found = made(lengths, budget, runs)
    for batch in found:
        assert len({lengths[int(place)] > LONG_TOKENS for place in batch.places}) == 1
        assert batch.ids.shape[1] == max(lengths[int(place)] for place in batch.places)
    assert sorted(int(place) for batch in found for place in batch.places) == list(range(len(lengths)))


def test_a_text_s_kernel_does_not_depend_on_its_company() -> None:
    """The kernel goes by a batch's width: a text of LONG_TOKENS stays below, whoever comes along."""
    at, above = made([LONG_TOKENS], 10**6, 1), made([LONG_TOKENS + 1], 10**6, 1)
    assert [b.ids.shape for b in (*at, *above)] == [(1, LONG_TOKENS), (1, LONG_TOKENS + 1)]
    together = made([LONG_TOKENS, LONG_TOKENS + 1, 5, LONG_TOKENS + 9], 10**6, 1)
    assert [(b.places.tolist(), b.ids.shape[1]) for b in together] == [([3, 1], LONG_TOKENS + 9), ([0, 2], LONG_TOKENS)]


@given(lengths=MIXED, runs=RUNS)
def test_no_run_has_more_than_its_share_of_the_work(lengths: list[int], runs: int) -> None:
    share = max(LEAST_SPLIT_TOKENS, -(-sum(lengths) // runs))
    assert all(len(batch.ids) == 1 or batch.ids.size <= share for batch in made(lengths, 10**9, runs))


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80), runs=RUNS)
def test_every_run_has_a_part_of_what_is_worth_it(lengths: list[int], runs: int) -> None:
    """So many texts that a share is above the least to split off, and above the longest text."""
    many = lengths * (1 + runs * (LEAST_SPLIT_TOKENS + 60) // sum(lengths))
    assert len(made(many, 10**9, runs)) >= runs


@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=LEAST_SPLIT_TOKENS // 8), runs=RUNS)
def test_little_work_is_not_split(lengths: list[int], runs: int) -> None:
    assert len(made(lengths, 10**9, runs)) == 1


def test_shares_worked_out_by_hand() -> None:
    """Four texts of 64 tokens: together, two and two, and no further, for smaller runs read all weights for little."""
    for runs, rows in ((1, [4]), (2, [2, 2]), (4, [2, 2])):
        assert [len(batch.ids) for batch in made([64] * 4, 10**6, runs)] == rows
    assert [len(batch.ids) for batch in made([64] * 4, 128, 2)] == [1] * 4  # 64 tokens of budget a run
    assert [len(batch.ids) for batch in made([64] * 4, 3, 4)] == [1] * 4  # fewer tokens of budget than runs


@pytest.mark.parametrize("runs", [1, 4])
def test_no_rows_make_no_batch(runs: int) -> None:
    assert list(batches([], 0, 16, runs)) == []


@given(rows=ROWS, shape=st.tuples(st.integers(1, 7), st.integers(12, 20)))
def test_fitted_pieces_have_the_shape_and_carry_each_row_once(rows: list[list[int]], shape: tuple[int, int]) -> None:
    whole, seen = collate(rows, -1), list[int]()
    for piece, count in fitted(whole, shape):
        assert piece.ids.shape == piece.mask.shape == shape
        assert piece.mask.any(axis=1).all()  # no row without tokens, which would have no vector
        assert len(piece.places) == count
        for at in range(count):
            assert piece.ids[at][piece.mask[at] > 0].tolist() == rows[int(piece.places[at])]
        seen += piece.places.tolist()
    assert seen == list(range(len(rows)))
