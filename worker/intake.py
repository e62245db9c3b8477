"""From message to pipeline and back: checks what Redis hands over, acknowledges what is recorded. The hub's thread.

kombu's channels belong to one thread, that of Celery's event loop (the hub). The pipeline's recorder only leaves
word there that deliveries are settled.
"""

import gc
import logging
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from celery import Celery, bootsteps
from celery.worker import state as worker_state
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.control import control_command
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from config.endpoints import HEALTH_PATH, READY_PATH, serve
from config.names import (
    ACTIVATION_CHANGED,
    ANSWER_CHANNEL,
    ANSWER_TO_HEADER,
    DECIDED_CHANNEL,
    EXPIRES_HEADER,
    MAX_ANSWER_TOKEN_CHARS,
    MAX_COMMENTS_PER_MESSAGE,
    MAX_ID_CHARS,
    PIPELINE_STATS,
    SUBMITTED_AT_HEADER,
    Reason,
)
from config.policy import PolicyError
from config.settings import settings, without_password
from db.migrate import require_current
from db.outage import Outage
from db.session import DatabaseProblem, is_outage, open_database, without_rows
from model.version import VersionError
from worker import clock
from worker.drift import DriftWatch
from worker.health import Health
from worker.job import Delivery, Item
from worker.message import Parsed, parse_message, refuse_all, refuse_unparsed, refuse_unread, single_messages
from worker.metrics import WorkerMetrics
from worker.pipeline import Pipeline
from worker.policies import PolicyFollower
from worker.resending import Resending
from worker.retention import Retention
from worker.swap import VersionFollower
from worker.sweeper import Chore, Sweeper
from worker.transport import SUSPECT_RETURNS, UNREAD_RETURNS, Held, failure
from worker.trial import Judging

logger = logging.getLogger(__name__)

HELD_WINDOWS = 2
"""Held where no setting says: one window being scored, one being gathered."""
TOKENS_PER_COMMENT = 80
"""Of a usual comment, to count a window's tokens in comments."""
HELD_BYTES_PER_COMMENT = 2048
"""Several times a usual comment, far less than the longest: those are held in smaller numbers."""
GC_NEW_OBJECTS = 20_000
"""Between two looks for garbage in cycles."""
MAX_DELIVERIES = 5
"""A comment that was delivered so often, and whose worker died each time, is not tried again."""
STEADY_S = 60.0
"""A connection that lasted so long was sound: pauses begin anew after it."""
LAST_WORDS_S = 5.0
"""For Redis to hear what a worker that ends still has to say."""
START_PATIENCE_S = 60.0
"""How long a worker that starts waits for a database that does not answer: both may have just been switched on."""
LONGEST_START_PAUSE_S = 3.0
"""In which a SIGTERM is not heard."""
LONGEST_QUEUE_AGE_S = 366 * 86_400


class Consumer(CeleryConsumer):
    """Hands every message to the intake, and pauses before it connects anew.

    Celery's own handler would run one task per message in the pool, and log the body of what it cannot read.
    """

    intake: "Intake"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Gossip is of no use here, and prints a page of its own about every lost connection.
        super().__init__(*args, **{**kwargs, "without_gossip": True})
        self._losses = Outage()
        self._lost_at = -math.inf

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        self.intake.is_connected = False
        self.intake.keep_held()  # before the channel is closed, which would give it back
        super().on_connection_error_after_connected(exc)
        # Celery pauses between attempts to connect. A Redis that takes the connection and then refuses what is needed
        # to start on it would be tried without end, and without pause.
        if time.monotonic() > self._lost_at + STEADY_S:
            self._losses.end()
        self._losses.begin()
        until = time.monotonic() + self._losses.pause_s()
        while (left_s := until - time.monotonic()) > 0:
            worker_state.maybe_shutdown()
            time.sleep(min(left_s, 0.5))
        self._lost_at = time.monotonic()

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        return self.intake.take


