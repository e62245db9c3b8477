"""What could not be decided: written, read and deleted. Owns the SQL of `dead_letters`.

Functions take a connection from `db.session.reading` or `writing` and never commit.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, func, select, update

from config.names import Reason
from db.durable import PendingSubmission, record_pending
from db.rows import chunks, every, insert_if_absent
from db.session import DatabaseProblem
from db.tables import DEAD, DECIDED, IS_PENDING, PENDING, DeadLetter, Submission


class AlreadyDecided(DatabaseProblem):
    """A dead letter of a comment that was decided after all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterRow:
    """A row of `dead_letters`, column by column."""

    dead_letter_id: str
    queue: str
    reason: str
    detail: str
    payload: bytes
    payload_bytes: int
    payload_sha256: str | None
    text_sha256: str | None
    community: str | None
    comment_id: str | None
    author: str | None
    received_at: datetime
    name: str | None = None
    submitted_at: datetime | None = None


def record(connection: Connection, letters: Sequence[DeadLetterRow]) -> None:
    """Set aside what could not be decided, unless it was decided after all; a letter already there is left as it is.

    A message may be with two workers at once, where one stood still for longer than its lease: the one decides a
    comment while the other refuses it. The submission's row settles which came first, as both must have it.
    """
    ordered = sorted(letters, key=lambda letter: letter.dead_letter_id)
    ids = [letter.dead_letter_id for letter in ordered]
    _end_submissions(connection, ordered)
    _end_wait(connection, ids)
    # A statement of its own: the first may have waited for another worker, and does not see what that one committed.
    decided = submission_states(connection, ids, DECIDED)
    if undecided := [asdict(letter) for letter in ordered if letter.dead_letter_id not in decided]:
        connection.execute(insert_if_absent(connection, DeadLetter), undecided)


def _end_submissions(connection: Connection, letters: Sequence[DeadLetterRow]) -> None:
    """Leave a dead submission of each well-formed comment that has none."""
    dead = [
        {
            "submission_id": letter.dead_letter_id,
            "community": letter.community,
            "comment_id": letter.comment_id or letter.dead_letter_id,
            "author": letter.author,
            "text_sha256": letter.text_sha256,
            "submitted_at": letter.received_at,
            "state": DEAD,
        }
        for letter in letters
        if letter.text_sha256 is not None
    ]
    if dead:
        connection.execute(insert_if_absent(connection, Submission), dead)


def _end_wait(connection: Connection, submission_ids: Collection[str]) -> None:
    for ids in chunks(submission_ids):
        pending = select(Submission.submission_id).where(IS_PENDING, Submission.submission_id.in_(ids))
        # In the order of ids, as decisions are recorded, so that two never wait for each other in a circle.
        locked = pending.order_by(Submission.submission_id).with_for_update()
        connection.execute(update(Submission).where(Submission.submission_id.in_(locked)).values(state=DEAD))


def newest(connection: Connection, *, limit: int | None, reason: Reason | None = None) -> list[DeadLetterRow]:
    """The newest dead letters, newest first; without a limit all of them.

    Args:
        reason: only those set aside for it.
    """
    letters = _narrowed(select(DeadLetter), reason, None)
    newest_first = letters.order_by(DeadLetter.received_at.desc(), DeadLetter.dead_letter_id)
    return every(connection, newest_first.limit(limit), DeadLetterRow)


def ids(connection: Connection, *, reason: Reason | None = None) -> list[str]:
    """Of all dead letters, the oldest first."""
    letters = _narrowed(select(DeadLetter.dead_letter_id), reason, None)
    return list(connection.scalars(letters.order_by(DeadLetter.received_at, DeadLetter.dead_letter_id)))


def by_id(connection: Connection, dead_letter_ids: Collection[str]) -> dict[str, DeadLetterRow]:
    """Those of these letters that there are, by their ids."""
    asked = (select(DeadLetter).where(DeadLetter.dead_letter_id.in_(ids)) for ids in chunks(dead_letter_ids))
    return {letter.dead_letter_id: letter for ids in asked for letter in every(connection, ids, DeadLetterRow)}


def count(connection: Connection, *, reason: Reason | None = None, received_before: datetime | None = None) -> int:
    """How many `purge` would delete."""
    return connection.scalar(_narrowed(select(func.count(DeadLetter.dead_letter_id)), reason, received_before)) or 0


def purge(connection: Connection, *, reason: Reason | None = None, received_before: datetime | None = None) -> int:
    """Delete the letters that fit all that is given; how many there were."""
    return connection.execute(_narrowed(delete(DeadLetter), reason, received_before)).rowcount


def submission_states(connection: Connection, submission_ids: Collection[str], *states: str) -> dict[str, str]:
    """Of those of these submissions that are in one of these states: which."""
    found: dict[str, str] = {}
    for ids in chunks(submission_ids):
        rows = select(Submission.submission_id, Submission.state)
        rows = rows.where(Submission.submission_id.in_(ids), Submission.state.in_(states))
        found |= dict(connection.execute(rows).all())
    return found


def take_back(connection: Connection, letter_id: str, rows: Sequence[PendingSubmission]) -> bool:
    """Put submissions, pending, in the place of a letter. In one transaction, so that there is always one or the other.

    Returns:
        Whether it was done; False where the letter is gone, and nothing was written.

    Raises:
        AlreadyDecided: one of them has a decision, which stands. Nothing must be committed.
    """
    if connection.execute(delete(DeadLetter).where(DeadLetter.dead_letter_id == letter_id)).rowcount != 1:
        return False
    ids = [row.submission_id for row in rows]
    dead = submission_states(connection, ids, DEAD)
    for row in rows:
        if row.submission_id in dead:
            again = {**asdict(row), "state": PENDING, "erased_at": None}
            connection.execute(update(Submission).where(Submission.submission_id == row.submission_id).values(again))
    taken = record_pending(connection, rows)
    if decided := taken or [*submission_states(connection, ids, DECIDED)]:
        raise AlreadyDecided(f"submission {decided[0]!r} has a decision already, which stands")
    return True


def _narrowed(statement: Any, reason: Reason | None, received_before: datetime | None) -> Any:
    if reason is not None:
        statement = statement.where(DeadLetter.reason == reason)
    if received_before is not None:
        statement = statement.where(DeadLetter.received_at < received_before)
    return statement
