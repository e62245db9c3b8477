"""What commands share at the terminal: results on stdout, everything else on stderr, progress, one-line problems."""

import getpass
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any, Protocol

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

PLAIN_PROGRESS_S = 10
"""Between two lines of progress where stderr is no terminal."""
PLAIN_WIDTH = 160
"""Of tables that go into a file or a pipe, unless the environment's COLUMNS says otherwise."""
CONTROLS = dict.fromkeys(
    # C0 and C1 but for tab and line feed, and what turns the direction of writing.
    (*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)),
    "\N{REPLACEMENT CHARACTER}",
)
"""What no text may send to a terminal. The consoles' own colours do not pass through here."""

ACTION_STYLES = {"allow": "green", "label": "cyan", "review": "yellow", "hide": "magenta", "remove": "red"}


class _SafeConsole(Console):
    """Shows every text without the control characters in it: an author's name must not clear the screen."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else text.translate(CONTROLS), style, control)


for stream in (sys.stdout, sys.stderr):
    # A locale that lacks a character must not end a command half-way through its table.
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")

_follows_columns = sys.stdout.isatty() or "COLUMNS" in os.environ
out = _SafeConsole(highlight=False, width=None if _follows_columns else PLAIN_WIDTH)
err = _SafeConsole(highlight=False, stderr=True)


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


def print_line(line: Text, indent: int) -> None:
    """A line on stdout that begins with a name of `indent` columns: wrapped beside it on a terminal, else whole."""
    if not out.is_terminal:
        out.print(line, soft_wrap=True)
        return
    grid = Table.grid()
    grid.add_column(width=indent)
    grid.add_column(overflow="fold")
    grid.add_row(*line.divide([indent]))
    out.print(grid)


def shown(time: datetime | None) -> str:
    """A time by this machine's clock, with its zone."""
    return "" if time is None else f"{time.astimezone():%Y-%m-%d %H:%M:%S %Z}"


def confirm(question: str) -> None:
    """Ask on stderr.

    Raises:
        Problem: the answer is no, or nobody can answer.
    """
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        say("")  # the question ended without a line feed
        raise Problem("no answer, so nothing was changed; --yes does not ask") from None
    if not agreed:
        raise Problem("nothing was changed")


def printable(text: str) -> str:
    """A name on one line, every character as it came; those that cannot be seen are written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
    said_at, said = time.monotonic(), ""

    def update(done: float, total: float | None = None, note: str = "") -> None:
        nonlocal said_at, said, of
        of = total if total is not None else of
        if time.monotonic() - said_at >= PLAIN_PROGRESS_S:
            count = f"{done:,.0f}{'' if of is None else f' of {of:,.0f}'}" if done or of else ""
            line = " ".join(filter(None, (f"{description}:", count, note)))
            if line != said:
                said_at, said = time.monotonic(), line
                say(line)

    return update
