"""What activations of versions and of policies share: one lock, the check of what is replaced, and the way back.

Like `db.queries`: functions take a connection and never commit.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any, Protocol, TypeVar

from sqlalchemy import ColumnElement, Connection, case, func, select

from config.names import ACTIVATION_LOCK
from db.session import DatabaseProblem
from db.tables import Activation, Decision, PolicyActivation


class ActiveChanged(DatabaseProblem):
    """Something else became active after the caller had looked; nothing was written."""


class NothingToRollBack(DatabaseProblem):
    """There is no earlier version or policy to go back to, or not the one that was named."""


class AlreadyRolledBack(DatabaseProblem):
    """The active version or policy is itself the result of going back. Going further back needs a name."""


class Activated(Protocol):
    """A row of `activations` or of `policy_activations`."""

    @property
    def activated(self) -> str:
        """The version, or the policy's hash."""

    @property
    def label(self) -> str:
        """The same for people."""

    @property
    def activated_at(self) -> datetime: ...
    @property
    def activated_by(self) -> str: ...
    @property
    def reason(self) -> str: ...


Row = TypeVar("Row", bound=Activated)


def hold_activations(connection: Connection) -> None:
    """Until this transaction ends, nobody else activates a version or a policy, or starts a trial."""
    if connection.dialect.name == "postgresql":  # on SQLite a writer is alone
        connection.execute(select(func.pg_advisory_xact_lock(ACTIVATION_LOCK)))


NEWEST_POSITION = (
    select(func.coalesce(func.max(Decision.position), 0)).where(Decision.position.is_not(None)).scalar_subquery()
)
"""Of a decision: stands in rows that say between which decisions something happened."""


def came_before(table: type[Activation | PolicyActivation], decision: Mapping[str, Any]) -> ColumnElement[bool]:
    """Whether an activation was there when this row of `decisions` was made."""
    by_time = table.activated_at <= decision["decided_at"]
    if decision["position"] is None:  # of a release that had none
        return by_time
    return case((table.after_position.is_(None), by_time), else_=table.after_position < decision["position"])


def require_unchanged(seen: Row | None, newest: Row | None, now: datetime) -> None:
    """Refuse to replace what the caller has not seen.

    Args:
        seen: the activation that the caller wants to replace; None where it saw none.
        newest: the newest activation, read under the lock of `hold_activations`.

    Raises:
        ActiveChanged: they are not the same.
    """
    if seen == newest:
        return
    if newest is None:
        raise ActiveChanged("nothing was changed: this database has no activation, so none can be replaced")
    raise ActiveChanged(f"nothing was changed: meanwhile {told(newest, now)}")


def told(row: Activated, now: datetime) -> str:
    """What was activated, by whom, how long ago, and why."""
    return f"{row.label} was activated by {row.activated_by} {_age(row.activated_at, now)} ago ({row.reason})"


def _age(then: datetime, now: datetime) -> str:
    seconds = max(0, round((now - then).total_seconds()))
    for unit, unit_seconds in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * unit_seconds:
            return f"{seconds // unit_seconds} {unit}"
    return f"{seconds} s"


def way_back(history: Iterable[str]) -> list[str]:
    """The versions that led to the active one, which is the last.

    Activating a version that is on the way returns to it: what came after it is off the way. So going back from
    A, B, C leads to B and then to A, and never to C again.

    Args:
        history: the activated versions, the oldest first.
    """
    way: dict[str, None] = {}
    for version in history:
        if version in way:
            while next(reversed(way)) != version:
                way.popitem()
        way[version] = None
    return list(way)


def returned_by(history: Sequence[Row]) -> Row | None:
    """The activation that went back to what is active now; None where the active one is new on the way.

    Args:
        history: all activations, the oldest first.
    """
    # Activating the active version once more changes nothing.
    changes = [next(run) for _, run in groupby(history, key=lambda row: row.activated)]
    if changes and changes[-1].activated in way_back(row.activated for row in changes[:-1]):
        return changes[-1]
    return None


def choose_return(history: Sequence[Row], earlier: str | None, to: str | None, now: datetime) -> str:
    """What a rollback activates.

    Two people who roll back in the same incident mean the same step, so a second rollback must say where it goes.

    Args:
        history: all activations, the oldest first.
        earlier: what is before the active one on the way back; None where nothing is.
        to: what the operator named; None for `earlier`.

    Raises:
        AlreadyRolledBack: the active one is the result of going back, and `to` is None.
        NothingToRollBack: nothing was active before, or not what `to` names, or that is active now.
    """
    if to is None and (returned := returned_by(history)) is not None:
        further = f"`--to {earlier}` goes further back" if earlier else "nothing else was active before it"
        raise AlreadyRolledBack(f"nothing was changed: {told(returned, now)} as a step back; {further}")
    target = to or earlier
    if target is None:
        raise NothingToRollBack("nothing else was active before; activate something by its name")
    if target not in (row.activated for row in history):
        raise NothingToRollBack(f"{target} was never active, so there is no way back to it")
    if target == history[-1].activated:
        raise NothingToRollBack(f"{target} is active already")
    return target
