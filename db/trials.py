"""Every question asked about trials: a second version beside the active one, its scores, its errors, its reviews.

Like `db.queries`: functions take a connection and never commit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Select, case, func, select

from config.names import LABELS, Action
from db.activations import NEWEST_POSITION, hold_activations
from db.queries import NoSuchVersion, activate, active, end_live_trial, version
from db.rows import every, first, insert_if_absent, insert_one
from db.session import DatabaseProblem
from db.tables import Decision, Review, Submission, Trial, TrialScore

Kind = Literal["canary", "ab", "shadow"]
Outcome = Literal["promoted", "stopped", "rolled_back"]


class TrialIsLive(DatabaseProblem):
    """Another trial runs; one at a time."""


class NoTrial(DatabaseProblem):
    """No trial of the kind asked for runs, or ever ran."""


class NothingToTry(DatabaseProblem):
    """The candidate is the active version, or there is none that it could stand beside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """A row of `trials`, column by column."""

    trial_id: int
    kind: Kind
    version: str
    baseline: str
    share: float
    bounds: dict[str, Any]
    started_at: datetime
    started_by: str
    reason: str
    outcome: Outcome | None
    ended_at: datetime | None
    ended_by: str | None
    verdict: str | None
    after_position: int | None
    until_position: int | None


def start_trial(
    connection: Connection,
    *,
    kind: Kind,
    candidate: str,
    share: float,
    bounds: Mapping[str, Any],
    by: str,
    reason: str,
    now: datetime,
) -> int:
    """Put a registered version beside the active one; the trial's id is returned.

    Args:
        share: of the submissions, above 0 and up to 1.
        bounds: `config.settings.TrialSettings` as they are now.

    Raises:
        TrialIsLive: another trial runs.
        NoSuchVersion: the candidate is not registered.
        NothingToTry: it is the active version, or no version is active.
    """
    # An activation ends the live trial: it must come wholly before this one begins, or see it.
    hold_activations(connection)
    if (running := live_trial(connection)) is not None:
        raise TrialIsLive(
            f"a trial runs already: {running.kind} of {running.version} beside {running.baseline}, started by "
            f"{running.started_by}; end it first: moderato {running.kind} stop"
        )
    if version(connection, candidate) is None:
        raise NoSuchVersion(f"no model version {candidate!r} is registered")
    baseline = active(connection)
    if baseline is None:
        raise NothingToTry("no version is active yet; start a worker, or activate one")
    if baseline.version == candidate:
        raise NothingToTry(f"{candidate} is the active version already; try another one beside it")
    row = {
        "kind": kind,
        "version": candidate,
        "baseline": baseline.version,
        "share": share,
        "bounds": dict(bounds),
        "started_at": now,
        "started_by": by,
        "reason": reason,
        "after_position": NEWEST_POSITION,
    }
    return insert_one(connection, Trial, row)


def live_trial(connection: Connection) -> TrialRow | None:
    """The trial that runs now."""
    return first(connection, select(Trial).where(Trial.outcome.is_(None)), TrialRow)


def live_trial_of(connection: Connection, kind: Kind) -> TrialRow:
    """The trial that runs now, if it is of this kind.

    Raises:
        NoTrial: none runs, or one of another kind.
    """
    live = live_trial(connection)
    if live is None:
        raise NoTrial(f"no {kind} runs; begin one: moderato {kind} start VERSION")
    if live.kind != kind:
        raise NoTrial(f"no {kind} runs, but a trial of another kind: {live.kind} of {live.version}")
    return live


def newest_trial(connection: Connection, kind: Kind) -> TrialRow:
    """The newest trial of a kind, running or over.

    Raises:
        NoTrial: there never was one.
    """
    newest = select(Trial).where(Trial.kind == kind).order_by(Trial.trial_id.desc()).limit(1)
    row = first(connection, newest, TrialRow)
    if row is None:
        raise NoTrial(f"there is no {kind}, and never was; begin one: moderato {kind} start VERSION")
    return row


def end_trial(
    connection: Connection,
    trial_id: int,
    *,
    outcome: Literal["stopped", "rolled_back"],
    by: str,
    verdict: str,
    now: datetime,
) -> bool:
    """End a trial; everything is decided by the active version again. False where it was over already."""
    return end_live_trial(connection, Trial.trial_id == trial_id, outcome=outcome, by=by, verdict=verdict, now=now)


