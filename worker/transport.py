"""kombu's Redis transport for our worker. Owns how messages leave Redis, how they are held, and how they come back.

Stock kombu pops a message with BRPOP and writes it to the unacknowledged set afterwards: a kill between the two
loses it. Here one script (FETCH) moves many messages from their lists to the unacknowledged set in one step, so a
kill at any instant only repeats work. The lists and the messages in them stay kombu's own, so any Celery producer
can send, and a stock worker could take over. What is held lies under keys of our own, in these forms:

    <unacked_key>        hash: delivery tag -> "<list key>\\n<message, byte for byte as it was sent>"
    <unacked_index_key>  sorted set: delivery tag -> when its lease was last renewed, by Redis' clock
    <unacked_key>_returns  hash: SHA-1 of a message -> how often it came back because its lease ran out

Delivery tags are made here, one per delivery: the producer's may be missing, or the same on every message.

Waiting takes nothing and asks nothing: after an empty FETCH, CLIENT TRACKING has Redis push word of the next change to
any of the lists. A Redis that refuses it is asked by BLMOVE of a list's end to the same end, which wakes on a push and
takes nothing either, but watches the first list only; the others are then looked into once a second.

A lost connection gives nothing back. What it held stays leased, and this worker's next connection adopts it (ADOPT):
only a worker that never connects again counts as dead.

A message that came back SUSPECT_RETURNS times may be what ended its workers. It is taken when nothing else is held,
and nothing else while it is: the next death counts for it alone, and its neighbours get done. One that holds several
comments is replaced by one message for each (REPLACE), as suspect as it was.
"""

import hashlib
import logging
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import count, groupby, islice
from operator import itemgetter
from queue import Empty
from time import monotonic
from typing import Any, NamedTuple
from uuid import uuid4

from kombu import Message as KombuMessage
from kombu import transport as kombu_transport
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from config.names import MODERATE_QUEUE, MODERATE_QUEUES, WORKER_UNACKED_KEY
from config.queues import PRIORITIES, known_queue
from db.outage import Outage
from worker import clock
from worker.envelope import MalformedMessage, malformed_envelope, read_envelope

logger = logging.getLogger(__name__)

MAX_FETCH_MESSAGES = 256
MAX_BUFFERED_ACKS = 1_000
TAGS_PER_SCRIPT = 1_000
"""Redis serves nobody else while a script runs, so long work is done in steps of this many messages."""
LONGEST_WAIT_S = 5.0
"""A FETCH in between shows whether the connection still lives: none of it would be heard on a dead one."""
SUSPECT_RETURNS = 2
UNREAD_RETURNS = 10
"""A message that came back so often is not even read any more: reading it may be what ends its workers."""
DELIVER_S = 1.0
"""After so long the hub has its turn, which renews leases, before more messages of a fetch are read."""
RETURNS_KEPT_S = 86_400
"""How long returns are counted after the last one, for messages that others have taken over and acknowledged."""
LOWER_QUEUE_SHARE = 16
"""While preferred queues are full, a lower one still gets one message in so many."""

