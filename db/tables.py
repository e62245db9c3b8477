"""The tables, and the meaning of every column. Owns the schema; db/migrations must equal it (tested).

Times are UTC. Scores are probabilities from 0 to 1. Nothing here is overwritten but the way of a submission (`state`,
`enqueued_at`), what is erased of it, the progress of a row in `training_runs`, and the end of one in `trials`.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    LargeBinary,
    String,
    Text,
    TypeDecorator,
    literal,
    or_,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from config.names import MAX_ID_CHARS


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time on every database; SQLite itself keeps no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a time without a time zone cannot be stored: {value!r}")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    type_annotation_map = {
        datetime: UtcDateTime,
        # Without a value the column is null, not the JSON word null.
        dict[str, Any]: JSON(none_as_null=True),
    }


PENDING, DECIDED, DEAD = "pending", "decided", "dead"
"""States of a submission, see there."""

BESIDE_WORKERS = "built_beside_workers"
"""Marks the index of a large table that no migration makes: `db.migrate` builds it while workers write to the table."""

SUBMISSION_ID_CHARS = 255
VERSION_CHARS = 100
ENDPOINT_CHARS = 100


class Submission(Base):
    """One request to score one comment. Immutable but for its way through the queue, and what is erased of it."""

    __tablename__ = "submissions"
    __table_args__ = (
        Index("ix_submissions_comment", "community", "comment_id"),
        Index(
            "ix_submissions_pending",
            "queue",
            "enqueued_at",
            postgresql_where=text("state = 'pending'"),
            sqlite_where=text("state = 'pending'"),
        ),
        # For retention: texts whose dead letter may be gone.
        Index(
            "ix_submissions_dead",
            "submitted_at",
            postgresql_where=text("state = 'dead' AND text IS NOT NULL"),
            sqlite_where=text("state = 'dead' AND text IS NOT NULL"),
            info={BESIDE_WORKERS: True},
        ),
    )

    submission_id: Mapped[str] = mapped_column(String(SUBMISSION_ID_CHARS), primary_key=True)
    """Made of the community and the name, see `config.identity`: in the community `default` usually the name itself.
    Rows of older releases have the name alone, whatever their community."""
    community: Mapped[str] = mapped_column(String(MAX_ID_CHARS))
    """Selects the policy."""
    comment_id: Mapped[str] = mapped_column(String(SUBMISSION_ID_CHARS))
    """The producer's own id; the submission's where it gave none."""
    author: Mapped[str | None] = mapped_column(String(MAX_ID_CHARS))
    """Opaque to us."""
    text: Mapped[str | None] = mapped_column(Text)
    """As submitted; null where the producer said `store_text: false`."""
    text_sha256: Mapped[str] = mapped_column(String(64))
    """Of the text's UTF-8 as submitted."""
    language: Mapped[str | None] = mapped_column(String(35))
    context: Mapped[dict[str, Any] | None]
    """The producer's own JSON; stored, never scored."""
    created_at: Mapped[datetime | None]
    """When the comment was written, if the producer said so."""
    submitted_at: Mapped[datetime]
    """When the producer submitted it; where the message does not say, when the worker took it."""
    state: Mapped[str] = mapped_column(String(16))
    """`decided`; of a durable submission `pending` before that, or `dead` where it became a dead letter instead."""
    queue: Mapped[str | None] = mapped_column(String(MAX_ID_CHARS))
    """Of a durable submission: the queue it waits in, as the next two; null of all others."""
    expires_at: Mapped[datetime | None]
    enqueued_at: Mapped[datetime | None]
    """When its message was last put on the queue, by the database's clock."""
    erased_at: Mapped[datetime | None]
    """When text, context and perhaps author were erased; null where they were not."""
    name: Mapped[str | None] = mapped_column(String(MAX_ID_CHARS))
    """The idempotency key, or `<task id>:<n>`; null where `submission_id` is that itself. See `config.identity`."""


IS_PENDING = Submission.state == literal(PENDING, literal_execute=True)
"""Written out in the statement, so that SQLite sees that the index of pending submissions fits."""
IS_DEAD = Submission.state == literal(DEAD, literal_execute=True)
HOLDS_TEXT = or_(Submission.text.is_not(None), Submission.context.is_not(None))


