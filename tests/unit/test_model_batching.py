"""How a window is cut into batches."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from model.batching import plan_batches

LENGTHS = st.lists(st.integers(1, 300), max_size=80)
BUDGETS = st.integers(1, 2_000)


@given(LENGTHS, BUDGETS)
def test_every_index_is_in_exactly_one_batch(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)


@given(LENGTHS, BUDGETS)
def test_a_padded_batch_keeps_to_the_budget_or_is_one_item(lengths: list[int], budget: int) -> None:
    for batch in plan_batches(lengths, budget):
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget


@given(LENGTHS, BUDGETS)
def test_batches_follow_each_other_in_order_of_length(lengths: list[int], budget: int) -> None:
    planned = [lengths[index] for batch in plan_batches(lengths, budget) for index in batch]
    assert planned == sorted(lengths)


@given(LENGTHS, BUDGETS)
def test_no_batch_ends_while_the_next_item_would_fit(lengths: list[int], budget: int) -> None:
    for batch, following in pairwise(plan_batches(lengths, budget)):
        assert lengths[following[0]] * (len(batch) + 1) > budget


def test_nothing_needs_no_batch() -> None:
    assert plan_batches([], 1_024) == []


def test_an_item_above_the_budget_is_a_batch_of_its_own() -> None:
    assert plan_batches([500, 3, 2], 100) == [[2, 1], [0]]
