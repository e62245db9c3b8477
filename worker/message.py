"""The message contract: what a producer may send, and what is said of everything else. Pure.

A message is the Celery task `worker.moderate` with one positional argument, a list of 1 to 256 comments. Where the
list is sound, a bad comment does not take its neighbours along.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from config.comment import Comment, Name, explain, is_nested_deeper_than, shown
from config.identity import refused_id, submission_id
from config.names import (
    DEFAULT_COMMUNITY,
    ENQUEUED_AT_HEADER,
    EXPIRES_HEADER,
    MAX_COMMENTS_PER_MESSAGE,
    MAX_ID_CHARS,
    MODERATE_TASK,
    SUBMITTED_AT_HEADER,
    Reason,
)
from worker.envelope import (
    MALFORMED_BYTES_HEADER,
    MALFORMED_HEADER,
    MAX_VALUES,
    StoringSearch,
    holds_more_values,
    write_envelope,
)

MAX_PAYLOAD_BYTES = 65_536
"""How much of what was refused is kept."""
MAX_TASK_ID_CHARS = MAX_ID_CHARS - len(f":{MAX_COMMENTS_PER_MESSAGE}")
"""So that a submission's id, made of it, may be an idempotency key."""
TASK_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
"""As Celery names tasks, by their module. Anything else in that place may be a text, which no letter quotes."""
MAX_DIGITS = 4_000
"""Of a number in JSON: Python takes no more than 4,300 to be safe from endless ones."""
JSON_WHITESPACE = b" \t\r\n"
NAME_ENDS, QUOTED_NAME_ENDS, ESCAPED_BACKSLASH_ENDS = b'":', rb"\":", rb'\\":'
MAX_NESTING = 64
"""Levels of lists and objects in a comment, more than it needs. Deeper ones can be read, but not surely written."""
MAX_FIELDS = 1_000
"""Of a comment, each of which is looked at before it is refused."""
NAME = TypeAdapter(Name)
TIME_HEADERS = SUBMITTED_AT_HEADER, ENQUEUED_AT_HEADER
NAMED = {"community": "community", "comment_id": "id", "author": "author"}
"""Columns of a dead letter to the comment's fields that they repeat."""

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
    name: str | None = None
    """The idempotency key, or `<message id>:<n>`; None where that is the id itself."""


@dataclass(frozen=True, slots=True)
class Refused:
    """What cannot be decided. `detail` is for the producer and never quotes the comment."""

    dead_letter_id: str
    reason: Reason
    detail: str
    payload: bytes
    payload_bytes: int
    payload_sha256: str
    text_sha256: str | None = None
    """Of a well-formed comment's text."""
    community: str | None = None
    """Of the comment, as the next two: None where it cannot be read, or does not say."""
    comment_id: str | None = None
    author: str | None = None
    name: str | None = None
    """Of a well-formed comment's submission, where that is not its id."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """All that one message holds."""

    submitted: list[Submitted] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


class _Unsound(Exception):
    """What stands in the place of a comment is none; says why."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


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
        return refuse_unread(
            headers, body, Reason.UNREADABLE_MESSAGE, f"not a Celery message: {headers[MALFORMED_HEADER]}"
        )
    if holds_more_values(body, MAX_VALUES):
        detail = f"the body holds more than {MAX_VALUES:,} JSON values"
        whole = _refuse_whole(_message_id(headers.get("id"), body), Reason.UNREADABLE_MESSAGE, detail, body)
        return Parsed(refused=[whole])
    if headers.get("task") == MODERATE_TASK:
        try:
            # Nearly every message: all of it in one pass of compiled code. Whatever is odd about another one, reading
            # it again, step by step, takes it all the same or finds the words.
            (sound,), _, embed = USUAL_BODY.validator.validate_json(body)
        except ValidationError:
            sound, embed = [], {}
        if sound and _names(sound, embed) == _written_names(body):
            return _submit(_message_id(headers.get("id"), body), enumerate(sound), Parsed(), now)
    return _parse_step_by_step(headers, body, now)


