"""How the newest decisions differ from what was to be expected of them. Owns the SQL of drift; see `config.drift`.

Functions take a connection, as `db.queries`. Whatever is in the tables, a bounded number of the newest rows is looked
at, by the index of their times.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import CTE, ColumnElement, Connection, case, exists, func, literal, select, union_all
from sqlalchemy.orm import aliased

from config.drift import SCORE_EDGES, Counts, psi_by_label, reference_counts
from config.names import LABELS
from db import queries
from db.tables import Decision, Review

PERIOD = timedelta(days=1)
"""Now is the newest decisions of one, before is those of the one that ended when it began: at the same time of day."""
MOST_ROWS = 10_000
"""Of each period, its newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What has moved, within a day and against the day before."""

    version: str
    """The active one, whose scores are compared."""
    decisions: int
    """Of all versions, of now; at most MOST_ROWS."""
    decisions_before: int
    psi_held_out: dict[str, float] | None
    """By label, against the held-out rows of the version's training; None where its manifest has no histogram, or too
    few decisions are there."""
    psi_before: dict[str, float] | None
    """By label, against what the same version said the day before; None where either day has too few decisions."""
    action_shares: dict[str, float]
    """Of the decisions; an action never taken is absent."""
    action_shares_before: dict[str, float]
    reviewed: int
    """Submissions reviewed within a day, by their newest review; at most MOST_ROWS."""
    overturned: int
    """Those whose reviewer chose another action than the model."""

    @property
    def overturned_share(self) -> float | None:
        return self.overturned / self.reviewed if self.reviewed else None


def measure_drift(connection: Connection, *, now: datetime, most: int = MOST_ROWS) -> Drift | None:
    """Look at the newest decisions and reviews. None where no version was ever active.

    Args:
        most: rows that are looked at of each day.
    """
    active = queries.active(connection)
    if active is None:
        return None
    registered = queries.version(connection, active.version)
    metrics = registered.manifest.get("metrics", {}) if registered else {}
    today, yesterday = _newest(now - PERIOD, now, most), _newest(now - 2 * PERIOD, now - PERIOD, most)
    scores, scores_before = (_score_counts(connection, rows, active.version) for rows in (today, yesterday))
    actions, actions_before = (_action_counts(connection, rows) for rows in (today, yesterday))
    reviewed, overturned = _overturned(connection, now - PERIOD, most)
    return Drift(
        version=active.version,
        decisions=sum(actions.values()),
        decisions_before=sum(actions_before.values()),
        psi_held_out=psi_by_label(reference_counts(metrics), scores),
        psi_before=psi_by_label(scores_before, scores),
        action_shares=_shares(actions),
        action_shares_before=_shares(actions_before),
        reviewed=reviewed,
        overturned=overturned,
    )


def _newest(since: datetime, until: datetime, most: int) -> CTE:
    """Decisions from `since` on and before `until`, the newest so many."""
    columns = [Decision.__table__.c[name] for name in (*LABELS, "action", "model_version")]
    within = Decision.decided_at >= since, Decision.decided_at < until
    return select(*columns).where(*within).order_by(Decision.decided_at.desc()).limit(most).cte("newest")


def _score_counts(connection: Connection, rows: CTE, version: str) -> Counts:
    """Of each label, how many of a version's scores lie in each bin."""
    of_version = rows.c.model_version == version
    in_bins = [
        select(literal(label).label("label"), _bin(rows.c[label]).label("bin")).where(of_version) for label in LABELS
    ]
    all_bins = union_all(*in_bins).subquery()
    counts: Counts = {label: [0] * (len(SCORE_EDGES) + 1) for label in LABELS}
    counted = select(all_bins.c.label, all_bins.c.bin, func.count()).group_by(all_bins.c.label, all_bins.c.bin)
    for label, bin_, count in connection.execute(counted):
        counts[label][bin_] = count
    return counts


def _bin(score: ColumnElement[float]) -> ColumnElement[int]:
    return case(*((score < edge, index) for index, edge in enumerate(SCORE_EDGES)), else_=len(SCORE_EDGES))


def _action_counts(connection: Connection, rows: CTE) -> dict[str, int]:
    return dict(connection.execute(select(rows.c.action, func.count()).group_by(rows.c.action)).all())


def _shares(counts: dict[str, int]) -> dict[str, float]:
    return {action: count / sum(counts.values()) for action, count in sorted(counts.items())}


def _overturned(connection: Connection, since: datetime, most: int) -> tuple[int, int]:
    """How many submissions were reviewed since then, and of how many the action was changed by the newest review."""
    newest = select(Review.review_id).order_by(Review.review_id.desc()).limit(most).subquery()
    later = aliased(Review)
    superseded = exists().where(later.submission_id == Review.submission_id, later.review_id > Review.review_id)
    changed = func.sum(case((Review.action != Decision.action, 1), else_=0))
    counted = (
        select(func.count(), func.coalesce(changed, 0))
        .select_from(Review)
        .join(newest, newest.c.review_id == Review.review_id)
        .join(Decision, Decision.submission_id == Review.submission_id)
        .where(Review.reviewed_at >= since, ~superseded)
    )
    reviewed, overturned = connection.execute(counted).one()
    return reviewed, overturned
