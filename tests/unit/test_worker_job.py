"""What a job makes of its forward passes."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

from config.comment import Comment
from worker.job import Item, Job
from worker.message import Submitted

NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def test_each_forward_pass_counts_once_and_the_first_begins() -> None:
    # Given a text of four windows, three of which are scored together, in the pass that began first and ends last
    scorer: Any = SimpleNamespace(version="v1")
    delivery: Any = None  # not looked at
    job = Job(Item(Submitted("s", Comment(text="four windows long")), delivery), scorer)
    job.expect(4)
    assert not job.add([[0.1, 0.2]], NOON + timedelta(seconds=1), 5.0)
    assert job.add([[0.3, 0.0], [0.0, 0.1], [0.2, 0.15]], NOON, 50.0)
    assert job.scores == ([0.3, 0.2], 4)
    assert (job.started_at, job.compute_ms) == (NOON, 55.0)
