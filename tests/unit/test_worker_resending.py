"""Which submissions are no longer in their queue."""

from datetime import timedelta

import pytest

from tests.integration.rows import NOON, minutes, pending
from worker.resending import QueueState, gone_before, in_messages

AFTER = timedelta(minutes=1)


@pytest.mark.parametrize(
    ("depth", "head", "left", "some_returned", "expected"),
    [
        (0, None, None, False, -1),  # an empty queue has been left by all, a moment ago
        (1, -5.0, None, False, -5 - 1 / 6),  # what was put there before its head, but for how far clocks may lie apart
        (9, -0.5, None, False, -1),
        (1, 0.1, None, False, -1),
        (1, None, None, False, None),  # a head without a time says nothing
        (1, 3.0, None, False, None),  # nor does one from the future
        (1, None, -50.0, False, -50 - 1 / 6),  # until a message has left that was the newest at some time
        (1, 3.0, -0.5, False, -1),
        (1, -5.0, -1.0, False, -5 - 1 / 6),
        (0, None, None, True, -10),  # what came back is tried for a while
        (1, -5.0, None, True, -10),
        (1, -30.0, None, True, -30 - 1 / 6),
    ],
)
def test_what_is_gone(
    depth: int, head: float | None, left: float | None, some_returned: bool, expected: float | None
) -> None:
    at = [None if time is None else minutes(time) for time in (head, left, expected)]
    assert gone_before(QueueState(depth, at[0], some_returned, at[1]), NOON, AFTER) == at[2]


def test_messages_hold_what_was_submitted_together() -> None:
    rows = [pending(f"a{n}") for n in range(300)] + [pending("b", submitted_at=minutes(1)), pending("a300")]
    messages = in_messages(rows)
    assert [len(listed) for listed in messages] == [256, 45, 1]
    assert [row.submission_id for row in messages[1]][-1] == "a300"
    assert in_messages([]) == []
