"""Submissions that are rows before they are messages: written as pending, and found again when they wait too long.

Their end is elsewhere: `db.queries.record_decisions` turns a pending row into a decided one, `db.dead_letters.record`
into a dead one. Functions take a connection, as there.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import Connection, Select, func, literal, select, update
from sqlalchemy.dialects import postgresql

from config.names import SWEEP_LOCK
from db.bulk import given_rows, in_json_list, json_parameter, sqlite_insert
from db.identity import known, under_stored_ids, with_letter
from db.rows import chunks
from db.tables import DEAD, IS_PENDING, PENDING, Submission


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
    name: str | None = None


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
    """Write each submission that is not there yet, and put back those whose dead letter is gone.

    One that waits, is decided, or has a letter stays as it is.

    Returns:
        The ids that belong to another text, or another community; where there is any, nothing should be committed.
    """
    rows = under_stored_ids(connection, rows)
    first: dict[str, PendingSubmission] = {}
    for row in rows:
        first.setdefault(row.submission_id, row)
    insert_new = {"postgresql": _insert_new_on_postgresql, "sqlite": _insert_new_on_sqlite}[connection.dialect.name]
    there = known(connection, insert_new(connection, [*first.values()]))
    taken = [
        row.submission_id
        for row in rows
        if (row.text_sha256 != first[row.submission_id].text_sha256)
        or ((of := there.get(row.submission_id)) and not of.is_same(row))
    ]
    if not taken and (dead := [row.submission_id for row in there.values() if row.state == DEAD]):
        _put_back(connection, {each: first[each] for each in dead})
    return list(dict.fromkeys(taken))


def _put_back(connection: Connection, rows: Mapping[str, PendingSubmission]) -> None:
    """Make those of these dead submissions pending whose letter is gone."""
    with_letters = with_letter(connection, [*known(connection, rows, lock=True).values()])
    for submission_id in rows.keys() - with_letters:
        values = asdict(rows[submission_id]) | {"state": PENDING, "erased_at": None}
        del values["comment_id"]  # it has one
        still_dead = Submission.submission_id == submission_id, Submission.state == DEAD
        connection.execute(update(Submission).where(*still_dead).values(values))


def _insert_new_on_postgresql(connection: Connection, rows: Sequence[PendingSubmission]) -> Sequence[str]:
    """Write the rows whose ids are new; the ids of the others."""
    return connection.scalars(_POSTGRESQL_INSERT, {"rows": json_parameter(rows)}).all()


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


def _insert_new_on_sqlite(connection: Connection, rows: Sequence[PendingSubmission]) -> Sequence[str]:
    """The same, under the only writer's lock."""
    there = set(connection.scalars(_SQLITE_THERE, {"ids": json.dumps([row.submission_id for row in rows])}))
    if new := [row for row in rows if row.submission_id not in there]:
        insert_sql, values = _SQLITE_INSERT
        connection.exec_driver_sql(insert_sql, values(new))
    return list(there)


_SQLITE_THERE = select(Submission.submission_id).where(in_json_list(Submission.__table__.c.submission_id))
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