FETCH = r"""
-- KEYS: unacked hash, unacked index, returns hash, then the lists
-- ARGV: most messages, bytes after which to stop, 1 if nothing is held, tag prefix, returns that make a suspect,
--   per list 1 if its consumer acknowledges, then in threes whose turn it is: first list, last list, most messages
-- Reply: 1 if nothing more may be taken before all is done, Redis' time in microseconds, then in threes: list,
--   message, how often it came back
redis.call('HLEN', KEYS[1])  -- a key of the wrong type must fail here, not after a message was taken
redis.call('ZCARD', KEYS[2])
local some_returned = redis.call('HLEN', KEYS[3]) > 0
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local room, bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local nothing_held, prefix, suspect = ARGV[3] == '1', ARGV[4], tonumber(ARGV[5])
local reply, taken = {0, time[1] * 1e6 + time[2]}, 0
for turn = #KEYS + 3, #ARGV, 3 do
  local most = math.min(room, tonumber(ARGV[turn + 2]))
  for list = tonumber(ARGV[turn]), tonumber(ARGV[turn + 1]) do
    local key = KEYS[list + 4]
    while most > 0 and bytes > 0 do
      -- Taken before it is kept: at maxmemory Redis lets a script grow the data only after a write that does not.
      local message = redis.call('RPOP', key)
      if not message then break end
      local returns = some_returned and tonumber(redis.call('HGET', KEYS[3], redis.sha1hex(message)) or 0) or 0
      if returns >= suspect then
        reply[1] = 1
        if taken > 0 or not nothing_held then
          redis.call('RPUSH', key, message)
          return reply
        end
        most, room = 1, 1
      end
      most, room, bytes, taken = most - 1, room - 1, bytes - #message, taken + 1
      reply[#reply + 1] = list
      reply[#reply + 1] = message
      reply[#reply + 1] = returns
      if ARGV[list + 6] == '1' then
        local tag = prefix .. taken
        redis.call('HSET', KEYS[1], tag, key .. '\n' .. message)
        redis.call('ZADD', KEYS[2], now, tag)
      end
    end
  end
end
return reply
"""

GIVE_BACK_ONE = r"""
local function give_back(tag, push)
  redis.call('ZREM', KEYS[2], tag)  -- first, for maxmemory's sake
  local held = redis.call('HGET', KEYS[1], tag)
  if not held then return end
  local list_end = string.find(held, '\n', 1, true)
  local message = string.sub(held, list_end + 1)
  redis.call(push, string.sub(held, 1, list_end - 1), message)
  redis.call('HDEL', KEYS[1], tag)
  return message
end
"""

GIVE_BACK = (
    GIVE_BACK_ONE
    + r"""
-- ARGV: RPUSH (to the end that is taken next) or LPUSH (behind what waits), seconds for which the return is counted
--   (0: it is not), then the tags
for i = 3, #ARGV do
  local message = give_back(ARGV[i], ARGV[1])
  if message and ARGV[2] ~= '0' then
    redis.call('HINCRBY', KEYS[3], redis.sha1hex(message), 1)
    redis.call('EXPIRE', KEYS[3], ARGV[2])
  end
end
"""
)

GIVE_BACK_EXPIRED = (
    GIVE_BACK_ONE
    + r"""
-- ARGV: visibility timeout in seconds, most messages, seconds for which returns are counted
local time = redis.call('TIME')
local cutoff = time[1] + time[2] / 1e6 - ARGV[1]
local tags = redis.call('ZRANGE', KEYS[2], '-inf', cutoff, 'BYSCORE', 'LIMIT', 0, ARGV[2])
for i = #tags, 1, -1 do  -- the oldest last, so that it is taken first
  local message = give_back(tags[i], 'RPUSH')
  if message then redis.call('HINCRBY', KEYS[3], redis.sha1hex(message), 1) end
end
if #tags > 0 then redis.call('EXPIRE', KEYS[3], ARGV[3]) end
return #tags
"""
)

REPLACE = r"""
-- ARGV: the tag, how often each is taken to have come back, seconds for which that is counted, then the messages
local held = redis.call('HGET', KEYS[1], ARGV[1])
if not held then return end  -- its lease ran out: whoever has it now replaces it
local list_end = string.find(held, '\n', 1, true)
local list, original = string.sub(held, 1, list_end - 1), string.sub(held, list_end + 1)
redis.call('LLEN', list)  -- a key of the wrong type must fail here, not after the message is gone
redis.call('HLEN', KEYS[3])
redis.call('ZREM', KEYS[2], ARGV[1])  -- first, for maxmemory's sake
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[3], redis.sha1hex(original))
for i = #ARGV, 4, -1 do  -- the first of them last, so that it is taken first
  redis.call('RPUSH', list, ARGV[i])
  redis.call('HSET', KEYS[3], redis.sha1hex(ARGV[i]), ARGV[2])
end
redis.call('EXPIRE', KEYS[3], ARGV[3])
"""

