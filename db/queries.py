"""Every question asked of the database, one function each. Owns the SQL of decisions, versions and trainings.

Functions take a connection from `db.session.reading` or `writing` and never commit. Times are aware datetimes.
What a function returns is a plain value that outlives the connection, but for the iterators: they stream, and
are consumed while the connection is open.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, ClassVar, Literal, TypedDict, Unpack

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    exists,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import aliased

from config.names import LABELS, REVIEW_LOCK
from db.activations import NEWEST_POSITION, choose_return, hold_activations, require_unchanged, way_back
from db.bulk import given_rows, in_json_list, json_parameter, sqlite_insert
from db.identity import Known, known, letters, standing, under_stored_ids, unread_places, with_letter
from db.rows import WithScores, every, first, insert_if_absent, insert_one, streamed
from db.session import DatabaseProblem
from db.tables import (
    DEAD,
    DECIDED,
    IS_PENDING,
    PENDING,
    Activation,
    DeadLetter,
    Decision,
    ModelVersion,
    Review,
    Submission,
    TrainingRun,
    Trial,
    VersionLoad,
)


class NoSuchDecision(DatabaseProblem):
    """A review of a submission that has no decision."""


class NoSuchVersion(DatabaseProblem):
    """A model version that was never registered."""


class VersionConflict(DatabaseProblem):
    """Two different model versions under one name."""


class NoSuchRun(DatabaseProblem):
    """A training run that was never requested."""


class RunIsOver(DatabaseProblem):
    """A word from a training run that already has its verdict."""


# --- Decisions ---------------------------------------------------------------------------------------------------


# Not frozen, as setting the fields of a frozen one takes four times as long, for every comment.
@dataclass(slots=True, kw_only=True)
class ScoredSubmission:
    """A comment, its six scores and its action: a row of `submissions` and one of `decisions`, column by column."""

    state: ClassVar[str] = DECIDED

    submission_id: str
    community: str
    comment_id: str
    author: str | None
    text: str | None
    text_sha256: str
    language: str | None
    context: dict[str, Any] | None
    created_at: datetime | None
    submitted_at: datetime
    toxic: float
    severe_toxic: float
    obscene: float
    threat: float
    insult: float
    identity_hate: float
    action: str
    fired_label: str | None
    fired_threshold: float | None
    model_version: str
    policy_version: str
    windows: int
    truncated: bool
    queue_ms: float
    compute_ms: float
    decided_at: datetime
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of each row given to `record_decisions`, by its index there: every index is in exactly one set."""

    recorded: frozenset[int]
    repeated: frozenset[int]
    """The submission is decided already, or about to be elsewhere, or its dead letter is there; nothing was written."""
    conflicts: frozenset[int]
    """The submission's id belongs to another text, or to another community; nothing was written."""


def record_decisions(connection: Connection, rows: Sequence[ScoredSubmission]) -> Recorded:
    """Write each submission not seen before, with its decision, and the decision of each that is pending.

    The same for each whose dead letter is gone: it was retried, or deleted. Of an id that occurs twice in `rows` the
    first comes first. Safe while other workers record the same submissions: each is decided by one of them. The
    policies that decided must have been stored (`db.policies.store`).
    """
    recorded, repeated, conflicts = set[int](), set[int](), set[int]()
    left = dict(enumerate(under_stored_ids(connection, rows)))
    while left:
        first: dict[str, int] = {}
        for index, row in left.items():
            first.setdefault(row.submission_id, index)
        given = [left.pop(index) for index in first.values()]
        decide = {"postgresql": _decide_on_postgresql, "sqlite": _decide_on_sqlite}[connection.dialect.name]
        passed_over = frozenset(decide(connection, given))
        there = known(connection, passed_over)
        same = {row.submission_id: row for row in given if (of := there.get(row.submission_id)) and of.is_same(row)}
        decided_after_all = _decide_dead(connection, [same[each] for each in same if there[each].state == DEAD])
        for submission_id, index in first.items():
            if submission_id not in passed_over or submission_id in decided_after_all:
                recorded.add(index)
            else:
                (repeated if submission_id in same else conflicts).add(index)
    return Recorded(frozenset(recorded), frozenset(repeated), frozenset(conflicts))


