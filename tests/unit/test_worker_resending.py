"""Which submissions are no longer in their queue."""

from datetime import timedelta

import pytest

from tests.integration.rows import NOON, minutes, pending
from worker.resending import QueueState, gone_before, in_messages

AFTER = timedelta(minutes=1)


@pytest.mark.parametrize(
    ("depth", "head", "some_returned", "expected"),
    [
        (0, None, False, -1),  # an empty queue has been left by all, a moment ago
        (1, -5.0, False, -5 - 1 / 6),  # what was put there before its head, but for how far clocks may lie apart
        (9, -0.5, False, -1),
        (1, 0.1, False, -1),
        (1, 3.0, False, -10),  # a head from the future says nothing
        (1, None, False, -10),  # nor does one without a time
        (0, None, True, -10),  # what came back is tried for a while
        (1, -5.0, True, -10),
        (1, -30.0, True, -30 - 1 / 6),
    ],
)
def test_what_is_gone(depth: int, head: float | None, some_returned: bool, expected: float) -> None:
    queue = QueueState(depth, None if head is None else minutes(head), some_returned)
    assert gone_before(queue, NOON, AFTER) == minutes(expected)


def test_messages_hold_what_was_submitted_together() -> None:
    rows = [pending(f"a{n}") for n in range(300)] + [pending("b", submitted_at=minutes(1)), pending("a300")]
    messages = in_messages(rows)
    assert [len(listed) for listed in messages] == [256, 45, 1]
    assert [row.submission_id for row in messages[1]][-1] == "a300"
    assert in_messages([]) == []
