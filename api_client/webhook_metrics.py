"""What monitoring sees of `moderato webhooks run`: how far the outbox is, what came of the posts, whether it works.

The outbox is asked when monitoring asks; the posts are counted by each sender. docs/monitoring.md lists every metric
(tested).
"""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from sqlalchemy import Engine, select

from config.endpoints import Probe, Trouble
from db import webhooks
from db.durable import database_time
from db.session import reading

if TYPE_CHECKING:
    from api_client.webhooks import Sender

ASK_TIMEOUT_S = 3.0
"""For the database; Prometheus itself waits for ten seconds."""
STUCK_S = 120.0
"""Longer than any step of a sender takes: the longest is a database behind a dead line."""
DELIVERED, FAILED, DEAD = OUTCOMES = ("delivered", "failed", "dead")
"""Of an attempt: taken, tried again later, or the last of its delivery."""


class WebhookMonitor:
    """The collector and the looks. Asked by other threads than those that post."""

    def __init__(self, senders: Sequence["Sender"], database: Engine, stop: threading.Event) -> None:
        self._senders = senders
        self._engine = database
        self._stop = stop
        self._database = Probe("the database", self._ask_database, ASK_TIMEOUT_S)
        self._outbox = Probe("the outbox", self._look, ASK_TIMEOUT_S)
        self._seen: dict[str, webhooks.Outstanding] = {}

    def healthy(self) -> Trouble:
        """Fails for what a new process may mend."""
        for sender in self._senders:
            age_s = time.monotonic() - sender.stepped_at
            if sender.thread.is_alive() and age_s > STUCK_S:
                return f"endpoint {sender.name} has gone no step further for {age_s:.0f} s"
        return None

    def ready(self) -> Trouble:
        """Whether it can find what is to be posted, and note what came of it. An endpoint that fails is its own."""
        return "shutting down" if self._stop.is_set() else self._database()

    def _ask_database(self) -> Trouble:
        with reading(self._engine) as connection:
            connection.execute(select(1))
        return None

    def _look(self) -> Trouble:
        with reading(self._engine) as connection:
            now = database_time(connection)
            self._seen = {
                sender.name: found
                for sender in self._senders
                if (found := webhooks.outstanding(connection, sender.name, now=now)) is not None
            }
        return None

    def collect(self) -> Iterator[Metric]:
        attempts = CounterMetricFamily(
            "moderato_webhook_attempts",
            "Posts to an endpoint: taken, to be tried again, or given up with their delivery.",
            labels=["endpoint", "outcome"],
        )
        for sender in self._senders:
            for outcome in OUTCOMES:
                attempts.add_metric([sender.name, outcome], sender.outcomes[outcome])
        yield attempts
        up = GaugeMetricFamily("moderato_database_up", "Whether the database answers.")
        up.add_metric([], float(self._database() is None))
        yield up
        # What cannot be asked is absent.
        seen = self._seen if self._outbox() is None else {}
        pending = GaugeMetricFamily(
            "moderato_webhook_pending_deliveries", "Of the outbox, not yet taken.", labels=["endpoint"]
        )
        age = GaugeMetricFamily(
            "moderato_webhook_oldest_undelivered_age_seconds",
            "Since what waits longest came into the outbox, or was decided; 0 where nothing waits.",
            labels=["endpoint"],
        )
        for name, outstanding in seen.items():
            pending.add_metric([name], outstanding.pending)
            age.add_metric([name], outstanding.oldest_age_s)
        yield pending
        yield age
