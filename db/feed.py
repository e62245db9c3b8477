"""Decisions in the order in which they are handed on, so that whoever keeps a position misses none. Owns its SQL.

Each decision has a `position`. A reader keeps the highest that it has seen, its cursor, and asks for what lies above.
That is sound only if nothing can appear below a cursor later.

On SQLite nothing can: the recorder takes the highest position and one more, under the only writer's lock, so positions
become visible in their order.

On PostgreSQL a sequence gives them, and its order is not that of commits: of two recording transactions, the one that
drew the smaller position may commit last, and a reader that went by what it sees would step over it. To have writers
wait for each other would cost every recording; so it is the reader that waits (`settled_position`):

1. It reads H, the highest position that is committed.
2. It notes which transactions hold the lock that every INSERT takes on the table (ROW EXCLUSIVE on `decisions`).
3. It waits until each of these has ended. They are recordings and last milliseconds; those that begin meanwhile are
   not waited for, so it waits once, however busy the table is.

Then every position up to H is committed, and visible to the next statement, or never will be. For: a transaction that
drew p < H drew it before H was drawn, so before 1. It took the lock before it drew, since a statement locks its tables
before it computes anything, and it keeps it until it ends. So at 2 it either held the lock, and was waited for, or had
ended. And where it has committed, its rows are visible: PostgreSQL shows a commit before it releases its locks. What
begins after 1 draws positions above H.

This is how CREATE INDEX CONCURRENTLY makes sure of old writers. It asks nothing of those who write, so it holds beside
workers of an older release as well. No other lock is looked at: a transaction that reads for hours, or writes to other
tables, delays nothing. One that writes to `decisions` for long, such as one great DELETE, delays readers until its end.

Functions take a connection and never commit. On PostgreSQL each of their statements must see what is newest, as those
of `db.session.reading` do, and the server must be the primary: a replica knows nothing of the writers' locks.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, bindparam, func, select, text

from db.queries import Result, select_results
from db.rows import every
from db.session import DatabaseProblem
from db.tables import Decision, Submission

PATIENCE_S = 10.0
"""For transactions that write decisions to end."""
FIRST_LOOK_S, LONGEST_LOOK_S = 0.002, 0.1
"""Between two looks at whether they have."""
POSITIONS_PER_PAGE = 5_000
"""Most that one statement looks through, whatever it is to find there."""
ROWS_PER_PAGE = 500


class WritersDoNotEnd(DatabaseProblem):
    """Transactions that write decisions hold up whoever reads them in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecidedResult(Result):
    """A result as the feed hands it on."""

    position: int

    @property
    def cursor(self) -> str:
        """Where to go on after this one; opaque to whoever keeps it."""
        return str(self.position)


def position_of(cursor: str) -> int:
    """The position that a cursor stands for.

    Raises:
        ValueError: it is none of ours.
    """
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= 18):
        raise ValueError(f"{cursor[:40]!r} is no cursor: give one as it came with a decision")
    return int(cursor)


def settled_position(connection: Connection) -> int:
    """The position up to which every decision is visible from now on that ever will be; 0 before the first.

    Waits for what is being written, see above.

    Raises:
        WritersDoNotEnd: it has not ended after PATIENCE_S.
    """
    highest = _highest_position(connection)
    if connection.dialect.name == "postgresql":
        _wait_for_writers(connection)
    return highest


def _highest_position(connection: Connection) -> int:
    # Said so, SQLite too goes to the end of the index.
    return connection.scalar(select(func.max(Decision.position)).where(Decision.position.is_not(None))) or 0


_WRITERS = text("""
SELECT virtualtransaction, pid FROM pg_locks
WHERE locktype = 'relation' AND relation = 'decisions'::regclass AND mode = 'RowExclusiveLock' AND granted
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND pid <> pg_backend_pid()
""")
_WRITERS_LEFT = text(f"{_WRITERS.text} AND virtualtransaction IN :seen").bindparams(bindparam("seen", expanding=True))


def _wait_for_writers(connection: Connection) -> None:
    deadline = time.monotonic() + PATIENCE_S
    pause_s = FIRST_LOOK_S
    writers = connection.execute(_WRITERS).all()
    while writers:
        if time.monotonic() > deadline:
            processes = ", ".join(sorted(str(writer.pid) for writer in writers))
            raise WritersDoNotEnd(
                f"decisions cannot be handed on in order: transactions that write to the table have not ended for "
                f"{PATIENCE_S:g} s (PostgreSQL's processes {processes}); pg_stat_activity says whose they are"
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_LOOK_S)
        seen = [writer.virtualtransaction for writer in writers]
        writers = connection.execute(_WRITERS_LEFT, {"seen": seen}).all()


def position_before(connection: Connection, since: datetime) -> int:
    """Above which lies everything decided since then."""
    settled = settled_position(connection)
    # Not that of the earliest: what an outage held back was recorded late.
    placed = Decision.decided_at >= since, Decision.position.is_not(None)
    first = connection.scalar(select(func.min(Decision.position)).where(*placed))
    return settled if first is None else min(first - 1, settled)


def decided_after(
    connection: Connection,
    position: int,
    *,
    settled: int,
    community: str | None = None,
    actions: Collection[str] | None = None,
) -> tuple[list[DecidedResult], int]:
    """The next decisions in order, and the position up to which that is all of them.

    Args:
        settled: see `settled_position`; nothing beyond it is read.
        actions: only what the model's scores led to one of these, whatever reviewers made of it since.

    Returns:
        At most a page. There is more to read while the position returned is below `settled`.
    """
    if settled <= position:
        return [], position
    end = min(settled, position + POSITIONS_PER_PAGE)
    wanted = [Decision.position > position, Decision.position <= end]
    if community is not None:
        wanted.append(Submission.community == community)
    if actions is not None:
        wanted.append(Decision.action.in_(list(actions)))
    page = select_results().add_columns(Decision.position).where(*wanted)
    rows = every(connection, page.order_by(Decision.position).limit(ROWS_PER_PAGE), DecidedResult)
    return rows, rows[-1].position if len(rows) == ROWS_PER_PAGE else end