class Intake(bootsteps.StartStopStep):
    """The consumer's last step to start and first to stop: it drains the pipeline while Redis can still be told."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Consumer, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        consumer.intake = self
        self._settings = settings().worker
        self._pipeline: Pipeline | None = None
        self._follower: VersionFollower | None = None
        self._policies: PolicyFollower | None = None
        self._hub: Any = None
        self._channel: Any = None
        self._kept: Held | None = None
        """Of a lost connection, until there is another."""
        self._renewed_at = self._kept_at = 0.0
        self._lease_timer: Any = None
        self._database_timer: Any = None
        self._renewals = Outage()
        self._arrived: list[Item] = []
        self._held: set[Delivery] = set()
        self._held_comments = 0
        self._held_bytes = 0
        # Of recent messages, to judge how many more to fetch. Begins high: the first fetches are small.
        self._comments_per_message = float(MAX_COMMENTS_PER_MESSAGE)
        self._settled: deque[Delivery] = deque()
        self._settled_some = threading.Event()
        # What whoever watches this worker looks at, as it begins.
        self.database: Engine | None = None
        self.resending: Resending | None = None
        self.sweeper: Sweeper | None = None
        self.drift: DriftWatch | None = None
        self.is_connected = self.is_stopping = False
        self.redelivered = 0
        """Messages that came back from a worker before."""
        self.health = Health(self, consumer.app)
        # Before Redis and the database are waited for: whoever asks is told that this worker is on its way.
        looks = {HEALTH_PATH: self.health.healthy, READY_PATH: self.health.ready}
        metrics = settings().metrics
        serve(metrics.host, metrics.worker_port, WorkerMetrics(self), looks)

    @property
    def pipeline(self) -> Pipeline | None:
        return self._pipeline

    @property
    def follower(self) -> VersionFollower | None:
        return self._follower

    # --- Celery's steps ---

    def start(self, consumer: Consumer) -> None:
        """On start, and again after each lost connection: the pipeline goes on through that, the channel is new."""
        if self._pipeline is None:
            self._pipeline = self._start_pipeline_patiently(consumer)
        self._hub = consumer.hub
        channel = consumer.task_consumer.channel
        if self._kept is not None:
            silent_s = self._kept_at - self._renewed_at
            channel.qos.adopt(self._kept, alive=silent_s < self._settings.visibility_timeout_s)
            self._kept = None
        self._channel, self._renewed_at = channel, time.monotonic()
        self._channel.fetch_limit = self.fetch_limit
        self._lease_timer = consumer.timer.call_repeatedly(self._settings.visibility_timeout_s / 3, self._renew_leases)
        self._database_timer = consumer.timer.call_repeatedly(1.0, self._pipeline.notice_silent_database)
        self._acknowledge_settled()
        self.is_connected = True

    def keep_held(self) -> None:
        """The connection is lost: what is held stays with the pipeline, and is acknowledged by the next one."""
        if self._kept is None and self._channel is not None:
            self._kept, self._kept_at = self._channel.qos.hand_over(), time.monotonic()

    def stop(self, consumer: Consumer) -> None:
        self.is_connected = False
        for timer in (self._lease_timer, self._database_timer):
            if timer is not None:
                timer.cancel()
        if consumer.blueprint.state != bootsteps.RUN:  # else the connection is lost, and the step starts again
            self.is_stopping = True
            self._drain()
            # All that is left is telling Redis. One that stands still would take a timeout for each word.
            last_words = threading.Timer(LAST_WORDS_S, _end_without_redis)
            last_words.daemon = True
            last_words.start()

    def _start_pipeline_patiently(self, consumer: Consumer) -> Pipeline:
        """A pipeline, as soon as the database answers; the end of the worker where it does not, or never could."""
        deadline = time.monotonic() + START_PATIENCE_S
        outage = Outage()
        while True:
            try:
                return self._start_pipeline(consumer.app, consumer.hostname)
            except (DatabaseProblem, PolicyError, VersionError) as error:
                logger.critical("cannot start: %s", error)
                raise SystemExit(1) from None
            except (DBAPIError, OSError) as error:
                said = without_rows(error) if isinstance(error, DBAPIError) else error
                trouble = f"the database {without_password(settings().database_url)} cannot be used: {said}"
                if not is_outage(error) or time.monotonic() > deadline:
                    logger.critical("cannot start: %s", trouble)
                    raise SystemExit(1) from None
            if outage.begin():
                logger.error("%s; waiting up to %g s for it", trouble, START_PATIENCE_S)
            time.sleep(min(outage.pause_s(), LONGEST_START_PAUSE_S))
            worker_state.maybe_shutdown()

    def _start_pipeline(self, app: Celery, worker: str) -> Pipeline:
        database = self.database = open_database(settings().database_url)
        require_current(database)
        self._policies = PolicyFollower(database, settings())
        policy = self._policies.load_first()
        self._follower = VersionFollower(database, settings(), worker)
        scorer = self._follower.load_first()
        pipeline = Pipeline(
            scorer, policy, database, reuse_texts=self._settings.reuse_texts, on_settled=self._leave_word
        )
        pipeline.start()
        self._follower.follow(pipeline.exchange, pipeline.try_out)
        self._policies.follow(pipeline.exchange_policy)
        self.resending = Resending(database, app, settings())
        chores: dict[str, Chore] = {
            "sending durable submissions again": self.resending,
            "erasing old texts": Retention(database, settings().privacy.keep_text_days, worker),
            "judging the canary": Judging(database, worker),
        }
        if settings().metrics.worker_port:
            self.drift = chores["measuring drift"] = DriftWatch(database)
        self.sweeper = Sweeper(chores)
        self.sweeper.start()
        # Comments on their way are many small objects without cycles. Python would look through all of them, and all
        # of the libraries', several times a second to find nothing: a third of the worker's own time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_NEW_OBJECTS, 20, 20)
        logger.info("at most %d comments held", self._max_held_comments(pipeline))
        return pipeline

    # --- messages in ---

    def fetch_limit(self) -> int:
        """How many more messages may be taken now; the transport asks before each fetch."""
        assert self._pipeline is not None
        max_held_comments = self._max_held_comments(self._pipeline)
        room = max_held_comments - self._held_comments
        max_held_bytes = self._settings.max_held_bytes or HELD_BYTES_PER_COMMENT * max_held_comments
        if room <= 0 or self._held_bytes >= max_held_bytes:
            return 0
        return math.ceil(room / self._comments_per_message)

    def _max_held_comments(self, pipeline: Pipeline) -> int:
        """As set, or some windows of the version that scores now."""
        windows = HELD_WINDOWS * pipeline.scorer.batching.window_tokens // TOKENS_PER_COMMENT
        return self._settings.max_held_comments or max(MAX_COMMENTS_PER_MESSAGE, windows)

    def take(self, message: Any) -> None:
        """One message from Redis: its comments to the pipeline, what is wrong with it to the dead letters."""
        assert self._pipeline is not None
        now = clock.now()
        parsed, singles = _read(message, now)
        # By the tag: the connection that is there then may be another than the one the message came by.
        acknowledge = partial(self._acknowledge, message.delivery_tag)
        if message.returns:
            self.redelivered += 1
        if singles:
            # One of them may be what its workers died of. Alone, it is the only one that is counted from now on.
            logger.warning(
                "a message was redelivered %d times: it is split into its %d comments", message.returns, len(singles)
            )
            acknowledge = partial(self._replace, message.delivery_tag, singles)
            if not parsed.refused:
                acknowledge()
                return
        delivery = Delivery(
            acknowledge=acknowledge,
            queue=message.queue,
            received_at=now,
            submitted_at=_submitted_at(message.headers, now),
            comments=len(parsed.submitted) + len(parsed.refused),
            text_bytes=len(message.body),
            answer_to=_answer_to(message.headers),
        )
        self._held.add(delivery)
        self._held_comments += delivery.comments
        self._held_bytes += delivery.text_bytes
        self._comments_per_message += (delivery.comments - self._comments_per_message) / 8
        if parsed.refused:
            first = parsed.refused[0].dead_letter_id
            logger.warning(
                "%d of %d comments refused: %s; the first is dead letter %r",
                len(parsed.refused),
                delivery.comments,
                ", ".join(sorted({refused.reason.value for refused in parsed.refused})),
                first,
                extra={"submission_id": first},
            )
            self._pipeline.refuse(parsed.refused, delivery)
        if not self._arrived:
            # A fetch brings many messages in one tick. They go on together, or the first batch would hold one.
            self._hub.call_soon(self._pass_on)
        self._arrived.extend([Item(submitted, delivery) for submitted in parsed.submitted])

    def _pass_on(self) -> None:
        assert self._pipeline is not None
        items, self._arrived = self._arrived, []
        if items:
            self._pipeline.put(items)

    def stats(self) -> dict[str, Any]:
        """The pipeline's counters, how much is held, and why the active policy does not decide, if so."""
        if self._pipeline is None or self._policies is None:
            return {}
        held = {"held_comments": self._held_comments, "max_held_comments": self._max_held_comments(self._pipeline)}
        return self._pipeline.stats() | held | {"policy_refusal": self._policies.refusal}

    def look_for_activation(self) -> None:
        """A broadcast said that there is a new one, of a version or of a policy."""
        if self._follower is not None and self._policies is not None:
            self._follower.look_now()
            self._policies.look_now()

    # --- acknowledgements out ---

    def _leave_word(self, deliveries: list[Delivery]) -> None:
        """The recorder's thread: these are committed."""
        self._settled.extend(deliveries)
        self._settled_some.set()
        self._hub.call_soon(self._acknowledge_settled)

    def _acknowledge_settled(self) -> None:
        if self._settled:
            self._channel.qos.publish(DECIDED_CHANNEL, b"")
        while self._settled:
            delivery = self._settled.popleft()
            self._answer(delivery)
            self._held.discard(delivery)
            self._held_comments -= delivery.comments
            self._held_bytes -= delivery.text_bytes
            try:
                delivery.acknowledge()
            except Exception as error:
                # Its channel is gone, so the message comes again, and is found to be decided.
                logger.debug("an acknowledgement was not sent (%r); its message repeats", error)

    def _acknowledge(self, delivery_tag: str) -> None:
        self._channel.qos.ack(delivery_tag)

    def _replace(self, delivery_tag: str, messages: Sequence[bytes]) -> None:
        self._channel.qos.replace(delivery_tag, messages)

    def _answer(self, delivery: Delivery) -> None:
        """Tell a producer that waits. All of it is committed, so who does not hear it finds it in the database."""
        if delivery.answer_to is None:
            return
        if len(delivery.answers) < delivery.comments:
            # The rest was refused, or decided before: an empty answer says to look there now.
            delivery.answers.append(b"{}")
        for answer in delivery.answers:
            self._channel.qos.publish(ANSWER_CHANNEL + delivery.answer_to, answer)

    def _renew_leases(self) -> bool:
        """Whether they are renewed; where they are not, that is said."""
        try:
            self._channel.qos.renew_leases()
        except Exception as error:
            # The connection is lost, which the event loop finds out by itself; or Redis refuses to write.
            if self._renewals.begin():
                logger.warning("leases cannot be renewed (%s); what is held may come again", type(error).__name__)
            return False
        self._renewed_at = time.monotonic()
        if self._renewals.end():
            logger.warning("leases are renewed again")
        return True

    def _drain(self) -> None:
        """Finish what is in hand. The event loop has stopped, so its work is done here."""
        assert self._pipeline is not None
        self._pass_on()
        self._acknowledge_settled()
        if self._held:
            logger.info("finishing %d comments", self._held_comments)
        renew_at = time.monotonic()
        while self._held:
            self._pipeline.notice_silent_database()
            if self._pipeline.database_is_away:
                logger.warning("the database is away; %d comments return to the queue", self._held_comments)
                self._pipeline.stop_waiting()
                return
            if time.monotonic() >= renew_at:
                # Nobody connects anew any more, and a Redis that stands still takes a timeout for each attempt.
                reached = self._renew_leases()
                renew_at = time.monotonic() + self._settings.visibility_timeout_s / 3 if reached else math.inf
            self._settled_some.wait(timeout=1.0)
            self._settled_some.clear()
            self._acknowledge_settled()


