"""What only monitoring asks of the database. Functions take a connection, as `db.queries`."""

from dataclasses import dataclass, fields
from datetime import datetime

from sqlalchemy import Connection, func, select

from db.rows import first
from db.tables import Review, TrainingRun

MOST_REVIEWS = 10_000
"""Counted, however many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A row of `training_runs` without its figures, which are long."""

    run_id: str
    state: str
    phase: str | None
    step: int | None
    total_steps: int | None
    version: str | None
    finished_at: datetime | None


def running_run(connection: Connection) -> RunSummary | None:
    """The newest that runs."""
    running = _SUMMARY.where(TrainingRun.state == "running").order_by(TrainingRun.started_at.desc())
    return first(connection, running.limit(1), RunSummary)


def last_run(connection: Connection) -> RunSummary | None:
    """The newest that is over."""
    over = _SUMMARY.where(TrainingRun.finished_at.is_not(None)).order_by(TrainingRun.finished_at.desc())
    return first(connection, over.limit(1), RunSummary)


_SUMMARY = select(*(TrainingRun.__table__.c[field.name] for field in fields(RunSummary)))


def count_runs(connection: Connection) -> dict[str, int]:
    """Training runs by state; a state that none is in is absent."""
    return dict(connection.execute(select(TrainingRun.state, func.count()).group_by(TrainingRun.state)).all())


def count_waiting_reviews(connection: Connection) -> int:
    """Reviews that no finished training has seen, up to MOST_REVIEWS."""
    # A run that was refused before it trained wrote no version, and has seen none.
    seen_until = select(func.max(TrainingRun.started_at)).where(
        TrainingRun.state.in_(("promoted", "refused")), TrainingRun.version.is_not(None)
    )
    newest = select(Review.reviewed_at).order_by(Review.review_id.desc()).limit(MOST_REVIEWS).subquery()
    waiting = select(func.count()).select_from(newest)
    if (started_at := connection.scalar(seen_until)) is not None:
        waiting = waiting.where(newest.c.reviewed_at > started_at)
    return connection.scalar(waiting) or 0
