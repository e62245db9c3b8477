"""What a dead letter still holds that can be submitted again. Pure: a letter in, comments or a reason out."""

import json
from typing import Any

from pydantic import ValidationError

from config.comment import Comment, explain
from config.identity import refused_name
from config.names import MAX_ID_CHARS, Reason
from db.dead_letters import DeadLetterRow


class NotRetryable(Exception):
    """Nothing of a dead letter can be submitted again; the message says why and what could be done."""


class _Repeated(Exception):
    pass


def comments_of(letter: DeadLetterRow) -> list[tuple[str, dict[str, Any]]]:
    """The comments of a letter in the form they travel in, each with the name of its submission.

    What could not be read has the name now that it would have had then: its idempotency key, or that of its place in
    its message. None of them expires any more: an operator who retries an expired one wants it decided.

    Raises:
        NotRetryable: the letter does not hold all of it, or it breaks the contract still.
    """
    if letter.reason == Reason.ERASED:
        raise NotRetryable("it was erased")
    if not letter.payload:
        raise NotRetryable("its text was not stored; only whoever submitted it can submit it again")
    if letter.payload_bytes > len(letter.payload):
        raise NotRetryable(
            f"only the first {len(letter.payload):,} of its {letter.payload_bytes:,} bytes were kept; "
            "whoever submitted it must submit it again"
        )
    forms = [_form(letter, name, raw) for name, raw in _comments(letter)]
    return [(form["idempotency_key"], form) for form in forms]


def _comments(letter: DeadLetterRow) -> list[tuple[str, object]]:
    name = letter.name or refused_name(letter.dead_letter_id)
    try:
        payload = json.loads(letter.payload, object_pairs_hook=_object)
    except _Repeated:
        raise NotRetryable("it breaks the contract still: a name stands twice in one of its objects") from None
    except (ValueError, RecursionError):
        raise NotRetryable("it is no comment and no list of comments, so nothing in it can be scored") from None
    arguments = payload[0] if isinstance(payload, list) and len(payload) == 3 else None
    if isinstance(payload, dict) and "args" in payload:
        arguments = payload["args"]  # Celery's protocol 1
    if isinstance(arguments, list) and len(arguments) == 1 and isinstance(arguments[0], list) and arguments[0]:
        return [(f"{name}:{place}", raw) for place, raw in enumerate(arguments[0])]
    return [(name, payload)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        raise _Repeated
    return read


def _form(letter: DeadLetterRow, name: str, raw: object) -> dict[str, Any]:
    try:
        comment = Comment.model_validate(raw)
    except ValidationError as error:
        raise NotRetryable(f"{name} breaks the contract still: {explain(error)}") from None
    if letter.text_sha256 is None and comment.idempotency_key is not None:
        name = comment.idempotency_key
    if len(name) > MAX_ID_CHARS:
        raise NotRetryable(f"its id is too long to submit it under: {len(name)} characters, of {MAX_ID_CHARS} allowed")
    comment = comment.model_copy(update={"idempotency_key": name, "expires_at": None, "store_text": True})
    return comment.model_dump(mode="json", exclude_defaults=True)
