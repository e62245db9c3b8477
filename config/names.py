"""The words that client, worker and trainer share. Owns no behaviour and imports nothing of ours."""

from enum import StrEnum

LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
"""The six labels, in the order of every score vector in the project."""


TEXT_COLUMNS = ("comment_text", "text")
"""Where a file's texts are, where nobody names another column; the first that it has."""


class Action(StrEnum):
    """What is done with a comment, mildest first."""

    ALLOW = "allow"
    LABEL = "label"
    REVIEW = "review"
    HIDE = "hide"
    REMOVE = "remove"


class EventType(StrEnum):
    """What the feed tells of, see `db.feed`."""

    DECIDED = "comment.decided"
    """The model scored a submission and the policy chose an action."""
    REVIEWED = "comment.reviewed"
    """A person confirmed or overturned that action."""
    ERASED = "comment.erased"
    """A person had a submission's text erased."""


MODERATE_QUEUE = "toxicity"
INTERACTIVE_QUEUE = f"{MODERATE_QUEUE}.interactive"
"""Preferred to the ordinary queue by a worker that is given both: for comments whose authors wait."""
BULK_QUEUE = f"{MODERATE_QUEUE}.bulk"
"""Taken from when the others are empty, and now and then when they are not: for archives."""
MODERATE_QUEUES = (INTERACTIVE_QUEUE, MODERATE_QUEUE, BULK_QUEUE)
"""The most urgent first."""
RETRAIN_QUEUE = "retrain"

MODERATE_TASK = "worker.moderate"
RETRAIN_TASK = "trainer.retrain"

WORKER_CONTROL_EXCHANGE = "moderato.worker"
"""Remote-control exchange of our workers, so that a broadcast never reaches another team's."""
TRAINER_CONTROL_EXCHANGE = "moderato.trainer"

WORKER_UNACKED_KEY = "moderato.worker.unacked"
"""Redis hash of the messages that workers hold. Our own: every consumer of a Redis database sweeps kombu's default
key with its own timeout, and would give our messages, or we another team's, to somebody else."""
TRAINER_UNACKED_KEY = "moderato.trainer.unacked"

ACTIVATION_CHANGED = "activation_changed"
"""Remote-control command that tells a worker to look at once at which version and which policy are active."""
PIPELINE_STATS = "pipeline_stats"
"""Remote-control command that a worker answers with its pipeline's counters."""

SUBMITTED_AT_HEADER = "submitted_at"
"""Message header: when the producer submitted, seconds since the epoch. Optional."""
ENQUEUED_AT_HEADER = "enqueued_at"
"""Message header of durable submissions: when they were put on the queue, by the database's clock, in such seconds."""

EXPIRES_HEADER = "expires"
"""Celery's own message header: until when the message is worth anything, in ISO 8601."""

ANSWER_TO_HEADER = "answer_to"
"""Message header of a producer that waits: a token of its own making, up to MAX_ANSWER_TOKEN_CHARS letters, digits and
hyphens. When the message's last comment is decided, each decision is published on ANSWER_CHANNEL and the token."""
MAX_ANSWER_TOKEN_CHARS = 64
ANSWER_CHANNEL = "moderato.answer."
"""Redis pub/sub channels of the answers, as the next; before each stand the prefix of all keys and `/<database>.`, as
kombu has it. What is published there may be lost, the database's rows are not."""
ANSWERED = (
    "submission_id",
    "community",
    "comment_id",
    *LABELS,
    "action",
    "fired_label",
    "fired_threshold",
    "model_version",
    "policy_version",
    "windows",
    "decided_at",
)
"""What an answer says of a decision, a JSON object: columns of its rows."""
DECIDED_CHANNEL = "moderato.decided"
"""Says that something was decided, not what."""

MAX_COMMENTS_PER_MESSAGE = 256
MAX_TEXT_BYTES = 20_480
"""Longest text in bytes of UTF-8: what the Perspective API allowed."""
MAX_ID_CHARS = 200
MAX_CONTEXT_BYTES = 4_096
MAX_POLICY_BYTES = 1_048_576
"""Longest text of a policy: some ten thousand communities."""

SWEEP_LOCK = 6_877_836_933
"""PostgreSQL's advisory lock of the one worker that sweeps; any number that nobody else uses."""

ACTIVATION_LOCK = 6_877_836_934
"""The same, of the one transaction that changes which version is active or on trial, or which policy is active."""

REVIEW_LOCK = 6_877
"""The first number of PostgreSQL's advisory lock of a review; the second is the submission's."""

DEFAULT_COMMUNITY = "default"
STARTER_VERSION = "starter-2"
"""The trained version that ships in `model/starter`."""
FORMER_STARTERS = ("starter-1",)
"""Those that earlier releases shipped. A database may still say that one of them is active."""


class Reason(StrEnum):
    """Why something was set aside in `dead_letters`."""

    UNREADABLE_MESSAGE = "unreadable_message"
    UNKNOWN_TASK = "unknown_task"
    NOT_A_LIST = "not_a_list"
    TOO_MANY_COMMENTS = "too_many_comments"
    INVALID_COMMENT = "invalid_comment"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict"
    EXPIRED = "expired"
    REVOKED = "revoked"
    WORKER_DIED = "worker_died"
    SCORING_FAILED = "scoring_failed"
    RECORDING_FAILED = "recording_failed"
    ERASED = "erased"
