"""The message contract: what a producer may send, and what is said of everything else. Pure.

A message is the Celery task `worker.moderate` with one positional argument, a list of 1 to 256 comments. Where the
list is sound, a bad comment does not take its neighbours along.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, NoReturn

from pydantic import Field, TypeAdapter, ValidationError

from config.comment import Comment, explain, is_nested_deeper_than, shown
from config.names import MAX_COMMENTS_PER_MESSAGE, MAX_ID_CHARS, MODERATE_TASK, Reason
from worker.envelope import MALFORMED_BYTES_HEADER, MALFORMED_HEADER

MAX_PAYLOAD_BYTES = 65_536
"""How much of what was refused is kept."""
STORE_TEXT_FALSE = re.compile(rb'"store_text"\s*:\s*false')
MAX_NESTING = 64
"""Levels of lists and objects in a body, more than a comment needs. Deeper ones can be read, but not surely shown."""

USUAL_BODY = TypeAdapter(
    tuple[
        tuple[Annotated[list[Comment], Field(min_length=1, max_length=MAX_COMMENTS_PER_MESSAGE)]],
        Annotated[dict[str, object], Field(max_length=0)],
        dict[str, None],
    ]
)
"""Sound comments as any Celery client sends them: one argument, no keywords, and no callback that is set."""


# Not frozen, as setting the fields of a frozen one takes three times as long, for every comment.
@dataclass(slots=True)
class Submitted:
    """A sound comment under the identity of its submission."""

    submission_id: str
    comment: Comment


@dataclass(frozen=True, slots=True)
class Refused:
    """What cannot be decided. `detail` is for the producer and never quotes the comment."""

    dead_letter_id: str
    reason: Reason
    detail: str
    payload: bytes
    payload_bytes: int
    payload_sha256: str
    comment: Comment | None
    """Where it was well-formed."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """All that one message holds."""

    submitted: list[Submitted] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


class _Unreadable(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def parse_message(headers: Mapping[str, Any], body: bytes, *, now: datetime) -> Parsed:
    """Sort a message into comments to score and refusals to record. Never raises for anything in the message.

    Args:
        headers: of the message, as Celery's protocol 2 sets them; protocol 1 has all of it in the body.
        body: what the envelope held, JSON by its own account; or the bytes that were no envelope.
        now: comments that expired before it are refused.
    """
    if MALFORMED_HEADER in headers:
        detail = f"not a Celery message: {headers[MALFORMED_HEADER]}"
        length = headers[MALFORMED_BYTES_HEADER]
        return Parsed(refused=[_refuse_whole(headers["id"], Reason.UNREADABLE_MESSAGE, detail, body, length)])
    if headers.get("task") == MODERATE_TASK:
        try:
            # Nearly every message: all of it in one pass of compiled code. Whatever is odd about another one, reading
            # it again, step by step, takes it all the same or finds the words.
            (sound,), _, _ = USUAL_BODY.validator.validate_json(body)
        except ValidationError:
            pass
        else:
            return _submit(_message_id(headers.get("id"), body), enumerate(sound), Parsed(), now)
    return _parse_step_by_step(headers, body, now)


def _parse_step_by_step(headers: Mapping[str, Any], body: bytes, now: datetime) -> Parsed:
    message_id = _message_id(headers.get("id"), body)
    try:
        task, task_id, arguments = _task(headers, _decode(body))
        message_id = _message_id(task_id, body)
        comments = _comments(task, arguments)
    except _Unreadable as problem:
        return Parsed(refused=[_refuse_whole(message_id, problem.reason, problem.detail, body, len(body))])
    if len(comments) > MAX_COMMENTS_PER_MESSAGE:
        detail = (
            f"{len(comments):,} comments in one message, more than the {MAX_COMMENTS_PER_MESSAGE} allowed; "
            "none was scored: send them in several messages"
        )
        return Parsed(refused=[_refuse_whole(message_id, Reason.TOO_MANY_COMMENTS, detail, body, len(body))])

    parsed, sound = Parsed(), []
    for index, raw in enumerate(comments):
        try:
            sound.append((index, Comment.model_validate(raw)))
        except ValidationError as error:
            payload = json.dumps(raw).encode()
            # Anything but a plain true forbids it: a comment this wrong may have meant to.
            stored = not isinstance(raw, dict) or raw.get("store_text", True) is True
            refused = _refuse(f"{message_id}:{index}", Reason.INVALID_COMMENT, explain(error), payload, stored)
            parsed.refused.append(refused)
    return _submit(message_id, sound, parsed, now)


def _submit(message_id: str, sound: Iterable[tuple[int, Comment]], parsed: Parsed, now: datetime) -> Parsed:
    """Add well-formed comments, each with its place in the message, to what was parsed."""
    for index, comment in sound:
        submission_id = comment.idempotency_key or f"{message_id}:{index}"
        if comment.expires_at is not None and comment.expires_at <= now:
            detail = f"expired at {comment.expires_at.isoformat()}, before a worker took it; it was not scored"
            parsed.refused.append(refuse_comment(submission_id, comment, Reason.EXPIRED, detail))
        else:
            parsed.submitted.append(Submitted(submission_id, comment))
    return parsed


def refuse_message(headers: Mapping[str, Any], body: bytes, reason: Reason, detail: str) -> Parsed:
    """The whole message set aside unread, for what the worker knows of it."""
    return Parsed(refused=[_refuse_whole(_message_id(headers.get("id"), body), reason, detail, body, len(body))])


def refuse_comment(dead_letter_id: str, comment: Comment, reason: Reason, detail: str) -> Refused:
    """A refusal of a comment that was well-formed; its payload is kept unless it must not be stored."""
    payload = comment.model_dump_json(exclude_defaults=True).encode()
    return _refuse(dead_letter_id, reason, detail, payload, comment.store_text, comment)


def _refuse(
    dead_letter_id: str, reason: Reason, detail: str, payload: bytes, stored: bool, comment: Comment | None = None
) -> Refused:
    kept = payload[:MAX_PAYLOAD_BYTES] if stored else b""
    sha256 = hashlib.sha256(payload).hexdigest()
    return Refused(dead_letter_id, reason, detail, kept, len(payload), sha256, comment)


def _refuse_whole(message_id: str, reason: Reason, detail: str, body: bytes, length: int) -> Refused:
    # Its comments cannot be told apart, so one that must not be stored forbids it for all.
    kept = b"" if STORE_TEXT_FALSE.search(body) else body[:MAX_PAYLOAD_BYTES]
    return Refused(message_id, reason, detail, kept, length, hashlib.sha256(body).hexdigest(), None)


def _message_id(task_id: object, body: bytes) -> str:
    """The task's id where it has a usable one, else a hash: the same message has the same one again."""
    if isinstance(task_id, str) and 0 < len(task_id) <= MAX_ID_CHARS and task_id.isascii() and task_id.isprintable():
        return task_id
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def _decode(body: bytes) -> object:
    too_deep = _Unreadable(
        Reason.UNREADABLE_MESSAGE, f"the body is nested too deeply; {MAX_NESTING} levels are allowed in all"
    )
    try:
        decoded = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        # The error's own text may quote the comment.
        where = f" at character {error.pos:,}" if isinstance(error, json.JSONDecodeError) else ""
        raise _Unreadable(Reason.UNREADABLE_MESSAGE, f"the body is not JSON in UTF-8{where}") from None
    if is_nested_deeper_than(MAX_NESTING, decoded):
        raise too_deep
    return decoded


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _task(headers: Mapping[str, Any], decoded: object) -> tuple[object, object, object]:
    """Name, id and positional arguments, from Celery's message protocol 2 or 1.

    https://docs.celeryq.dev/en/stable/internals/protocol.html
    """
    if "task" in headers:
        arguments = decoded[0] if isinstance(decoded, list) and decoded else None
        return headers["task"], headers.get("id"), arguments
    if isinstance(decoded, dict) and "task" in decoded:
        return decoded["task"], decoded.get("id"), decoded.get("args")
    raise _Unreadable(Reason.UNREADABLE_MESSAGE, "no task is named in the headers or the body")


def _comments(task: object, arguments: object) -> list[object]:
    if task != MODERATE_TASK:
        raise _Unreadable(
            Reason.UNKNOWN_TASK,
            f"task {shown(task)} is not known here; this queue takes {MODERATE_TASK!r}",
        )
    if not isinstance(arguments, list) or len(arguments) != 1 or not isinstance(arguments[0], list):
        raise _Unreadable(
            Reason.NOT_A_LIST,
            f'{MODERATE_TASK} takes one positional argument, a list of comments: args=[[{{"text": …}}, …]]',
        )
    if not arguments[0]:
        raise _Unreadable(Reason.NOT_A_LIST, "the list of comments is empty")
    return arguments[0]
