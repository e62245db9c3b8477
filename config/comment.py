"""The contract of one comment: what a producer may send. Client and worker check it with the same words. Pure."""

import difflib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from config.names import DEFAULT_COMMUNITY, MAX_CONTEXT_BYTES, MAX_ID_CHARS, MAX_TEXT_BYTES

MAX_CONTEXT_NESTING = 32
"""Levels of lists and objects. Deeper ones can be read, but not surely be written again."""
SEEN = re.compile(r"\w")
"""A letter, a digit: nearly every text has one among its first characters."""
UNSEEN = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})
"""Controls, formatting and separators, as Unicode's general categories name them."""
LONGEST_MISSPELT_NAME = 24
LEAST_LIKENESS = 0.7
"""Of a misspelt name to the one that is meant."""
CONTEXT_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def _storable(value: str) -> str:
    if "\x00" in value:
        raise ValueError("holds a NUL character, which databases cannot store; remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is no Unicode text; remove it") from None
    return value


def checked_text(value: str) -> str:
    """A text that can be stored and scored, as it is.

    Raises:
        ValueError: it cannot; the message says why, without a word of it.
    """
    # The length first: what follows may look at every character, and a text may come with 64 MiB of them.
    if (length := len(value.encode(errors="surrogatepass"))) > MAX_TEXT_BYTES:
        raise ValueError(f"has {length:,} bytes of UTF-8, more than the {MAX_TEXT_BYTES:,} allowed; shorten it")
    _storable(value)
    if not SEEN.search(value) and all(unicodedata.category(character) in UNSEEN for character in value):
        raise ValueError("is empty, or holds nothing that can be seen; a comment needs text to be scored")
    return value


def _number_as_text(value: object) -> object:
    # Many sites number their comments and authors.
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _context(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is not None:
        if is_nested_deeper_than(MAX_CONTEXT_NESTING, value):
            raise ValueError(f"is nested more than {MAX_CONTEXT_NESTING} levels deep")
        try:
            document = CONTEXT_JSON.encode(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot be written as JSON: {error}") from None
        if (length := len(document.encode(errors="surrogatepass"))) > MAX_CONTEXT_BYTES:
            raise ValueError(f"has {length:,} bytes as JSON, more than the {MAX_CONTEXT_BYTES:,} allowed")
        # The texts in it, as the document has escapes for some characters, and looks the same for an escaped escape.
        for text in _texts(value):
            _storable(text)
    return value


def _texts(value: object) -> Iterator[str]:
    """Every text and name in a JSON value that is not nested deeply."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _texts(name)
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _plausible(value: datetime) -> datetime:
    if not 1900 <= value.year <= 2999:
        raise ValueError("must lie between the years 1900 and 2999")
    return value


# Lengths stand next to str: behind a function pydantic would speak of items rather than characters.
Name = Annotated[
    str,
    Field(min_length=1, max_length=MAX_ID_CHARS),
    AfterValidator(_storable),
    BeforeValidator(_number_as_text),
]
Time = Annotated[AwareDatetime, AfterValidator(_plausible), Field(strict=False)]


def is_nested_deeper_than(levels: int, value: object) -> bool:
    """Whether lists and objects in a JSON value stand in each other more often than this; itself not recursive."""
    containers = _containers([value])
    while containers and levels:
        children = (node.values() if isinstance(node, dict) else node for node in containers)
        containers, levels = _containers(chain.from_iterable(children)), levels - 1
    return bool(containers)


def _containers(values: Iterable[object]) -> list[dict[str, object] | list[object]]:
    return [value for value in values if isinstance(value, (dict, list))]


class Comment(BaseModel):
    """One comment as a producer sends it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    text: Annotated[str, AfterValidator(checked_text)]
    id: Name | None = None
    community: Name = DEFAULT_COMMUNITY
    author: Name | None = None
    language: Annotated[str, Field(max_length=35), AfterValidator(_storable)] | None = None
    created_at: Time | None = None
    expires_at: Time | None = None
    context: Annotated[dict[str, Any] | None, AfterValidator(_context)] = None
    idempotency_key: Name | None = None
    store_text: bool = True
    v: Literal[1] = 1
    """Version of this contract."""


def explain(error: ValidationError) -> str:
    """What is wrong with a comment, for its producer. Never quotes a value: that may be the comment's text."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    if any(problem["loc"] == ("v",) for problem in found):
        # Of a later version: what else seems wrong may be right there.
        return "'v' names a version of the contract that is not known here: this release knows 1; upgrade the workers"
    problems = []
    for problem in found[:5]:
        place = problem["loc"][0] if problem["loc"] else None
        said = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            said = f"is not a field of a comment; allowed: {', '.join(Comment.model_fields)}"
        elif problem["type"] == "missing":
            said = "is required"
        elif problem["type"] == "model_type":
            said = 'a comment is an object such as {"text": …}'
        problems.append(said if place is None else f"{shown(place, Comment.model_fields)} {said}")
    return "; ".join(dict.fromkeys(problems))


def shown(name: object, known: Iterable[str]) -> str:
    """A name that a stranger chose, as it may be told: quoted where it is nearly one of these, else by its length.

    It may be anything, a comment's text too, where somebody put the value in the place of the key.
    """
    if not isinstance(name, str):
        return "null" if name is None else f"a {type(name).__name__}"
    known = list(known)
    nearly = len(name) <= LONGEST_MISSPELT_NAME and difflib.get_close_matches(name, known, 1, LEAST_LIKENESS)
    if name in known or nearly:
        return ascii(name)
    return f"a name of {len(name):,} characters"
