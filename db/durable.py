"""Submissions that are rows before they are messages: written as pending, and found again when they wait too long.

Their end is elsewhere: `db.queries.record_decisions` turns a pending row into a decided one, `db.dead_letters.record`
into a dead one. Functions take a connection, as there.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import Connection, Select, func, literal, select, update
from sqlalchemy.dialects import postgresql

from config.names import SWEEP_LOCK
from db.bulk import given_rows, in_json_list, json_parameter, sqlite_insert
from db.queries import SHA256_THAT_COUNTS
from db.rows import chunks
from db.tables import IS_PENDING, PENDING, Submission


# Not frozen, as setting the fields of a frozen one takes four times as long, for every comment.
@dataclass(slots=True, kw_only=True)
class PendingSubmission:
    """A comment that waits for its decision: a row of `submissions`, column by column."""

    state: ClassVar[str] = PENDING

    submission_id: str
    community: str
    comment_id: str
    author: str | None
    text: str
    text_sha256: str
    language: str | None
    context: dict[str, Any] | None
    created_at: datetime | None
    submitted_at: datetime
    queue: str
    expires_at: datetime | None
    enqueued_at: datetime


def database_time(connection: Connection) -> datetime:
    """The database's clock as it is now; SQLite has its machine's.

    Not the time at which the transaction began, as it may have waited for a lock since.
    """
    if connection.dialect.name == "postgresql":
        return connection.scalars(select(func.clock_timestamp())).one().astimezone(UTC)
    now: str = connection.scalars(select(func.strftime("%Y-%m-%dT%H:%M:%f", "now"))).one()
    return datetime.fromisoformat(now).replace(tzinfo=UTC)


# --- Submitting --------------------------------------------------------------------------------------------------


def record_pending(connection: Connection, rows: Sequence[PendingSubmission]) -> list[str]:
    """Write each submission that is not there yet. One that is stays as it is, whatever became of it.

    Returns:
        The ids that belong to another text; where there is any, nothing should be committed.
    """
    first: dict[str, PendingSubmission] = {}
    for row in rows:
        first.setdefault(row.submission_id, row)
    insert_new = {"postgresql": _insert_new_on_postgresql, "sqlite": _insert_new_on_sqlite}[connection.dialect.name]
    there = insert_new(connection, [*first.values()])
    text_sha256 = {submission_id: row.text_sha256 for submission_id, row in first.items()} | there
    taken = (row.submission_id for row in rows if text_sha256[row.submission_id] not in (None, row.text_sha256))
    return list(dict.fromkeys(taken))


def _insert_new_on_postgresql(connection: Connection, rows: Sequence[PendingSubmission]) -> dict[str, str | None]:
    """Write the rows whose ids are new; of each of the others, the hash of its text, if that counts."""
    there = connection.scalars(_POSTGRESQL_INSERT, {"rows": json_parameter(rows)}).all()
    text_sha256: dict[str, str | None] = {}
    for ids in chunks(there):
        known = select(Submission.submission_id, SHA256_THAT_COUNTS).where(Submission.submission_id.in_(ids))
        text_sha256 |= dict(connection.execute(known).all())
    return text_sha256


def _postgresql_insert() -> Select[Any]:
    given = given_rows(PendingSubmission, Submission)
    columns = [field.name for field in fields(PendingSubmission)]
    # In the order of ids, so that two producers inserting the same ones wait for each other but never in a circle.
    rows = select(*(given.c[name] for name in columns), literal(PENDING)).order_by(given.c.submission_id)
    inserted = (
        postgresql.insert(Submission)
        .from_select([*columns, "state"], rows)
        .on_conflict_do_nothing(index_elements=[Submission.submission_id])
        .returning(Submission.submission_id)
        .cte("inserted")
    )
    return select(given.c.submission_id).where(given.c.submission_id.not_in(select(inserted.c.submission_id)))


_POSTGRESQL_INSERT = _postgresql_insert()


def _insert_new_on_sqlite(connection: Connection, rows: Sequence[PendingSubmission]) -> dict[str, str | None]:
    """The same, under the only writer's lock."""
    ids = json.dumps([row.submission_id for row in rows])
    there: dict[str, str | None] = dict(connection.execute(_SQLITE_THERE, {"ids": ids}).all())
    if new := [row for row in rows if row.submission_id not in there]:
        insert_sql, values = _SQLITE_INSERT
        connection.exec_driver_sql(insert_sql, values(new))
    return there


_SQLITE_THERE = select(Submission.submission_id, SHA256_THAT_COUNTS).where(
    in_json_list(Submission.__table__.c.submission_id)
)
_SQLITE_INSERT = sqlite_insert(PendingSubmission, Submission)


# --- Sweeping ----------------------------------------------------------------------------------------------------


def take_sweep_lock(connection: Connection) -> bool:
    """Whether this transaction is the only one that sweeps, until its end. Never waits.

    On SQLite it is by being a write transaction.
    """
    if connection.dialect.name == "sqlite":
        return True
    return bool(connection.scalar(select(func.pg_try_advisory_xact_lock(SWEEP_LOCK))))


def overdue_queues(connection: Connection, *, before: datetime) -> list[str]:
    """The queues with submissions that are pending and were last put there before then."""
    queues: list[str] = []
    # One step of the index for each queue: it may hold a million submissions.
    next_queue = select(func.min(Submission.queue)).where(IS_PENDING)
    queue = connection.scalar(next_queue)
    while queue is not None:
        waits_too_long = IS_PENDING, Submission.queue == queue, Submission.enqueued_at < before
        if connection.scalar(select(Submission.submission_id).where(*waits_too_long).limit(1)) is not None:
            queues.append(queue)
        queue = connection.scalar(next_queue.where(Submission.queue > queue))
    return queues


def overdue(connection: Connection, *, queue: str, before: datetime, limit: int) -> list[PendingSubmission]:
    """Those of one queue, the longest waiting first."""
    columns = [Submission.__table__.c[field.name] for field in fields(PendingSubmission)]
    oldest = Submission.enqueued_at, Submission.submission_id
    waiting = IS_PENDING, Submission.queue == queue, Submission.enqueued_at < before
    statement = select(*columns).where(*waiting).order_by(*oldest).limit(limit)
    return [PendingSubmission(**row) for row in connection.execute(statement).mappings()]


def renew(connection: Connection, submission_ids: Collection[str], now: datetime) -> None:
    """Note that they are being put on their queue again. One that somebody is just deciding is passed over."""
    for ids in chunks(submission_ids):
        pending = select(Submission.submission_id).where(IS_PENDING, Submission.submission_id.in_(ids))
        free = pending.with_for_update(skip_locked=True)
        connection.execute(update(Submission).where(Submission.submission_id.in_(free)).values(enqueued_at=now))
