"""Real messages with something wrong: a seeded stream of what broken producers, networks and attackers might send.

Owns how messages are broken. The tests and the chaos run feed it to a worker that must survive all of it.
"""

import base64
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from typing import Any
from uuid import UUID

from celery import Celery

from config.names import MODERATE_QUEUE, MODERATE_TASK, SUBMITTED_AT_HEADER
from worker.envelope import write_envelope

TEXTS = (
    "You are right, thank you.",
    "I will find you and hurt you, idiot",
    "Ünïcode, \u202ebackwards\u202c, ro\u200bber, 👩‍👩‍👧 and Z̴̡̛a̸l̷g̵o",
    'He said: "text": {"text": "a"}, and left \\',
    "long " * 300,
)
LISTS = (1, 1, 2, 5, 16)
"""Comments in each of the messages that are broken."""
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 2, 1.5, 1e308, float("nan"), float("inf"), float("-inf"), 10**30, 10**4_200),
    *("", " ", "\u200b", "\x00", "\ud800", "x" * 300, "x" * 30_000, "2026-13-01", "worker.moderate", "gzip", "utf-16"),
    *([], {}, [[]], {"": None}, [None] * 300, {"text": "a"}, [[[{"text": "a"}]], {}, {}]),
)


def mutated(seed: int, n: int) -> Iterator[bytes]:
    """`n` messages, as they may stand in a Redis list, each broken in one to three ways; the same ones for a seed."""
    rng = random.Random(seed)
    for _ in range(n):
        raw = rng.choice(real_messages())
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            raw = rng.choice(WAYS)(rng, raw)
        yield raw


@cache
def real_messages() -> tuple[bytes, ...]:
    """As Celery sends them in both of its protocols, plain and compressed, singles and lists, bare and with all fields.

    Without idempotency keys: submissions of different messages stay different ones.
    """
    with Celery(broker="memory://", set_as_current=False) as app:
        return tuple(
            _real_message(app, number, size, protocol, compress=compress)
            for number, (size, protocol, compress) in enumerate(
                (size, protocol, compress) for size in LISTS for protocol in (1, 2) for compress in (False, True)
            )
        )


def _real_message(app: Celery, number: int, size: int, protocol: int, *, compress: bool) -> bytes:
    comments = [_comment(number + place) for place in range(size)]
    make = app.amqp.task_protocols[protocol]
    headers, _, body, _ = make(str(UUID(int=number)), MODERATE_TASK, [comments], {})
    headers[SUBMITTED_AT_HEADER] = datetime(2026, 11, 22, tzinfo=UTC).timestamp()
    encoded = json.dumps(body).encode()
    if compress:
        headers["compression"] = "application/x-gzip"
        encoded = zlib.compress(encoded)
    return write_envelope(headers, encoded, MODERATE_QUEUE)


def _comment(number: int) -> dict[str, Any]:
    bare = {"text": TEXTS[number % len(TEXTS)]}
    if number % 2:
        return bare
    return bare | {
        "id": number,
        "community": "news",
        "author": f"author {number}",
        "language": "en",
        "created_at": "2026-11-22T12:00:00Z",
        "expires_at": "2999-11-22T12:00:00Z",
        "context": {"thread": [1, 2.5, None, {"deep": True}]},
        "store_text": number % 4 == 0,
        "v": 1,
    }


# --- Bytes -------------------------------------------------------------------------------------------------------


def _place(rng: random.Random, raw: bytes) -> int:
    return rng.randrange(len(raw) + 1)


def flip_bits(rng: random.Random, raw: bytes) -> bytes:
    """One to eight of them."""
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 8) if raw else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, raw: bytes) -> bytes:
    """At its end or its beginning."""
    place = _place(rng, raw)
    return rng.choice((raw[:place], raw[place:]))


def splice(rng: random.Random, raw: bytes) -> bytes:
    """The beginning of one, the end of another."""
    other = rng.choice(real_messages())
    return raw[: _place(rng, raw)] + other[_place(rng, other) :]


def repeat_slice(rng: random.Random, raw: bytes) -> bytes:
    """A part of it, some times over."""
    start, end = sorted((_place(rng, raw), _place(rng, raw)))
    return raw[:end] + raw[start:end] * rng.randint(1, 3) + raw[end:]


