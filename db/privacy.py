"""Erasing what people wrote: of one comment, of one author, or grown older than the settings allow.

Scores and decisions stay, and so does the hash of the text: a message that comes again must find its decision. Owns
also what the databases themselves keep of erased bytes, as far as a connection can reach it.
"""

import hashlib
import sqlite3
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    CursorResult,
    Engine,
    exists,
    func,
    insert,
    null,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError

from config.names import Reason
from db import dead_letters
from db.rows import chunks
from db.session import without_rows
from db.tables import (
    DEAD,
    DECIDED,
    HOLDS_TEXT,
    IS_DEAD,
    IS_PENDING,
    DeadLetter,
    Decision,
    ErasedSubmission,
    Erasure,
    Submission,
)

RETENTION = "retention"
RETENTION_STEP = 2_000
"""Decisions, or dead letters, whose texts go in one transaction: a moment's work, so that workers need not wait."""
RETENTION_PAUSE = timedelta(hours=1)
"""Between two rounds, or less where texts are kept for hours only."""
VACUUMED = ("submissions", "dead_letters")


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose texts are to go."""

    kind: Literal["comment", "author"]
    name: str
    """The producer's id of the comment, or the author."""
    community: str | None = None
    """Null for all of them."""

    @property
    def recorded_name(self) -> str:
        """As `erasures` keeps it."""
        return self.name if self.kind == "comment" else hashlib.sha256(self.name.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Erased:
    """How much an erasure takes, or took."""

    submissions: int
    dead_letters: int
    undecided: int = 0
    """Of the submissions: those that waited for their decision and now get none."""


def erasable(connection: Connection, subject: Subject) -> Erased:
    """What `erase` would take."""
    submissions, letters = _of_submissions(subject), _of_dead_letters(subject)
    count = select(func.count()).select_from
    return Erased(
        submissions=connection.scalar(count(Submission).where(*submissions)) or 0,
        dead_letters=connection.scalar(count(DeadLetter).where(*letters)) or 0,
        undecided=connection.scalar(count(Submission).where(*submissions, IS_PENDING)) or 0,
    )


def erase(connection: Connection, subject: Subject, *, by: str, reason: str | None, now: datetime) -> Erased:
    """Erase texts, contexts and dead letters' payloads, of an author the name too, and write down that it was done.

    Each submission is an event of the feed. One that still waits for its decision cannot be scored any more: it becomes
    a dead letter.
    """
    undecided = _give_up_undecided(connection, subject, now)
    author: dict[str, Any] = {"author": null()} if subject.kind == "author" else {}
    # In the order of ids, as workers record, so that two never wait for each other in a circle.
    wanted = select(Submission.submission_id).where(*_of_submissions(subject)).order_by(Submission.submission_id)
    ids = connection.scalars(wanted.with_for_update()).all()
    for some in chunks(ids):
        _erase_submissions(connection, Submission.submission_id.in_(some), now=now, **author)
    letters = _erase_letters(connection, *_of_dead_letters(subject), **author)
    _record(
        connection,
        kind=subject.kind,
        subject=subject.recorded_name,
        community=subject.community,
        submissions=len(ids),
        dead_letters=letters,
        erased_at=now,
        erased_by=by,
        reason=reason,
    )
    # Last, because readers of the feed wait from here until the end of the transaction.
    for some in chunks(ids):
        events = [{"submission_id": each, "erased_at": now} for each in some]
        connection.execute(insert(ErasedSubmission), events)
    return Erased(len(ids), letters, undecided)


def _give_up_undecided(connection: Connection, subject: Subject, now: datetime) -> int:
    pending = (
        select(Submission)
        .where(*_of_submissions(subject), IS_PENDING)
        # In the order of ids, as workers record, so that two never wait for each other in a circle.
        .order_by(Submission.submission_id)
        .with_for_update()
    )
    rows = connection.execute(pending).all()
    letters = [
        dead_letters.DeadLetterRow(
            dead_letter_id=row.submission_id,
            queue=row.queue,
            reason=Reason.ERASED.value,
            detail=ERASED_DETAIL,
            payload=b"",
            payload_bytes=0,
            payload_sha256=None,
            text_sha256=row.text_sha256,
            community=row.community,
            comment_id=row.comment_id,
            author=None if subject.kind == "author" else row.author,
            received_at=now,
            name=row.name,
            submitted_at=row.submitted_at,
        )
        for row in rows
    ]
    dead_letters.record(connection, letters)
    return len(rows)


def _of_submissions(subject: Subject) -> list[ColumnElement[bool]]:
    """The rows that hold something of the subject's."""
    if subject.kind == "comment":
        found = [Submission.comment_id == subject.name, HOLDS_TEXT]
    else:
        found = [Submission.author == subject.name]
    return found if subject.community is None else [*found, Submission.community == subject.community]


def _of_dead_letters(subject: Subject) -> list[ColumnElement[bool]]:
    if subject.kind == "comment":
        found = [DeadLetter.comment_id == subject.name, _HOLDS_WORDS]
    else:
        found = [DeadLetter.author == subject.name]
    return found if subject.community is None else [*found, DeadLetter.community == subject.community]


ERASED_DETAIL = "its text was erased"
"""In the place of a letter's detail: those of older releases may quote the name of an unknown field, which may be a
text that stands in the wrong place."""
_HOLDS_WORDS = or_(DeadLetter.payload != b"", DeadLetter.detail != ERASED_DETAIL)


def _erase_submissions(connection: Connection, *wanted: ColumnElement[bool], now: datetime, **more: Any) -> int:
    return _count(
        connection, update(Submission).where(*wanted).values(text=null(), context=null(), erased_at=now, **more)
    )


def _erase_letters(connection: Connection, *wanted: ColumnElement[bool], **more: Any) -> int:
    values = {"payload": b"", "detail": ERASED_DETAIL} | more
    return _count(connection, update(DeadLetter).where(*wanted).values(values))


def _count(connection: Connection, statement: Any) -> int:
    changed: CursorResult[Any] = connection.execute(statement)
    return changed.rowcount


def _record(connection: Connection, **row: Any) -> None:
    connection.execute(insert(Erasure).values(row))


# --- Retention ---------------------------------------------------------------------------------------------------


def retention_is_due(connection: Connection, *, keep_days: float, now: datetime) -> bool:
    """Whether the last round ended long enough ago, or where a process died within it."""
    keep = timedelta(days=keep_days)
    done = _erased_until(connection)
    return done is None or now - keep - done >= min(RETENTION_PAUSE, keep / 24)


def erase_expired(connection: Connection, *, keep_days: float, by: str, now: datetime) -> tuple[Erased, bool]:
    """One step of erasing what was decided, or set aside, more than `keep_days` ago; and whether more is left.

    Walks the indexes of time from where the step before ended, so that no row is read twice.

    Args:
        now: by the database's clock.
    """
    end = now - timedelta(days=keep_days)
    start = _erased_until(connection)
    if start is not None and start >= end:
        return Erased(0, 0), False
    until = min(
        _end_of_step(connection, Decision.decided_at, start, end),
        _end_of_step(connection, DeadLetter.received_at, start, end),
    )
    decided = select(Decision.submission_id).where(*_between(Decision.decided_at, start, until))
    set_aside = select(DeadLetter.dead_letter_id).where(*_between(DeadLetter.received_at, start, until))
    # Those without a letter: an older release left their texts when the letter was purged.
    letter = exists().where(DeadLetter.dead_letter_id == Submission.submission_id)
    old = IS_DEAD, Submission.text.is_not(None), Submission.submitted_at < end, ~letter
    left = select(Submission.submission_id).where(*old).order_by(Submission.submitted_at).limit(RETENTION_STEP)
    submissions = 0
    for state, ids in (DECIDED, decided), (DEAD, set_aside), (DEAD, left):
        expired = Submission.submission_id.in_(ids), Submission.state == state, HOLDS_TEXT
        submissions += _erase_submissions(connection, *expired, now=now)
    payloads_erased = _erase_letters(connection, *_between(DeadLetter.received_at, start, until), _HOLDS_WORDS)
    _record(
        connection,
        kind=RETENTION,
        subject=f"{keep_days:g}",
        until=until,
        submissions=submissions,
        dead_letters=payloads_erased,
        erased_at=now,
        erased_by=by,
    )
    return Erased(submissions, payloads_erased), until < end


def _erased_until(connection: Connection) -> datetime | None:
    return connection.scalar(select(func.max(Erasure.until)).where(Erasure.kind == RETENTION))


def _end_of_step(connection: Connection, time: Any, start: datetime | None, end: datetime) -> datetime:
    """The time before which a step's worth of rows lies, at most `end`.

    A step never ends between rows of one time, as a batch has them; where all are of one time it ends behind them.
    """
    times = select(time).order_by(time).limit(1)
    nth = connection.scalar(times.where(*_between(time, start, end)).offset(RETENTION_STEP))
    if nth is not None and nth == start:
        nth = connection.scalar(times.where(time > start, time < end))
    return end if nth is None else nth


def _between(time: Any, start: datetime | None, end: datetime) -> list[ColumnElement[bool]]:
    return [time < end] if start is None else [time >= start, time < end]


# --- What the database keeps of erased bytes ---------------------------------------------------------------------


def reclaim(engine: Engine) -> str | None:
    """Have the database drop the erased bytes from its files; where it could not, why and what to do.

    SQLite's file is rewritten, and its write-ahead log emptied: with `secure_delete` alone, copies of a row stay behind
    where pages were once rearranged. PostgreSQL frees their space, and overwrites it when it needs it.
    """
    try:
        return _rewrite_sqlite(engine) if engine.dialect.name == "sqlite" else _vacuum_postgresql(engine)
    except (DBAPIError, sqlite3.Error) as error:
        why = without_rows(error) if isinstance(error, DBAPIError) else error
        return f"the rows are erased, but not yet their bytes in the database's files ({why}); run the command again"


def _rewrite_sqlite(engine: Engine) -> str | None:
    # Not within a transaction, which SQLAlchemy would begin.
    with engine.connect() as connection:
        driver_connection: Any = connection.connection.driver_connection
        driver_connection.execute("VACUUM")
        blocked, *_ = driver_connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if blocked:
        return "somebody reads the database, so that its write-ahead log still holds the bytes; run the command again"
    return None


def _vacuum_postgresql(engine: Engine) -> str | None:
    notices: list[str] = []
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        driver_connection: Any = connection.connection.driver_connection

        def keep(notice: Any) -> None:
            notices.append(notice.message_primary)

        driver_connection.add_notice_handler(keep)
        try:
            connection.execute(text(f"VACUUM {', '.join(VACUUMED)}"))
        finally:
            driver_connection.remove_notice_handler(keep)
    if notices:
        return f"the space of what was erased is not freed yet ({'; '.join(notices)}); autovacuum will, or the owner"
    return None