def _parse_step_by_step(headers: Mapping[str, Any], body: bytes, now: datetime) -> Parsed:
    message_id = _message_id(headers.get("id"), body)
    try:
        task, task_id, arguments = _task(headers, _decode(body))
        message_id = _message_id(task_id, body)
        comments = _comments(task, arguments)
    except _Unreadable as problem:
        return Parsed(refused=[_refuse_whole(message_id, problem.reason, problem.detail, body)])
    if len(comments) > MAX_COMMENTS_PER_MESSAGE:
        detail = (
            f"{len(comments):,} comments in one message, more than the {MAX_COMMENTS_PER_MESSAGE} allowed; "
            "none was scored: send them in several messages"
        )
        return Parsed(refused=[_refuse_whole(message_id, Reason.TOO_MANY_COMMENTS, detail, body)])

    parsed, sound, search = Parsed(), [], StoringSearch()
    for index, raw in enumerate(comments):
        try:
            sound.append((index, _sound(raw)))
        except _Unsound as problem:
            parsed.refused.append(_refuse_raw(refused_id(f"{message_id}:{index}"), problem.detail, raw, search))
    return _submit(message_id, sound, parsed, now)


def _submit(message_id: str, sound: Iterable[tuple[int, Comment]], parsed: Parsed, now: datetime) -> Parsed:
    """Add well-formed comments, each with its place in the message, to what was parsed."""
    for index, comment in sound:
        name = comment.idempotency_key or f"{message_id}:{index}"
        its_id = submission_id(comment.community, name)
        one = Submitted(its_id, comment, None if name == its_id else name)
        if comment.expires_at is not None and comment.expires_at <= now:
            detail = f"expired at {comment.expires_at.isoformat()}, before a worker took it; it was not scored"
            parsed.refused.append(refuse_comment(one, Reason.EXPIRED, detail))
        else:
            parsed.submitted.append(one)
    return parsed


def refuse_all(parsed: Parsed, reason: Reason, detail: str) -> Parsed:
    """What was parsed with every sound comment refused as well, each under its submission's id."""
    refused = [refuse_comment(one, reason, detail) for one in parsed.submitted]
    return Parsed(refused=[*parsed.refused, *refused])


def refuse_unread(headers: Mapping[str, Any], body: bytes, reason: Reason, detail: str) -> Parsed:
    """The refusal of a message that came wrapped, as `worker.envelope.malformed_envelope` leaves it."""
    # The id is the hash of all of it; the body only its beginning, or nothing.
    sha256 = headers["id"]
    size = headers[MALFORMED_BYTES_HEADER]
    return Parsed(refused=[Refused(refused_id(sha256), reason, detail, body, size, sha256)])


def refuse_unparsed(headers: Mapping[str, Any], body: bytes, detail: str) -> Parsed:
    """The refusal of a message that could not be parsed for no fault of its own: only its length and hash are kept."""
    sha256 = hashlib.sha256(body).hexdigest()
    letter_id = refused_id(_message_id(headers.get("id"), body))
    return Parsed(refused=[Refused(letter_id, Reason.UNREADABLE_MESSAGE, detail, b"", len(body), sha256)])


def refuse_comment(one: Submitted, reason: Reason, detail: str) -> Refused:
    """A refusal of a comment that was well-formed; its payload is kept unless it must not be stored."""
    comment = one.comment
    payload = comment.model_dump_json(exclude_defaults=True).encode()
    named = {"community": comment.community, "comment_id": comment.id, "author": comment.author}
    named["name"] = one.name
    named["text_sha256"] = hashlib.sha256(comment.text.encode()).hexdigest()
    return _refuse(one.submission_id, reason, detail, payload, comment.store_text, **named)