def _end_without_redis() -> None:
    logger.warning("Redis does not answer; this worker ends without it, and what it held returns by its lease")
    logging.shutdown()
    os._exit(0)


@control_command(name=ACTIVATION_CHANGED)
def activation_changed(state: Any) -> dict[str, str]:
    """Look at the newest activations now."""
    state.consumer.intake.look_for_activation()
    return {"ok": "looking"}


@control_command(name=PIPELINE_STATS)
def pipeline_stats(state: Any) -> dict[str, Any]:
    """What the pipeline has done since its start, what waits in it now, and which queues it is fed from."""
    consumer = state.consumer
    return consumer.intake.stats() | {"queues": sorted(queue.name for queue in consumer.task_consumer.queues)}


def _read(message: Any, now: datetime) -> tuple[Parsed, list[bytes]]:
    """What a message holds, and the messages that replace it where its comments are to go on alone. Never raises.

    An exception would leave through Celery's event loop and end this worker, and then each one that the message comes
    to next.
    """
    try:
        parsed = _parse(message, now)
        if message.returns < SUSPECT_RETURNS or len(parsed.submitted) <= 1:
            return parsed, []
        singles = single_messages(parsed.submitted, message.headers, message.queue)
        return Parsed(refused=parsed.refused), singles
    except Exception as error:
        logger.error("parsing a message failed, so it is refused: %s", failure(error))
        detail = f"parsing it failed: {type(error).__name__}; the worker's log says where"
        return refuse_unparsed(message.headers, message.body, detail), []