def promote_trial(connection: Connection, trial: TrialRow, *, by: str, reason: str, now: datetime) -> int:
    """Make the candidate of a live trial the active version; the activation's id is returned.

    Raises:
        NoTrial: the trial is over.
    """
    hold_activations(connection)
    its_row = Trial.trial_id == trial.trial_id
    if not end_live_trial(connection, its_row, outcome="promoted", by=by, verdict=reason, now=now):
        raise NoTrial(f"the {trial.kind} of {trial.version} is over; nothing was activated")
    # While a trial is live, what it was compared with is active: the activation of another version ends it.
    instead_of = active(connection)
    return activate(connection, version=trial.version, instead_of=instead_of, by=by, reason=reason, now=now)


# --- What a candidate says ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialScoreRow:
    """A row of `trial_scores`, column by column: six scores and an action, or an error."""

    trial_id: int
    submission_id: str
    toxic: float | None = None
    severe_toxic: float | None = None
    obscene: float | None = None
    threat: float | None = None
    insult: float | None = None
    identity_hate: float | None = None
    action: str | None = None
    error: str | None = None
    scored_at: datetime


def record_trial_scores(connection: Connection, rows: Sequence[TrialScoreRow]) -> None:
    """Write what a candidate said of submissions; a row that is there already is left as it is."""
    if rows:
        # In one order everywhere, so that two workers may wait for each other but never in a circle.
        ordered = sorted(rows, key=lambda row: (row.trial_id, row.submission_id))
        connection.execute(insert_if_absent(connection, TrialScore), [asdict(row) for row in ordered])


# --- How it does -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The decisions of one version during a trial, in aggregates."""

    version: str
    decisions: int = 0
    not_allowed: int = 0
    """Decisions whose action is anything but `allow`."""
    actions: dict[str, int]
    means: dict[str, float]
    """Of each label's scores; empty without decisions, as the next."""
    variances: dict[str, float]
    """Of the scores themselves, not of their mean."""
    errors: int = 0
    """Submissions that it failed to score, and the other version decided."""


def sides(connection: Connection, trial: TrialRow) -> tuple[Side, Side]:
    """Candidate and baseline over what was decided while the trial ran."""
    scores = Decision.__table__.c
    sums = [column for label in LABELS for column in (func.sum(scores[label]), func.sum(scores[label] * scores[label]))]
    statement = (
        select(Decision.model_version, Decision.action, func.count(), *sums)
        .where(*_decided_by_either(trial))
        .group_by(Decision.model_version, Decision.action)
    )
    by_version: dict[str, list[Any]] = {}
    for row in connection.execute(statement):
        by_version.setdefault(row[0], []).append(row)
    # Over the same decisions: the other version decided what the candidate failed to score.
    errors = (
        select(func.count())
        .join_from(TrialScore, Decision, Decision.submission_id == TrialScore.submission_id)
        .where(TrialScore.trial_id == trial.trial_id, TrialScore.error.is_not(None), *_decided_during(trial))
    )
    return (
        _side(trial.version, by_version.get(trial.version, []), connection.scalar(errors) or 0),
        _side(trial.baseline, by_version.get(trial.baseline, []), 0),
    )


def _decided_by_either(trial: TrialRow) -> list[ColumnElement[bool]]:
    return [Decision.model_version.in_((trial.version, trial.baseline)), *_decided_during(trial)]


def _decided_during(trial: TrialRow) -> list[ColumnElement[bool]]:
    """By positions, as the clocks of the database and of Redis may differ; by times what older releases wrote."""
    begun = (
        Decision.decided_at >= trial.started_at
        if trial.after_position is None
        else Decision.position > trial.after_position
    )
    if trial.ended_at is None:
        return [begun]
    ended = (
        Decision.decided_at < trial.ended_at
        if trial.until_position is None
        else Decision.position <= trial.until_position
    )
    return [begun, ended]


def decided_in(decision: Mapping[str, Any]) -> ColumnElement[bool]:
    """Whether a trial ran when this row of `decisions` was made: the same the other way round."""
    at, position = decision["decided_at"], decision["position"]
    begun, ended = Trial.started_at <= at, Trial.ended_at.is_(None) | (Trial.ended_at > at)
    if position is None:  # of a release that had none
        return begun & ended
    return case((Trial.after_position.is_(None), begun), else_=Trial.after_position < position) & case(
        (Trial.until_position.is_(None), ended), else_=Trial.until_position >= position
    )


