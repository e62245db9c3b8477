"""kombu's Redis transport for our worker. Owns how messages leave Redis, how they are held, and how they come back.

Stock kombu pops a message with BRPOP and writes it to the unacknowledged set afterwards: a kill between the two
loses it. Here one script (FETCH) moves many messages from their lists to the unacknowledged set in one step, so a
kill at any instant only repeats work. The lists and the messages in them stay kombu's own, so any Celery producer
can send, and a stock worker could take over. What is held lies under keys of our own, in these forms:

    <unacked_key>        hash: delivery tag -> "<list key>\\n<message, byte for byte as it was sent>"
    <unacked_index_key>  sorted set: delivery tag -> when its lease was last renewed, by Redis' clock

Delivery tags are made here, one per delivery: the producer's may be missing, or the same on every message.

Waiting for a message is BLMOVE of a list's end to the same end, which wakes on a push and takes nothing. It watches
the first list only: messages sent with a priority, and those of a second queue, are looked for once a second.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from queue import Empty
from time import monotonic
from typing import Any, NamedTuple
from uuid import uuid4

from kombu import transport as kombu_transport
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from redis.exceptions import ResponseError

from config.names import WORKER_UNACKED_KEY
from worker.envelope import MalformedMessage, malformed_envelope, read_envelope

logger = logging.getLogger(__name__)

MAX_FETCH_MESSAGES = 256
MAX_BUFFERED_ACKS = 1_000
TAGS_PER_SCRIPT = 1_000
"""Redis serves nobody else while a script runs, so long work is done in steps of this many messages."""
REFUSED_PAUSE_S = 1.0

FETCH = r"""
-- KEYS: unacked hash, unacked index, then the lists in the order to take from
-- ARGV: most messages, bytes after which to stop, tag prefix, then per list 1 if its consumer acknowledges
redis.call('HLEN', KEYS[1])  -- a key of the wrong type must fail here, not after a message was taken
redis.call('ZCARD', KEYS[2])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local room, bytes, reply = tonumber(ARGV[1]), tonumber(ARGV[2]), {}
for k = 3, #KEYS do
  while room > 0 and bytes > 0 do
    -- Taken before it is kept: at maxmemory Redis lets a script grow the data only after a write that does not.
    local message = redis.call('RPOP', KEYS[k])
    if not message then break end
    room, bytes = room - 1, bytes - #message
    reply[#reply + 1] = k - 3
    reply[#reply + 1] = message
    if ARGV[k + 1] == '1' then
      local tag = ARGV[3] .. #reply / 2
      redis.call('HSET', KEYS[1], tag, KEYS[k] .. '\n' .. message)
      redis.call('ZADD', KEYS[2], now, tag)
    end
  end
end
return reply
"""

GIVE_BACK_ONE = r"""
local function give_back(tag, push)
  redis.call('ZREM', KEYS[2], tag)  -- first, for maxmemory's sake
  local held = redis.call('HGET', KEYS[1], tag)
  if held then
    local list_end = string.find(held, '\n', 1, true)
    redis.call(push, string.sub(held, 1, list_end - 1), string.sub(held, list_end + 1))
    redis.call('HDEL', KEYS[1], tag)
  end
end
"""

GIVE_BACK = (
    GIVE_BACK_ONE
    + r"""
-- ARGV: RPUSH (to the end that is taken next) or LPUSH (behind what waits), then the tags
for i = 2, #ARGV do give_back(ARGV[i], ARGV[1]) end
"""
)

GIVE_BACK_EXPIRED = (
    GIVE_BACK_ONE
    + r"""
-- ARGV: visibility timeout in seconds, most messages
local time = redis.call('TIME')
local cutoff = time[1] + time[2] / 1e6 - ARGV[1]
local tags = redis.call('ZRANGE', KEYS[2], '-inf', cutoff, 'BYSCORE', 'LIMIT', 0, ARGV[2])
for i = #tags, 1, -1 do give_back(tags[i], 'RPUSH') end  -- the oldest last, so that it is taken first
return #tags
"""
)

RENEW_LEASES = r"""
-- ARGV: the tags
redis.call('ZREM', KEYS[2], '')  -- removes nothing; see FETCH on maxmemory
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
for i = 1, #ARGV do redis.call('ZADD', KEYS[2], 'XX', now, ARGV[i]) end
"""


class Delivery(NamedTuple):
    """One message as FETCH took it."""

    tag: str
    queue: str
    raw: bytes


class Message(virtual.Message):
    """A message whose construction cannot fail, whatever a producer sent: see `malformed_envelope`."""

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        if isinstance(payload, Delivery):
            delivery = payload
            try:
                payload = read_envelope(delivery.raw)
            except MalformedMessage as reason:
                payload = malformed_envelope(delivery.raw, str(reason))
            properties = payload["properties"]
            properties["delivery_tag"] = delivery.tag
            if not isinstance(properties.get("delivery_info"), dict):
                properties["delivery_info"] = {"exchange": "", "routing_key": delivery.queue}
        super().__init__(payload, channel, **kwargs)


class QoS(virtual.QoS):
    """What the channel holds, and its way out: acknowledged, or back to its list. The hub's thread only."""

    def __init__(self, channel: Any, prefetch_count: int = 0) -> None:
        super().__init__(channel, prefetch_count)
        self._acks: list[str] = []

    def can_consume(self) -> bool:
        return self.can_consume_max_estimate() > 0

    def can_consume_max_estimate(self) -> int:
        """Messages that the next FETCH may take."""
        room = MAX_FETCH_MESSAGES
        if self.prefetch_count:
            room = min(room, self.prefetch_count - len(self._delivered))
        if self.channel.fetch_limit is not None:
            room = min(room, self.channel.fetch_limit())
        return max(room, 0)

    def ack(self, delivery_tag: str) -> None:
        """Forget a message; Redis hears of it by the end of this tick. A kill in between repeats the message."""
        # No longer held: it went back to its list when its channel closed, and will be delivered again.
        if self._delivered.pop(delivery_tag, None) is None:
            return
        self._acks.append(delivery_tag)
        if len(self._acks) >= MAX_BUFFERED_ACKS:
            self.flush_acks()

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Forget a message, or put it behind those that wait in its list."""
        if not requeue:
            self.ack(delivery_tag)
        elif self._delivered.pop(delivery_tag, None) is not None:
            self.give_back([delivery_tag], "LPUSH")

    def flush_acks(self) -> None:
        """Write the buffered acknowledgements. After a connection error they stay buffered."""
        if not self._acks:
            return
        channel = self.channel
        try:
            # No MULTI: Redis at maxmemory refuses it, and with it the acks that would free memory. The hash goes
            # first: a tag left in the index without a message is swept away, the reverse would stay for ever.
            with channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
                pipe.hdel(channel.unacked_key, *self._acks).zrem(channel.unacked_index_key, *self._acks).execute()
        except ResponseError as error:
            logger.error("Redis refused %d acknowledgements: %s; their messages repeat", len(self._acks), error)
        self._acks = []

    def renew_leases(self) -> None:
        """Keep what is held from being given to others for another visibility timeout.

        Raises:
            one of the transport's connection_errors.
        """
        for tags in _chunks(self._delivered):
            self._run(RENEW_LEASES, *tags)

    def give_back(self, tags: Iterable[str], push: str = "RPUSH") -> None:
        """Return messages to their lists: RPUSH to the end that is taken next, LPUSH behind what waits."""
        for chunk in _chunks(tags):
            self._run(GIVE_BACK, push, *chunk)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Return the messages of workers that no longer renew their leases. kombu calls it every few seconds."""
        self.flush_acks()
        try:
            while self._run(GIVE_BACK_EXPIRED, self.channel.visibility_timeout, TAGS_PER_SCRIPT) == TAGS_PER_SCRIPT:
                pass
        except ResponseError as error:
            logger.error("Redis refused to return expired messages to their queues: %s", error)

    def restore_unacked(self) -> list[Any]:
        self.give_back(reversed(self._delivered))
        self._delivered.clear()
        return []

    def restore_unacked_once(self, stderr: Any = None) -> None:
        # After a lost connection Celery closes a channel that can no longer connect, and an exception from here
        # would end the worker.
        try:
            self.flush_acks()
            super().restore_unacked_once(stderr)
        except Exception as error:
            logger.warning("%d messages are left to the visibility timeout: %r", len(self._delivered), error)
            self._delivered.clear()
            self._acks.clear()

    def _run(self, script: str, *args: Any) -> Any:
        channel = self.channel
        keys = [channel.global_keyprefix + key for key in (channel.unacked_key, channel.unacked_index_key)]
        with channel.conn_or_acquire() as client:
            return client.eval(script, len(keys), *keys, *args)


def _chunks(tags: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(tags)
    while chunk := list(islice(remaining, TAGS_PER_SCRIPT)):
        yield chunk


class Channel(kombu_redis.Channel):
    """kombu's Redis channel with FETCH in the place of BRPOP, or, after an empty one, a wait that takes nothing."""

    QoS = QoS
    Message = Message

    fetch_limit: Callable[[], int] | None = None
    """How many more messages may be taken now; 0 stops fetching. Asked at every tick of the hub, so it must be cheap;
    after room returns the next tick fetches. None: as many as prefetch_count allows."""
    max_fetch_bytes = 8 * 1024 * 1024
    """A fetch stops after the message that reaches it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._tag_prefixes = (f"{uuid4().hex}.{n}." for n in count())
        self._no_ack_queues: set[str] = set()
        self._fetching: tuple[str, list[str]] | None = None
        """Of the FETCH in flight: its tag prefix, and the queue of each list; None while a wait is in flight."""
        self._lists_empty = False
        self._refused_until = 0.0
        super().__init__(*args, **kwargs)

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        (self._no_ack_queues.add if no_ack else self._no_ack_queues.discard)(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        # kombu's pops first and holds afterwards, which this QoS does not do.
        raise NotImplementedError("this transport only delivers to consumers: consume from the queue instead")

    def _brpop_start(self, timeout: float | None = None) -> None:
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues or monotonic() < self._refused_until:
            return
        queue_of_list = [queue for _ in self.priority_steps for queue in queues]
        lists = [
            self.global_keyprefix + self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues
        ]
        command: tuple[Any, ...]
        if self._lists_empty:
            self._fetching = None
            command = ("BLMOVE", lists[0], lists[0], "RIGHT", "RIGHT", self.brpop_timeout)
        else:
            prefix = next(self._tag_prefixes)
            self._fetching = prefix, queue_of_list
            keys = [self.global_keyprefix + key for key in (self.unacked_key, self.unacked_index_key)] + lists
            acknowledged = [int(queue not in self._no_ack_queues) for queue in queue_of_list]
            bounds = self.qos.can_consume_max_estimate(), self.max_fetch_bytes
            command = ("EVAL", FETCH, len(keys), *keys, *bounds, prefix, *acknowledged)
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        self.client.connection.send_command(*command)

    def _brpop_read(self, **options: Any) -> bool:
        fetching = self._fetching
        try:
            reply = self.client.parse_response(self.client.connection, "EVAL", **options)
        except self.connection_errors:
            self.client.connection.disconnect()  # so that the next tick connects anew
            raise
        except ResponseError as error:
            # Out of memory, disk full, missing permission: raised in the hub it would end the worker.
            what = "to wait for" if fetching is None else "to hand out"
            logger.error("Redis refused %s messages: %s; asking again in %g s", what, error, REFUSED_PAUSE_S)
            self._refused_until = monotonic() + REFUSED_PAUSE_S
            self._lists_empty = False
            raise Empty from None
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        self._lists_empty = fetching is not None and not reply
        if fetching is None or not reply:
            raise Empty
        prefix, queue_of_list = fetching
        self._deliver_all(
            Delivery(f"{prefix}{n}", queue_of_list[list_index], raw)
            for n, (list_index, raw) in enumerate(zip(reply[::2], reply[1::2], strict=True), start=1)
        )
        return True

    def _deliver_all(self, deliveries: Iterable[Delivery]) -> None:
        waiting = deque(deliveries)
        self._queue_cycle.rotate(waiting[-1].queue)
        try:
            while waiting and not self._closing:
                delivery = waiting.popleft()
                self.connection._deliver(delivery, delivery.queue)
        finally:
            # Closing, or a consumer raised: Redis counts the rest as held by us, but nobody here would ever ack it.
            self.qos.give_back(delivery.tag for delivery in reversed(waiting))

    def close(self) -> None:
        self._closing = True
        if self._in_poll:
            try:
                if self._fetching is None:
                    self.client.connection.disconnect()  # a wait took nothing, and may last another second
                else:
                    self._brpop_read()
            except (Empty, *self.connection_errors):
                pass
        super().close()


class SentinelChannel(Channel, kombu_redis.SentinelChannel):
    """The same for sentinel:// URLs."""


class Poller(kombu_redis.MultiChannelPoller):
    """Reads every reply as it comes.

    kombu leaves a reply unread while the prefetch limit is reached. Here a fetch was sized when it was sent, and its
    messages are held in Redis already: unread, nobody would renew their leases.
    """

    def on_poll_start(self) -> None:
        for channel in self._channels:
            channel.qos.flush_acks()
        super().on_poll_start()

    def _update_brpop_polling(self) -> None:
        pass

    def on_readable(self, fileno: int) -> None:
        channel, kind = self._fd_to_chan.get(fileno, (None, None))
        if channel is None:
            return  # of a connection just dropped
        if kind == "BRPOP" and not channel._in_poll:
            channel.client.connection.disconnect()  # nothing was asked, so the server has closed it
        else:
            channel.handlers[kind]()


class Transport(kombu_redis.Transport):
    Channel = Channel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()


class SentinelTransport(Transport):
    default_port = kombu_redis.SentinelTransport.default_port
    Channel = SentinelChannel


def install() -> None:
    """Make this the transport of every Redis URL in this process (redis+socket:// is looked up as redis)."""
    kombu_transport.TRANSPORT_ALIASES.update(
        redis=f"{__name__}:Transport",
        rediss=f"{__name__}:Transport",
        sentinel=f"{__name__}:SentinelTransport",
    )
    kombu_transport._transport_cache.clear()


def transport_options(visibility_timeout_s: float) -> dict[str, Any]:
    """Celery's `broker_transport_options` for our worker."""
    return {
        "visibility_timeout": visibility_timeout_s,
        "unacked_key": WORKER_UNACKED_KEY,
        "unacked_index_key": f"{WORKER_UNACKED_KEY}_index",
        "unacked_mutex_key": f"{WORKER_UNACKED_KEY}_mutex",
        "unacked_restore_interval": 2,
        "priority_steps": [0, 3, 6, 9],
        "socket_connect_timeout": 5,
        "socket_timeout": 30,
        "socket_keepalive": True,
        "health_check_interval": 10,
    }
