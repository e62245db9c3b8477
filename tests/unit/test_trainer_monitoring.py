"""What the trainer says of itself, by what its event loop saw."""

import pytest

from trainer import monitoring
from trainer.monitoring import HEARTBEAT_LATE_S, Monitor, Seen


def seen(heartbeat_age_s: float | None = None) -> Seen:
    return Seen(runs={}, running=None, last=None, waiting_reviews=0, heartbeat_age_s=heartbeat_age_s)


def names(monitor: Monitor) -> set[str]:
    return {metric.name for metric in monitor.collect()}


def test_before_the_first_look_it_is_well_and_not_ready() -> None:
    monitor = Monitor()
    assert monitor.healthy() is None
    assert monitor.ready() == "not connected to Redis"
    assert names(monitor) == {"moderato_broker_up", "moderato_database_up"}


def test_ready_with_redis_and_a_database_until_it_is_told_to_end() -> None:
    monitor = Monitor()
    monitor.is_connected = True
    assert monitor.ready() == "the database has not answered"
    monitor.note(seen())
    assert monitor.ready() is None
    monitor.note(None)
    assert monitor.ready() == "the database has not answered"
    monitor.is_stopping = True
    assert monitor.ready() == "shutting down"


def test_a_silent_training_and_an_event_loop_that_stands_still_are_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Monitor()
    monitor.is_connected = True
    monitor.note(seen(heartbeat_age_s=HEARTBEAT_LATE_S))
    assert monitor.healthy() is None
    monitor.note(seen(heartbeat_age_s=HEARTBEAT_LATE_S + 1))
    assert monitor.healthy() == "the training gave no sign of life for 31 s"
    # When nothing was looked after for too long
    monkeypatch.setattr(monitoring, "STANDSTILL_S", -1.0)
    assert "the event loop has looked after nothing" in (monitor.healthy() or "")
    # Then that is Redis' matter while it is away
    monitor.note(seen())
    monitor.is_connected = False
    assert monitor.healthy() is None