def _decide_dead(connection: Connection, rows: Sequence[ScoredSubmission]) -> set[str]:
    """Write the decisions of those of these dead submissions whose letter is gone; their ids."""
    if not rows:
        return set()
    # Whoever writes a letter locks the row as well, so none appears between this look and the decision.
    there = known(connection, [row.submission_id for row in rows], lock=True)
    dead = [row for row in there.values() if row.state == DEAD]
    waiting = {row.submission_id for row in there.values() if row.state != DECIDED} - with_letter(connection, dead)
    again = [row for row in rows if row.submission_id in waiting]
    columns = {each.name for each in Submission.__table__.c if hasattr(ScoredSubmission, each.name)} - {"comment_id"}
    for row in again:
        values = {each: getattr(row, each) for each in columns} | {"erased_at": None}
        connection.execute(update(Submission).where(Submission.submission_id == row.submission_id).values(values))
    _insert_decisions(connection, again)
    return waiting


def _decide_on_postgresql(connection: Connection, rows: Sequence[ScoredSubmission]) -> Sequence[str]:
    """Write the rows that are new or pending; the ids of the others."""
    return connection.scalars(_POSTGRESQL_DECIDE, {"rows": json_parameter(rows)}).all()


def _postgresql_decide() -> Select[Any]:
    """One statement for both tables; it answers with the ids it passed over."""
    submission, decision = Submission.__table__.c, Decision.__table__.c
    given = given_rows(ScoredSubmission, Submission, Decision)
    values = dict(given.c.items()) | {"state": literal(DECIDED)}
    # In the order of ids, so that two workers inserting the same ones wait for each other but never in a circle.
    given_columns = [values[each.name].label(each.name) for each in submission if each.name in values]
    submissions = select(*given_columns).order_by(given.c.submission_id)
    inserted = (
        postgresql.insert(Submission)
        .from_select(list(submissions.selected_columns.keys()), submissions)
        .on_conflict_do_nothing(index_elements=[submission.submission_id])
        .returning(submission.submission_id)
        .cte("inserted")
    )
    is_new = given.c.submission_id.in_(select(inserted.c.submission_id))
    # Only what could not be inserted is looked up, which usually is nothing. Its locks come after all inserts and in
    # the order of ids as well. Whoever has waited for one sees what the other made of it: no longer pending.
    identity = [given.c[each] for each in ("community", "name", "text_sha256")]
    there = select(given.c.submission_id, *identity).where(~is_new).cte("there")
    pending = (
        select(submission.submission_id)
        .join(there, there.c.submission_id == submission.submission_id)
        .where(
            submission.state == PENDING,
            *(submission[each.name].is_not_distinct_from(there.c[each.name]) for each in identity),
        )
        .order_by(submission.submission_id)
        .with_for_update(of=Submission)
        .cte("pending")
    )
    updated = (
        update(Submission)
        .where(submission.submission_id == pending.c.submission_id)
        .values(state=DECIDED)
        .returning(submission.submission_id)
        .cte("updated")
    )
    is_decided = is_new | given.c.submission_id.in_(select(updated.c.submission_id))
    decided_columns = [each for each in decision if each.name in values]
    decisions = select(*(values[each.name] for each in decided_columns)).where(is_decided)
    decided = insert(Decision).from_select(decided_columns, decisions).cte("decided")
    return select(given.c.submission_id).where(~is_decided).add_cte(decided)


_POSTGRESQL_DECIDE = _postgresql_decide()


def _decide_on_sqlite(connection: Connection, rows: Sequence[ScoredSubmission]) -> Sequence[str]:
    """The same. In a transaction that holds the only writer's lock, what is not there now is not there when written."""
    ids = json.dumps([row.submission_id for row in rows])
    found = {row.submission_id: Known(**row) for row in connection.execute(_SQLITE_FOUND, {"ids": ids}).mappings()}
    new = [row for row in rows if row.submission_id not in found]
    pending = [row for row in rows if (of := found.get(row.submission_id)) and of.state == PENDING and of.is_same(row)]
    if new:
        connection.exec_driver_sql(_SQLITE_INSERT_SUBMISSIONS[0], _SQLITE_INSERT_SUBMISSIONS[1](new))
    if pending:
        connection.execute(_SQLITE_NO_LONGER_PENDING, {"ids": json.dumps([row.submission_id for row in pending])})
    _insert_decisions(connection, [*new, *pending])
    return list(found.keys() - {row.submission_id for row in pending})


