"""Times as people type them at a command."""

import re
from datetime import UTC, datetime, timedelta

from cli.terminal import Problem

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def past(value: str) -> datetime:
    """A time: so long ago (`10m`, `2h`, `7d`, `4w`), or `2026-11-23`, `2026-11-23T12:00`: UTC unless it says.

    Raises:
        Problem: it is neither.
    """
    try:
        if ago := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", value):
            return datetime.now(UTC) - timedelta(**{UNITS[ago[2]]: float(ago[1])})
        time = datetime.fromisoformat(value)
    except (ValueError, OverflowError):
        raise Problem(f"{value!r} is no time: give one as 10m, 2h, 7d, 4w ago, or as 2026-11-23T12:00 (UTC)") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
