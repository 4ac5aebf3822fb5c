"""Batches: every text once, no more tokens than the budget, right padding."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from featherbed.run.batches import batches, collate, plan

LENGTHS = st.lists(st.integers(1, 80), max_size=60)
BUDGETS = st.integers(1, 400)
ROWS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=20)


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
@given(rows=ROWS, budget=BUDGETS)
def test_batches_carry_each_row_to_its_place(rows: list[list[int]], budget: int) -> None:
    seen: dict[int, list[int]] = {}
    for batch in batches(rows, 9, budget):
        assert len(batch.ids) == 1 or batch.ids.size <= budget
        for ids, mask, place in zip(batch.ids, batch.mask, batch.places, strict=True):
            assert int(place) not in seen
            seen[int(place)] = ids[mask == 1].tolist()
    assert [seen[place] for place in range(len(rows))] == rows


def test_no_rows_make_no_batch() -> None:
    assert list(batches([], 0, 16)) == []