class Decision(Base):
    """What the model said of a submission and what the policy made of it. Append-only, one per submission."""

    __tablename__ = "decisions"
    __table_args__ = (
        Index("ix_decisions_decided_at", "decided_at"),
        Index("ix_decisions_action", "action", "decided_at"),
        Index(
            "ix_decisions_position",
            "position",
            unique=True,
            # Without those that have none: all of what older releases left, which may be most of a large table.
            postgresql_where=text("position IS NOT NULL"),
            sqlite_where=text("position IS NOT NULL"),
            info={BESIDE_WORKERS: True},
        ),
    )

    submission_id: Mapped[str] = mapped_column(ForeignKey("submissions.submission_id"), primary_key=True)
    toxic: Mapped[float]
    severe_toxic: Mapped[float]
    obscene: Mapped[float]
    threat: Mapped[float]
    insult: Mapped[float]
    identity_hate: Mapped[float]
    action: Mapped[str] = mapped_column(String(16))
    fired_label: Mapped[str | None] = mapped_column(String(16))
    """The label whose rule led to the action; null where no rule did."""
    fired_threshold: Mapped[float | None]
    """The threshold that its score reached."""
    model_version: Mapped[str] = mapped_column(String(VERSION_CHARS))
    policy_version: Mapped[str] = mapped_column(ForeignKey("policies.policy_version"))
    windows: Mapped[int]
    """Overlapping pieces that the text was scored in: more than one where it is longer than the model reads. Each
    score is the highest of them."""
    truncated: Mapped[bool]
    """Only the beginning of the text was scored: Unicode normalisation (NFKC) makes more than 32 KiB of it. The action
    is then `review` or stricter; it is `review` by no rule where the scores of the beginning led to less. In rows of
    releases without windows: the text's end was not scored, whatever the action."""
    queue_ms: Mapped[float]
    """From `submitted_at` to the start of the first forward pass, milliseconds."""
    compute_ms: Mapped[float]
    """Of the forward pass that scored the comment's whole batch, milliseconds; of several passes, their sum. 0 where
    the scores of the same text were known."""
    decided_at: Mapped[datetime]
    position: Mapped[int | None] = mapped_column(BigInteger)
    """Its place in the feed, see `db.feed`; null in rows from before there was one. PostgreSQL draws it from a sequence
    as the column's default. On SQLite the writer counts, and a trigger raises it above other events'."""


class Review(Base):
    """A person's word on a decision: the trainer's food. Append-only; the newest row of a submission counts."""

    __tablename__ = "reviews"
    __table_args__ = (
        Index("ix_reviews_submission", "submission_id"),
        Index(
            "ix_reviews_position",
            "position",
            unique=True,
            postgresql_where=text("position IS NOT NULL"),
            sqlite_where=text("position IS NOT NULL"),
        ),
    )

    review_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    submission_id: Mapped[str] = mapped_column(ForeignKey("decisions.submission_id"))
    action: Mapped[str] = mapped_column(String(16))
    """What should be done with the comment; equal to the decision's where the reviewer confirms it."""
    toxic: Mapped[bool | None]
    severe_toxic: Mapped[bool | None]
    obscene: Mapped[bool | None]
    threat: Mapped[bool | None]
    insult: Mapped[bool | None]
    identity_hate: Mapped[bool | None]
    """Each label as the reviewer sees it; null where not said, and then not trained on."""
    reviewer: Mapped[str] = mapped_column(String(MAX_ID_CHARS))
    note: Mapped[str | None] = mapped_column(Text)
    reviewed_at: Mapped[datetime]
    position: Mapped[int | None] = mapped_column(BigInteger)
    """Its place in the feed; null in rows from before reviews were part of it. The database fills it in: PostgreSQL
    from the sequence of the decisions, SQLite by a trigger."""


class Policy(Base):
    """Every policy that ever decided or was activated, so that each decision can be explained later."""

    __tablename__ = "policies"

    policy_version: Mapped[str] = mapped_column(String(64), primary_key=True)
    """sha256 of `text`."""
    text: Mapped[str] = mapped_column(Text)
    first_used_at: Mapped[datetime]
    """When it first decided or was activated."""


class PolicyActivation(Base):
    """Which policy was made the active one, when, by whom and why. Append-only; the newest row is the truth.

    Where there is none each worker decides by its own policy file.
    """

    __tablename__ = "policy_activations"

    policy_activation_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    policy_version: Mapped[str] = mapped_column(ForeignKey("policies.policy_version"))
    activated_at: Mapped[datetime]
    activated_by: Mapped[str] = mapped_column(String(MAX_ID_CHARS))
    reason: Mapped[str] = mapped_column(Text)
    after_position: Mapped[int | None] = mapped_column(BigInteger)
    """The highest position of a decision when it was written: times are of the database's clock, decisions' of Redis'.
    Null in rows of older releases."""


