"""Which queue is taken from first, and what the others get all the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.names import BULK_QUEUE, INTERACTIVE_QUEUE, MODERATE_QUEUE
from worker.transport import LOWER_QUEUE_SHARE, first_turns, preference


def test_queues_are_preferred_in_their_order_and_unknown_ones_are_ordinary() -> None:
    ranked = sorted([BULK_QUEUE, "news", MODERATE_QUEUE, INTERACTIVE_QUEUE], key=preference)
    assert ranked == [INTERACTIVE_QUEUE, "news", MODERATE_QUEUE, BULK_QUEUE]
    assert preference("news") == preference(MODERATE_QUEUE)


@given(st.integers(1, 3), st.lists(st.integers(1, 256), min_size=1))
def test_each_lower_rank_has_the_first_turn_for_its_share(ranks: int, rooms: list[int]) -> None:
    # Given fetches of any sizes, each of which found as much as it had room for
    taken, firsts = 0, [0] * ranks
    for room in rooms:
        turns = first_turns(ranks, taken, room)
        # Then no fetch gives away more than it has
        assert sum(turns) <= room
        firsts = [before + now for before, now in zip(firsts, turns, strict=True)]
        taken += room
    # And of all that was taken each lower rank had its share, to the message; the first one waits for nobody
    assert firsts[0] == 0
    for of_lower in firsts[1:]:
        assert abs(of_lower - taken / LOWER_QUEUE_SHARE) < 1


@pytest.mark.parametrize("room", [1, 256])
def test_one_rank_has_no_first_turns(room: int) -> None:
    assert first_turns(1, taken=99, room=room) == [0]
