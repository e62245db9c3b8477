"""Comments on their way to a worker: checked, in lists that fit into messages, each with the id of its submission.

Pure: nothing here speaks to Redis or the database.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, overload

from pydantic import ValidationError

from api_client.publishing import new_task_id
from config.comment import Comment
from config.comment import explain as explain_refusal
from config.names import DEFAULT_COMMUNITY
from db.durable import PendingSubmission

COMMENTS_PER_MESSAGE = 64
COMMENTS_PER_ROUND_TRIP = 1_024
TEXT_BYTES_PER_ROUND_TRIP = 4 * 1024 * 1024
"""Bounds the memory of `submit_many`, whatever the comments' lengths."""


class InvalidComment(Exception):
    """A comment that no worker would take; the message names the field and what is allowed, never the text."""


class SubmissionIds(Sequence[str]):
    """The ids of submitted comments, in their order; kept for each message rather than for each comment."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, dict[int, str]]] = []
        self._ends: list[int] = []

    def add(self, task_id: str, comments: Sequence[Mapping[str, Any]]) -> None:
        """Take in one message."""
        keys = {
            index: comment["idempotency_key"] for index, comment in enumerate(comments) if "idempotency_key" in comment
        }
        self._messages.append((task_id, keys))
        self._ends.append(len(self) + len(comments))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        message = bisect_right(self._ends, position)
        task_id, keys = self._messages[message]
        place = position - (self._ends[message - 1] if message else 0)
        return keys.get(place, f"{task_id}:{place}")

    def __repr__(self) -> str:
        return f"<{len(self):,} submission ids>"


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


def pending_submission(
    form: Mapping[str, Any], submission_id: str, queue: str, submitted_at: datetime, now: datetime
) -> PendingSubmission:
    return PendingSubmission(
        submission_id=submission_id,
        community=form.get("community", DEFAULT_COMMUNITY),
        comment_id=form.get("id", submission_id),
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
    )


def _time(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value)


def text_sha256(form: Mapping[str, Any]) -> str:
    return hashlib.sha256(form["text"].encode()).hexdigest()


def key_is_taken(idempotency_key: str) -> str:
    return (
        f"the idempotency key {idempotency_key!r} was used before with another text; nothing was submitted: "
        "use a new key for an edited comment"
    )
