"""Decisions, reviews and erasures in one order, so that a reader who keeps a position misses none. Owns its SQL.

Each event is a row with a `position`: in `decisions`, `reviews` or `erased_submissions`. A reader keeps the highest
position that it has seen, its cursor, and asks for what lies above. That is sound only if nothing can appear below a
cursor later.

On SQLite nothing can. Every position is higher than all others, in whichever of the three tables, when it is given,
and it is given under the only writer's lock. So positions become visible in their order. The writer of decisions
counts by itself, as its release before did, but looks at decisions alone; where reviews or erasures have come further,
a trigger moves the new decision behind them, in the same transaction. The other two tables are counted by triggers, so
a client of the release before, which knows no position of a review, gives one too.

On PostgreSQL a sequence gives all of them, by the columns' defaults, and its order is not that of commits: of two
transactions, the one that drew the smaller position may commit last, and a reader that went by what it sees would step
over it. To have writers wait for each other would cost every recording. So the reader waits (`settled_position`):

1. It reads H, a highest position that is committed.
2. It notes which transactions hold the lock that every INSERT takes on its table (ROW EXCLUSIVE), on any of the three.
3. It waits until each of these has ended. They are short: a recording takes milliseconds. Those that begin meanwhile
   are not waited for, so it waits once, however busy the tables are.

Then every position up to H is committed, and visible to the next statement, or never will be. For: a transaction that
drew p < H drew it before H was drawn, since there is one sequence and no session keeps numbers in reserve; so it drew
before 1. It took the lock on its table before it drew, since a statement locks its tables before it computes anything,
and it keeps the lock until it ends. So at 2 it either held the lock, and was waited for, or had ended. And where it has
committed, its rows are visible: PostgreSQL shows a commit before it releases its locks. What begins to draw after 1
draws positions above H. This is true of each of the three tables, and H may come from any of them.

This is how CREATE INDEX CONCURRENTLY makes sure of old writers. It asks nothing of those who write, so it holds beside
processes of an older release too. An older reader waits for writers of decisions alone, and sees decisions alone, so
the same argument holds for it. No other lock is looked at: a transaction that reads for hours, or writes to other
tables, delays nothing. One that writes to these tables for long, such as one great DELETE, delays readers until its
end.

Within one submission the order is that of what happened: a review needs a committed decision, two reviews wait for each
other (`db.queries.add_review`), and of two reviews the one with the higher `review_id` has the higher position.

Functions take a connection and never commit. On PostgreSQL each of their statements must see what is newest, as those
of `db.session.reading` do, and the server must be the primary: a replica knows nothing of the writers' locks.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any, ClassVar

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, bindparam, exists, func, select, text
from sqlalchemy.orm import InstrumentedAttribute, aliased

from config.names import LABELS, EventType
from db.queries import Result, select_results
from db.session import DatabaseProblem
from db.tables import Decision, ErasedSubmission, Review, Submission

PATIENCE_S = 10.0
"""For transactions that write decisions, reviews or erasures to end."""
FIRST_LOOK_S, LONGEST_LOOK_S = 0.002, 0.1
"""Between two looks at whether they have."""
POSITIONS_PER_PAGE = 5_000
"""Most that one statement looks through, whatever it is to find there."""
ROWS_PER_PAGE = 500
EVENT_TYPES = tuple(EventType)


class WritersDoNotEnd(DatabaseProblem):
    """Long transactions that write decisions, reviews or erasures block the readers of the feed."""


class _Placed:
    """A row with a place in the feed."""

    __slots__ = ()
    type: ClassVar[EventType]
    position: int

    @property
    def cursor(self) -> str:
        """Where to go on after this one; opaque to whoever keeps it."""
        return str(self.position)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecidedResult(Result, _Placed):
    """A decision, with what holds when it is read: a later review has changed `action`, and not `model_action`."""

    type: ClassVar = EventType.DECIDED

    position: int

    @property
    def happened_at(self) -> datetime:
        return self.decided_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Reviewed(_Placed):
    """A person's word on a decision."""

    type: ClassVar = EventType.REVIEWED

    submission_id: str
    community: str
    comment_id: str
    submitted_at: datetime
    action: str
    """What the reviewer says should be done. It holds until the next review of this submission."""
    model_action: str
    """What was decided before any review."""
    labels: dict[str, bool]
    """Those that the reviewer spoke about."""
    reviewer: str
    note: str | None
    reviewed_at: datetime
    position: int

    @property
    def happened_at(self) -> datetime:
        return self.reviewed_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Erased(_Placed):
    """A submission whose text a person had erased. It may have no decision."""

    type: ClassVar = EventType.ERASED

    submission_id: str
    community: str
    comment_id: str
    submitted_at: datetime
    erased_at: datetime
    position: int

    @property
    def happened_at(self) -> datetime:
        return self.erased_at


Event = DecidedResult | Reviewed | Erased


def position_of(cursor: str) -> int:
    """The position that a cursor stands for.

    Raises:
        ValueError: it is none of ours.
    """
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= 18):
        raise ValueError(f"{cursor[:40]!r} is no cursor: give one as it came with an event")
    return int(cursor)


def settled_position(connection: Connection) -> int:
    """The position up to which every event is visible from now on that ever will be; 0 before the first.

    Waits for what is being written, see above.

    Raises:
        WritersDoNotEnd: it has not ended after PATIENCE_S.
    """
    highest = max(_highest(connection, table) for table in (Decision, Review, ErasedSubmission))
    if connection.dialect.name == "postgresql":
        _wait_for_writers(connection)
    return highest