def _insert_decisions(connection: Connection, rows: Sequence[ScoredSubmission]) -> None:
    if not rows:
        return
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(_SQLITE_INSERT_DECISIONS[0], _SQLITE_INSERT_DECISIONS[1](rows))
    else:
        columns = [each.name for each in Decision.__table__.c if hasattr(ScoredSubmission, each.name)]
        connection.execute(insert(Decision), [{each: getattr(row, each) for each in columns} for row in rows])


_IN_JSON_IDS = in_json_list(Submission.__table__.c.submission_id)
_SQLITE_FOUND = select(*(Submission.__table__.c[field.name] for field in fields(Known))).where(_IN_JSON_IDS)
_SQLITE_NO_LONGER_PENDING = update(Submission).where(_IN_JSON_IDS).values(state=DECIDED)
_SQLITE_INSERT_SUBMISSIONS = sqlite_insert(ScoredSubmission, Submission)
# Whoever writes has the only writer's lock, so decisions are committed in the order of their positions. A trigger moves
# them behind those of reviews and erasures. On PostgreSQL a sequence gives all of them, see `db.feed`.
_NEXT_POSITION: ColumnElement[int] = literal_column(
    "(SELECT COALESCE(MAX(position), 0) + 1 FROM decisions WHERE position IS NOT NULL)"
)
_SQLITE_INSERT_DECISIONS = sqlite_insert(ScoredSubmission, Decision, position=_NEXT_POSITION)


Ended = Literal["decided", "dead"]


def outcomes(connection: Connection, submission_ids: Sequence[str]) -> list[Ended | None]:
    """What each of these submissions has come to, in their order; None of those still on their way.

    Of a `SubmissionId` it is what became of its text, of any other id what became of whatever stands under it.
    """
    rows = standing(connection, submission_ids)
    ended: list[Ended | None] = [None if row is None else _ENDED.get(row.state) for row in rows]
    unread = {index: unread_places(each) for index, each in enumerate(submission_ids) if rows[index] is None}
    there = letters(connection, {place for places in unread.values() for place in places})
    for index, places in unread.items():
        if any(place in there and there[place][1] is None for place in places):
            ended[index] = "dead"
    return ended


_ENDED: dict[str, Ended] = {DECIDED: "decided", DEAD: "dead"}


# --- Results -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(WithScores):
    """A submission, its decision and the newest review of it."""

    submission_id: str
    community: str
    comment_id: str
    author: str | None
    text: str | None
    text_sha256: str
    language: str | None
    context: dict[str, Any] | None
    created_at: datetime | None
    submitted_at: datetime
    toxic: float
    severe_toxic: float
    obscene: float
    threat: float
    insult: float
    identity_hate: float
    action: str
    """What holds now: the reviewer's action where there is a review, else the model's."""
    model_action: str
    fired_label: str | None
    fired_threshold: float | None
    model_version: str
    policy_version: str
    windows: int
    truncated: bool
    queue_ms: float
    compute_ms: float
    decided_at: datetime
    reviewer: str | None
    """Null where nobody has reviewed it."""
    note: str | None
    reviewed_at: datetime | None


_OF_SUBMISSION = aliased(Review)
_LATEST_REVIEW = (
    select(func.max(_OF_SUBMISSION.review_id))
    .where(_OF_SUBMISSION.submission_id == Decision.submission_id)
    .scalar_subquery()
)
_ACTION_NOW = func.coalesce(Review.action, Decision.action)


def select_results() -> Select[Any]:
    """What `Result` holds; the caller says which."""
    columns = {field.name for field in fields(Result)}
    submission = [column for column in Submission.__table__.c if column.name in columns]
    # Its own `action` goes by another name.
    decision = [column for column in Decision.__table__.c if column.name in columns - {"submission_id", "action"}]
    return (
        select(
            *submission,
            *decision,
            _ACTION_NOW.label("action"),
            Decision.action.label("model_action"),
            Review.reviewer,
            Review.note,
            Review.reviewed_at,
        )
        .join_from(Decision, Submission)
        .outerjoin(Review, Review.review_id == _LATEST_REVIEW)
    )