RENEW_LEASES = r"""
-- ARGV: the tags
redis.call('ZREM', KEYS[2], '')  -- removes nothing; see FETCH on maxmemory
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
for i = 1, #ARGV do redis.call('ZADD', KEYS[2], 'XX', now, ARGV[i]) end
"""


ADOPT = r"""
-- ARGV: 1 if returns are taken back, then in pairs: tag, SHA-1 of its message
-- Reply: the tags that are not held any more
redis.call('ZREM', KEYS[2], '')  -- removes nothing; see FETCH on maxmemory
local time = redis.call('TIME')
local now, gone = time[1] + time[2] / 1e6, {}
for i = 2, #ARGV, 2 do
  local tag, sha1 = ARGV[i], ARGV[i + 1]
  if redis.call('HEXISTS', KEYS[1], tag) == 1 then
    redis.call('ZADD', KEYS[2], now, tag)
  else
    gone[#gone + 1] = tag
    if ARGV[1] == '1' and tonumber(redis.call('HGET', KEYS[3], sha1) or 0) > 0 then
      if redis.call('HINCRBY', KEYS[3], sha1, -1) == 0 then redis.call('HDEL', KEYS[3], sha1) end
    end
  end
end
return gone
"""


class Delivery(NamedTuple):
    """One message as FETCH took it."""

    tag: str
    queue: str
    raw: bytes
    returns: int


def preference(queue: str) -> int:
    """A queue's rank: 0 is taken from first. Queues of other names than ours are equal to the ordinary one."""
    return MODERATE_QUEUES.index(known_queue(queue))


def first_turns(ranks: int, taken: int, room: int) -> list[int]:
    """How many of the next `room` messages each rank may take before the preferred ones do.

    One in LOWER_QUEUE_SHARE for each rank but the first, also where a fetch is smaller than that: it goes by `taken`,
    the messages taken before.
    """
    return [0] + [
        (taken + rank + room) // LOWER_QUEUE_SHARE - (taken + rank) // LOWER_QUEUE_SHARE for rank in range(1, ranks)
    ]


class Held(NamedTuple):
    """What a channel held when its connection was lost: its messages are with this worker still."""

    delivered: dict[str, Any]
    """Delivery tag -> message."""
    acks: list[str]
    """Tags that were to be acknowledged."""
    digests: dict[str, str]
    """Tag -> SHA-1 of the message, of all of these."""
    returned: set[str]
    """Tags of what had come back before."""
    unheard: list[str]
    """Tags that a FETCH may have given whose answer was not heard."""
    finish_first: bool


class Message(virtual.Message):
    """A message whose construction cannot fail, whatever a producer sent: see `malformed_envelope`."""

    queue = MODERATE_QUEUE
    """The list that FETCH took it from. What the envelope says of that is a producer's word, and counts for nothing:
    by this name a message is ranked, counted, and put back when an operator retries it."""
    returns = 0
    """How often it came back because its worker died, or stood still for longer than its lease."""

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        if not isinstance(payload, Delivery):
            super().__init__(payload, channel, **kwargs)
            return
        envelope = _envelope(payload)
        properties = envelope["properties"]
        properties["delivery_tag"] = payload.tag
        properties["delivery_info"] = delivery_info = {"exchange": "", "routing_key": payload.queue}
        self.queue, self.returns = payload.queue, payload.returns
        # Not by way of virtual.Message, which would decode the body once more.
        KombuMessage.__init__(
            self,
            body=envelope["body"],
            channel=channel,
            delivery_tag=payload.tag,
            content_type=envelope["content-type"],
            content_encoding=envelope.get("content-encoding"),
            headers=envelope["headers"],
            properties=properties,
            delivery_info=delivery_info,
            **kwargs,
        )