def _highest(connection: Connection, table: type[Decision] | type[Review] | type[ErasedSubmission]) -> int:
    # With the condition SQLite too goes to the end of the index.
    return connection.scalar(select(func.max(table.position)).where(table.position.is_not(None))) or 0


_WRITERS = text("""
SELECT DISTINCT virtualtransaction, pid FROM pg_locks
WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
  AND relation IN ('decisions'::regclass, 'reviews'::regclass, 'erased_submissions'::regclass)
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
                f"events cannot be handed on in order: transactions that write decisions, reviews or erasures have not "
                f"ended for {PATIENCE_S:g} s (PostgreSQL's processes {processes}); pg_stat_activity says whose they are"
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_LOOK_S)
        seen = [writer.virtualtransaction for writer in writers]
        writers = connection.execute(_WRITERS_LEFT, {"seen": seen}).all()


def position_before(connection: Connection, since: datetime) -> int:
    """Above which lies everything decided, reviewed or erased since then."""
    settled = settled_position(connection)
    # Not that of the earliest: what an outage held back was recorded late.
    happened = (
        (Decision.position, Decision.decided_at),
        (Review.position, Review.reviewed_at),
        (ErasedSubmission.position, ErasedSubmission.erased_at),
    )
    firsts = (
        connection.scalar(select(func.min(position)).where(time >= since, position.is_not(None)))
        for position, time in happened
    )
    return min([settled, *(first - 1 for first in firsts if first is not None)])


def events_after(
    connection: Connection,
    position: int,
    *,
    settled: int,
    types: Collection[EventType] = EVENT_TYPES,
    community: str | None = None,
    actions: Collection[str] | None = None,
) -> tuple[list[Event], int]:
    """The next events in order, and the position up to which that is all of them.

    Args:
        settled: see `settled_position`; nothing beyond it is read.
        actions: only what concerns one of these, see `concerns`.

    Returns:
        At most a page. There is more to read while the position returned is below `settled`.
    """
    if settled <= position:
        return [], position
    end = min(settled, position + POSITIONS_PER_PAGE)
    found: list[Event] = []
    for kind in types:
        place = _POSITION[kind]
        wanted: list[ColumnElement[bool]] = [place > position, place <= end]
        if community is not None:
            wanted.append(Submission.community == community)
        if actions is not None:
            wanted.append(concerns(kind, actions))
        page = _SELECT[kind].where(*wanted).order_by(place).limit(ROWS_PER_PAGE)
        found += map(_EVENT[kind], connection.execute(page).mappings())
    # The first rows of each kind, as many as a page has, are enough for the first of all.
    found = sorted(found, key=attrgetter("position"))[:ROWS_PER_PAGE]
    return found, found[-1].position if len(found) == ROWS_PER_PAGE else end


def reviews_at(connection: Connection, positions: Collection[int]) -> dict[int, Reviewed]:
    """Reviews by their positions."""
    rows = connection.execute(_SELECT[EventType.REVIEWED].where(Review.position.in_(list(positions)))).mappings()
    return {row["position"]: _reviewed(row) for row in rows}


def erasures_at(connection: Connection, positions: Collection[int]) -> dict[int, Erased]:
    """Erasures by their positions."""
    at = ErasedSubmission.position.in_(list(positions))
    return {
        row["position"]: Erased(**row) for row in connection.execute(_SELECT[EventType.ERASED].where(at)).mappings()
    }


def concerns(kind: EventType, actions: Collection[str]) -> ColumnElement[bool]:
    """Whether an event is about one of these actions: the model's, or one that a review up to this event led to.

    So a reader that was told that a comment is hidden is also told of a later reversal to `allow`.
    """
    if kind is EventType.DECIDED:
        return Decision.action.in_(list(actions))
    event = Review if kind is EventType.REVIEWED else ErasedSubmission
    decision, review = aliased(Decision), aliased(Review)
    decided = exists().where(decision.submission_id == event.submission_id, decision.action.in_(list(actions)))
    reviewed = exists().where(
        review.submission_id == event.submission_id,
        func.coalesce(review.position, 0) <= event.position,
        review.action.in_(list(actions)),
    )
    return decided | reviewed


_POSITION: dict[EventType, InstrumentedAttribute[int | None]] = {
    EventType.DECIDED: Decision.position,
    EventType.REVIEWED: Review.position,
    EventType.ERASED: ErasedSubmission.position,
}


_SUBMISSION = Submission.submission_id, Submission.community, Submission.comment_id, Submission.submitted_at
_SELECT: dict[EventType, Select[*tuple[Any, ...]]] = {
    EventType.DECIDED: select_results().add_columns(Decision.position),
    EventType.REVIEWED: select(
        *_SUBMISSION,
        Review.action,
        Decision.action.label("model_action"),
        *(Review.__table__.c[label] for label in LABELS),
        Review.reviewer,
        Review.note,
        Review.reviewed_at,
        Review.position,
    )
    .join_from(Review, Decision)
    .join(Submission),
    EventType.ERASED: select(*_SUBMISSION, ErasedSubmission.erased_at, ErasedSubmission.position).join_from(
        ErasedSubmission, Submission
    ),
}


def _reviewed(row: RowMapping) -> Reviewed:
    values = dict(row)
    said = {label: values.pop(label) for label in LABELS}
    return Reviewed(**values, labels={label: value for label, value in said.items() if value is not None})


_EVENT: dict[EventType, Callable[[RowMapping], Event]] = {
    EventType.DECIDED: lambda row: DecidedResult(**row),
    EventType.REVIEWED: _reviewed,
    EventType.ERASED: lambda row: Erased(**row),
}
