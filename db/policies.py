"""Every question asked about policies: their texts, which one is active, and the stored scores to try one on.

Like `db.queries`: functions take a connection and never commit. What a text means is the model's business.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, exists, func, select

from config.names import LABELS
from db.queries import hold_activations
from db.rows import chunks, every, first, insert_if_absent, insert_one
from db.session import DatabaseProblem
from db.tables import Decision, Policy, PolicyActivation, Submission

SHORTEST_PREFIX = 4
"""Characters of a hash by which a policy is asked for."""
SCORED_ROWS = 5_000
"""Held in memory of the stored scores: so many that what each chunk costs does not matter."""


class NoSuchPolicy(DatabaseProblem):
    """A policy that was never stored, or not the only one that begins so."""


# --- Texts -------------------------------------------------------------------------------------------------------


def store(connection: Connection, text: str, *, now: datetime) -> str:
    """Keep a policy's text; its version, the sha256 of the text's UTF-8 in hex, is returned."""
    policy_version = hashlib.sha256(text.encode()).hexdigest()
    connection.execute(
        insert_if_absent(connection, Policy), {"policy_version": policy_version, "text": text, "first_used_at": now}
    )
    return policy_version


def texts(connection: Connection, versions: Collection[str]) -> dict[str, str]:
    """The texts of these policies, by version; those never stored are absent."""
    found: dict[str, str] = {}
    for some in chunks(versions):
        kept = select(Policy.policy_version, Policy.text).where(Policy.policy_version.in_(some))
        found |= dict(connection.execute(kept).all())
    return found


def find(connection: Connection, prefix: str) -> tuple[str, str]:
    """Version and text of the one policy whose hash begins so.

    Raises:
        NoSuchPolicy: there is none, or more than one, or the prefix is none.
    """
    prefix = prefix.lower()
    if len(prefix) < SHORTEST_PREFIX or set(prefix) - set("0123456789abcdef"):
        raise NoSuchPolicy(f"{prefix!r} is no hash of a policy: give {SHORTEST_PREFIX} or more of its hex digits")
    begins_so = select(Policy.policy_version, Policy.text).where(Policy.policy_version.startswith(prefix))
    found = connection.execute(begins_so.order_by(Policy.policy_version).limit(2)).all()
    if not found:
        raise NoSuchPolicy(f"no policy whose hash begins with {prefix} was ever stored; see `moderato policy history`")
    if len(found) > 1:
        raise NoSuchPolicy(f"more than one policy's hash begins with {prefix}; give more of its digits")
    version, text = found[0]
    return version, text


# --- Activations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyActivationRow:
    """A row of `policy_activations`, column by column."""

    policy_activation_id: int
    policy_version: str
    activated_at: datetime
    activated_by: str
    reason: str


def activate(connection: Connection, text: str, *, by: str, reason: str, now: datetime) -> int:
    """Store a policy and make it the active one; the activation's id is returned."""
    # Ids are given in the order of commits, so that whoever has seen one as the newest never misses an older one.
    hold_activations(connection)
    row = {
        "policy_version": store(connection, text, now=now),
        "activated_at": now,
        "activated_by": by,
        "reason": reason,
    }
    return insert_one(connection, PolicyActivation, row)


def active(connection: Connection) -> PolicyActivationRow | None:
    """The newest activation: the truth that workers follow. None where each decides by its own policy file."""
    return next(iter(activations(connection, limit=1)), None)


def activations(connection: Connection, limit: int) -> list[PolicyActivationRow]:
    """The newest activations, newest first."""
    newest = select(PolicyActivation).order_by(PolicyActivation.policy_activation_id.desc()).limit(limit)
    return every(connection, newest, PolicyActivationRow)


def previous(connection: Connection) -> PolicyActivationRow | None:
    """The newest activation of another policy than the active one; None where there was no other."""
    newest_first = select(PolicyActivation).order_by(PolicyActivation.policy_activation_id.desc()).limit(1)
    now_active = newest_first.with_only_columns(PolicyActivation.policy_version).scalar_subquery()
    return first(connection, newest_first.where(PolicyActivation.policy_version != now_active), PolicyActivationRow)


# --- Stored scores -----------------------------------------------------------------------------------------------


def scored(
    connection: Connection, *, since: datetime | None = None, community: str | None = None
) -> Iterator[Sequence[Row[Any]]]:
    """Stream what was decided, the newest first, in chunks of rows: submission_id, community, action, fired_label,
    fired_threshold, policy_version, and the six scores in the order of `config.names.LABELS`.

    Plain tuples, as there may be millions: one object for each would take longer than the database.
    """
    columns = Decision.__table__.c
    statement = (
        select(
            Decision.submission_id,
            Submission.community,
            Decision.action,
            Decision.fired_label,
            Decision.fired_threshold,
            Decision.policy_version,
            *(columns[label] for label in LABELS),
        )
        .join_from(Decision, Submission)
        .where(*_wanted(since, community))
        .order_by(Decision.decided_at.desc())
    )
    # Closed with the iterator: an answer that is not read to its end holds a cursor on the server.
    with connection.execute(statement, execution_options={"yield_per": SCORED_ROWS}) as rows:
        yield from rows.partitions()


def count_scored(connection: Connection, *, since: datetime | None = None, community: str | None = None) -> int:
    """How many rows `scored` gives."""
    statement = select(func.count(Decision.submission_id)).where(*_wanted(since, community))
    if community is not None:
        statement = statement.join(Submission)
    return connection.scalar(statement) or 0


def _wanted(since: datetime | None, community: str | None) -> list[ColumnElement[bool]]:
    wanted = []
    if since is not None:
        wanted.append(Decision.decided_at >= since)
    if community is not None:
        wanted.append(Submission.community == community)
    return wanted


def known_communities(connection: Connection, names: Collection[str]) -> set[str]:
    """Those of these communities that ever submitted a comment."""
    return {name for name in names if connection.scalar(select(exists().where(Submission.community == name)))}
