"""Rows that the database tests write: complete, and different only where a test says so."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from db import dead_letters, policies, privacy
from db.dead_letters import DeadLetterRow
from db.durable import PendingSubmission
from db.feed import Event
from db.queries import ScoredSubmission, add_review, record_decisions, register_version
from db.session import open_database, writing
from db.webhooks import EventToPost

NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
POLICY = "allow: everything\n"
POLICY_VERSION = hashlib.sha256(POLICY.encode()).hexdigest()


def minutes(number: float) -> datetime:
    """This long after noon."""
    return NOON + timedelta(minutes=number)


def scored(submission_id: str, text: str | None = None, **changes: Any) -> ScoredSubmission:
    """A scored submission whose text is its id's own unless given."""
    text = f"the text of {submission_id}" if text is None else text
    row = ScoredSubmission(
        submission_id=submission_id,
        community="default",
        comment_id=f"comment of {submission_id}",
        author=None,
        text=text,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        language=None,
        context=None,
        created_at=None,
        submitted_at=NOON,
        toxic=0.1,
        severe_toxic=0.02,
        obscene=0.03,
        threat=0.04,
        insult=0.05,
        identity_hate=0.06,
        action="allow",
        fired_label=None,
        fired_threshold=None,
        model_version="v1",
        policy_version=POLICY_VERSION,
        windows=1,
        truncated=False,
        queue_ms=1.5,
        compute_ms=2.5,
        decided_at=NOON,
    )
    return replace(row, **changes)


def pending(submission_id: str, text: str | None = None, **changes: Any) -> PendingSubmission:
    """The durable submission that `scored` decides."""
    decided = scored(submission_id, text)
    same = ("submission_id", "community", "comment_id", "author", "text_sha256", "language", "context", "created_at",
            "name")  # fmt: skip
    row = PendingSubmission(
        **{name: getattr(decided, name) for name in same},
        text=decided.text or "",
        submitted_at=decided.submitted_at,
        queue="toxicity",
        expires_at=None,
        enqueued_at=NOON,
    )
    return replace(row, **changes)


def letter(dead_letter_id: str, **changes: Any) -> DeadLetterRow:
    """A dead letter."""
    row = DeadLetterRow(
        dead_letter_id=dead_letter_id,
        queue="toxicity",
        reason="invalid_comment",
        detail="text is empty",
        payload=b'{"text": ""}',
        payload_bytes=12,
        payload_sha256=None,
        text_sha256=None,
        community=None,
        comment_id=None,
        author=None,
        received_at=NOON,
    )
    return replace(row, **changes)


def set_aside(submission_id: str, text: str | None = None, **changes: Any) -> DeadLetterRow:
    """The dead letter of the submission that `scored` decides."""
    row = scored(submission_id, text)
    same = {name: getattr(row, name) for name in ("community", "comment_id", "text_sha256", "submitted_at")}
    return letter(submission_id, **{"reason": "expired"} | same | changes)


def prepare(connection: Connection, *versions: str) -> None:
    """The policy that `scored` names, and registered model versions."""
    policies.store(connection, POLICY, now=NOON)
    for version in versions:
        register_version(connection, {"version": version, "parent": None}, NOON)


def review(connection: Connection, submission_id: str, action: str = "hide", *, minute: float = 1) -> None:
    """A moderator's word on a decision."""
    now = minutes(minute)
    add_review(connection, submission_id=submission_id, action=action, labels={}, reviewer="ann", note=None, now=now)


def erase(connection: Connection, submission_id: str, *, minute: float = 2) -> None:
    """What `moderato erase` does with a comment that `scored` made."""
    subject = privacy.Subject("comment", f"comment of {submission_id}")
    privacy.erase(connection, subject, by="ann", reason=None, now=minutes(minute))


def told(event: Event | EventToPost) -> str:
    """The id of what was decided; of another event its last word, too."""
    kind = event.type.removeprefix("comment.")
    return event.submission_id if kind == "decided" else f"{event.submission_id} {kind}"


def decide(database_url: str, *rows: ScoredSubmission, letters: Sequence[DeadLetterRow] = ()) -> None:
    """Write what a worker would."""
    engine = open_database(database_url)
    with writing(engine) as connection:
        prepare(connection, "v1", "v2")
        record_decisions(connection, rows)
        dead_letters.record(connection, letters)
    engine.dispose()
