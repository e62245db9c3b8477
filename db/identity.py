"""Which row a submission is: found by its id, or by the one that an older release gave it, and compared by its text.

Like `db.queries`: functions take a connection and never commit.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any, ClassVar, Protocol, TypeVar

from sqlalchemy import Connection, func, select

from config.identity import SubmissionId, community_and_name, id_of_text, refused_id
from db.rows import chunks, every
from db.tables import DeadLetter, Submission


class Identified(Protocol):
    """What tells a submission from others."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def community(self) -> str | None: ...
    @property
    def name(self) -> str | None: ...
    @property
    def text_sha256(self) -> str | None: ...


AnyRow = TypeVar("AnyRow", bound=Identified)


@dataclass(frozen=True, slots=True)
class Known:
    """What a row of `submissions` is."""

    submission_id: str
    community: str
    name: str | None
    text_sha256: str
    state: str
    submitted_at: datetime

    def is_same(self, other: Identified) -> bool:
        """Whether this is the row of that submission.

        Under its id there may be another: of another text, or of another community, where an older release wrote it.
        """
        return (self.community, self.name, self.text_sha256) == (other.community, other.name, other.text_sha256)


def known(connection: Connection, submission_ids: Collection[str], *, lock: bool = False) -> dict[str, Known]:
    """Those of these rows that there are, by their ids.

    Args:
        lock: nobody else changes them until this transaction ends.
    """
    columns = [Submission.__table__.c[field.name] for field in fields(Known)]
    found: dict[str, Known] = {}
    for ids in chunks(sorted(submission_ids)):
        rows: Any = select(*columns).where(Submission.submission_id.in_(ids))
        if lock:
            # In the order of ids, as decisions are recorded, so that two never wait for each other in a circle.
            rows = rows.order_by(Submission.submission_id).with_for_update()
        found |= {row.submission_id: row for row in every(connection, rows, Known)}
    return found


def under_stored_ids(connection: Connection, rows: Sequence[AnyRow], *, key: str = "submission_id") -> list[AnyRow]:
    """The rows; each that an older release has recorded goes under the id that it has there: its name.

    A worker of that release may still be running, and a message may come again from it.

    Args:
        rows: dataclasses.
        key: the field that holds the id.
    """
    names = {row.name for row in rows if row.name is not None}
    older: set[tuple[str | None, str | None]] = set()
    for some in chunks(names):
        recorded = Submission.submission_id.in_(some), Submission.name.is_(None)
        found = connection.execute(select(Submission.community, Submission.submission_id).where(*recorded))
        older |= {(community, name) for community, name in found}
    moved: list[AnyRow] = [
        replace(row, **{key: row.name, "name": None}) if (row.community, row.name) in older else row for row in rows
    ]
    return moved


def letters(connection: Connection, dead_letter_ids: Collection[str]) -> dict[str, tuple[str | None, str | None]]:
    """Those of these letters that there are, by their ids: of each its community and its text's sha256."""
    found: dict[str, tuple[str | None, str | None]] = {}
    for ids in chunks(dead_letter_ids):
        columns = DeadLetter.dead_letter_id, DeadLetter.community, DeadLetter.text_sha256
        rows = connection.execute(select(*columns).where(DeadLetter.dead_letter_id.in_(ids)))
        found |= {letter_id: (community, text_sha256) for letter_id, community, text_sha256 in rows}
    return found


def letter_places(row: Known) -> tuple[str, str]:
    """The ids that a submission's letter may have: its own, or where that is taken by another letter, one beside it."""
    return row.submission_id, id_of_text(row.submission_id, row.text_sha256)


def with_letter(connection: Connection, submissions: Collection[Known]) -> set[str]:
    """The ids of those of these submissions that a letter stands for."""
    found = letters(connection, [place for row in submissions for place in letter_places(row)])
    return {
        row.submission_id
        for row in submissions
        if any(is_letter_of(row, *found[place]) for place in letter_places(row) if place in found)
    }


def is_letter_of(row: Known, community: str | None, text_sha256: str | None) -> bool:
    """Whether a letter of this community and text, under an id of the submission's, stands for it."""
    # Older releases left both null in some.
    return community in (None, row.community) and text_sha256 in (None, row.text_sha256)


def standing(connection: Connection, submission_ids: Sequence[str]) -> list[Known | None]:
    """The row of each submission, in the order of the ids; None where there is none.

    A `SubmissionId` finds the row of its text, any other id whatever stands under it.
    """
    parts = [community_and_name(each) for each in submission_ids]
    rows = known(connection, {*submission_ids, *(name for _, name in filter(None, parts))})
    found: list[Known | None] = []
    beside: dict[int, str] = {}
    for index, (each, part) in enumerate(zip(submission_ids, parts, strict=True)):
        places = [rows.get(each)]
        if part is not None and (older := rows.get(part[1])) and (older.community, older.name) == (part[0], None):
            places.append(older)
        there = [row for row in places if row is not None]
        found.append(next((row for row in there if _is_of(row, each)), None))
        if found[-1] is None and there and isinstance(each, SubmissionId):
            beside[index] = id_of_text(each, each.text_hash)
    if beside:
        rows = known(connection, set(beside.values()))
        for index, place in beside.items():
            row = rows.get(place)
            found[index] = row if row is not None and _is_of(row, submission_ids[index]) else None
    return found


def _is_of(row: Known, asked: str) -> bool:
    if not isinstance(asked, SubmissionId):
        return True
    return row.community == asked.community and row.text_sha256.startswith(asked.text_hash)


def stored_id(connection: Connection, submission_id: str) -> str:
    """The id under which a submission is stored; the one given where it is not."""
    [row] = standing(connection, [submission_id])
    return submission_id if row is None else row.submission_id


def unread_places(submission_id: str) -> tuple[str, str]:
    """The ids that the letter of a comment without a row may have: what could not be read has only a letter.

    Older releases left it under the submission's own id.
    """
    parts = community_and_name(submission_id)
    return refused_id(submission_id if parts is None else parts[1]), submission_id


def communities_of(connection: Connection, comment_id: str) -> list[str]:
    """Those of which a submission or a dead letter has this comment id, in order."""
    letters = select(DeadLetter.community).where(DeadLetter.comment_id == comment_id, DeadLetter.community.is_not(None))
    found = {community for community in connection.scalars(letters.distinct()) if community is not None}
    # One step of the index for each community: comment ids alone have none.
    next_community = select(func.min(Submission.community))
    community = connection.scalar(next_community)
    while community is not None:
        one = select(Submission.comment_id).where(
            Submission.community == community, Submission.comment_id == comment_id
        )
        if connection.scalar(one.limit(1)) is not None:
            found.add(community)
        community = connection.scalar(next_community.where(Submission.community > community))
    return sorted(found)
