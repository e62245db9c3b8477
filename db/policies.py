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
from db.activations import NEWEST_POSITION, choose_return, hold_activations, require_unchanged, way_back
from db.rows import chunks, every, insert_if_absent, insert_one
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
    after_position: int | None

    @property
    def activated(self) -> str:
        """What was activated, see `db.activations`."""
        return self.policy_version

    @property
    def label(self) -> str:
        """The same for people."""
        return f"policy {self.policy_version[:12]}"


def activate(
    connection: Connection, text: str, *, instead_of: PolicyActivationRow | None, by: str, reason: str, now: datetime
) -> int:
    """Store a policy and make it the active one; the activation's id is returned.

    The first activation is preceded by one of the policy that decided before it, from a worker's file, so that there
    is a way back.

    Args:
        instead_of: the newest activation as the caller saw it; None where there was none.

    Raises:
        ActiveChanged: another activation came after `instead_of`.
    """
    # Ids are given in the order of commits, so that whoever has seen one as the newest never misses an older one.
    hold_activations(connection)
    newest = active(connection)
    require_unchanged(instead_of, newest, now)
    version = store(connection, text, now=now)
    if newest is None and (decided := _newest_that_decided(connection)) not in (None, version):
        _insert(connection, decided, by=by, reason="decided before, by a worker's policy file", now=now)
    return _insert(connection, version, by=by, reason=reason, now=now)


def _insert(connection: Connection, version: str | None, *, by: str, reason: str, now: datetime) -> int:
    row = {
        "policy_version": version,
        "activated_at": now,
        "activated_by": by,
        "reason": reason,
        "after_position": NEWEST_POSITION,
    }
    return insert_one(connection, PolicyActivation, row)


def _newest_that_decided(connection: Connection) -> str | None:
    return connection.scalar(select(Decision.policy_version).order_by(Decision.decided_at.desc()).limit(1))


def roll_back(
    connection: Connection,
    *,
    instead_of: PolicyActivationRow | None,
    to: str | None,
    by: str,
    reason: str,
    now: datetime,
) -> int:
    """Go back to the policy that was active before the active one; the activation's id is returned.

    Args:
        instead_of: as in `activate`.
        to: the hash of an earlier policy; None for the one before, see `db.activations.choose_return`.

    Raises:
        ActiveChanged: another activation came after `instead_of`.
        AlreadyRolledBack: the active policy came back already, and `to` is None.
        NothingToRollBack: no other policy was active before, or not the one that `to` names.
    """
    hold_activations(connection)
    require_unchanged(instead_of, active(connection), now)
    _, version = rollback_target(connection, to=to, now=now)
    return _insert(connection, version, by=by, reason=reason, now=now)


def rollback_target(connection: Connection, *, to: str | None, now: datetime) -> tuple[PolicyActivationRow, str]:
    """The newest activation, and the hash of the policy to which a rollback would go from it.

    Raises:
        AlreadyRolledBack, NothingToRollBack: as `roll_back`.
    """
    oldest_first = select(PolicyActivation).order_by(PolicyActivation.policy_activation_id)
    history = every(connection, oldest_first, PolicyActivationRow)
    way = way_back(row.policy_version for row in history)
    version = choose_return(history, way[-2] if len(way) > 1 else None, to, now)
    return history[-1], version


def active(connection: Connection) -> PolicyActivationRow | None:
    """The newest activation: the truth that workers follow. None where each decides by its own policy file."""
    return next(iter(activations(connection, limit=1)), None)


def activations(connection: Connection, limit: int) -> list[PolicyActivationRow]:
    """The newest activations, newest first."""
    newest = select(PolicyActivation).order_by(PolicyActivation.policy_activation_id.desc()).limit(limit)
    return every(connection, newest, PolicyActivationRow)


# --- Stored scores -----------------------------------------------------------------------------------------------


def scored(
    connection: Connection, *, since: datetime | None = None, community: str | None = None
) -> Iterator[Sequence[Row[Any]]]:
    """Stream what was decided, the newest first, in chunks of rows: submission_id, community, action, fired_label,
    fired_threshold, policy_version, truncated, and the six scores in the order of `config.names.LABELS`.

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
            Decision.truncated,
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