def result(connection: Connection, submission_id: str) -> Result | None:
    """What became of one submission; None while it has no decision."""
    return first(connection, select_results().where(Decision.submission_id == submission_id), Result)


def results(
    connection: Connection,
    *,
    community: str | None = None,
    comment_id: str | None = None,
    author: str | None = None,
    action: str | None = None,
    label: str | None = None,
    min_score: float | None = None,
    model_version: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    order: str = "newest",
    limit: int | None = None,
) -> Iterator[Result]:
    """Stream the results that fit every filter given.

    Args:
        action: what holds now, after reviews.
        label: with `min_score`, the label that must reach it; alone, the label whose rule led to the action.
        min_score: least probability, of `label` or of any label.
        since: decided then or later.
        until: decided before then.
        order: `newest` or `oldest` decision first, or a label: its highest score first.

    Raises:
        ValueError: an unknown label or order.
    """
    if label is not None and label not in LABELS:
        raise ValueError(f"unknown label {label!r}; the labels are {', '.join(LABELS)}")
    wanted: list[ColumnElement[bool]] = [
        column == value
        for column, value in (
            (Submission.community, community),
            (Submission.comment_id, comment_id),
            (Submission.author, author),
            (_ACTION_NOW, action),
            (Decision.model_version, model_version),
        )
        if value is not None
    ]
    if min_score is not None:
        wanted.append(or_(*(_score(name) >= min_score for name in ([label] if label else LABELS))))
    elif label is not None:
        wanted.append(Decision.fired_label == label)
    if since is not None:
        wanted.append(Decision.decided_at >= since)
    if until is not None:
        wanted.append(Decision.decided_at < until)
    statement = select_results().where(*wanted).order_by(*_ordering(order)).limit(limit)
    return (Result(**row) for row in streamed(connection, statement))


def _ordering(order: str) -> list[ColumnElement[Any]]:
    if order == "newest":
        return [Decision.decided_at.desc(), Decision.submission_id.desc()]
    if order == "oldest":
        return [Decision.decided_at.asc(), Decision.submission_id.asc()]
    if order in LABELS:
        return [_score(order).desc(), Decision.submission_id.asc()]
    raise ValueError(f"unknown order {order!r}; it is newest, oldest or one of {', '.join(LABELS)}")


def _score(label: str) -> ColumnElement[float]:
    return Decision.__table__.c[label]


@dataclass(frozen=True, slots=True)
class Totals:
    """How much there is of everything."""

    decisions: int
    actions: dict[str, int]
    """Decisions by the model's action; an action never taken is absent."""
    dead_letters: int
    reviews: int
    pending: int
    """Durable submissions on their way."""


def totals(connection: Connection) -> Totals:
    """Count decisions, dead letters, reviews and what is pending."""
    by_action = select(Decision.action, func.count()).group_by(Decision.action)
    actions = dict(connection.execute(by_action).all())
    return Totals(
        decisions=sum(actions.values()),
        actions=actions,
        dead_letters=connection.scalar(select(func.count()).select_from(DeadLetter)) or 0,
        reviews=connection.scalar(select(func.count()).select_from(Review)) or 0,
        pending=connection.scalar(select(func.count()).where(IS_PENDING)) or 0,
    )


# --- Reviews -----------------------------------------------------------------------------------------------------