class ModelVersion(Base):
    """A version that a worker may be told to load. Its files are in the versions directory under its name."""

    __tablename__ = "model_versions"

    version: Mapped[str] = mapped_column(String(VERSION_CHARS), primary_key=True)
    parent: Mapped[str | None] = mapped_column(String(VERSION_CHARS))
    """The version it was fine-tuned from."""
    manifest: Mapped[dict[str, Any]]
    """What its manifest.json said when it was registered."""
    registered_at: Mapped[datetime]


class Activation(Base):
    """Which version was made the active one, when, by whom and why. Append-only; the newest row is the truth."""

    __tablename__ = "activations"

    activation_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    version: Mapped[str] = mapped_column(ForeignKey("model_versions.version"))
    activated_at: Mapped[datetime]
    activated_by: Mapped[str] = mapped_column(String(MAX_ID_CHARS))
    reason: Mapped[str] = mapped_column(Text)
    after_position: Mapped[int | None] = mapped_column(BigInteger)
    """The highest position of a decision when it was written: times are of the database's clock, decisions' of Redis'.
    Null in rows of older releases."""


class VersionLoad(Base):
    """What came of each worker's attempt to follow an activation. Append-only."""

    __tablename__ = "version_loads"
    __table_args__ = (Index("ix_version_loads_activation", "activation_id"),)

    load_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    activation_id: Mapped[int] = mapped_column(ForeignKey("activations.activation_id"))
    worker: Mapped[str] = mapped_column(String(MAX_ID_CHARS))
    """Celery's node name."""
    version: Mapped[str] = mapped_column(String(VERSION_CHARS))
    """The version the worker scores with since."""
    error: Mapped[str | None] = mapped_column(Text)
    """Why the activated version was refused; null where it was loaded."""
    loaded_at: Mapped[datetime]


