"""The time by which the worker stamps and judges: Redis' clock, which all workers share, not this host's.

Every FETCH brings Redis' time; between two of them the monotonic clock goes on. A host's clock that is wrong, or is
set while the worker runs, so neither expires a comment nor orders decisions.
"""

import time
from datetime import UTC, datetime

_epoch_s = time.time() - time.monotonic()
"""What the monotonic clock must be given to be wall time; until the first FETCH by the host's clock."""


def tell(redis_time_s: float) -> None:
    """Set the clock: seconds since the epoch, as Redis has just said."""
    global _epoch_s
    _epoch_s = redis_time_s - time.monotonic()


def now_s() -> float:
    """Seconds since the epoch."""
    return time.monotonic() + _epoch_s


def now() -> datetime:
    """The same as an aware datetime."""
    return datetime.fromtimestamp(now_s(), UTC)