def add_review(
    connection: Connection,
    *,
    submission_id: str,
    action: str,
    labels: Mapping[str, bool],
    reviewer: str,
    note: str | None,
    now: datetime,
) -> int:
    """Write a person's word on a decision; the review's id is returned.

    Args:
        labels: those the reviewer speaks about; the others stay unknown and are not trained on.

    Raises:
        NoSuchDecision: the submission has no decision.
        ValueError: an unknown label.
    """
    if unknown := sorted(set(labels) - set(LABELS)):
        raise ValueError(f"unknown labels {', '.join(unknown)}; the labels are {', '.join(LABELS)}")
    if connection.dialect.name == "postgresql":
        # Two reviews of one submission wait for each other, so that the order of their ids, by which the newest holds,
        # is that of their positions, in which they are handed on.
        connection.execute(select(func.pg_advisory_xact_lock(REVIEW_LOCK, func.hashtext(submission_id))))
    if connection.scalar(select(Decision.submission_id).where(Decision.submission_id == submission_id)) is None:
        raise NoSuchDecision(f"submission {submission_id!r} has no decision to review")
    row = {
        "submission_id": submission_id,
        "action": action,
        "reviewer": reviewer,
        "note": note,
        "reviewed_at": now,
        **labels,
    }
    return insert_one(connection, Review, row)


# --- Versions and activations ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRow:
    """A row of `model_versions`, column by column."""

    version: str
    parent: str | None
    manifest: dict[str, Any]
    registered_at: datetime


def register_version(connection: Connection, manifest: Mapping[str, Any], now: datetime) -> None:
    """Make a version known under the name in its manifest; the same manifest again changes nothing.

    Raises:
        VersionConflict: the name belongs to a version with another manifest.
    """
    # As JSON keeps it, so that a tuple equals the list it becomes.
    manifest = json.loads(json.dumps(dict(manifest)))
    name = manifest["version"]
    row = {"version": name, "parent": manifest.get("parent"), "manifest": manifest, "registered_at": now}
    connection.execute(insert_if_absent(connection, ModelVersion), row)
    if connection.scalar(select(ModelVersion.manifest).where(ModelVersion.version == name)) != manifest:
        raise VersionConflict(f"another model version is already registered as {name!r}: its manifest differs")


def versions(connection: Connection) -> list[VersionRow]:
    """Every registered version, newest first."""
    newest_first = select(ModelVersion).order_by(ModelVersion.registered_at.desc(), ModelVersion.version.desc())
    return every(connection, newest_first, VersionRow)


def version(connection: Connection, name: str) -> VersionRow | None:
    """The version registered under this name."""
    return first(connection, select(ModelVersion).where(ModelVersion.version == name), VersionRow)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRow:
    """A row of `activations`, column by column."""

    activation_id: int
    version: str
    activated_at: datetime
    activated_by: str
    reason: str
    after_position: int | None

    @property
    def activated(self) -> str:
        """What was activated, see `db.activations`."""
        return self.version

    @property
    def label(self) -> str:
        """The same for people."""
        return f"version {self.version}"


def activate(
    connection: Connection, *, version: str, instead_of: ActivationRow | None, by: str, reason: str, now: datetime
) -> int:
    """Make a registered version the active one; the activation's id is returned.

    A live trial beside another version ends by it: what it compared with decides no longer.

    Args:
        instead_of: the newest activation as the caller saw it; None where there was none.

    Raises:
        NoSuchVersion: no version is registered under this name.
        ActiveChanged: another activation came after `instead_of`.
    """
    hold_activations(connection)
    newest = active(connection)
    require_unchanged(instead_of, newest, now)
    if connection.scalar(select(ModelVersion.version).where(ModelVersion.version == version)) is None:
        raise NoSuchVersion(f"no model version {version!r} is registered")
    end_live_trial(
        connection,
        Trial.baseline != version,
        outcome="stopped",
        by=by,
        verdict=f"version {version} was activated by {by}: {reason}",
        now=now,
    )
    row = {
        "version": version,
        "activated_at": now,
        "activated_by": by,
        "reason": reason,
        "after_position": NEWEST_POSITION,
    }
    return insert_one(connection, Activation, row)


def roll_back(
    connection: Connection, *, instead_of: ActivationRow | None, to: str | None, by: str, reason: str, now: datetime
) -> int:
    """Go back to the version that was active before the active one; the activation's id is returned.

    Args:
        instead_of: as in `activate`.
        to: an earlier version; None for the one before, see `db.activations.choose_return`.

    Raises:
        ActiveChanged: another activation came after `instead_of`.
        AlreadyRolledBack: the active version came back already, and `to` is None.
        NothingToRollBack: no other version was active before, or not the one that `to` names.
    """
    hold_activations(connection)
    require_unchanged(instead_of, active(connection), now)
    newest, version = rollback_target(connection, to=to, now=now)
    return activate(connection, version=version, instead_of=newest, by=by, reason=reason, now=now)


