"""What Redis publishes to those that listen: that something was decided, or a worker's answer to one who waits.

Owns the subscribed connections. All of it may be lost, with a connection, a Redis or a worker; so nothing here is
relied on: whoever listens also asks the database now and then, which is the truth.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kombu import Connection as BrokerConnection
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from config.names import ANSWER_CHANNEL, DECIDED_CHANNEL
from db.outage import Outage

BROKER_ERRORS = (KombuError, RedisError, OSError)
PROMPT_TIMEOUT_S = 1.0
"""To connect, and for an answer, where somebody waits for a decision: Redis takes a millisecond."""
MOST_IDLE = 10
"""Subscribed connections kept for the next who wait."""

logger = logging.getLogger(__name__)


def prompt_options() -> dict[str, Any]:
    """What differs in the transport options of a connection that somebody waits for."""
    return {"socket_connect_timeout": PROMPT_TIMEOUT_S, "socket_timeout": PROMPT_TIMEOUT_S}


class Subscription:
    """A connection of its own that hears one channel. One thread at a time; `hear` and the making may raise any of
    BROKER_ERRORS, and then it is of no more use."""

    def __init__(self, broker: BrokerConnection, channel_name: str) -> None:
        """Subscribe, and return when Redis has said that it is so.

        Args:
            broker: connected to nothing else; closed with this.
            channel_name: without what kombu puts before it.
        """
        self._broker = broker
        broker.transport_options = {**broker.transport_options, **prompt_options()}
        try:
            channel: Any = broker.default_channel
            with channel.conn_or_acquire() as client:
                self._pubsub: Any = client.pubsub()
            self._pubsub.subscribe(channel.keyprefix_fanout + channel_name)
            if self._next(PROMPT_TIMEOUT_S, "subscribe") is None:
                raise TimeoutError(f"Redis did not answer within {PROMPT_TIMEOUT_S:g} s")
        except BaseException:
            self.close()
            raise

    def hear(self, timeout_s: float) -> bytes | None:
        """The next that was published; None where nothing was in time."""
        return self._next(timeout_s, "message")

    def _next(self, timeout_s: float, kind: str) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            said = self._pubsub.get_message(timeout=left_s)
            if said is not None and said["type"] == kind:
                return said["data"]
            if said is None and not left_s:
                return None

    def close(self) -> None:
        with suppress(*BROKER_ERRORS, AttributeError):  # the making may have failed half-way
            self._pubsub.close()
        with suppress(*BROKER_ERRORS):
            self._broker.close()


class AnswerLine(Subscription):
    """Where workers answer to one who waits for a decision; messages name it by its token."""

    def __init__(self, broker: BrokerConnection) -> None:
        self.token = secrets.token_hex(16)
        super().__init__(broker, ANSWER_CHANNEL + self.token)


class AnswerLines:
    """Lines for those who wait at the same time, kept for the next: to subscribe takes as long as a decision."""

    def __init__(self, connect: Callable[[], BrokerConnection]) -> None:
        """Prepare, connecting to nothing."""
        self._connect = connect
        self._idle: list[AnswerLine] = []
        self._outage = Outage()

    @contextmanager
    def borrow(self) -> Iterator[AnswerLine | None]:
        """A line that nobody else uses meanwhile; None where Redis gives none, which is said once."""
        line = self._take()
        try:
            yield line
        finally:
            if line is not None and len(self._idle) < MOST_IDLE:
                self._idle.append(line)
            elif line is not None:
                line.close()

    def _take(self) -> AnswerLine | None:
        with suppress(IndexError):
            line = self._idle.pop()
            try:
                # What came too late for the last one; and whether the connection still lives.
                while line.hear(0) is not None:
                    pass
                return line
            except BROKER_ERRORS:
                line.close()
        try:
            line = AnswerLine(self._connect())
        except BROKER_ERRORS as error:
            if self._outage.begin():
                logger.warning(
                    "no answers can be heard from Redis (%s); waiting by asking the database", type(error).__name__
                )
            return None
        self._outage.end()
        return line

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


class Nudges:
    """Wakes whoever follows the decisions, when there are new ones or after a while. One thread."""

    def __init__(self, connect: Callable[[], BrokerConnection]) -> None:
        """Prepare, connecting to nothing."""
        self._connect = connect
        self._subscription: Subscription | None = None
        self._outage = Outage()
        self._next_try_at = 0.0

    def wait(self, timeout_s: float) -> bool:
        """Return when something was decided since the last time, or after the timeout; which of them it was.

        Without Redis it is always the timeout; it connects anew by itself.
        """
        deadline = time.monotonic() + timeout_s
        if self._subscription is None and time.monotonic() >= self._next_try_at:
            self._subscribe()
            # What was decided before this may not have been heard.
            return True
        if self._subscription is not None:
            try:
                heard = self._subscription.hear(timeout_s) is not None
                while self._subscription.hear(0) is not None:
                    heard = True
                return heard
            except BROKER_ERRORS as error:
                self.close()
                self._note(error)
        time.sleep(max(0.0, deadline - time.monotonic()))
        return False

    def _subscribe(self) -> None:
        try:
            self._subscription = Subscription(self._connect(), DECIDED_CHANNEL)
        except BROKER_ERRORS as error:
            self._note(error)
        else:
            if self._outage.end():
                logger.warning("Redis says again when something is decided")

    def _note(self, error: Exception) -> None:
        if self._outage.begin():
            logger.warning(
                "Redis cannot say when something is decided (%s); looking for it every now and then",
                type(error).__name__,
            )
        self._next_try_at = time.monotonic() + self._outage.pause_s()

    def close(self) -> None:
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None
