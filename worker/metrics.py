"""A worker's metrics for Prometheus: what its parts have counted, put into Prometheus' form when it is asked for.

Nothing is counted here a second time: a worker that nobody scrapes pays nothing, and one that is scraped next to
nothing. docs/monitoring.md lists every metric (tested).
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from celery import Celery
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from config.names import LABELS, MODERATE_QUEUES, WORKER_UNACKED_KEY, Action, Reason
from config.queues import priority_lists
from db.drift import Drift
from worker import clock
from worker.histogram import BOUNDS_S, Histogram
from worker.pipeline import Counters
from worker.resending import BROKER_OPTIONS, sent_at

if TYPE_CHECKING:
    from worker.intake import Intake

LE = (*(f"{bound:g}" for bound in BOUNDS_S), "+Inf")
NO_LABEL = "none"
"""The label of a decision by no rule."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """What can be seen of a queue."""

    messages: int
    oldest_sent_at: datetime | None
    """Of what is taken next; None where nothing waits, or no producer says when."""


class QueueWatch:
    """Asks Redis what waits, on a connection of its own. One thread at a time."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._broker: Any = None
        self.queues: dict[str, QueueState] = {}
        """At the last look, as the next: empty and None where it failed."""
        self.unacknowledged: int | None = None

    def look(self) -> None:
        """Look at every queue that is ours or that this worker takes from.

        Raises:
            one of the transport's connection_errors, or of channel_errors.
        """
        try:
            self._look()
        except Exception:
            self.queues, self.unacknowledged = {}, None
            self.close()
            raise

    def close(self) -> None:
        """Give up the connection; the next look makes another."""
        broker, self._broker = self._broker, None
        if broker is not None:
            with suppress(Exception):
                broker.close()

    def _look(self) -> None:
        if self._broker is None:
            self._broker = self._app.connection_for_read(transport_options=BROKER_OPTIONS)
        channel = self._broker.default_channel
        taken = self._app.amqp.queues.consume_from
        names = dict.fromkeys([*MODERATE_QUEUES, *taken])
        lists = [(name, key) for name in names for key in priority_lists(name)]
        with channel.client.pipeline(transaction=False) as asked:
            for _, key in lists:
                # kombu's client adds the prefix of all keys to some commands only.
                asked.llen(key).lrange(channel.global_keyprefix + key, -1, -1)
            *answers, self.unacknowledged = asked.hlen(WORKER_UNACKED_KEY).execute(raise_on_error=False)
        if isinstance(self.unacknowledged, Exception):
            raise self.unacknowledged
        states: dict[str, QueueState] = {}
        for (name, _), messages, head in zip(lists, answers[::2], answers[1::2], strict=True):
            if refused := next((answer for answer in (messages, head) if isinstance(answer, Exception)), None):
                if name in taken:
                    raise refused
                continue  # one that Redis refuses hides no other
            before = states.get(name, QueueState(0, None))
            heads = [
                head_sent_at
                for head_sent_at in (before.oldest_sent_at, sent_at(head[0]) if head else None)
                if head_sent_at
            ]
            states[name] = QueueState(before.messages + messages, min(heads, default=None))
        self.queues = states


