"""How much a queue takes: its depth, and how many comments a community may submit. Asked and taken in one step.

Rates are kept by the generic cell rate algorithm: of each community Redis remembers until when its comments have
used up what it may submit. It may be a minute ahead of the clock, and once further by however many comments come
together, so that a large batch passes whole and is paid for by waiting.
https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from config.names import DEFAULT_COMMUNITY
from config.queues import priority_lists
from config.settings import ClientSettings

RATE_KEY = "moderato.rate."
"""Redis key of a community's rate, before its name."""
BURST_S = 60
"""One minute's comments may come at once."""
QUEUE_FULL_WAIT_S = 1.0

TAKE = r"""
-- KEYS: the queue's lists, the one to push to first, then the rate of each community that is limited
-- ARGV: most messages in the lists (0: any number), messages that come, seconds that a rate may be ahead, how many
--   lists there are, for each community its comments and the seconds that each takes, then the messages; without them
--   it is only asked
-- Reply: 'taken'; 'full' and the depth; or 'limited', which community, and the seconds to wait
local most, come, burst, lists = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local depth = 0
for i = 1, lists do depth = depth + redis.call('LLEN', KEYS[i]) end
-- An empty queue takes whatever comes together, or a small limit would refuse it for ever.
if most > 0 and depth > 0 and depth + come > most then return {'full', depth} end
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local limited, longest, kept, used_until = 0, 0, {}, {}
for i = lists + 1, #KEYS do
  local needs = 2 * (i - lists) + 3
  local comments, each = tonumber(ARGV[needs]), tonumber(ARGV[needs + 1])
  kept[i] = tonumber(redis.call('GET', KEYS[i]) or 0)
  local used = math.max(now, kept[i])
  local wait = used + each - now - burst
  if wait > longest then limited, longest = i - lists, wait end
  used_until[i] = used + comments * each
end
if limited > 0 then return {'limited', limited, tostring(longest)} end
-- The messages first: at maxmemory Redis refuses the first write or none.
local first = 2 * (#KEYS - lists) + 5
if #ARGV >= first then redis.call('LPUSH', KEYS[1], unpack(ARGV, first)) end
for i = lists + 1, #KEYS do
  -- Not SET: who may set rates could then write over a queue, which these two refuse.
  redis.call('INCRBYFLOAT', KEYS[i], string.format('%.6f', used_until[i] - kept[i]))
  redis.call('GETEX', KEYS[i], 'EX', math.ceil(used_until[i] - now))
end
return {'taken'}
"""


class TryLater(Exception):
    """What was to be submitted is too much just now; none of it was."""

    wait_s: float
    """When it makes sense to try again, seconds from now."""


class QueueFull(TryLater):
    """So many messages wait in the queue that no more are taken."""

    def __init__(self, depth: int, limit: int) -> None:
        super().__init__(
            f"{depth:,} messages wait in the queue, which takes up to {limit:,} (client.max_queue_messages); nothing "
            "was submitted: try again when the workers have caught up, or start more of them"
        )
        self.depth = depth
        self.limit = limit
        self.wait_s = QUEUE_FULL_WAIT_S


class RateLimited(TryLater):
    """A community has submitted all that it may for now."""

    def __init__(self, community: str, limit: int, wait_s: float) -> None:
        super().__init__(
            f"community {community!r} may submit {limit:,} comments in a minute (client.max_comments_per_minute); "
            f"nothing was submitted: try again in {math.ceil(wait_s):,} s"
        )
        self.community = community
        self.limit = limit
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Limits:
    """What may come together: false where anything may."""

    max_queue_messages: int
    """0 for any number."""
    rates: Sequence[tuple[str, int, int]]
    """Of each community that is limited: its name, how many comments come, and how many may in a minute."""

    @classmethod
    def of(cls, comments: Sequence[Mapping[str, Any]], settings: ClientSettings) -> Self:
        """The limits for these comments."""
        every, some = settings.max_comments_per_minute, settings.community_max_comments_per_minute
        rates = []
        if every or some:
            counts = Counter(comment.get("community", DEFAULT_COMMUNITY) for comment in comments)
            limited = ((name, count, some.get(name, every)) for name, count in counts.items())
            rates = [(name, count, per_minute) for name, count, per_minute in limited if per_minute]
        return cls(settings.max_queue_messages, rates)

    def __bool__(self) -> bool:
        return bool(self.max_queue_messages or self.rates)

    def take(self, channel: Any, queue: str, messages: int, payloads: Sequence[str] = ()) -> None:
        """Use up what these messages need, and append them to the queue: all of it, or nothing.

        Args:
            channel: kombu's, of Redis.
            queue: to whose list of priority 0 they are appended; those of the others count too.
            messages: how many there are.
            payloads: the messages; without them it is only used up.

        Raises:
            QueueFull, RateLimited: it is too much.
            RedisError, OSError: Redis may or may not have done it.
        """
        lists = priority_lists(queue)
        keys = [channel.global_keyprefix + key for key in (*lists, *(RATE_KEY + name for name, _, _ in self.rates))]
        needs = [value for _, count, per_minute in self.rates for value in (count, 60 / per_minute)]
        arguments = self.max_queue_messages, messages, BURST_S, len(lists), *needs, *payloads
        verdict, *details = channel.client.eval(TAKE, len(keys), *keys, *arguments)
        if verdict == b"full":
            raise QueueFull(int(details[0]), self.max_queue_messages)
        if verdict == b"limited":
            community, _, per_minute = self.rates[int(details[0]) - 1]
            raise RateLimited(community, per_minute, float(details[1]))