def rollback_target(connection: Connection, *, to: str | None, now: datetime) -> tuple[ActivationRow, str]:
    """The newest activation, and the version to which a rollback would go from it.

    Raises:
        AlreadyRolledBack, NothingToRollBack: as `roll_back`.
    """
    history = every(connection, select(Activation).order_by(Activation.activation_id), ActivationRow)
    version = choose_return(history, previous_version(connection), to, now)
    return history[-1], version


def end_live_trial(
    connection: Connection,
    which: ColumnElement[bool],
    *,
    outcome: Literal["promoted", "stopped", "rolled_back"],
    by: str,
    verdict: str,
    now: datetime,
) -> bool:
    """End the live trial if it is `which`; whether it was."""
    end = update(Trial).where(Trial.outcome.is_(None), which)
    how = {"outcome": outcome, "ended_by": by, "verdict": verdict}
    ended = connection.execute(end.values(ended_at=now, until_position=NEWEST_POSITION, **how))
    return ended.rowcount == 1


def active(connection: Connection) -> ActivationRow | None:
    """The newest activation: the truth that workers follow. None before the first."""
    return next(iter(activations(connection, limit=1)), None)


def activations(connection: Connection, limit: int) -> list[ActivationRow]:
    """The newest activations, newest first."""
    newest = select(Activation).order_by(Activation.activation_id.desc()).limit(limit)
    return every(connection, newest, ActivationRow)


def previous_version(connection: Connection) -> str | None:
    """The version on the way to the active one that is before it (see `way_back`); None where there is none.

    One that every worker refused is passed over: it never decided anything, and could not now.
    """
    newest = select(func.max(Activation.activation_id)).scalar_subquery()
    tried = exists().where(VersionLoad.activation_id == Activation.activation_id)
    loaded = tried.where(VersionLoad.error.is_(None))
    usable = select(Activation.version).where((Activation.activation_id == newest) | loaded | ~tried)
    way = way_back(connection.scalars(usable.order_by(Activation.activation_id)))
    return way[-2] if len(way) > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRow:
    """A row of `version_loads`, column by column."""

    load_id: int
    activation_id: int
    worker: str
    version: str
    error: str | None
    loaded_at: datetime


def record_load(
    connection: Connection, *, activation_id: int, worker: str, version: str, error: str | None, now: datetime
) -> None:
    """Note what came of a worker's attempt to follow an activation: the version it scores with since, or the error."""
    row = {
        "activation_id": activation_id,
        "worker": worker,
        "version": version,
        "error": error,
        "loaded_at": now,
    }
    insert_one(connection, VersionLoad, row)


def loads(connection: Connection, activation_id: int) -> list[LoadRow]:
    """Each worker's newest word on this activation, by the worker's name."""
    newest = (
        select(func.max(VersionLoad.load_id))
        .where(VersionLoad.activation_id == activation_id)
        .group_by(VersionLoad.worker)
    )
    statement = select(VersionLoad).where(VersionLoad.load_id.in_(newest)).order_by(VersionLoad.worker)
    return every(connection, statement, LoadRow)


# --- Training runs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """A row of `training_runs`, column by column."""

    run_id: str
    state: str
    requested_at: datetime
    requested_by: str
    overrides: dict[str, Any]
    started_at: datetime | None
    heartbeat_at: datetime | None
    finished_at: datetime | None
    phase: str | None
    step: int | None
    total_steps: int | None
    loss: float | None
    seconds_left: float | None
    parent: str | None
    version: str | None
    dataset_sha256: str | None
    metrics: dict[str, Any] | None
    reason: str | None


class Progress(TypedDict, total=False):
    """Columns of `training_runs` that a running training sets as it goes."""

    phase: str
    step: int
    total_steps: int
    loss: float
    seconds_left: float
    parent: str | None
    dataset_sha256: str


