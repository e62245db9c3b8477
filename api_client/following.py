"""Following the decisions: every one in order, at least once, through outages of Redis and of the database."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager

from sqlalchemy import Connection

from api_client.listening import Nudges
from db import feed
from db.feed import DecidedResult
from db.outage import Outage
from db.session import DatabaseProblem

LOOK_S = 1.0
"""Between two looks where nobody says that there is something new."""
SHORTEST_LOOK_S = 0.05
"""Between two looks while decisions stream in, so that each brings many."""

logger = logging.getLogger(__name__)


def follow(
    read: Callable[[], AbstractContextManager[Connection]],
    nudges: Nudges,
    position: int,
    *,
    community: str | None,
    actions: Collection[str] | None,
    stop: threading.Event,
) -> Generator[DecidedResult, None, None]:
    """Decisions above a position as they are made, until `stop` is set; closes the nudges in the end.

    A page is read whole before any of it is handed on, so that nothing is held in the database meanwhile.
    """
    outage = Outage()
    settled = position
    try:
        while not stop.is_set():
            try:
                with read() as connection:
                    settled = feed.settled_position(connection)
                    rows, position = feed.decided_after(
                        connection, position, settled=settled, community=community, actions=actions
                    )
            except DatabaseProblem as problem:
                if outage.begin():
                    logger.warning("following the decisions waits: %s", problem)
                stop.wait(outage.pause_s())
                continue
            if outage.end():
                logger.warning("following the decisions goes on")
            yield from rows
            if position >= settled:
                if rows:
                    stop.wait(SHORTEST_LOOK_S)
                _wait(nudges, stop)
    finally:
        nudges.close()


def _wait(nudges: Nudges, stop: threading.Event) -> None:
    """Until something may be new; LOOK_S at most, within which `stop` is heard too."""
    until = time.monotonic() + LOOK_S
    while not stop.is_set() and (left_s := until - time.monotonic()) > 0:
        if nudges.wait(min(left_s, LOOK_S / 4)):
            return
