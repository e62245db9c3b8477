"""Every question asked about people's reviews: who said what of which text, and which decisions wait for a word.

Like `db.queries`: functions take a connection and never commit. A text is known by its hash: however often it was
submitted, it is one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import itemgetter

from sqlalchemy import Connection, and_, func, select

from config.names import LABELS, Action
from db.rows import streamed
from db.tables import Decision, Review, Submission, Trial, TrialScore

Labels = Mapping[str, bool | None]
"""All six; None where the reviewer did not say."""


@dataclass(frozen=True, slots=True)
class JudgedText:
    """A text that somebody reviewed, and what each of them says of it now."""

    text: str | None
    """None where it was erased, or never stored."""
    said: Mapping[str, Labels]
    """By reviewer: the newest review of each, whichever submission of the text it was of."""


def judged_texts(connection: Connection) -> Iterator[JudgedText]:
    """Stream every reviewed text, in the order of their hashes, so that the same reviews give the same order."""
    labels = [Review.__table__.c[label] for label in LABELS]
    statement = (
        select(Submission.text_sha256, Submission.text, Review.reviewer, *labels)
        .join(Submission, Submission.submission_id == Review.submission_id)
        .order_by(Submission.text_sha256, Review.review_id)
    )
    for _, rows in groupby(streamed(connection, statement), key=itemgetter("text_sha256")):
        text, said = None, {}
        for row in rows:
            text = text or row["text"]  # one copy may have been erased, and another not
            said[row["reviewer"]] = {label: row[label] for label in LABELS}
        yield JudgedText(text, said)


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a version makes of a text."""

    version: str
    action: Action
    scores: tuple[float, ...]
    """Six, in the order of `LABELS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreviewedDecision:
    """A decision on a text that nobody has reviewed, under this submission or another."""

    submission_id: str
    community: str
    text: str
    text_sha256: str
    scores: tuple[float, ...]
    """Six, in the order of `LABELS`."""
    action: Action
    model_version: str
    policy_version: str
    decided_at: datetime
    shadow: Opinion | None
    """What the version of the newest shadow trial makes of it, if that scored it and is another."""


def unreviewed_decisions(connection: Connection, *, community: str | None, among: int) -> Iterator[UnreviewedDecision]:
    """Stream those of the newest decisions whose text is stored and was never reviewed, newest first.

    Args:
        community: only those of it.
        among: how many of the newest decisions, of every community, are looked at: what bounds the work.
    """
    by_time = Decision.decided_at.desc(), Decision.submission_id.desc()
    newest = select(Decision).order_by(*by_time).limit(among).subquery()
    of_review = Review.submission_id == Submission.submission_id
    reviewed = select(Submission.text_sha256).join(Review, of_review).distinct().subquery()
    newest_shadow = select(func.max(Trial.trial_id)).where(Trial.kind == "shadow").scalar_subquery()
    its_version = select(Trial.version).where(Trial.trial_id == newest_shadow).scalar_subquery()
    shadow = TrialScore.__table__.c
    statement = (
        select(
            newest,
            Submission.community,
            Submission.text,
            Submission.text_sha256,
            shadow.action.label("shadow_action"),
            its_version.label("shadow_version"),
            *(shadow[label].label(f"shadow_{label}") for label in LABELS),
        )
        .join(Submission, Submission.submission_id == newest.c.submission_id)
        # Joined rather than looked for one by one: a text has no index.
        .outerjoin(reviewed, reviewed.c.text_sha256 == Submission.text_sha256)
        .outerjoin(
            TrialScore,
            and_(
                TrialScore.trial_id == newest_shadow,
                TrialScore.submission_id == newest.c.submission_id,
                TrialScore.error.is_(None),
                newest.c.model_version != its_version,
            ),
        )
        .where(Submission.text.is_not(None), reviewed.c.text_sha256.is_(None))
        .order_by(newest.c.decided_at.desc(), newest.c.submission_id.desc())
    )
    if community is not None:
        statement = statement.where(Submission.community == community)
    for row in streamed(connection, statement):
        opinion = None
        if row["shadow_action"] is not None:
            scores = tuple(row[f"shadow_{label}"] for label in LABELS)
            opinion = Opinion(row["shadow_version"], Action(row["shadow_action"]), scores)
        yield UnreviewedDecision(
            submission_id=row["submission_id"],
            community=row["community"],
            text=row["text"],
            text_sha256=row["text_sha256"],
            scores=tuple(row[label] for label in LABELS),
            action=Action(row["action"]),
            model_version=row["model_version"],
            policy_version=row["policy_version"],
            decided_at=row["decided_at"],
            shadow=opinion,
        )