def _refuse_raw(dead_letter_id: str, detail: str, raw: object, search: StoringSearch) -> Refused:
    """A refusal of what stands in the place of a comment."""
    try:
        payload = json.dumps(raw).encode()
    except RecursionError:  # it takes a few levels more to write it than to read it
        payload = b""
    fields = raw if isinstance(raw, dict) else {}
    # By these an operator finds it, and whoever wants it erased.
    named = {column: _name(fields.get(name)) for column, name in NAMED.items()}
    if isinstance(raw, dict) and "community" not in raw:
        named["community"] = DEFAULT_COMMUNITY
    return _refuse(dead_letter_id, Reason.INVALID_COMMENT, detail, payload, not search.may_forbid(payload), **named)


def _name(value: object) -> str | None:
    try:
        return NAME.validate_python(value, strict=True)
    except ValidationError:
        return None


def _refuse(
    dead_letter_id: str, reason: Reason, detail: str, payload: bytes, stored: bool, **named: str | None
) -> Refused:
    kept = payload[:MAX_PAYLOAD_BYTES] if stored else b""
    return Refused(dead_letter_id, reason, detail, kept, len(payload), hashlib.sha256(payload).hexdigest(), **named)


def _refuse_whole(message_id: str, reason: Reason, detail: str, body: bytes) -> Refused:
    # Its comments cannot be told apart, so one that must not be stored forbids it for all.
    return _refuse(refused_id(message_id), reason, detail, body, not StoringSearch().may_forbid(body))


def _message_id(task_id: object, body: bytes) -> str:
    """The task's id where it has a usable one, else a hash: the same message has the same one again."""
    if (
        isinstance(task_id, str)
        and 0 < len(task_id) <= MAX_TASK_ID_CHARS
        and task_id.isascii()
        and task_id.isprintable()
    ):
        return task_id
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def single_messages(submitted: Iterable[Submitted], sent: Mapping[str, Any], queue: str) -> list[bytes]:
    """One message for each comment, which names its submission, as a producer would have sent it.

    Args:
        sent: headers of the message that they came in. Its id stays: by that an operator may revoke it.
    """
    headers: dict[str, Any] = {name: sent[name] for name in TIME_HEADERS if isinstance(sent.get(name), int | float)}
    if isinstance(expires := sent.get(EXPIRES_HEADER), str) and len(expires) <= MAX_ID_CHARS:
        headers[EXPIRES_HEADER] = expires
    if isinstance(task_id := sent.get("id"), str) and len(task_id) <= MAX_ID_CHARS:
        headers["id"] = task_id
    headers["task"] = MODERATE_TASK
    messages = []
    for one in submitted:
        comment = one.comment.model_copy(update={"idempotency_key": one.name or one.submission_id})
        body = b"[[[%s]], {}, {}]" % comment.model_dump_json(exclude_defaults=True).encode()
        messages.append(write_envelope(headers, body, queue))
    return messages


def _names(comments: Iterable[Comment], embed: Mapping[str, object]) -> int:
    """How many names the objects of a usual body have, each once."""
    count = len(embed)
    for comment in comments:
        count += len(comment.__pydantic_fields_set__)
        if comment.context:
            count += _names_within(comment.context)
    return count


def _names_within(value: object) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_names_within, value.values()))
    return sum(map(_names_within, value)) if isinstance(value, list) else 0


def _written_names(body: bytes) -> int:
    """How many names are written in a JSON body, the repeated ones too; -1 where counting cannot tell.

    A name is what ends in a quote before a colon. Within a text such a quote has a backslash before it; but so has that
    of a name that ends in an escaped backslash.
    """
    dense = body.translate(None, JSON_WHITESPACE)
    return -1 if ESCAPED_BACKSLASH_ENDS in dense else dense.count(NAME_ENDS) - dense.count(QUOTED_NAME_ENDS)