def drop_slice(rng: random.Random, raw: bytes) -> bytes:
    """A part of it is lost."""
    start, end = sorted((_place(rng, raw), _place(rng, raw)))
    return raw[:start] + raw[end:]


def insert_noise(rng: random.Random, raw: bytes) -> bytes:
    """Random bytes within."""
    place = _place(rng, raw)
    return raw[:place] + rng.randbytes(rng.randint(1, 40)) + raw[place:]


# --- JSON --------------------------------------------------------------------------------------------------------


def change_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one thing changed anywhere within: another type, a name dropped or renamed, nested, NaN."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice((*ODD_VALUES, [value], {"text": value}, _nested(value, rng.choice((3, 70, 900)))))
    if isinstance(value, list):
        place = rng.randrange(len(value))
        changes: tuple[list[Any], ...] = (
            [change_value(rng, value[place])],
            [],
            [value[place], value[place]],
            [change_value(rng, None)],
        )
        return [*value[:place], *rng.choices(changes, (8, 1, 1, 1))[0], *value[place + 1 :]]
    name = rng.choice(list(value))
    others = {other: value[other] for other in value if other != name}
    renamed = {rng.choice((name.upper(), f"{name} ", "", "v", "text", "task", "compression")): value[name]}
    return others | rng.choices(({name: change_value(rng, value[name])}, {}, renamed), (8, 1, 1))[0]


def _nested(value: Any, levels: int) -> Any:
    for level in range(levels):
        value = [value] if level % 2 else {"text": value}
    return value


def repeat_name(rng: random.Random, written: str) -> str:
    """The same name once more in one of the objects of a JSON text."""
    names = list(re.finditer(r'"(\w+)":', written))
    if not names:
        return written
    found = rng.choice(names)
    return (
        f"{written[: found.start()]}{found[0]} {rng.choice(('null', '1', 'false', 'NaN'))}, {written[found.start() :]}"
    )


def change_envelope(rng: random.Random, raw: bytes) -> bytes:
    """Its fields, its headers or its properties."""
    return _rewritten(raw, lambda envelope: _written(rng, change_value(rng, envelope)))


def change_headers(rng: random.Random, raw: bytes) -> bytes:
    """One header or property is another, or one more."""

    def change(envelope: Any) -> bytes:
        where = envelope[rng.choice(("headers", "properties"))]
        name = rng.choice(
            (*where, "compression", "task", "id", "body_encoding", "moderato_malformed", SUBMITTED_AT_HEADER)
        )
        where[name] = change_value(rng, None)
        return _written(rng, envelope)

    return _rewritten(raw, change)


def change_body(rng: random.Random, raw: bytes) -> bytes:
    """A sound envelope around a body that is not."""

    def change(envelope: Any) -> bytes:
        body = base64.b64decode(envelope["body"])
        compressed = "compression" in envelope["headers"]
        decoded = json.loads(zlib.decompress(body) if compressed else body)
        body = rng.choice((_written, _written, _damaged))(rng, change_value(rng, decoded))
        envelope["body"] = base64.b64encode(zlib.compress(body) if compressed else body).decode()
        return json.dumps(envelope).encode()

    return _rewritten(raw, change)


def break_base64(rng: random.Random, raw: bytes) -> bytes:
    """The envelope is sound, its body's encoding is not."""

    def change(envelope: Any) -> bytes:
        body = envelope["body"].encode()
        broken = rng.choice((flip_bits, cut, drop_slice, repeat_slice))(rng, body)
        return json.dumps(envelope | {"body": broken.decode("latin-1")}).encode()

    return _rewritten(raw, change)


def _rewritten(raw: bytes, change: Callable[[Any], bytes]) -> bytes:
    """A change to what an earlier one may have left unreadable."""
    try:
        return change(json.loads(raw))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error):
        return raw


def _written(rng: random.Random, value: Any) -> bytes:
    written = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.25:
        written = repeat_name(rng, written)
    return written.encode("utf-8", "surrogatepass")


def _damaged(rng: random.Random, value: Any) -> bytes:
    return rng.choice((flip_bits, cut, drop_slice, insert_noise))(rng, _written(rng, value))


WAYS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(flip_bits, cut, splice, repeat_slice, drop_slice, insert_noise),
    *(change_envelope, change_headers, break_base64, *(change_body,) * 6),
)