def _envelope(delivery: Delivery) -> dict[str, Any]:
    if delivery.returns >= UNREAD_RETURNS:
        return malformed_envelope(delivery.raw, "it came back too often to be read once more", searched=False)
    try:
        try:
            return read_envelope(delivery.raw)
        except MalformedMessage as reason:
            return malformed_envelope(delivery.raw, str(reason))
    except Exception as error:
        # Not foreseen, such as a want of memory. Raised here it would end this worker, and the next one.
        logger.error("reading a message failed, so it is refused: %s", failure(error))
        return malformed_envelope(delivery.raw, f"reading it failed: {type(error).__name__}", searched=False)


def failure(error: BaseException) -> str:
    """An error's class, and where in the code it arose; not its text, which may quote a message."""
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}"


class QoS(virtual.QoS):
    """What the channel holds, and its way out: acknowledged, or back to its list. The hub's thread only."""

    def __init__(self, channel: Any, prefetch_count: int = 0) -> None:
        super().__init__(channel, prefetch_count)
        self._acks: list[str] = []
        self._digests: dict[str, str] = {}
        """Delivery tag -> SHA-1 of the message, under which its returns are counted."""
        self._returned: set[str] = set()
        """Tags of what came back before: when they are acknowledged their returns are forgotten."""
        self.finish_first = False
        """Nothing more may be taken before all that is held is done."""
        self._words: list[tuple[str, bytes]] = []
        self._acks_refused, self._returns_refused, self._words_refused = Outage(), Outage(), Outage()

    def note(self, delivery: Delivery) -> None:
        """Remember under which name its returns are counted, and whether there are any."""
        self._digests[delivery.tag] = hashlib.sha1(delivery.raw, usedforsecurity=False).hexdigest()
        if delivery.returns:
            self._returned.add(delivery.tag)

    def _forget(self, tags: Iterable[str]) -> None:
        for tag in tags:
            self._digests.pop(tag, None)
            self._returned.discard(tag)

    def hand_over(self) -> Held:
        """Let go of all that is held without giving it back, for the next connection to adopt."""
        held = Held(
            dict(self._delivered),
            self._acks,
            self._digests,
            self._returned,
            self.channel.unheard_tags(),
            self.finish_first,
        )
        self._delivered.clear()
        self._acks, self._digests, self._returned = [], {}, set()
        return held

    def adopt(self, held: Held, *, alive: bool) -> None:
        """Hold what another connection of this worker held, under leases that begin anew.

        Returns are counted because a message that ends its workers must be found, and a lease that runs out is how a
        death shows. It also runs out where Redis or the network is away for longer than a lease, and then every worker
        that lives would make a suspect of what it holds. A worker that is dead never comes here; one that does takes
        back the count of each message that others were given meanwhile. So what is left in the count is deaths.

        Args:
            alive: false where this process itself may have stood still for longer than a lease, as a message that
                freezes its worker makes it; then the count stays.

        Raises:
            one of the transport's connection_errors; nothing is held then.
        """
        tags = [*held.delivered, *held.acks]
        gone: list[bytes] = []
        try:
            # Nobody here knows these messages, so they go back at once, to be taken first.
            self.give_back(reversed(held.unheard))
            for chunk in _chunks(tags):
                gone += self._run(ADOPT, int(alive), *(value for tag in chunk for value in (tag, held.digests[tag])))
        except ResponseError as error:
            raise_if_read_only(error)
            logger.error("Redis refuses to renew the leases of %d messages: %s", len(tags), error)
        self._delivered.update(held.delivered)
        self._acks += held.acks
        self._digests |= held.digests
        self._returned |= held.returned
        # Others have these, or they were acknowledged already. Kept, the next adoption would take back one more count.
        others = {tag.decode() for tag in gone}
        for tag in others:
            self._delivered.pop(tag, None)
        self._acks = [tag for tag in self._acks if tag not in others]
        self._forget(others)
        self.finish_first = self.finish_first or held.finish_first

    def held_bytes(self, delivery_tag: str) -> int:
        """Of a message's body, as it was read; none of one that is settled already."""
        message = self._delivered.get(delivery_tag)
        return 0 if message is None else len(message.body)

    @property
    def holds_some(self) -> bool:
        return bool(self._delivered)

    def can_consume(self) -> bool:
        return self.can_consume_max_estimate() > 0

    def can_consume_max_estimate(self) -> int:
        """Messages that the next FETCH may take."""
        if self.finish_first and self._delivered:
            return 0
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
            self._forget([delivery_tag])
            self.give_back([delivery_tag], "LPUSH")

    def replace(self, delivery_tag: str, messages: Sequence[bytes]) -> None:
        """Put others in the place of a message: Redis has the one or the others, at any instant.

        They go to the end of its list that is taken next, as suspect as it was: each is taken alone.

        Raises:
            one of the transport's connection_errors.
        """
        # As in `ack`. Not held any more, its lease is not renewed: where Redis refuses, it comes again.
        if self._delivered.pop(delivery_tag, None) is None:
            return
        self._forget([delivery_tag])
        try:
            self._run(REPLACE, delivery_tag, SUSPECT_RETURNS, RETURNS_KEPT_S, *messages)
        except ResponseError as error:
            raise_if_read_only(error)
            logger.error("Redis refused to replace a message by %d others: %s; it repeats", len(messages), error)

    def publish(self, name: str, word: bytes) -> None:
        """Say something on a pub/sub channel, along with the acknowledgements of this tick. It may be lost."""
        self._words.append((self.channel.keyprefix_fanout + name, word))

    def flush_acks(self) -> None:
        """Write the buffered acknowledgements, in the same round trip as what is to be published.

        After a connection error the acknowledgements stay buffered.
        """
        if not self._acks and not self._words:
            return
        channel = self.channel
        words, self._words = self._words, []
        try:
            # No MULTI: Redis at maxmemory refuses it, and with it the acks that would free memory. The hash goes
            # first: a tag left in the index without a message is swept away, the reverse would stay for ever.
            with channel.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
                for name, word in words:
                    pipe.publish(name, word)
                if self._acks:
                    pipe.hdel(channel.unacked_key, *self._acks).zrem(channel.unacked_index_key, *self._acks)
                if done := [self._digests[tag] for tag in self._acks if tag in self._returned]:
                    pipe.hdel(channel.returns_key, *done)
                replies = pipe.execute(raise_on_error=False)
            self._note_words(replies[: len(words)])
            for refused in (reply for reply in replies[len(words) :] if isinstance(reply, ResponseError)):
                raise refused
        except ResponseError as error:
            raise_if_read_only(error)
            if self._acks_refused.begin():
                logger.error("Redis refuses acknowledgements (%s); their messages repeat", error)
        else:
            if self._acks_refused.end():
                logger.warning("Redis takes acknowledgements again")
        self._forget(self._acks)
        self._acks = []

    def _note_words(self, replies: Sequence[Any]) -> None:
        refused = next((reply for reply in replies if isinstance(reply, ResponseError)), None)
        if refused is not None and self._words_refused.begin():
            logger.warning(
                "Redis refuses to publish what was decided (%s); who waits for it asks the database now and then",
                refused,
            )
        elif refused is None and replies and self._words_refused.end():
            logger.warning("Redis publishes what was decided again")

    def renew_leases(self) -> None:
        """Keep what is held from being given to others for another visibility timeout.

        Raises:
            one of the transport's connection_errors.
            ResponseError: Redis refuses to write.
        """
        for tags in _chunks(self._delivered):
            self._run(RENEW_LEASES, *tags)

    def give_back(self, tags: Iterable[str], push: str = "RPUSH", *, counted: bool = False) -> None:
        """Return messages to their lists: RPUSH to the end that is taken next, LPUSH behind what waits.

        Args:
            counted: as a return of a message whose worker died.
        """
        for chunk in _chunks(tags):
            self._run(GIVE_BACK, push, RETURNS_KEPT_S if counted else 0, *chunk)

    def give_back_harmful(self, delivery_tag: str) -> None:
        """Return a message that made its consumer fail. That ends the worker, so it counts as a death."""
        if self._delivered.pop(delivery_tag, None) is not None:
            self._forget([delivery_tag])
            self.give_back([delivery_tag], counted=True)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Return the messages of workers that no longer renew their leases. kombu calls it every few seconds."""
        self.flush_acks()
        try:
            bounds = self.channel.visibility_timeout, TAGS_PER_SCRIPT, RETURNS_KEPT_S
            while self._run(GIVE_BACK_EXPIRED, *bounds) == TAGS_PER_SCRIPT:
                pass
        except ResponseError as error:
            raise_if_read_only(error)
            if self._returns_refused.begin():
                logger.error("Redis refuses to return expired messages to their queues: %s", error)
        else:
            if self._returns_refused.end():
                logger.warning("Redis returns expired messages to their queues again")

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
            if self._delivered:
                logger.warning("%d messages are left to the visibility timeout: %r", len(self._delivered), error)
            self._delivered.clear()
            self._acks.clear()

    def _run(self, script: str, *args: Any) -> Any:
        channel = self.channel
        keys = channel.own_keys()
        with channel.conn_or_acquire() as client:
            return client.eval(script, len(keys), *keys, *args)


def raise_if_read_only(error: ResponseError) -> None:
    """A master that was demoted will not come back by itself: its name, asked again, may lead to the new one.

    Raises:
        redis.exceptions.ConnectionError: as one of the transport's connection_errors it has Celery connect anew.
    """
    # Of a script, Redis before 7 says it in the middle of the error.
    if isinstance(error, ReadOnlyError) or "-READONLY" in str(error):
        raise RedisConnectionError("this Redis is a read-only replica") from error


def is_out_of_memory(error: ResponseError) -> bool:
    """Whether Redis is at maxmemory. Of a script, Redis before 7 says it in the middle of the error."""
    return isinstance(error, OutOfMemoryError) or "-OOM" in str(error)


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

    longest_wait_s = LONGEST_WAIT_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._tag_prefixes = (f"{uuid4().hex}.{n}." for n in count())
        self._no_ack_queues: set[str] = set()
        self._taken = 0
        self._fetching: tuple[str, list[str]] | None = None
        """Of the FETCH in flight: its tag prefix, and the queue of each list; None of what begins a wait."""
        self._unheard: str | None = None
        """Tag prefix of a FETCH that was not answered."""
        self._next_fetch_at = 0.0
        """Until then we wait for a push, or leave a Redis alone that refuses."""
        self._asked_queues: set[str] = set()
        self._tracked_socket: object = None
        self._tracked = False
        """Whether Redis can push word of a list's change."""
        self._lists_empty = False
        self._fetch_refused = Outage()
        super().__init__(*args, **kwargs)
        # It answers, or the line above had raised; but a replica answers too. Celery tries again, with growing pauses.
        try:
            with self.conn_or_acquire() as client:
                client.hdel(self.unacked_key, "")
        except ResponseError as error:
            raise_if_read_only(error)

    @property
    def returns_key(self) -> str:
        return f"{self.unacked_key}_returns"

    def unheard_tags(self) -> list[str]:
        """Those that a FETCH may have given whose answer has not come; after a lost connection it never does."""
        if self._unheard is None:
            return []
        return [f"{self._unheard}{taken}" for taken in range(1, MAX_FETCH_MESSAGES + 1)]

    def own_keys(self) -> list[str]:
        """What the scripts need besides lists: KEYS[1] to KEYS[3]."""
        own = self.unacked_key, self.unacked_index_key, self.returns_key
        return [self.global_keyprefix + key for key in own]

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        (self._no_ack_queues.add if no_ack else self._no_ack_queues.discard)(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        # kombu's pops first and holds afterwards, which this QoS does not do.
        raise NotImplementedError("this transport only delivers to consumers: consume from the queue instead")

    def _size(self, queue: str) -> int:
        # Without kombu's MULTI: Redis at maxmemory refuses it, and a worker that starts must be able to drain it.
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for step in self.priority_steps:
                pipe.llen(self._q_for_pri(queue, step))
            return sum(pipe.execute())

    def _queue_bind(self, *args: Any) -> None:
        try:
            super()._queue_bind(*args)
        except ResponseError as error:
            if not is_out_of_memory(error):
                raise
            # Only what goes by way of an exchange needs the binding, and as a rule it is there from before.
            logger.warning("Redis could not note the binding of a queue (%s); going on without", error)

    def _delete(self, *args: Any, **kwargs: Any) -> None:
        # As in `_size`. Of a reply queue, whose replies were read, there is no list to delete any more.
        try:
            super()._delete(*args, **kwargs)
        except ResponseError as error:
            if not is_out_of_memory(error):
                raise

    def maybe_refresh_binding_expiry(self) -> None:
        # Bindings last for an hour, and kombu tries again within seconds.
        try:
            super().maybe_refresh_binding_expiry()
        except ResponseError as error:
            if not is_out_of_memory(error):
                raise

    def _brpop_start(self, timeout: float | None = None) -> None:
        connection = self.client.connection
        if connection._sock is not self._tracked_socket:
            self._track(connection)
        queues = self._queue_cycle.consume(len(self.active_queues))
        # A queue added meanwhile is not among those of which Redis tells us.
        if not queues or (monotonic() < self._next_fetch_at and self._asked_queues == set(queues)):
            return
        self._asked_queues = set(queues)
        # The cycle gives every queue its turn to be first, and the sort leaves equals in its order.
        ranks = [list(equals) for _, equals in groupby(sorted(queues, key=preference), key=preference)]
        queue_of_list = [queue for equals in ranks for _ in self.priority_steps for queue in equals]
        lists = [
            self.global_keyprefix + self._q_for_pri(queue, step)
            for equals in ranks
            for step in self.priority_steps
            for queue in equals
        ]
        commands: list[tuple[Any, ...]]
        if self._lists_empty:
            self._fetching = None
            if self._tracked:
                # A message may have come since the FETCH. From this look on, every change is told.
                commands = [("CLIENT", "CACHING", "YES"), ("EXISTS", *lists)]
            else:
                commands = [("BLMOVE", lists[0], lists[0], "RIGHT", "RIGHT", self.brpop_timeout)]
        else:
            prefix = next(self._tag_prefixes)
            self._fetching = prefix, queue_of_list
            self._unheard = prefix
            keys = [*self.own_keys(), *lists]
            room = self.qos.can_consume_max_estimate()
            bounds = room, self.max_fetch_bytes, int(not self.qos.holds_some), prefix, SUSPECT_RETURNS
            acknowledged = [int(queue not in self._no_ack_queues) for queue in queue_of_list]
            turns = self._turns([len(equals) * len(self.priority_steps) for equals in ranks], room)
            commands = [("EVAL", FETCH, len(keys), *keys, *bounds, *acknowledged, *turns)]
        self._in_poll = connection
        self._brpop_sent_at = monotonic()
        connection.send_packed_command(connection.pack_commands(commands))

    def _turns(self, lists_of_ranks: list[int], room: int) -> Iterator[int]:
        """FETCH's turns: the lower ranks' own, then whoever has messages, preferred ones first."""
        first = 0
        for lists, most in zip(lists_of_ranks, first_turns(len(lists_of_ranks), self._taken, room), strict=True):
            if most:
                yield from (first, first + lists - 1, most)
            first += lists
        yield from (0, first - 1, room)

    def _track(self, connection: Any) -> None:
        """Have Redis push to this connection when a list changes that was read there after CLIENT CACHING."""
        self._tracked_socket = connection._sock
        self._next_fetch_at = 0.0
        self._lists_empty = False
        self._tracked = False
        try:
            if str(connection.get_protocol()) != "3":
                raise ResponseError("the connection speaks RESP2, which has no pushes")
            connection.send_command("CLIENT", "TRACKING", "ON", "OPTIN")
            connection.read_response()
            self._tracked = True
        except ResponseError as error:
            logger.warning(
                "Redis cannot say when messages arrive (%s): looking into all but the first list of each "
                "worker once a second",
                error,
            )

    def _brpop_read(self, **options: Any) -> bool:
        fetching, connection = self._fetching, self.client.connection
        try:
            if fetching is None and self._tracked:
                with suppress(ResponseError):  # to CLIENT CACHING; the second reply must be read in any case
                    connection.read_response()
            reply = self.client.parse_response(connection, "EVAL", **options)
            self._unheard = None
            # A push that came along with the reply makes no socket readable any more.
            wait = fetching is None and self._tracked and not reply and not connection.can_read()
        except self.connection_errors:
            connection.disconnect()  # so that the next tick connects anew
            raise
        except ResponseError as error:
            self._unheard = None
            raise_if_read_only(error)
            # Out of memory, disk full, missing permission: raised in the hub it would end the worker.
            if self._fetch_refused.begin():
                what = "to wait for" if fetching is None else "to hand out"
                logger.error("Redis refuses %s messages: %s; asking again and again", what, error)
            self._next_fetch_at = monotonic() + self._fetch_refused.pause_s()
            self._lists_empty = False
            raise Empty from None
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        self._next_fetch_at = monotonic() + self.longest_wait_s if wait else 0.0
        if fetching is None:
            self._lists_empty = False
            raise Empty
        if self._fetch_refused.end():
            logger.warning("Redis hands out messages again")
        finish_first, time_us, *taken = reply
        clock.tell(time_us / 1e6)
        self.qos.finish_first = bool(finish_first)
        self._lists_empty = not taken and not finish_first
        if not taken:
            raise Empty
        self._deliver_all(_deliveries(taken, *fetching))
        return True

    def read_push(self) -> None:
        """A list has changed for which we wait; or the server has closed the connection.

        Raises:
            Empty: always, as a fetch that brings nothing.
        """
        connection = self.client.connection
        try:
            connection.read_response(push_request=True)
        except self.connection_errors:
            connection.disconnect()  # so that the next tick connects anew
        self._next_fetch_at = 0.0
        raise Empty

    def _deliver_all(self, deliveries: Sequence[Delivery]) -> None:
        waiting = deque(deliveries)
        self._taken += len(waiting)
        for queue in dict.fromkeys(delivery.queue for delivery in deliveries):
            self._queue_cycle.rotate(queue)
        until, room = monotonic() + DELIVER_S, self.max_fetch_bytes
        try:
            while waiting and not self._closing:
                delivery = waiting.popleft()
                self.qos.note(delivery)
                try:
                    self.connection._deliver(delivery, delivery.queue)
                except (SystemExit, KeyboardInterrupt, *self.connection_errors):
                    raise
                except BaseException:
                    self.qos.give_back_harmful(delivery.tag)
                    raise
                room -= self.qos.held_bytes(delivery.tag)
                # What is not acknowledged is not held, so it could not go back.
                if (room <= 0 or monotonic() > until) and not self._no_ack_queues:
                    break
        finally:
            # Closing, or a consumer raised: Redis counts the rest as held by us, but nobody here would ever ack it.
            # Or a few messages were large once decompressed, or slow to read: the next fetch takes the rest.
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


def _deliveries(taken: list[Any], prefix: str, queue_of_list: list[str]) -> list[Delivery]:
    """What a FETCH brought, preferred queues first."""
    ranked = sorted(zip(count(1), taken[::3], taken[1::3], taken[2::3], strict=False), key=itemgetter(1))
    return [Delivery(f"{prefix}{n}", queue_of_list[index], raw, returns) for n, index, raw, returns in ranked]


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
            channel.read_push()
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
        "priority_steps": [*PRIORITIES],
        "socket_connect_timeout": 5,
        "socket_timeout": 10,
        "socket_keepalive": True,
        "health_check_interval": 10,
    }
