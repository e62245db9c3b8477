"""Times as people type them at a command."""

import re
from datetime import UTC, datetime, timedelta

from cli.terminal import Problem

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def past(value: str) -> datetime:
    """A time: an age (`10m`, `2h`, `7d`, `4w`), or `2026-11-23`, `2026-11-23T12:00`: by this machine's clock, as times
    are shown, unless it names a zone (`2026-11-23T12:00Z`).

    Raises:
        Problem: it is neither.
    """
    try:
        if ago := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", value):
            return datetime.now(UTC) - timedelta(**{UNITS[ago[2]]: float(ago[1])})
        return datetime.fromisoformat(value).astimezone(UTC)
    except (ValueError, OverflowError):
        raise Problem(
            f"invalid time {value!r}: pass an age such as 10m, 2h, 7d or 4w, or a time such as 2026-11-23T12:00, "
            "which is read by this machine's clock unless it ends in a zone such as Z or +02:00"
        ) from None


def days_ago(days: float) -> datetime:
    """The time that many days ago.

    Raises:
        Problem: no calendar goes back so far.
    """
    try:
        return datetime.now(UTC) - timedelta(days=days)
    except (ValueError, OverflowError):
        raise Problem(f"invalid number of days: {days:g}; pass an age such as 90") from None