class _Repetitive(dict[str, Any]):
    """An object in which a name stands twice, which JSON leaves open; it is written again as it was read."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self._pairs = pairs

    def items(self) -> Any:
        return self._pairs

    def values(self) -> Any:
        return [value for _, value in self._pairs]

    @property
    def repeated(self) -> str:
        times = Counter(name for name, _ in self._pairs)
        return next(name for name, count in times.items() if count > 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    return read if len(read) == len(pairs) else _Repetitive(pairs)


def _is_repetitive(value: object) -> bool:
    """Whether a name stands twice in one of the objects of a JSON value."""
    if isinstance(value, dict):
        return isinstance(value, _Repetitive) or any(map(_is_repetitive, value.values()))
    return isinstance(value, list) and any(map(_is_repetitive, value))


def _sound(raw: object) -> Comment:
    if is_nested_deeper_than(MAX_NESTING, raw):
        raise _Unsound(f"is nested too deeply; {MAX_NESTING} levels are allowed in all")
    if isinstance(raw, dict) and len(raw) > MAX_FIELDS:
        raise _Unsound(f"has {len(raw):,} fields, which is more than a comment of any version has")
    if isinstance(raw, _Repetitive):
        name = shown(raw.repeated, Comment.model_fields)
        raise _Unsound(f"{name} stands twice; which of them counts is left open")
    if _is_repetitive(raw):
        raise _Unsound("a name stands twice in an object within it; which of them counts is left open")
    try:
        return Comment.model_validate(raw)
    except ValidationError as error:
        raise _Unsound(explain(error)) from None


def _decode(body: bytes) -> object:
    try:
        return json.loads(body, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        raise _Unreadable(Reason.UNREADABLE_MESSAGE, "the body is nested too deeply to be read") from None
    except ValueError as error:
        # The error's own text may quote the comment.
        where = f" at character {error.pos:,}" if isinstance(error, json.JSONDecodeError) else ""
        raise _Unreadable(Reason.UNREADABLE_MESSAGE, f"the body is not JSON in UTF-8{where}") from None


def _integer(digits: str) -> int | float:
    # An endless one is wrong in any field, and spoils only its own comment.
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


def _task(headers: Mapping[str, Any], decoded: object) -> tuple[object, object, object]:
    """Name, id and positional arguments, from Celery's message protocol 2 or 1.

    https://docs.celeryq.dev/en/stable/internals/protocol.html
    """
    if "task" in headers:
        arguments = decoded[0] if isinstance(decoded, list) and decoded else None
        return headers["task"], headers.get("id"), arguments
    if isinstance(decoded, _Repetitive):
        name = shown(decoded.repeated, ("task", "id", "args", "kwargs"))
        raise _Unreadable(Reason.UNREADABLE_MESSAGE, f"{name} stands twice in the body")
    if isinstance(decoded, dict) and "task" in decoded:
        return decoded["task"], decoded.get("id"), decoded.get("args")
    raise _Unreadable(Reason.UNREADABLE_MESSAGE, "no task is named in the headers or the body")


def _task_shown(task: object) -> str:
    is_dotted = isinstance(task, str) and len(task) <= MAX_TASK_ID_CHARS and TASK_NAME.fullmatch(task)
    return ascii(task) if is_dotted else shown(task, (MODERATE_TASK,))


def _comments(task: object, arguments: object) -> list[object]:
    if task != MODERATE_TASK:
        raise _Unreadable(
            Reason.UNKNOWN_TASK,
            f"the task is not known here: {_task_shown(task)}; this queue takes {MODERATE_TASK!r}",
        )
    if not isinstance(arguments, list) or len(arguments) != 1 or not isinstance(arguments[0], list):
        raise _Unreadable(
            Reason.NOT_A_LIST,
            f'{MODERATE_TASK} takes one positional argument, a list of comments: args=[[{{"text": …}}, …]]',
        )
    if not arguments[0]:
        raise _Unreadable(Reason.NOT_A_LIST, "the list of comments is empty")
    return arguments[0]
