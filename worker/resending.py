"""Durable submissions that are pending although their message is gone: put on their queue again.

A producer may have died between its commit and its push, and Redis may have lost what it held. Owns the judgement of
what is gone, and the chore that sends it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from celery import Celery
from redis.exceptions import ResponseError
from sqlalchemy import Engine

from config.names import (
    ENQUEUED_AT_HEADER,
    MAX_COMMENTS_PER_MESSAGE,
    MODERATE_TASK,
    SUBMITTED_AT_HEADER,
)
from config.queues import known_queue
from config.settings import Settings
from db.durable import PendingSubmission, database_time, overdue, overdue_queues, renew, take_sweep_lock
from db.outage import Outage
from db.session import reading, writing
from worker.envelope import MalformedMessage, read_envelope

logger = logging.getLogger(__name__)

ROWS_PER_STEP = 1_024
CLOCKS_APART = timedelta(seconds=10)
"""How far the clocks of producers and the database may lie apart, and how long a commit may take."""
UNSURE_FACTOR = 10
"""Where messages have come back, so many times the usual wait must have passed."""
MAX_MARKER_BYTES = 1 << 20
"""Of a message that is looked for in its queue again."""
BROKER_OPTIONS = {"max_retries": 1, "interval_start": 0.1, "socket_connect_timeout": 5, "socket_timeout": 5}
"""A Redis that is away is for the next sweep; by default kombu would try for ever."""


@dataclass(frozen=True, slots=True)
class QueueState:
    """What can be seen of a queue."""

    depth: int
    """Messages that wait in its list."""
    head_sent_at: datetime | None
    """When the one that is taken next was put there; None where it does not say, or nothing waits."""
    some_returned: bool
    """Messages whose worker died are being tried again, of whichever queue."""
    left_before: datetime | None = None
    """What was put there before then has left it: a message that was the newest at that time is there no longer."""


def gone_before(queue: QueueState, now: datetime, after: timedelta) -> datetime | None:
    """What was last put on the queue before this time, and is still pending, is no longer on its way.

    A queue is first in, first out. So what was put there before its head has left it; what was put there after it
    waits behind it, for however long, and to send that again would feed an overload. An empty queue has been left by
    all. What has left it needs a moment to be decided.

    A head that does not say when it was sent, as of plain Celery, leaves the order of arrival alone to tell: see
    `Marker`. Time that has passed tells nothing, because a backlog may last for any length of it.

    Args:
        now: by the database's clock.
        after: how long that moment may be.

    Returns:
        None where it cannot be told yet of anything.
    """
    before = now - after
    if queue.depth:
        head = queue.head_sent_at
        left_before = head if head is not None and head <= now + CLOCKS_APART else queue.left_before
        if left_before is None:
            return None
        before = min(before, left_before - CLOCKS_APART)
    # What came back is tried for some minutes. If it is what its workers died of, a second copy would kill as many.
    if queue.some_returned:
        before = min(before, now - UNSURE_FACTOR * after)
    return before


@dataclass(slots=True)
class Marker:
    """The newest message of a queue at some time: when it has left, so has all that was put there before it."""

    message: bytes
    since: datetime
    left_before: datetime | None = None
    """The time of the marker before this one, which has left."""


def in_messages(rows: Sequence[PendingSubmission]) -> list[list[PendingSubmission]]:
    """Those that were submitted together, in lists that are not too long for a message; in their order."""
    together: dict[datetime, list[PendingSubmission]] = {}
    for row in rows:
        together.setdefault(row.submitted_at, []).append(row)
    most = MAX_COMMENTS_PER_MESSAGE
    return [listed[start : start + most] for listed in together.values() for start in range(0, len(listed), most)]


class Resending:
    """The chore. One step looks at every queue that has something overdue, and sends so many rows of each at most."""

    def __init__(self, database: Engine, app: Celery, settings: Settings) -> None:
        self._database = database
        self._app = app
        self._after = timedelta(seconds=settings.worker.resubmit_after_s)
        self._max_queue_messages = settings.client.max_queue_messages
        self._markers: dict[str, Marker] = {}
        self._refusals: dict[str, Outage] = {}
        self.resent = 0
        """Submissions, since the start."""

    @property
    def refused(self) -> set[str]:
        """Queues that Redis refused at the last look: what is pending there waits."""
        return {queue for queue, refusal in list(self._refusals.items()) if refusal.lasts}

    def __call__(self) -> bool:
        with reading(self._database) as connection:
            now = database_time(connection)
            queues = overdue_queues(connection, before=now - self._after)
        for queue in self._refusals.keys() - queues:  # nothing waits for it any more
            del self._refusals[queue]
        if not queues:
            return False
        with self._app.connection_for_write(transport_options=BROKER_OPTIONS) as broker:
            more = [self._try_queue(broker, queue, now) for queue in queues]
        return any(more)

    def _try_queue(self, broker: Any, queue: str, now: datetime) -> bool:
        """As `_send_overdue`. A queue that Redis refuses, such as one that this user may not use, stops no other."""
        refusal = self._refusals.setdefault(queue, Outage())
        try:
            more = self._send_overdue(broker, queue, now)
        except ResponseError as error:
            if refusal.begin():
                # The error's class alone: its text may quote a message.
                what = type(error).__name__
                logger.error("Redis refuses the queue %s (%s); its durable submissions are not resent", queue, what)
            return False
        if refusal.end():
            logger.warning("Redis accepts the queue %s again", queue)
        return more

    def _send_overdue(self, broker: Any, row_queue: str, now: datetime) -> bool:
        queue = known_queue(row_queue)
        # Redis is asked before the transaction, and told after it: on SQLite that keeps every worker from writing.
        state = self._look_at(broker.default_channel, queue, now)
        room = self._max_queue_messages - state.depth if self._max_queue_messages else ROWS_PER_STEP
        with writing(self._database) as connection:
            if room <= 0 or not take_sweep_lock(connection):
                return False
            now = database_time(connection)
            before = gone_before(state, now, self._after)
            if before is None:
                return False
            rows = overdue(connection, queue=row_queue, before=before, limit=ROWS_PER_STEP)
            messages = in_messages(rows)[:room]
            renew(connection, [row.submission_id for listed in messages for row in listed], now)
        # A process that dies here has sent nothing; the rows are found again when as much time has passed once more.
        # One that stands still here may send what another has sent meanwhile, which is decided once all the same.
        for listed in messages:
            self._send(broker, queue, listed, now)
        if messages:
            count = sum(map(len, messages))
            self.resent += count
            logger.warning("%d durable submissions were no longer in the queue %s; they are sent again", count, queue)
        return len(rows) == ROWS_PER_STEP

    def _look_at(self, channel: Any, queue: str, now: datetime) -> QueueState:
        # Where producers push who give no priority, as ours.
        list_key = channel._q_for_pri(queue, 0)
        *_, returns_key = channel.own_keys()
        marker = self._markers.get(queue)
        with channel.client.pipeline(transaction=False) as asked:
            # kombu's client adds the prefix of all keys to some commands only.
            prefixed = channel.global_keyprefix + list_key
            asked.llen(list_key).lrange(prefixed, -1, -1).exists(returns_key)
            asked.lpos(prefixed, b"" if marker is None else marker.message).lrange(prefixed, 0, 0)
            depth, head, some_returned, place, newest = asked.execute()
        has_left = marker is None or place is None
        left_before = None if marker is None else marker.since if has_left else marker.left_before
        if has_left and newest and len(newest[0]) <= MAX_MARKER_BYTES:
            self._markers[queue] = Marker(newest[0], now, left_before)
        return QueueState(depth, sent_at(head[0]) if head else None, bool(some_returned), left_before)

    def _send(self, broker: Any, queue: str, rows: Sequence[PendingSubmission], now: datetime) -> None:
        headers = {SUBMITTED_AT_HEADER: rows[0].submitted_at.timestamp(), ENQUEUED_AT_HEADER: now.timestamp()}
        self._app.send_task(
            MODERATE_TASK,
            [[_comment(row) for row in rows]],
            queue=queue,
            headers=headers,
            # Celery's own would put the texts into the headers, and from there into other people's logs.
            argsrepr=f"({len(rows)} comments,)",
            kwargsrepr="{}",
            connection=broker,
            retry=False,
            ignore_result=True,
        )


def _comment(row: PendingSubmission) -> dict[str, Any]:
    """As it travels. The key names the submission, whose message and place in it are others now."""
    comment = {
        "text": row.text,
        "id": row.comment_id,
        "community": row.community,
        "author": row.author,
        "language": row.language,
        "created_at": row.created_at and row.created_at.isoformat(),
        "expires_at": row.expires_at and row.expires_at.isoformat(),
        "context": row.context,
        "idempotency_key": row.name or row.submission_id,
    }
    return {name: value for name, value in comment.items() if value is not None}


def sent_at(message: bytes) -> datetime | None:
    """When a message was put on its queue, if it says so plausibly."""
    try:
        headers = read_envelope(message)["headers"]
    except MalformedMessage:
        return None
    seconds = headers.get(ENQUEUED_AT_HEADER, headers.get(SUBMITTED_AT_HEADER))
    # Any other number is no time of ours; the comparison is false for NaN too.
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 2**33:
        return None
    return datetime.fromtimestamp(seconds, UTC)
