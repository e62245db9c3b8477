"""What a producer may put into a comment, checked before it is sent, so that a mistake shows where it was made.

The worker checks again by itself: messages also come from plain Celery.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from config.names import MAX_CONTEXT_BYTES, MAX_ID_CHARS, MAX_TEXT_BYTES

NAMES = ("id", "community", "author", "idempotency_key")
TIMES = ("created_at", "expires_at")
FIELDS = ("text", *NAMES, *TIMES, "language", "context", "store_text", "v")
CONTRACT_VERSION = 1
MAX_LANGUAGE_CHARS = 35


class InvalidComment(Exception):
    """A comment that no worker would take; the message names the field and what is allowed, never the text."""


def message_form(comment: str | Mapping[str, Any]) -> dict[str, Any]:
    """The comment as it travels: JSON types only, fields that are None left out.

    Args:
        comment: its text, or a mapping with `text` and any other of FIELDS.

    Raises:
        InvalidComment: a field is missing, unknown or breaks its bound.
    """
    if isinstance(comment, str):
        return {"text": _text(comment)}
    if not isinstance(comment, Mapping):
        raise InvalidComment(f"a comment is a string or a mapping, not {_kind(comment)}")
    if unknown := [name for name in comment if name not in FIELDS]:
        raise InvalidComment(f"unknown field {unknown[0]!r}; a comment has {', '.join(FIELDS)}")
    form = {name: value for name, value in comment.items() if value is not None}
    form["text"] = _text(form.get("text"))
    form |= {name: _name(name, form[name]) for name in NAMES if name in form}
    form |= {name: _time(name, form[name]) for name in TIMES if name in form}
    if "language" in form:
        _bounded("language", form["language"], MAX_LANGUAGE_CHARS)
    if "context" in form:
        _check_context(form["context"])
    if not isinstance(form.get("store_text", True), bool):
        raise InvalidComment(f"store_text must be true or false, not {_kind(form['store_text'])}")
    if form.get("v", CONTRACT_VERSION) != CONTRACT_VERSION:
        raise InvalidComment(f"v must be {CONTRACT_VERSION}, the version of the message contract, or left out")
    return form


def _text(value: object) -> str:
    text = _storable("text", value)
    if not text.strip():
        raise InvalidComment("text is empty; a comment needs text to be scored")
    if (size := len(text.encode())) > MAX_TEXT_BYTES:
        raise InvalidComment(f"text has {size:,} bytes of UTF-8, more than the {MAX_TEXT_BYTES:,} allowed; shorten it")
    return text


def _name(field: str, value: object) -> str:
    # Many sites number their comments and authors.
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return _bounded(field, value, MAX_ID_CHARS)


def _bounded(field: str, value: object, most: int) -> str:
    text = _storable(field, value)
    if not 1 <= len(text) <= most:
        raise InvalidComment(f"{field} has {len(text):,} characters; 1 to {most} are allowed")
    return text


def _time(field: str, value: object) -> str:
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        time = None
    if not isinstance(time, datetime) or time.tzinfo is None:
        raise InvalidComment(f"{field} must be a datetime with a time zone, or such a one in ISO 8601")
    return time.isoformat()


def _check_context(value: object) -> None:
    if not isinstance(value, Mapping):
        raise InvalidComment(f"context must be a mapping, not {_kind(value)}")
    try:
        encoded = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidComment(f"context cannot be written as JSON: {error}") from None
    _storable("context", encoded.replace(r"\u0000", "\0"))
    if (size := len(encoded.encode())) > MAX_CONTEXT_BYTES:
        raise InvalidComment(f"context has {size:,} bytes as JSON, more than the {MAX_CONTEXT_BYTES:,} allowed")


def _storable(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidComment(f"{field} must be a string, not {_kind(value)}")
    if "\0" in value:
        raise InvalidComment(f"{field} holds a NUL character, which databases cannot store; remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidComment(f"{field} holds a lone surrogate, which is no Unicode text; remove it") from None
    return value


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
