"""What could not be decided: written, read and deleted. Owns the SQL of `dead_letters`.

Functions take a connection from `db.session.reading` or `writing` and never commit.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, func, null, select, update

from config.identity import id_of_text
from config.names import Reason
from db import identity
from db.durable import PendingSubmission, database_time, record_pending
from db.identity import known, under_stored_ids
from db.rows import chunks, every, insert_if_absent
from db.session import DatabaseProblem
from db.tables import DEAD, DECIDED, HOLDS_TEXT, IS_DEAD, IS_PENDING, PENDING, DeadLetter, Submission


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


def record(connection: Connection, letters: Sequence[DeadLetterRow]) -> list[DeadLetterRow]:
    """Set aside what could not be decided, unless it was decided after all; a letter already there is left as it is.

    A message may be with two workers at once, where one was stopped for longer than its lease: the one decides a
    comment while the other refuses it. The submission's row settles which came first, as both must have it.

    A letter ends its own submission only. Where its id belongs to another text, it goes under `id_of_text`.

    Returns:
        The letters that stand, each under the id that it has.
    """
    of_submissions = [letter for letter in letters if letter.text_sha256 is not None]
    unread = [letter for letter in letters if letter.text_sha256 is None]
    standing = unread + _end_submissions(connection, under_stored_ids(connection, of_submissions, key="dead_letter_id"))
    if standing:
        ordered = sorted(standing, key=_id)
        connection.execute(insert_if_absent(connection, DeadLetter), [asdict(letter) for letter in ordered])
    return standing


def _id(letter: DeadLetterRow) -> str:
    return letter.dead_letter_id


def _end_submissions(
    connection: Connection, letters: Sequence[DeadLetterRow], *, beside: bool = False
) -> list[DeadLetterRow]:
    """Leave a dead submission of each well-formed comment, and end the wait of those that are pending.

    Args:
        beside: the ids are those of `id_of_text`, since their own belong to others.

    Returns:
        The letters of all that were not decided, each under the id of its submission.
    """
    if not letters:
        return []
    letters = sorted(letters, key=_id)
    connection.execute(insert_if_absent(connection, Submission), [_dead_submission(letter) for letter in letters])
    ids = [letter.dead_letter_id for letter in letters]
    # Locked: a worker that decides a dead submission without a letter locks it too, before it looks for one.
    there, taken = known(connection, ids, lock=True), identity.letters(connection, ids)
    standing, elsewhere, undecided = [], [], []
    for letter in letters:
        assert letter.text_sha256 is not None
        row, whose = there[letter.dead_letter_id], (letter.community, letter.text_sha256)
        place = id_of_text(letter.dead_letter_id, letter.text_sha256)
        if not row.is_same(letter):
            elsewhere.append(replace(letter, dead_letter_id=place, name=None))
        elif row.state == DEAD or (row.state == PENDING and not beside):
            undecided.append(letter.dead_letter_id)
            if row.state == PENDING:  # its message may be of a retry, and later
                letter = replace(letter, submitted_at=row.submitted_at)
            # An older release may have left another letter under the id.
            is_free = taken.get(letter.dead_letter_id, whose) == whose
            standing.append(letter if is_free else replace(letter, dead_letter_id=place))
        # What is pending beside another text is so because an operator retried it: it will be decided.
    for some in chunks(undecided):
        waits = IS_PENDING, Submission.submission_id.in_(some)
        connection.execute(update(Submission).where(*waits).values(state=DEAD))
    return standing + _end_submissions(connection, elsewhere, beside=True)


def _dead_submission(letter: DeadLetterRow) -> dict[str, Any]:
    return {
        "submission_id": letter.dead_letter_id,
        "community": letter.community,
        "comment_id": letter.comment_id or letter.dead_letter_id,
        "author": letter.author,
        "text_sha256": letter.text_sha256,
        "submitted_at": letter.submitted_at or letter.received_at,
        "state": DEAD,
        "name": letter.name,
    }


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


def letter_of(connection: Connection, submission_id: str) -> DeadLetterRow | None:
    """The letter that a submission came to; None where it came to none, or it was deleted."""
    [row] = identity.standing(connection, [submission_id])
    places = identity.unread_places(submission_id) if row is None else identity.letter_places(row)
    found = by_id(connection, places)
    there = (found[place] for place in places if place in found)
    return next(
        (each for each in there if row is None or identity.is_letter_of(row, each.community, each.text_sha256)), None
    )


def count(connection: Connection, *, reason: Reason | None = None, received_before: datetime | None = None) -> int:
    """How many `purge` would delete."""
    return connection.scalar(_narrowed(select(func.count(DeadLetter.dead_letter_id)), reason, received_before)) or 0


def purge(connection: Connection, *, reason: Reason | None = None, received_before: datetime | None = None) -> int:
    """Delete the letters that fit all that is given, and their submissions' texts; how many letters there were."""
    ids = _narrowed(select(DeadLetter.dead_letter_id), reason, received_before)
    texts = update(Submission).where(Submission.submission_id.in_(ids), IS_DEAD, HOLDS_TEXT)
    connection.execute(texts.values(text=null(), context=null(), erased_at=database_time(connection)))
    return connection.execute(_narrowed(delete(DeadLetter), reason, received_before)).rowcount


def take_back(connection: Connection, letter_id: str, rows: Sequence[PendingSubmission]) -> bool:
    """Put submissions, pending, in the place of a letter. In one transaction, so that there is always one or the other.

    Returns:
        Whether it was done; False where the letter is gone, and nothing was written.

    Raises:
        AlreadyDecided: one of them has a decision, or its id belongs to another text. Nothing must be committed.
    """
    if connection.execute(delete(DeadLetter).where(DeadLetter.dead_letter_id == letter_id)).rowcount != 1:
        return False
    if taken := record_pending(connection, rows):
        raise AlreadyDecided(f"the id {taken[0]!r} belongs to another text")
    there = identity.standing(connection, [row.submission_id for row in rows])
    if decided := [row.submission_id for row in there if row is not None and row.state == DECIDED]:
        raise AlreadyDecided(f"submission {decided[0]!r} has a decision already, which stands")
    return True


def _narrowed(statement: Any, reason: Reason | None, received_before: datetime | None) -> Any:
    if reason is not None:
        statement = statement.where(DeadLetter.reason == reason)
    if received_before is not None:
        statement = statement.where(DeadLetter.received_at < received_before)
    return statement