def _parse(message: Any, now: datetime) -> Parsed:
    """What a message holds, and which of it is not to be scored, whatever it is."""
    deaths = (
        f"delivered {message.returns} times, and each time its worker died, or stood still for longer than its lease, "
        "before it was decided; it is not tried again"
    )
    if message.returns >= UNREAD_RETURNS:
        return refuse_unread(message.headers, message.body, Reason.WORKER_DIED, f"{deaths}, nor was it read this time")
    parsed = parse_message(message.headers, message.body, now=now)
    task_id = message.headers.get("id")
    if worker_state.revoked and isinstance(task_id, str) and task_id in worker_state.revoked:
        detail = "revoked by remote control before a worker took it; it was not scored"
        return refuse_all(parsed, Reason.REVOKED, detail)
    if (expires := _expires(message.headers)) is not None and expires <= now:
        detail = f"the message expired at {expires.isoformat()}, before a worker took it; it was not scored"
        return refuse_all(parsed, Reason.EXPIRED, detail)
    # A list is taken apart before it is given up.
    if message.returns >= MAX_DELIVERIES and len(parsed.submitted) == 1:
        return refuse_all(parsed, Reason.WORKER_DIED, deaths)
    return parsed


def _submitted_at(headers: Mapping[str, Any], now: datetime) -> datetime:
    """When the producer submitted, if its header says so plausibly; else now."""
    seconds = headers.get(SUBMITTED_AT_HEADER)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return now
    now_s = now.timestamp()
    # The comparison is false for NaN too.
    if not now_s - LONGEST_QUEUE_AGE_S <= seconds <= now_s:
        return now
    return datetime.fromtimestamp(seconds, UTC)


def _expires(headers: Mapping[str, Any]) -> datetime | None:
    """When the message expires, as Celery writes `send_task(expires=…)`; in UTC where it names no zone."""
    said = headers.get(EXPIRES_HEADER)
    try:
        time = datetime.fromisoformat(said) if isinstance(said, str) and len(said) <= MAX_ID_CHARS else None
    except ValueError:
        return None
    return time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time


def _answer_to(headers: Mapping[str, Any]) -> str | None:
    """The token of a producer that waits, if it is one: it becomes part of a channel's name."""
    token = headers.get(ANSWER_TO_HEADER)
    if isinstance(token, str) and re.fullmatch(f"[A-Za-z0-9-]{{1,{MAX_ANSWER_TOKEN_CHARS}}}", token):
        return token
    return None
