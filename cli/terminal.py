"""What commands share at the terminal: results on stdout, everything else on stderr, progress, one-line problems."""

import getpass
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

PLAIN_PROGRESS_S = 10
"""Between two lines of progress where stderr is no terminal."""
PLAIN_WIDTH = 160
"""Of tables that go into a file or a pipe."""

ACTION_STYLES = {"allow": "green", "label": "cyan", "review": "yellow", "hide": "magenta", "remove": "red"}

out = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
err = Console(highlight=False, stderr=True)


class Problem(Exception):
    """What was asked cannot be done; the message says why and what would help."""


class Update(Protocol):
    """Says how far a long work has come."""

    def __call__(self, done: float, total: float | None = None, note: str = "") -> None: ...


def say(message: str) -> None:
    """A line for people, on stderr, shown as it is."""
    err.print(message, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One line of JSON on stdout; dataclasses as objects, times in ISO 8601."""
    print(json.dumps(value, default=_json))


def _json(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)


def shown(time: datetime | None) -> str:
    """A time as this machine's clock shows it."""
    return "" if time is None else f"{time.astimezone():%Y-%m-%d %H:%M:%S}"


def shorten(text: str | None, most: int = 100) -> str:
    """A text on one line, without the control characters that could steer the terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text or "").split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def user() -> str:
    """Who runs this command, for the record."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Update]:
    """A bar on stderr; where that is no terminal, a plain line now and then."""
    if not err.is_terminal:
        yield _plain_progress(description, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(description, total=total, note="")

        def update(done: float, total: float | None = None, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)  # a total of None leaves it as it is

        yield update


def _plain_progress(description: str, of: float | None) -> Update:
    said_at = time.monotonic()

    def update(done: float, total: float | None = None, note: str = "") -> None:
        nonlocal said_at, of
        of = total if total is not None else of
        if time.monotonic() - said_at >= PLAIN_PROGRESS_S:
            said_at = time.monotonic()
            count = f"{done:,.0f}{'' if of is None else f' of {of:,.0f}'}" if done or of else ""
            say(" ".join(filter(None, (f"{description}:", count, note))))

    return update