def _side(name: str, by_action: Sequence[Any], errors: int) -> Side:
    """Of rows (version, action, count, and for each label the sum of its scores and of their squares)."""
    actions = {row[1]: int(row[2]) for row in by_action}
    count = sum(actions.values())
    if not count:
        return Side(version=name, actions={}, means={}, variances={}, errors=errors)
    means, variances = {}, {}
    for index, label in enumerate(LABELS):
        mean = sum(row[3 + 2 * index] for row in by_action) / count
        means[label] = mean
        # Rounding may leave less than nothing of equal scores.
        variances[label] = max(0.0, sum(row[4 + 2 * index] for row in by_action) / count - mean * mean)
    return Side(
        version=name,
        decisions=count,
        not_allowed=count - actions.get(Action.ALLOW, 0),
        actions=actions,
        means=means,
        variances=variances,
        errors=errors,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewedSide:
    """What reviewers made of one version's decisions during a trial."""

    version: str
    decisions: int = 0
    reviewed: int = 0
    overturned: int = 0
    """Reviewed ones whose newest review says another action."""


def reviewed_sides(connection: Connection, trial: TrialRow) -> tuple[ReviewedSide, ReviewedSide]:
    """Candidate and baseline: how many of their decisions were reviewed, and how many overturned."""
    newest = select(func.max(Review.review_id).label("review_id")).group_by(Review.submission_id).subquery()
    overturned = func.sum(case((Review.action != Decision.action, 1), else_=0))
    reviewed = (
        select(Decision.model_version, func.count(), overturned)
        .join(Review, Review.submission_id == Decision.submission_id)
        .join(newest, newest.c.review_id == Review.review_id)
        .where(*_decided_by_either(trial))
        .group_by(Decision.model_version)
    )
    counts = {row[0]: (int(row[1]), int(row[2])) for row in connection.execute(reviewed)}

    def side(name: str, decisions: int) -> ReviewedSide:
        reviews, changed = counts.get(name, (0, 0))
        return ReviewedSide(version=name, decisions=decisions, reviewed=reviews, overturned=changed)

    candidate, baseline = sides(connection, trial)
    return side(trial.version, candidate.decisions), side(trial.baseline, baseline.decisions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A submission on which a shadow and the version that decided do not agree."""

    submission_id: str
    text: str | None
    action: str
    shadow_action: str
    most: float
    """The largest difference of any label's scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowComparison:
    """A shadow's scores beside the decisions on the same submissions."""

    compared: int
    errors: int
    """Submissions that the candidate could not score."""
    actions: dict[str, dict[str, int]]
    """How many: action decided → action that the shadow would have taken."""
    mean_differences: dict[str, float]
    """Mean absolute difference of each label's scores; empty where nothing was compared."""
    differences: list[Difference]
    """The submissions on which they differ most, the largest difference first."""

    @property
    def changed(self) -> int:
        """How many actions would have been others."""
        return sum(count for decided, row in self.actions.items() for shadow, count in row.items() if decided != shadow)


def shadow_comparison(connection: Connection, trial: TrialRow, *, limit: int) -> ShadowComparison:
    """Hold a shadow's scores against the decisions.

    Args:
        limit: of the submissions that differ most.
    """
    decided, shadow = Decision.__table__.c, TrialScore.__table__.c
    apart = {label: func.abs(decided[label] - shadow[label]) for label in LABELS}

    def of_both(*columns: Any) -> Select[Any]:
        return (
            select(*columns)
            .join_from(TrialScore, Decision, Decision.submission_id == TrialScore.submission_id)
            # A decision that the candidate made itself, as a trial before or after may have had it, compares nothing.
            .where(
                TrialScore.trial_id == trial.trial_id,
                TrialScore.error.is_(None),
                Decision.model_version != trial.version,
            )
        )

    sums = [func.sum(difference) for difference in apart.values()]
    matrix: dict[str, dict[str, int]] = {}
    totals = [0.0] * len(LABELS)
    statement = of_both(Decision.action, TrialScore.action, func.count(), *sums).group_by(
        Decision.action, TrialScore.action
    )
    for taken, would_be, count, *summed in connection.execute(statement):
        matrix.setdefault(taken, {})[would_be] = int(count)
        totals = [total + value for total, value in zip(totals, summed, strict=True)]
    compared = sum(count for row in matrix.values() for count in row.values())
    greatest = {"postgresql": "greatest", "sqlite": "max"}[connection.dialect.name]
    most = getattr(func, greatest)(*apart.values())
    columns = (
        Decision.submission_id,
        Submission.text,
        Decision.action,
        TrialScore.action.label("shadow_action"),
        most.label("most"),
    )
    furthest = (
        of_both(*columns)
        .join(Submission, Submission.submission_id == Decision.submission_id)
        .order_by(most.desc(), Decision.submission_id)
        .limit(limit)
    )
    errors = select(func.count()).where(TrialScore.trial_id == trial.trial_id, TrialScore.error.is_not(None))
    return ShadowComparison(
        compared=compared,
        errors=connection.scalar(errors) or 0,
        actions=matrix,
        mean_differences={label: total / compared for label, total in zip(LABELS, totals, strict=True)}
        if compared
        else {},
        differences=every(connection, furthest, Difference),
    )
