"""The trainer's metrics and health: what its event loop saw last. Loaded by the parent: imports no torch.

Whoever asks is answered by other threads, which touch neither Redis nor the database: a child that is forked meanwhile
must find none of their locks held.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from sqlalchemy import Connection

from config.endpoints import Trouble
from db.monitoring import RunSummary, count_runs, count_waiting_reviews, last_run, running_run

STATES = ("requested", "running", "promoted", "refused", "failed")
STANDSTILL_S = 60.0
"""Several times the pause between two looks, and longer than a database behind a dead line is waited for."""
HEARTBEAT_LATE_S = 30.0
"""Several times the pause between two of a run's signs of life, and half of the time after which it is given up."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look at the database found."""

    runs: dict[str, int]
    """By state."""
    running: RunSummary | None
    last: RunSummary | None
    """The newest that is over."""
    waiting_reviews: int
    heartbeat_age_s: float | None
    """Of the run that has been silent for the longest; None while none runs."""


def look(connection: Connection, heartbeat_age_s: float | None) -> Seen:
    """What there is to be seen now."""
    return Seen(
        runs=count_runs(connection),
        running=running_run(connection),
        last=last_run(connection),
        waiting_reviews=count_waiting_reviews(connection),
        heartbeat_age_s=heartbeat_age_s,
    )


class Monitor:
    """Told by the event loop's thread, asked by others."""

    def __init__(self) -> None:
        self.is_connected = self.is_stopping = False
        self._seen: Seen | None = None
        self._looked_at = time.monotonic()

    def note(self, seen: Seen | None) -> None:
        """A look was made; None where the database did not answer."""
        self._seen, self._looked_at = seen, time.monotonic()

    def healthy(self) -> Trouble:
        """Fails for what a new process may mend."""
        age_s = time.monotonic() - self._looked_at
        # Without Redis the loop waits for it, and looks after nothing else.
        if self.is_connected and age_s > STANDSTILL_S:
            return f"the event loop has looked after nothing for {age_s:.0f} s"
        silent_s = self._seen.heartbeat_age_s if self._seen else None
        if silent_s is not None and silent_s > HEARTBEAT_LATE_S:
            return f"the training gave no sign of life for {silent_s:.0f} s"
        return None

    def ready(self) -> Trouble:
        """Whether it can take a run, and carry it out."""
        if self.is_stopping:
            return "shutting down"
        if not self.is_connected:
            return "not connected to Redis"
        return None if self._seen else "the database has not answered"

    def collect(self) -> Iterator[Metric]:
        yield _gauge("moderato_broker_up", "Whether the trainer is connected to Redis.", self.is_connected)
        yield _gauge("moderato_database_up", "Whether the database answered at the last look.", self._seen is not None)
        if (seen := self._seen) is None:
            return
        runs = GaugeMetricFamily("moderato_training_runs", "Training runs, by their state.", labels=["state"])
        for state in STATES:
            runs.add_metric([state], seen.runs.get(state, 0))
        yield runs
        yield _gauge(
            "moderato_training_waiting_reviews",
            "Reviews that no finished training has seen; 10,000 are counted at most.",
            seen.waiting_reviews,
        )
        if seen.last is not None and seen.last.finished_at is not None:
            last = {"state": seen.last.state, "version": seen.last.version or "", "run_id": seen.last.run_id}
            yield InfoMetricFamily("moderato_training_last_run", "The newest run that is over.", value=last)
            yield _gauge(
                "moderato_training_last_run_timestamp_seconds", "When it ended.", seen.last.finished_at.timestamp()
            )
        if seen.running is not None:
            now = {"run_id": seen.running.run_id, "phase": seen.running.phase or ""}
            yield InfoMetricFamily("moderato_training_run", "The run under way, and what it is doing.", value=now)
            if seen.running.step is not None and seen.running.total_steps:
                share = seen.running.step / seen.running.total_steps
                yield _gauge("moderato_training_progress_ratio", "Share of its steps that are done.", share)
        if seen.heartbeat_age_s is not None:
            yield _gauge(
                "moderato_training_heartbeat_age_seconds", "Since a run's last sign of life.", seen.heartbeat_age_s
            )


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value=float(value))
