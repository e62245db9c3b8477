"""Following the feed: every event in order, at least once, through outages of Redis and of the database."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager

from sqlalchemy import Connection

from api_client.listening import Nudges
from config.names import EventType
from db import feed
from db.feed import Event
from db.outage import Outage
from db.session import DatabaseProblem

LOOK_S = 1.0
"""Between two looks where nobody says that there is something new."""
SHORTEST_LOOK_S = 0.05
"""Between two looks while events stream in, so that each brings many."""

logger = logging.getLogger(__name__)


def follow(
    read: Callable[[], AbstractContextManager[Connection]],
    nudges: Nudges,
    position: int,
    *,
    types: Collection[EventType],
    community: str | None,
    actions: Collection[str] | None,
    stop: threading.Event,
) -> Generator[Event, None, None]:
    """Events above a position as they happen, until `stop` is set; closes the nudges in the end.

    A page is read whole before any of it is handed on, so that nothing is held in the database meanwhile.
    """
    outage = Outage()
    settled = position
    try:
        while not stop.is_set():
            try:
                with read() as connection:
                    settled = feed.settled_position(connection)
                    rows, position = feed.events_after(
                        connection, position, settled=settled, types=types, community=community, actions=actions
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
