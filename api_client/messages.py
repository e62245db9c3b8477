"""Comments on their way to a worker: checked, in lists that fit into messages, each with the id of its submission.

Pure: nothing here speaks to Redis or the database.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, overload

from pydantic import ValidationError

from api_client.publishing import new_task_id
from config.comment import Comment
from config.comment import explain as explain_refusal
from config.identity import TEXT_HASH_CHARS, SubmissionId, submission_id
from config.names import DEFAULT_COMMUNITY
from db.durable import PendingSubmission

COMMENTS_PER_MESSAGE = 64
COMMENTS_PER_ROUND_TRIP = 1_024
TEXT_BYTES_PER_ROUND_TRIP = 4 * 1024 * 1024
"""Bounds the memory of `submit_many`, whatever the comments' lengths."""


class InvalidComment(Exception):
    """A comment that no worker would take; the message names the field and what is allowed, never the text."""


class SubmissionIds(Sequence[str]):
    """The ids of submitted comments, in their order; kept for each message rather than for each comment.

    Each is a `config.identity.SubmissionId`.
    """

    def __init__(self) -> None:
        self._messages: list[_Message] = []
        self._ends: list[int] = []

    def add(self, task_id: str, comments: Sequence[Mapping[str, Any]]) -> None:
        """Take in one message."""
        self._messages.append(_Message.of(task_id, comments))
        self._ends.append(len(self) + len(comments))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> SubmissionId: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> SubmissionId | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        message = bisect_right(self._ends, position)
        return self._messages[message].id_at(position - (self._ends[message - 1] if message else 0))

    def __repr__(self) -> str:
        return f"<{len(self):,} submission ids>"


@dataclass(frozen=True, slots=True)
class _Message:
    """What the ids of its comments are made of."""

    task_id: str
    keys: dict[int, str]
    """Of those that have one, by their places; so with the next."""
    communities: dict[int, str]
    text_hashes: bytes
    """TEXT_HASH_CHARS digits of each."""

    @classmethod
    def of(cls, task_id: str, comments: Sequence[Mapping[str, Any]]) -> "_Message":
        keys, communities = (
            {place: comment[field] for place, comment in enumerate(comments) if field in comment}
            for field in ("idempotency_key", "community")
        )
        hashes = (bytes.fromhex(text_sha256(comment)[:TEXT_HASH_CHARS]) for comment in comments)
        return cls(task_id, keys, communities, b"".join(hashes))

    def id_at(self, place: int) -> SubmissionId:
        community = self.communities.get(place, DEFAULT_COMMUNITY)
        each = TEXT_HASH_CHARS // 2
        text_hash = self.text_hashes[place * each : (place + 1) * each].hex()
        name = self.keys.get(place) or f"{self.task_id}:{place}"
        return SubmissionId(submission_id(community, name), community, text_hash)


def message_form(comment: str | Mapping[str, Any]) -> dict[str, Any]:
    """The comment as it travels: JSON types only, what is None left out.

    The worker checks again by the same contract: messages also come from plain Celery.

    Args:
        comment: its text, or a mapping with `text` and any other field of `config.comment.Comment`.

    Raises:
        InvalidComment: a field is missing, unknown or breaks its bound.
    """
    if isinstance(comment, str):
        comment = {"text": comment}
    if not isinstance(comment, Mapping):
        raise InvalidComment(f"a comment is a string or a mapping, not {type(comment).__name__}")
    try:
        checked = Comment.model_validate({name: value for name, value in comment.items() if value is not None})
    except ValidationError as error:
        raise InvalidComment(explain_refusal(error)) from None
    return checked.model_dump(mode="json", exclude_unset=True)


def checked_form(comment: str | Mapping[str, Any], durable: bool) -> dict[str, Any]:
    form = message_form(comment)
    if durable and not form.get("store_text", True):
        raise InvalidComment(
            "store_text=False forbids what durable needs, the text in the database until it is decided; "
            "submit this one with durable=False"
        )
    return form


def round_trips(comments: Iterable[str | Mapping[str, Any]], durable: bool) -> Iterator[list[dict[str, Any]]]:
    """Checked comments in lists bounded by count and bytes; those before a bad one are handed out before it raises."""
    batch: list[dict[str, Any]] = []
    text_bytes = 0
    try:
        for position, comment in enumerate(comments):
            try:
                form = checked_form(comment, durable)
            except InvalidComment as error:
                raise InvalidComment(f"comment {position} (counted from 0): {error}") from None
            batch.append(form)
            text_bytes += len(form["text"].encode())
            if len(batch) == COMMENTS_PER_ROUND_TRIP or text_bytes >= TEXT_BYTES_PER_ROUND_TRIP:
                yield batch
                batch, text_bytes = [], 0
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def in_messages(comments: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """In lists that are not too long for a message, each with a task id of its own."""
    return [
        (new_task_id(), comments[start : start + COMMENTS_PER_MESSAGE])
        for start in range(0, len(comments), COMMENTS_PER_MESSAGE)
    ]


def name_of(form: Mapping[str, Any], task_id: str, place: int) -> str:
    """The name of a comment's submission: see `config.identity`."""
    name: str = form.get("idempotency_key", f"{task_id}:{place}")
    return name


def pending_submission(
    form: Mapping[str, Any], name: str, queue: str, submitted_at: datetime, now: datetime
) -> PendingSubmission:
    community = form.get("community", DEFAULT_COMMUNITY)
    its_id = submission_id(community, name)
    return PendingSubmission(
        submission_id=its_id,
        community=community,
        comment_id=form.get("id", its_id),
        author=form.get("author"),
        text=form["text"],
        text_sha256=text_sha256(form),
        language=form.get("language"),
        context=form.get("context"),
        created_at=_time(form.get("created_at")),
        submitted_at=submitted_at,
        queue=queue,
        expires_at=_time(form.get("expires_at")),
        enqueued_at=now,
        name=None if name == its_id else name,
    )


def _time(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value)


def text_sha256(form: Mapping[str, Any]) -> str:
    return hashlib.sha256(form["text"].encode()).hexdigest()


def id_is_taken(submission_id: str) -> str:
    return f"the id {submission_id!r} belongs to another text; use a new idempotency key for an edited comment"
