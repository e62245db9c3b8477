"""How a window is cut into batches."""

from collections.abc import Iterator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from model.batching import BatchCost, Batching, padded_tokens, plan_batches

LENGTHS = st.lists(st.integers(1, 300), max_size=80)
COSTS = st.builds(BatchCost, st.floats(0, 100), st.floats(0, 0.1))
BATCHINGS = st.builds(Batching, st.integers(1, 2_000), st.just(1), st.none() | COSTS)
PADDED = st.builds(Batching, st.integers(1, 2_000), st.just(1), COSTS)


@given(LENGTHS, BATCHINGS)
def test_every_index_is_in_exactly_one_batch(lengths: list[int], batching: Batching) -> None:
    batches = plan_batches(lengths, batching)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)


@given(LENGTHS, BATCHINGS)
def test_a_batch_keeps_to_the_budget_or_is_one_item(lengths: list[int], batching: Batching) -> None:
    for batch in plan_batches(lengths, batching):
        of_batch = [lengths[index] for index in batch]
        assert len(batch) == 1 or padded_tokens(of_batch, batching) <= batching.max_batch_tokens


@given(LENGTHS, PADDED)
def test_padded_batches_follow_each_other_in_order_of_length(lengths: list[int], batching: Batching) -> None:
    planned = [lengths[index] for batch in plan_batches(lengths, batching) for index in batch]
    assert planned == sorted(lengths)


@given(st.lists(st.integers(1, 60), max_size=9), st.builds(Batching, st.integers(1, 200), st.just(1), COSTS))
def test_no_other_way_to_cut_takes_less_time(lengths: list[int], batching: Batching) -> None:
    planned = [[lengths[index] for index in batch] for batch in plan_batches(lengths, batching)]
    least = min(
        sum(time_of(batch, batching) for batch in batches)
        for batches in every_way_to_cut(sorted(lengths))
        if all(len(batch) == 1 or padded_tokens(batch, batching) <= batching.max_batch_tokens for batch in batches)
    )
    assert sum(time_of(batch, batching) for batch in planned) <= least * (1 + 1e-9)


@given(LENGTHS, st.builds(Batching, st.integers(1, 2_000), st.just(1), st.none()))
def test_without_padding_texts_keep_their_order_and_fill_each_batch(lengths: list[int], batching: Batching) -> None:
    batches = plan_batches(lengths, batching)
    assert [index for batch in batches for index in batch] == list(range(len(lengths)))
    for batch, following in pairwise(batches):
        assert sum(lengths[index] for index in batch) + lengths[following[0]] > batching.max_batch_tokens


def test_a_batch_that_costs_much_to_launch_is_worth_some_padding() -> None:
    lengths = [10, 11, 12, 13]
    assert plan_batches(lengths, Batching(1_000, 1_000, BatchCost(0.0, 0.0))) == [[0], [1], [2], [3]]
    assert plan_batches(lengths, Batching(1_000, 1_000, BatchCost(3.0, 0.0))) == [[0, 1], [2, 3]]
    assert plan_batches(lengths, Batching(1_000, 1_000, BatchCost(100.0, 0.0))) == [[0, 1, 2, 3]]


def test_an_item_above_the_budget_is_a_batch_of_its_own() -> None:
    assert plan_batches([500, 3, 2], Batching(100, 100, BatchCost(8.0))) == [[2, 1], [0]]
    assert plan_batches([3, 500, 2], Batching(100, 100, None)) == [[0], [1], [2]]


def time_of(batch: list[int], batching: Batching) -> float:
    assert batching.cost is not None
    longest = max(batch)
    return batching.cost.fixed_tokens + len(batch) * (longest + batching.cost.quadratic * longest**2)


def every_way_to_cut(lengths: list[int]) -> Iterator[list[list[int]]]:
    if not lengths:
        yield []
    for first in range(1, len(lengths) + 1):
        for rest in every_way_to_cut(lengths[first:]):
            yield [lengths[:first], *rest]
