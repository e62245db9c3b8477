"""What a dead letter still holds that can be submitted again. Pure: a letter in, comments or a reason out."""

import json
from typing import Any

from pydantic import ValidationError

from config.comment import Comment, explain
from config.names import MAX_ID_CHARS, Reason
from db.dead_letters import DeadLetterRow


class NotRetryable(Exception):
    """Nothing of a dead letter can be submitted again; the message says why and what could be done."""


class _Repeated(Exception):
    pass


def comments_of(letter: DeadLetterRow) -> list[tuple[str, dict[str, Any]]]:
    """The comments of a letter in the form they travel in, each with the id of its submission.

    That is the letter's id where it holds one comment, and `<letter id>:<n>` where it holds a whole message. None of
    them expires any more: whoever retries an expired one wants it decided.

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
    comments = _comments(letter)
    longest = max(len(submission_id) for submission_id, _ in comments)
    if longest > MAX_ID_CHARS:
        raise NotRetryable(f"its id is too long to submit it under: {longest} characters, of {MAX_ID_CHARS} allowed")
    return [(submission_id, _form(letter, submission_id, raw)) for submission_id, raw in comments]


def _comments(letter: DeadLetterRow) -> list[tuple[str, object]]:
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
        return [(f"{letter.dead_letter_id}:{place}", raw) for place, raw in enumerate(arguments[0])]
    return [(letter.dead_letter_id, payload)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        raise _Repeated
    return read


def _form(letter: DeadLetterRow, submission_id: str, raw: object) -> dict[str, Any]:
    try:
        comment = Comment.model_validate(raw)
    except ValidationError as error:
        which = "it" if submission_id == letter.dead_letter_id else submission_id
        raise NotRetryable(f"{which} breaks the contract still: {explain(error)}") from None
    comment = comment.model_copy(update={"idempotency_key": submission_id, "expires_at": None, "store_text": True})
    return comment.model_dump(mode="json", exclude_defaults=True)
