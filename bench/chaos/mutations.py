"""Real messages, each changed at random: what a broken, foreign or hostile producer may send."""

import base64
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.system import Envelopes

WEIRD: Sequence[Any] = (
    None, True, 0, -1, 2**63, 1e308, float("nan"), float("inf"), "", " ", "\u0000", "\ud800", "\u202e", "x" * 30_000,
    "é" * 300, "\u200b", "1970-01-01T00:00:00Z", [], {}, [[]], {"": None}, [1] * 300, {"text": "x"},
)  # fmt: skip


def mutated_message(envelopes: Envelopes, texts: Sequence[str], chance: random.Random) -> bytes:
    """A message of 1 to 8 comments, with one to three changes."""
    size = chance.choice((1, 1, 2, 8))
    comments = [{"text": chance.choice(texts), "id": f"m{chance.getrandbits(48):x}"} for _ in range(size)]
    raw = envelopes.message([comments])
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        raw = chance.choice(MUTATIONS)(raw, chance)
    return raw


# --- The bytes -------------------------------------------------------------------------------------------------------


def _flip(raw: bytes, chance: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(chance.randint(1, 8) if changed else 0):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _cut(raw: bytes, chance: random.Random) -> bytes:
    return raw[: chance.randint(0, len(raw))]


def _drop_slice(raw: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(raw))
    return raw[:start] + raw[start + chance.randint(1, 40) :]


def _repeat_slice(raw: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(raw))
    end = start + chance.randint(1, 40)
    return raw[:end] + raw[start:end] * chance.randint(1, 3) + raw[end:]


def _nonsense(raw: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(chance.randint(0, 200))


# --- What they say ---------------------------------------------------------------------------------------------------


def _change_envelope(raw: bytes, chance: random.Random) -> bytes:
    return _with_json(raw, chance, lambda envelope: envelope)


def _change_headers(raw: bytes, chance: random.Random) -> bytes:
    return _with_json(raw, chance, lambda envelope: envelope["headers"])


def _change_properties(raw: bytes, chance: random.Random) -> bytes:
    return _with_json(raw, chance, lambda envelope: envelope["properties"])


def _change_body(raw: bytes, chance: random.Random) -> bytes:
    try:
        envelope = json.loads(raw)
        body = json.loads(base64.b64decode(envelope["body"]))
        _change_somewhere(body, chance)
        envelope["body"] = base64.b64encode(json.dumps(body).encode()).decode()
        return json.dumps(envelope).encode()
    except (ValueError, KeyError, TypeError):
        return _flip(raw, chance)  # it is no message any more


def _with_json(raw: bytes, chance: random.Random, part: Callable[[Any], Any]) -> bytes:
    try:
        envelope = json.loads(raw)
        _change_one(part(envelope), chance)
        return json.dumps(envelope).encode()
    except (ValueError, KeyError, TypeError, IndexError):
        return _flip(raw, chance)


def _change_somewhere(value: Any, chance: random.Random) -> None:
    """Walk down at random, and change what is there."""
    while True:
        inner = [child for child in _children(value) if isinstance(child, dict | list) and child]
        if not inner or chance.random() < 0.2:
            _change_one(value, chance)
            return
        value = chance.choice(inner)


def _children(value: Any) -> Iterator[Any]:
    yield from value.values() if isinstance(value, dict) else value


def _change_one(value: Any, chance: random.Random) -> None:
    """Replace, remove or add one entry of an object or a list."""
    weird = chance.choice(WEIRD)
    if isinstance(value, list):
        place = chance.randrange(len(value))
        match chance.randrange(3):
            case 0:
                value[place] = weird
            case 1:
                del value[place]
            case _:
                value.insert(place, weird)
        return
    name = chance.choice(list(value))
    match chance.randrange(4):
        case 0:
            value[chance.choice(("zzz", "store_text", "community", "author", "v", "expires_at", "context"))] = weird
        case 1:
            del value[name]
        case _:
            value[name] = weird


MUTATIONS: Sequence[Callable[[bytes, random.Random], bytes]] = (
    _flip,
    _cut,
    _drop_slice,
    _repeat_slice,
    _nonsense,
    _change_envelope,
    _change_headers,
    _change_properties,
    _change_body,
    _change_body,
    _change_body,
)