def request_run(
    connection: Connection, *, run_id: str, requested_by: str, overrides: Mapping[str, Any], now: datetime
) -> None:
    """Write down that a training is wanted; its message may come before or after, once or more."""
    row = {
        "run_id": run_id,
        "state": "requested",
        "requested_at": now,
        "requested_by": requested_by,
        "overrides": dict(overrides),
    }
    connection.execute(insert_if_absent(connection, TrainingRun), row)


def requested_runs(connection: Connection) -> set[str]:
    """The ids of the runs that no trainer has claimed yet."""
    return set(connection.scalars(select(TrainingRun.run_id).where(TrainingRun.state == "requested")))


def claim_run(connection: Connection, run_id: str, now: datetime) -> bool:
    """Turn a requested run into a running one. True for the one caller that did; false for every other."""
    requested = TrainingRun.run_id == run_id, TrainingRun.state == "requested"
    claim = update(TrainingRun).where(*requested).values(state="running", started_at=now, heartbeat_at=now)
    return connection.execute(claim).rowcount == 1


def report_progress(connection: Connection, run_id: str, *, now: datetime, **progress: Unpack[Progress]) -> None:
    """A sign of life of a running training, with what it has to say.

    Raises:
        RunIsOver: the run was given up meanwhile; the training should stop.
        NoSuchRun: there is no such run.
    """
    running = TrainingRun.run_id == run_id, TrainingRun.state == "running"
    _update_run(connection, run_id, update(TrainingRun).where(*running).values(heartbeat_at=now, **progress))


def finish_run(
    connection: Connection,
    run_id: str,
    *,
    state: Literal["promoted", "refused", "failed"],
    reason: str,
    version: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    now: datetime,
) -> None:
    """Give a run its verdict, once. In one transaction with its activation, a run given up promotes nothing.

    Raises:
        RunIsOver: it has one already.
        NoSuchRun: there is no such run.
    """
    verdict = {
        "state": state,
        "reason": reason,
        "version": version,
        "metrics": None if metrics is None else dict(metrics),
        "finished_at": now,
    }
    unfinished = TrainingRun.run_id == run_id, TrainingRun.state.in_(("requested", "running"))
    _update_run(connection, run_id, update(TrainingRun).where(*unfinished).values(**verdict))


def _update_run(connection: Connection, run_id: str, statement: Any) -> None:
    if connection.execute(statement).rowcount == 1:
        return
    state = connection.scalar(select(TrainingRun.state).where(TrainingRun.run_id == run_id))
    if state is None:
        raise NoSuchRun(f"there is no training run {run_id!r}")
    raise RunIsOver(f"training run {run_id!r} is not running: it is {state}")


def heartbeats(connection: Connection) -> dict[str, datetime | None]:
    """The last sign of life of each running run, by its id."""
    running = select(TrainingRun.run_id, TrainingRun.heartbeat_at).where(TrainingRun.state == "running")
    return dict(connection.execute(running).all())


def fail_abandoned_run(connection: Connection, run_id: str, *, heartbeat_at: datetime | None, now: datetime) -> bool:
    """Fail a running run, unless it has given a sign of life after this one; whether it was failed."""
    silent = TrainingRun.run_id == run_id, TrainingRun.state == "running", TrainingRun.heartbeat_at == heartbeat_at
    reason = "the training process stopped without a word"
    give_up = update(TrainingRun).where(*silent).values(state="failed", reason=reason, finished_at=now)
    return connection.execute(give_up).rowcount == 1


def run(connection: Connection, run_id: str) -> RunRow | None:
    """One training run."""
    return first(connection, select(TrainingRun).where(TrainingRun.run_id == run_id), RunRow)


def run_that_wrote(connection: Connection, version: str) -> RunRow | None:
    """The training run that a version came from; None where it came another way."""
    newest = select(TrainingRun).where(TrainingRun.version == version).order_by(TrainingRun.requested_at.desc())
    return first(connection, newest.limit(1), RunRow)


def runs(connection: Connection, limit: int) -> list[RunRow]:
    """The newest training runs, newest first."""
    newest = select(TrainingRun).order_by(TrainingRun.requested_at.desc(), TrainingRun.run_id).limit(limit)
    return every(connection, newest, RunRow)