class TrainingRun(Base):
    """One retrain, from the request to the verdict. The row, not the message, is what a crash leaves behind."""

    __tablename__ = "training_runs"

    run_id: Mapped[str] = mapped_column(String(36), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    """`requested`, `running`, `promoted`, `refused` (by the gate, as superseded, or for too few corrections: see
    `reason`) or `failed`."""
    requested_at: Mapped[datetime]
    requested_by: Mapped[str] = mapped_column(String(MAX_ID_CHARS))
    overrides: Mapped[dict[str, Any]]
    """Trainer settings that the request changed."""
    started_at: Mapped[datetime | None]
    heartbeat_at: Mapped[datetime | None]
    """Last sign of life of the training process."""
    finished_at: Mapped[datetime | None]
    phase: Mapped[str | None] = mapped_column(String(32))
    """What it is doing, in a word: `data`, `training`, `calibrating`, `exporting`, `evaluating` or `judging`."""
    step: Mapped[int | None]
    total_steps: Mapped[int | None]
    loss: Mapped[float | None]
    seconds_left: Mapped[float | None]
    """Of the training steps."""
    parent: Mapped[str | None] = mapped_column(String(VERSION_CHARS))
    version: Mapped[str | None] = mapped_column(String(VERSION_CHARS))
    """The version it wrote."""
    dataset_sha256: Mapped[str | None] = mapped_column(String(64))
    metrics: Mapped[dict[str, Any] | None]
    """Candidate's and active version's figures on the same held-out rows, and the gate's verdict, number by number."""
    reason: Mapped[str | None] = mapped_column(Text)
    """The gate's verdict in words, or why the run failed."""


class DeadLetter(Base):
    """What could not be decided, why, and the bytes as they came (bounded)."""

    __tablename__ = "dead_letters"
    __table_args__ = (Index("ix_dead_letters_received_at", "received_at"),)

    dead_letter_id: Mapped[str] = mapped_column(String(SUBMISSION_ID_CHARS), primary_key=True)
    """The submission's id, or the message's, or a hash of its bytes where it has none: a redelivery adds no row."""
    queue: Mapped[str] = mapped_column(String(MAX_ID_CHARS))
    reason: Mapped[str] = mapped_column(String(32))
    """One of config.names.Reason."""
    detail: Mapped[str] = mapped_column(Text)
    """What is wrong and what to do about it, for the producer; never the comment's text."""
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    """The first bytes of the comment or message; empty where the producer said `store_text: false`."""
    payload_bytes: Mapped[int]
    """Its whole length."""
    payload_sha256: Mapped[str | None] = mapped_column(String(64))
    """Of the whole payload; null in rows of the first release."""
    text_sha256: Mapped[str | None] = mapped_column(String(64))
    """Of the comment's text; null where it was not well-formed."""
    community: Mapped[str | None] = mapped_column(String(MAX_ID_CHARS))
    """Of the comment, as the next two: null where it could not be read, or did not say."""
    comment_id: Mapped[str | None] = mapped_column(String(SUBMISSION_ID_CHARS))
    author: Mapped[str | None] = mapped_column(String(MAX_ID_CHARS))
    received_at: Mapped[datetime]
    name: Mapped[str | None] = mapped_column(String(MAX_ID_CHARS))
    """As in `submissions`."""
    submitted_at: Mapped[datetime | None]
    """When the producer submitted it first, whatever was retried since; null in rows of older releases."""


class Trial(Base):
    """A second version at work beside the active one: a canary, a shadow, or one side of an A/B test. One at a time."""

    __tablename__ = "trials"

    trial_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    kind: Mapped[str] = mapped_column(String(16))
    """`canary` and `ab`: it decides its share of the submissions; `shadow`: its scores are recorded, never acted on."""
    version: Mapped[str] = mapped_column(ForeignKey("model_versions.version"))
    baseline: Mapped[str] = mapped_column(String(VERSION_CHARS))
    """The version that was active when it began; the activation of another ends the trial."""
    share: Mapped[float]
    """Of the submissions, from 0 to 1; which ones is a matter of their ids alone."""
    bounds: Mapped[dict[str, Any]]
    """Within which a canary must stay, or is rolled back: the settings at its start."""
    started_at: Mapped[datetime]
    started_by: Mapped[str] = mapped_column(String(MAX_ID_CHARS))
    reason: Mapped[str] = mapped_column(Text)
    outcome: Mapped[str | None] = mapped_column(String(16))
    """Null while it runs; then `promoted`, `stopped` or `rolled_back`."""
    ended_at: Mapped[datetime | None]
    ended_by: Mapped[str | None] = mapped_column(String(MAX_ID_CHARS))
    verdict: Mapped[str | None] = mapped_column(Text)
    """Why it ended, with the figures that said so."""
    after_position: Mapped[int | None] = mapped_column(BigInteger)
    """The highest position of a decision when it began, as in `activations`; null in rows of older releases."""
    until_position: Mapped[int | None] = mapped_column(BigInteger)
    """The same when it ended. What was decided while it ran has a position between the two."""


class TrialScore(Base):
    """What a version on trial said of a submission: of a shadow always, of the others only where it failed."""

    __tablename__ = "trial_scores"

    trial_id: Mapped[int] = mapped_column(ForeignKey("trials.trial_id"), primary_key=True)
    submission_id: Mapped[str] = mapped_column(String(SUBMISSION_ID_CHARS), primary_key=True)
    """No foreign key: it may be written before the submission's own row."""
    toxic: Mapped[float | None]
    severe_toxic: Mapped[float | None]
    obscene: Mapped[float | None]
    threat: Mapped[float | None]
    insult: Mapped[float | None]
    identity_hate: Mapped[float | None]
    action: Mapped[str | None] = mapped_column(String(16))
    """What the policy would have made of the scores."""
    error: Mapped[str | None] = mapped_column(Text)
    """Why it gave no scores, never quoting the comment; the active version then decided."""
    scored_at: Mapped[datetime]


class Erasure(Base):
    """The record of an erasure: what was erased, not what it said. Append-only."""

    __tablename__ = "erasures"

    erasure_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    kind: Mapped[str] = mapped_column(String(16))
    """`comment`, `author`, or `retention`: texts grown older than the settings allow."""
    subject: Mapped[str] = mapped_column(String(SUBMISSION_ID_CHARS))
    """The comment's id; of an author only the sha256 of the name; of a retention the days texts are kept."""
    community: Mapped[str | None] = mapped_column(String(MAX_ID_CHARS))
    """To which it was confined; null where to none."""
    until: Mapped[datetime | None]
    """Of a retention: what was decided before then has been erased."""
    submissions: Mapped[int]
    """How many rows lost their text."""
    dead_letters: Mapped[int]
    """How many lost their payload."""
    erased_at: Mapped[datetime]
    erased_by: Mapped[str] = mapped_column(String(MAX_ID_CHARS))
    reason: Mapped[str | None] = mapped_column(Text)


class ErasedSubmission(Base):
    """A submission that a person had erased; its place in the feed. Append-only. Retention writes none."""

    __tablename__ = "erased_submissions"
    __table_args__ = (Index("ix_erased_submissions_position", "position", unique=True),)

    erased_submission_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    submission_id: Mapped[str] = mapped_column(ForeignKey("submissions.submission_id"))
    erased_at: Mapped[datetime]
    position: Mapped[int | None] = mapped_column(BigInteger)
    """The database fills it in, as that of a review."""


class WebhookCursor(Base):
    """How far an endpoint's deliveries have been made from the feed."""

    __tablename__ = "webhook_cursors"

    endpoint: Mapped[str] = mapped_column(String(ENDPOINT_CHARS), primary_key=True)
    """Its name in the settings."""
    position: Mapped[int] = mapped_column(BigInteger)
    """Up to which decisions were looked at."""
    events_position: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """Up to which reviews and erasures were. A sender of the release before moves only the first one on: it does not
    know of them."""
    updated_at: Mapped[datetime]


class WebhookDelivery(Base):
    """One decision to be posted to one endpoint: the outbox. It holds no text; that is read when it is posted."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        # What waits is little beside what was delivered and is kept for a while.
        Index(
            "ix_webhook_deliveries_due",
            "endpoint",
            "next_attempt_at",
            postgresql_where=text("state = 'pending'"),
            sqlite_where=text("state = 'pending'"),
        ),
        Index("ix_webhook_deliveries_finished", "finished_at"),
    )

    endpoint: Mapped[str] = mapped_column(String(ENDPOINT_CHARS), primary_key=True)
    """Its name in the settings."""
    submission_id: Mapped[str] = mapped_column(ForeignKey("decisions.submission_id"), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    """`pending`, `delivered`, or `dead`: given up after the last attempt."""
    attempts: Mapped[int]
    """Begun: one that a process died over counts."""
    next_attempt_at: Mapped[datetime | None]
    """Of a pending one; while it is being posted, when another process may take it for left behind."""
    error: Mapped[str | None] = mapped_column(Text)
    """Why the last attempt failed."""
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    """When it was delivered or given up."""


class WebhookEventDelivery(Base):
    """One review or erasure to be posted to one endpoint: the rest of the outbox.

    Not in `webhook_deliveries`, whose key leaves room for one delivery of a submission, and whose rows senders of the
    release before post as decisions.
    """

    __tablename__ = "webhook_event_deliveries"
    __table_args__ = (
        Index(
            "ix_webhook_event_deliveries_due",
            "endpoint",
            "next_attempt_at",
            postgresql_where=text("state = 'pending'"),
            sqlite_where=text("state = 'pending'"),
        ),
        # For the ones before it: of one submission they are posted in order.
        Index(
            "ix_webhook_event_deliveries_pending",
            "endpoint",
            "submission_id",
            "position",
            postgresql_where=text("state = 'pending'"),
            sqlite_where=text("state = 'pending'"),
        ),
        Index("ix_webhook_event_deliveries_finished", "finished_at"),
    )

    endpoint: Mapped[str] = mapped_column(String(ENDPOINT_CHARS), primary_key=True)
    position: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    """Of the row in `reviews` or `erased_submissions`."""
    type: Mapped[str] = mapped_column(String(32))
    """`comment.reviewed` or `comment.erased`."""
    submission_id: Mapped[str] = mapped_column(ForeignKey("submissions.submission_id"))
    state: Mapped[str] = mapped_column(String(16))
    """This and the next ones as in `webhook_deliveries`."""
    attempts: Mapped[int]
    next_attempt_at: Mapped[datetime | None]
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


class SchemaCompatibility(Base):
    """Which releases may run on these tables, for one that is older than the tables. One row, written by `db.migrate`.

    Migrations add first and take away in a later release, so that workers of two releases run beside each other.
    """

    __tablename__ = "schema_compatibility"

    oldest_revision: Mapped[str] = mapped_column(String(32), primary_key=True)
    """A release that needs this schema revision, or a later one, may."""


CURRENT_ACTIONS = """
SELECT community, comment_id, submission_id, action, decided_by, model_action, model_version, decided_at
FROM (
    SELECT s.community, s.comment_id, s.submission_id,
           COALESCE(r.action, d.action) AS action,
           CASE WHEN r.review_id IS NULL THEN 'model' ELSE r.reviewer END AS decided_by,
           d.action AS model_action, d.model_version, d.decided_at,
           ROW_NUMBER() OVER (PARTITION BY s.community, s.comment_id
                              ORDER BY s.submitted_at DESC, d.decided_at DESC, s.submission_id DESC) AS newest
    FROM decisions d
    JOIN submissions s ON s.submission_id = d.submission_id
    LEFT JOIN reviews r ON r.review_id = (
        SELECT MAX(review_id) FROM reviews WHERE submission_id = d.submission_id)
) AS ranked
WHERE newest = 1
"""
"""The view `current_actions`: what holds for each comment now: the newest submission's action, after reviews.

The newest is the one submitted last, not the one decided last: a text that waited, or was retried, stays behind the
text that replaced it."""