class WorkerMetrics:
    """The collector. What has not begun, or cannot be asked, is absent; a counter is there from its start, at 0."""

    def __init__(self, intake: "Intake") -> None:
        self._intake = intake

    def collect(self) -> Iterator[Metric]:
        intake = self._intake
        health = intake.health
        yield _gauge("moderato_broker_up", "Whether Redis answers.", health.broker() is None)
        yield _gauge("moderato_database_up", "Whether the database answers.", health.database() is None)
        yield from self._queues()
        yield _counter(
            "moderato_redelivered_messages", "Messages that came back from a worker before.", intake.redelivered
        )
        if intake.pipeline is None:
            return
        yield from self._pipeline(intake.stats(), intake.pipeline.counters())
        if intake.follower is not None:
            swaps = CounterMetricFamily(
                "moderato_version_swaps", "Activations that this worker followed, or refused to.", labels=["outcome"]
            )
            swaps.add_metric(["accepted"], intake.follower.accepted)
            swaps.add_metric(["refused"], intake.follower.refused)
            yield swaps
            yield _gauge(
                "moderato_active_version_refused",
                "Whether another version goes on here because the active one is refused.",
                intake.follower.is_behind,
            )
        if intake.sweeper is not None and intake.resending is not None:
            yield _counter(
                "moderato_sweeps", "Rounds of the chores that one worker does for all.", intake.sweeper.sweeps
            )
            yield _counter(
                "moderato_resent_submissions",
                "Durable submissions whose message was gone, and was sent again.",
                intake.resending.resent,
            )
            refused = GaugeMetricFamily(
                "moderato_resend_queue_refused",
                "Whether Redis refuses a queue, so that durable submissions wait for it.",
                labels=["queue"],
            )
            for queue in {*MODERATE_QUEUES, *intake.resending.refused}:
                refused.add_metric([queue], float(queue in intake.resending.refused))
            yield refused
        if intake.drift is not None and intake.drift.newest is not None:
            yield from drift_metrics(intake.drift.newest)

    def _queues(self) -> Iterator[Metric]:
        watch = self._intake.health.queue_watch
        messages = GaugeMetricFamily("moderato_queue_messages", "Messages that wait in Redis.", labels=["queue"])
        age = GaugeMetricFamily(
            "moderato_queue_oldest_message_age_seconds",
            "How long the message that is taken next has waited; 0 of an empty queue, absent where it does not say.",
            labels=["queue"],
        )
        for name, state in watch.queues.items():
            messages.add_metric([name], state.messages)
            if state.oldest_sent_at is not None:
                age.add_metric([name], max(0.0, clock.now_s() - state.oldest_sent_at.timestamp()))
            elif not state.messages:
                age.add_metric([name], 0.0)
        yield messages
        yield age
        if watch.unacknowledged is not None:
            yield _gauge(
                "moderato_unacknowledged_messages",
                "Messages that any worker holds, or one that died.",
                watch.unacknowledged,
            )

    def _pipeline(self, stats: dict[str, Any], counters: Counters) -> Iterator[Metric]:
        yield _info("moderato_model", "The version that scores.", version=stats["version"], engine=stats["engine"])
        yield _info("moderato_policy", "The policy that decides.", version=stats["policy_version"])
        held, limit = stats["held_comments"], stats["max_held_comments"]
        yield _gauge("moderato_held_comments", "Comments taken from Redis and not yet acknowledged.", held)
        yield _gauge("moderato_held_comments_limit", "From which on no further message is taken.", limit)
        waiting = GaugeMetricFamily(
            "moderato_waiting_comments", "Comments before each stage, or in it.", labels=["stage"]
        )
        for stage, comments in stats["waiting"].items():
            waiting.add_metric([stage], comments)
        yield waiting
        yield _decisions(counters, stats["version"])
        letters = CounterMetricFamily(
            "moderato_dead_letters", "Comments and messages that were set aside.", labels=["reason"]
        )
        for reason in Reason:
            letters.add_metric([reason.value], counters.dead_letters[reason.value])
        yield letters
        yield _stages(counters)
        yield _counter("moderato_batches", "Forward passes, but for a shadow's, as all of these.", counters.batches)
        yield _counter("moderato_batch_tokens", "Tokens that were scored.", counters.tokens)
        yield _counter(
            "moderato_batch_padded_tokens",
            "The same with the padding that they were scored with.",
            counters.padded_tokens,
        )
        yield _gauge("moderato_batch_tokens_limit", "Most padded tokens in a batch.", stats["max_batch_tokens"])
        yield _gauge("moderato_engine_lanes", "Forward passes side by side.", stats["lanes"])
        reused = CounterMetricFamily(
            "moderato_reused_comments",
            "Comments that needed no forward pass of their own: an identical text was on its way, or scored before.",
            labels=["how"],
        )
        reused.add_metric(["joined"], stats["duplicates"])
        reused.add_metric(["recalled"], stats["cache_hits"])
        yield reused


def drift_metrics(drift: Drift) -> Iterator[Metric]:
    """What has moved within a day: see `db.drift`."""
    psi = GaugeMetricFamily(
        "moderato_score_drift_psi",
        "Population stability index of the newest scores: below 0.1 stable, above 0.25 shifted.",
        labels=["label", "reference"],
    )
    for reference, values in (("held_out", drift.psi_held_out), ("day_before", drift.psi_before)):
        for label in LABELS:
            if values and label in values:
                psi.add_metric([label, reference], values[label])
    yield psi
    shares = GaugeMetricFamily(
        "moderato_action_share_ratio", "Of the newest decisions of each day.", labels=["action", "period"]
    )
    decisions = GaugeMetricFamily(
        "moderato_drift_decisions", "Of how many decisions the others speak.", labels=["period"]
    )
    periods = (
        ("today", drift.action_shares, drift.decisions),
        ("day_before", drift.action_shares_before, drift.decisions_before),
    )
    for period, actions, count in periods:
        decisions.add_metric([period], count)
        for action in Action if count else ():
            shares.add_metric([action.value, period], actions.get(action, 0.0))
    yield shares
    yield decisions
    yield _gauge("moderato_reviewed_decisions", "Decisions that were reviewed within a day.", drift.reviewed)
    yield _gauge("moderato_overturned_decisions", "Those whose reviewer chose another action.", drift.overturned)


def _decisions(counters: Counters, version: str) -> Metric:
    decisions = CounterMetricFamily(
        "moderato_decisions",
        "Decisions that were recorded, by the label whose rule led to the action.",
        labels=["action", "version", "label"],
    )
    # A worker that has decided nothing says so, rather than nothing.
    counted = {(Action.ALLOW.value, version, None): 0} | counters.decisions
    for (action, decided_by, label), count in sorted(counted.items(), key=str):
        decisions.add_metric([action, decided_by, label or NO_LABEL], count)
    return decisions


def _stages(counters: Counters) -> Metric:
    stages = HistogramMetricFamily(
        "moderato_stage_seconds",
        "queue: a comment's way to its forward pass; prepare: up to 64 comments; score: a forward pass; "
        "record: a transaction.",
        labels=["stage"],
    )
    histograms: dict[str, Histogram] = {
        "queue": counters.queue,
        "prepare": counters.prepare,
        "score": counters.score,
        "record": counters.record,
    }
    for stage, histogram in histograms.items():
        buckets = list(zip(LE, map(float, accumulate(histogram.counts)), strict=True))
        stages.add_metric([stage], buckets, histogram.sum_s)
    return stages


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value=float(value))


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(name, meaning, value=value)


def _info(name: str, meaning: str, **labels: str) -> Metric:
    return InfoMetricFamily(name, meaning, value=labels)
