"""Everything that is known of one submission: the question behind `moderato explain`.

Like `db.queries`: functions take a connection and never commit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from db import dead_letters
from db.activations import came_before
from db.dead_letters import DeadLetterRow
from db.identity import stored_id
from db.policies import PolicyActivationRow
from db.queries import ActivationRow, VersionRow, version
from db.rows import first
from db.tables import (
    Activation,
    Decision,
    Erasure,
    Policy,
    PolicyActivation,
    Review,
    Submission,
    Trial,
    TrialScore,
)
from db.trials import TrialRow, decided_in

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRow:
    """A row of `policies`, column by column."""

    policy_version: str
    text: str
    first_used_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the tables say of one submission. Where no class stands for a row it is a mapping of its columns."""

    submission: Row | None
    """Of `submissions`; None where only a dead letter knows the id."""
    decision: Row | None
    """Of `decisions`; None before there is one, and where there never will be."""
    reviews: list[Row]
    """Every one, the oldest first."""
    dead_letter: DeadLetterRow | None
    erasure: Row | None
    """The record of the erasure that took the text."""
    policy: PolicyRow | None
    policy_activation: PolicyActivationRow | None
    """The newest of the policy before the decision; None where the worker decided by its own file."""
    version: VersionRow | None
    version_activation: ActivationRow | None
    """The newest of the version before the decision; None where it only was on trial."""
    trial: TrialRow | None
    """The canary or A/B test in which the version decided this one."""
    trial_scores: list[Row]
    """What other versions said of it, or failed to: of `trial_scores`, with the trial's `kind` and `version`."""


def newest_submission(connection: Connection, *, community: str, comment_id: str) -> str | None:
    """The newest submission of a comment, decided or not; None where there is none."""
    of_comment = select(Submission.submission_id).where(
        Submission.community == community, Submission.comment_id == comment_id
    )
    # As `current_actions` has it: its row is the newest that was decided.
    newest = of_comment.outerjoin(Decision, Decision.submission_id == Submission.submission_id).order_by(
        Submission.submitted_at.desc(), Decision.decided_at.desc().nulls_last(), Submission.submission_id.desc()
    )
    return connection.scalar(newest.limit(1))


def facts(connection: Connection, submission_id: str) -> Facts | None:
    """All that is known of a submission, or of a dead letter's id; None where nothing is."""
    letter = dead_letters.letter_of(connection, submission_id)
    submission_id = stored_id(connection, submission_id)
    submission = _row(connection, select(Submission.__table__).where(Submission.submission_id == submission_id))
    if submission is None and letter is None:
        return None
    decision = _row(connection, select(Decision.__table__).where(Decision.submission_id == submission_id))
    reviews = select(Review.__table__).where(Review.submission_id == submission_id)
    return Facts(
        submission=submission,
        decision=decision,
        reviews=_rows(connection, reviews.order_by(Review.review_id)),
        # One may stand under the id of a submission that was decided before it came again; it explains nothing.
        dead_letter=letter if decision is None else None,
        erasure=_erasure(connection, submission),
        **(_WITHOUT_DECISION if decision is None else _of_decision(connection, decision)),
        trial_scores=_trial_scores(connection, submission_id),
    )


_WITHOUT_DECISION: dict[str, Any] = dict.fromkeys(
    ("policy", "policy_activation", "version", "version_activation", "trial")
)


def _of_decision(connection: Connection, decision: Row) -> dict[str, Any]:
    policy_version, model_version = decision["policy_version"], decision["model_version"]
    policy = select(Policy).where(Policy.policy_version == policy_version)
    of_policy = select(PolicyActivation).where(
        PolicyActivation.policy_version == policy_version, came_before(PolicyActivation, decision)
    )
    of_version = select(Activation).where(Activation.version == model_version, came_before(Activation, decision))
    trial = select(Trial).where(Trial.version == model_version, Trial.kind != "shadow", decided_in(decision))
    newest_of_policy = of_policy.order_by(PolicyActivation.policy_activation_id.desc()).limit(1)
    newest_of_version = of_version.order_by(Activation.activation_id.desc()).limit(1)
    return {
        "policy": first(connection, policy, PolicyRow),
        "policy_activation": first(connection, newest_of_policy, PolicyActivationRow),
        "version": version(connection, model_version),
        "version_activation": first(connection, newest_of_version, ActivationRow),
        "trial": first(connection, trial.order_by(Trial.trial_id.desc()).limit(1), TrialRow),
    }


def _erasure(connection: Connection, submission: Row | None) -> Row | None:
    if submission is None or submission["erased_at"] is None:
        return None
    # An erasure and what it takes have one time: they are one transaction.
    return _row(connection, select(Erasure.__table__).where(Erasure.erased_at == submission["erased_at"]).limit(1))


def _trial_scores(connection: Connection, submission_id: str) -> list[Row]:
    said = (
        select(TrialScore.__table__, Trial.kind, Trial.version)
        .join(Trial, Trial.trial_id == TrialScore.trial_id)
        .where(TrialScore.submission_id == submission_id)
        .order_by(TrialScore.trial_id)
    )
    return _rows(connection, said)


def _row(connection: Connection, statement: Any) -> Row | None:
    return next(iter(_rows(connection, statement)), None)


def _rows(connection: Connection, statement: Any) -> list[Row]:
    return [dict(row) for row in connection.execute(statement).mappings()]
