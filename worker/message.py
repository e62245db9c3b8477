"""The message contract: what a producer may send, and what is said of everything else. Pure.

A message is the Celery task `worker.moderate` with one positional argument, a list of 1 to 256 comments. Where the
list is sound, a bad comment does not take its neighbours along.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from config.names import (
    DEFAULT_COMMUNITY,
    MAX_COMMENTS_PER_MESSAGE,
    MAX_CONTEXT_BYTES,
    MAX_ID_CHARS,
    MAX_TEXT_BYTES,
    MODERATE_TASK,
    Reason,
)
from worker.envelope import MALFORMED_BYTES_HEADER, MALFORMED_HEADER

MAX_PAYLOAD_BYTES = 65_536
"""How much of what was refused is kept."""


def _storable(value: str) -> str:
    if "\x00" in value:
        raise ValueError("holds a NUL character, which databases cannot store; remove it")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("holds a lone surrogate, which is no Unicode text; remove it")
    return value


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty; a comment needs text to be scored")
    if (length := len(value.encode())) > MAX_TEXT_BYTES:
        raise ValueError(f"has {length:,} bytes of UTF-8, more than the {MAX_TEXT_BYTES:,} allowed; shorten it")
    return value


def _number_as_text(value: object) -> object:
    # Many sites number their comments and authors.
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _context(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is not None:
        encoded = _storable(json.dumps(value, ensure_ascii=False, allow_nan=False).replace(r"\u0000", "\x00")).encode()
        if len(encoded) > MAX_CONTEXT_BYTES:
            raise ValueError(f"has {len(encoded):,} bytes as JSON, more than the {MAX_CONTEXT_BYTES:,} allowed")
    return value


def _plausible(value: datetime) -> datetime:
    if not 1900 <= value.year <= 2999:
        raise ValueError("must lie between the years 1900 and 2999")
    return value


StorableText = Annotated[str, AfterValidator(_storable)]
Name = Annotated[StorableText, BeforeValidator(_number_as_text), Field(min_length=1, max_length=MAX_ID_CHARS)]
Time = Annotated[AwareDatetime, AfterValidator(_plausible), Field(strict=False)]


class Comment(BaseModel):
    """One comment as a producer sends it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    text: Annotated[StorableText, AfterValidator(_text)]
    id: Name | None = None
    community: Name = DEFAULT_COMMUNITY
    author: Name | None = None
    language: Annotated[StorableText, Field(max_length=35)] | None = None
    created_at: Time | None = None
    expires_at: Time | None = None
    context: Annotated[dict[str, Any] | None, AfterValidator(_context)] = None
    idempotency_key: Name | None = None
    store_text: bool = True
    v: Literal[1] = 1
    """Version of this contract."""


@dataclass(frozen=True, slots=True)
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
        return Parsed(refused=[_refuse(headers["id"], Reason.UNREADABLE_MESSAGE, detail, body, length)])
    message_id = f"sha256:{hashlib.sha256(body).hexdigest()}"
    try:
        decoded = _decode(body)
        task, task_id, arguments = _task(headers, decoded)
        if isinstance(task_id, str) and 0 < len(task_id) <= MAX_ID_CHARS and _is_storable(task_id):
            message_id = task_id
        comments = _comments(task, arguments)
    except _Unreadable as problem:
        return Parsed(refused=[_refuse(message_id, problem.reason, problem.detail, body)])
    if len(comments) > MAX_COMMENTS_PER_MESSAGE:
        detail = (
            f"{len(comments):,} comments in one message, more than the {MAX_COMMENTS_PER_MESSAGE} allowed; "
            "none was scored: send them in several messages"
        )
        kept = body if all(_may_be_stored(comment) for comment in comments) else b""
        return Parsed(refused=[_refuse(message_id, Reason.TOO_MANY_COMMENTS, detail, kept, len(body))])

    parsed = Parsed()
    for index, raw in enumerate(comments):
        submission_id = f"{message_id}:{index}"
        try:
            comment = Comment.model_validate(raw)
        except ValidationError as error:
            payload = _bytes(raw)
            kept = payload if _may_be_stored(raw) else b""
            parsed.refused.append(_refuse(submission_id, Reason.INVALID_COMMENT, _explain(error), kept, len(payload)))
            continue
        submission_id = comment.idempotency_key or submission_id
        if comment.expires_at is not None and comment.expires_at <= now:
            detail = f"expired at {comment.expires_at.isoformat()}, before a worker took it; it was not scored"
            parsed.refused.append(refuse_comment(submission_id, comment, Reason.EXPIRED, detail))
        else:
            parsed.submitted.append(Submitted(submission_id, comment))
    return parsed


def refuse_comment(dead_letter_id: str, comment: Comment, reason: Reason, detail: str) -> Refused:
    """A refusal of a comment that was well-formed; its payload is kept unless it must not be stored."""
    payload = comment.model_dump_json(exclude_defaults=True).encode()
    return _refuse(dead_letter_id, reason, detail, payload if comment.store_text else b"", len(payload))


def _refuse(dead_letter_id: str, reason: Reason, detail: str, payload: bytes, length: int | None = None) -> Refused:
    whole = len(payload) if length is None else length
    return Refused(dead_letter_id, reason, detail, payload[:MAX_PAYLOAD_BYTES], whole)


def _decode(body: bytes) -> object:
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise _Unreadable(Reason.UNREADABLE_MESSAGE, "the body is nested too deeply") from None
    except ValueError as error:
        # The error's own text may quote the comment.
        where = f" at character {error.pos:,}" if isinstance(error, json.JSONDecodeError) else ""
        raise _Unreadable(Reason.UNREADABLE_MESSAGE, f"the body is not JSON in UTF-8{where}") from None


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
            f"task {_shown(task)} is not known here; this queue takes {MODERATE_TASK!r}",
        )
    if not isinstance(arguments, list) or len(arguments) != 1 or not isinstance(arguments[0], list):
        raise _Unreadable(
            Reason.NOT_A_LIST,
            f'{MODERATE_TASK} takes one positional argument, a list of comments: args=[[{{"text": …}}, …]]',
        )
    if not arguments[0]:
        raise _Unreadable(Reason.NOT_A_LIST, "the list of comments is empty")
    return arguments[0]


def _explain(error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_input=False, include_url=False, include_context=False)[:5]:
        place = ".".join(map(str, problem["loc"][:1]))
        said = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            said = f"is not a field of a comment; allowed: {', '.join(Comment.model_fields)}"
        elif problem["type"] == "missing":
            said = "is required"
        problems.append(f"{_shown(place)} {said}" if place else said)
    return "; ".join(dict.fromkeys(problems))


def _shown(value: object) -> str:
    """A short, storable form of a name in a message; unknown keys may be anything."""
    return ascii(value)[:100]


def _is_storable(value: str) -> bool:
    return value.isprintable() and value.isascii()


def _may_be_stored(raw: object) -> bool:
    return not isinstance(raw, dict) or raw.get("store_text", True) is True


def _bytes(raw: object) -> bytes:
    return json.dumps(raw, ensure_ascii=True).encode()
