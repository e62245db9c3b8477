"""Whatever is put into the queue: it is set aside with a reason, its neighbours are decided, the worker goes on."""

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from celery import Celery

from bench.mutate import mutated
from config.identity import refused_id
from config.names import MAX_TEXT_BYTES, MODERATE_QUEUE, MODERATE_TASK, Reason
from tests.acceptance.system import System
from worker.envelope import MAX_MESSAGE_BYTES
from worker.message import MAX_PAYLOAD_BYTES

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)

SECRET = "zanzibar"
"""Stands in every text, and must stand in no log."""


def nested(levels: int) -> dict[str, Any]:
    context: dict[str, Any] = {}
    for _ in range(levels):
        context = {SECRET: context}
    return context


BAD_COMMENTS: dict[str, object] = {
    "no text": {"id": "1"},
    "empty text": {"text": ""},
    "blank text": {"text": " \n"},
    "over-long text": {"text": SECRET + "x" * MAX_TEXT_BYTES},
    "a number as text": {"text": 7},
    "a string for a comment": SECRET,
    "null for a comment": None,
    "an unknown field": {"text": SECRET, "txt": SECRET},
    "a lone surrogate": {"text": f"{SECRET} \ud800"},
    "a NUL": {"text": f"{SECRET} \x00"},
    "a context nested too deeply": {"text": SECRET, "context": nested(40)},
    "a time without a zone": {"text": SECRET, "created_at": "2026-01-01T12:00:00"},
    "a text of 5 MB": {"text": SECRET * 700_000},
    "nothing that can be seen": {"text": "\u200b\u202e\ufeff\u2060\x07"},
    "a comment of a later release": {"text": SECRET, "v": 2, "mood": SECRET},
    "true for an id": {"text": SECRET, "id": True},
    "a language that is a list": {"text": SECRET, "language": [SECRET]},
}
BAD_COMMENTS_IN_JSON = {
    "a text given twice": f'{{"text": "{SECRET}", "text": "{SECRET} again"}}',
    "a text given twice, once in disguise": rf'{{"text": "{SECRET}", "t\u0065xt": "{SECRET} again"}}',
    "NaN in the context": f'{{"text": "{SECRET}", "context": {{"a": [NaN]}}}}',
    "infinity for a comment": "-Infinity",
    "an endless number": f'{{"text": "{SECRET}", "context": {{"a": {"7" * 10_000}}}}}',
}
ODD_TEXTS = (
    "\u202etxet siht si sdrawkcab\u202c",
    "cut\u200b by\u2060 nothing\ufeff",
    "Z" + "\u0310" * 4_000,
    "".join(chr(plane << 16 | place) for plane in range(17) for place in (0xA1, 0xABCD) if plane << 16 | place > 0x9F),
    "\ufdfa" * 500,
)
"""Texts that are scored as they are."""


class Intruder:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self._folder),)


class Sender:
    """Sends what no client would, and notes what must come of it."""

    def __init__(self, system: System) -> None:
        self.decided: list[str] = []
        """Submissions that must be decided."""
        self.refused: dict[str, tuple[str, Reason]] = {}
        """Dead letters that there must be: each one's id to what was sent, and why it must be refused."""
        self._redis = system.redis
        self._app = Celery(broker=system.broker_url, set_as_current=False)

    def close(self) -> None:
        self._app.close()

    def task(self, *args: object, task: str = MODERATE_TASK) -> str:
        """Send a Celery message; its id."""
        return str(self._app.send_task(task, args, queue=MODERATE_QUEUE).id)

    def good(self) -> None:
        self.decided.append(f"{self.task([{'text': f'{SECRET} is fine'}])}:0")

    def bad(self, what: str, reason: Reason, *args: object, task: str = MODERATE_TASK) -> None:
        """A Celery message to be refused whole."""
        self.refused[refused_id(self.task(*args, task=task))] = what, reason

    def bad_body(self, what: str, body: str) -> None:
        """A Celery message of which nothing can be read but its headers."""
        message = self.envelope(body, content_type="application/json", content_encoding="utf-8")
        self.push(message)
        self.refused[refused_id(json.loads(message)["headers"]["id"])] = what, Reason.UNREADABLE_MESSAGE

    def bad_bytes(self, what: str, raw: bytes) -> None:
        """Bytes on the list that are no Celery message we read."""
        self.push(raw)
        self.refused[refused_id(_sha256(raw))] = what, Reason.UNREADABLE_MESSAGE

    def bad_json(self, what: str, comment: str) -> None:
        """A comment that no serializer writes, between two good ones."""
        good = json.dumps({"text": f"{SECRET} is fine"})
        body = f"[[[{good}, {comment}, {good}]], {{}}, {{}}]"
        message = self.envelope(body, content_type="application/json", content_encoding="utf-8")
        self.push(message)
        message_id = json.loads(message)["headers"]["id"]
        self.refused[refused_id(f"{message_id}:1")] = what, Reason.INVALID_COMMENT
        self.decided += [f"{message_id}:0", f"{message_id}:2"]

    def push(self, raw: bytes) -> None:
        self._redis.lpush(MODERATE_QUEUE, raw)

    def envelope(self, body: object, **how: str) -> bytes:
        """A message with this body as kombu sends it, taken from a queue that nobody reads."""
        with self._app.producer_or_acquire() as producer:
            headers = {"task": MODERATE_TASK, "id": str(uuid4())}
            producer.publish(body, routing_key="nobody", headers=headers, retry=False, **how)
        return cast(bytes, self._redis.rpop("nobody"))


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


@pytest.fixture
def sender(system: System) -> Iterator[Sender]:
    sender = Sender(system)
    yield sender
    sender.close()


def send_bad_comments(sender: Sender) -> None:
    """Each beside a good one, all in one list."""
    listed = [comment for bad in BAD_COMMENTS.values() for comment in (bad, {"text": f"{SECRET} is fine"})]
    message_id = sender.task(listed)
    for place, what in enumerate(BAD_COMMENTS):
        sender.refused[refused_id(f"{message_id}:{2 * place}")] = what, Reason.INVALID_COMMENT
        sender.decided.append(f"{message_id}:{2 * place + 1}")
    for what, comment in BAD_COMMENTS_IN_JSON.items():
        sender.bad_json(what, comment)
    odd_id = sender.task([{"text": text} for text in ODD_TEXTS])
    sender.decided += [f"{odd_id}:{place}" for place in range(len(ODD_TEXTS))]


def send_untimely_comments(sender: Sender) -> None:
    expired_id = sender.task([{"text": SECRET, "expires_at": "2020-01-01T00:00:00Z"}])
    sender.refused[f"{expired_id}:0"] = "expired", Reason.EXPIRED
    sender.task([{"text": SECRET, "idempotency_key": "key"}])
    sender.decided.append("key")


def send_conflict(sender: Sender) -> None:
    edited = f"{SECRET} edited"
    sender.task([{"text": edited, "idempotency_key": "key"}])
    conflict_id = f"key#{_sha256(edited.encode())[:16]}"
    sender.refused[conflict_id] = "another text under a used key", Reason.IDEMPOTENCY_CONFLICT


def send_bad_messages(sender: Sender) -> None:
    sender.bad("no argument", Reason.NOT_A_LIST)
    sender.bad("two arguments", Reason.NOT_A_LIST, [{"text": SECRET}], 1)
    sender.bad("a comment for a list", Reason.NOT_A_LIST, {"text": SECRET})
    sender.bad("a string for a list", Reason.NOT_A_LIST, SECRET)
    sender.good()
    sender.bad("an empty list", Reason.NOT_A_LIST, [])
    sender.bad("257 comments", Reason.TOO_MANY_COMMENTS, [{"text": SECRET}] * 257)
    sender.bad("another task", Reason.UNKNOWN_TASK, [{"text": SECRET}], task="news.digest")
    sender.good()
    sender.bad_body("a body that is not JSON", f"{{{SECRET}")
    sender.bad_body("an empty body", "")
    sender.bad_body("a body of open brackets", "[" * 200_000)
    sender.bad_body("a body nested deeply", "[" * 200_000 + "]" * 200_000)
    sender.good()


def send_bad_bytes(sender: Sender) -> None:
    sender.bad_bytes("nothing", b"")
    sender.bad_bytes("a text", SECRET.encode())
    sender.bad_bytes("binary", bytes(range(256)) * 4096)
    sender.bad_bytes("[1,2]", b"[1,2]")
    sender.bad_bytes("open brackets", b"[" * 200_000)
    sender.good()
    envelope = json.loads(sender.envelope([[[{"text": SECRET}]], {}, None], serializer="json"))
    sender.bad_bytes("an envelope cut short", json.dumps(envelope).encode()[:-20])
    sender.bad_bytes("an envelope without a body", json.dumps(envelope | {"body": None}).encode())
    sender.bad_bytes("a body that is not base64", json.dumps(envelope | {"body": f"*{SECRET}*"}).encode())
    sender.bad_bytes("headers that are a list", json.dumps(envelope | {"headers": [SECRET]}).encode())
    sender.bad_bytes("a task that is a list", json.dumps(envelope | {"headers": {"task": [SECRET]}}).encode())
    headers = envelope["headers"]
    for what, compression in (("unknown compression", "application/x-bz2"), ("a list in its place", [1])):
        odd = envelope | {"headers": headers | {"compression": compression}}
        sender.bad_bytes(what, json.dumps(odd).encode())
    bomb = base64.b64encode(zlib.compress(bytes(MAX_MESSAGE_BYTES + 1))).decode()
    odd = envelope | {"headers": headers | {"compression": "application/x-gzip"}, "body": bomb}
    sender.bad_bytes("a compression bomb", json.dumps(odd).encode())
    # Headers that mean nothing to us may be anything
    odd = envelope | {
        "headers": headers | {"id": "odd", "eta": [1], "expires": {}, "retries": SECRET, "submitted_at": SECRET}
    }
    sender.push(json.dumps(odd).encode())
    sender.decided.append("odd:0")
    sender.good()


def test_bad_input_is_set_aside_with_a_reason(system: System, sender: Sender, tmp_path: Path) -> None:
    # Given a worker
    worker = system.start_worker()

    # When all that can go wrong with a message comes among good comments, a pickle that acts when read included
    send_bad_comments(sender)
    send_untimely_comments(sender)
    send_bad_messages(sender)
    send_bad_bytes(sender)
    intruded = tmp_path / "intruded"
    sender.bad_bytes("a pickle", sender.envelope(Intruder(intruded), serializer="pickle"))
    sender.good()
    # And a key is used again, after its first text was decided: of two on their way either may come first
    system.wait_for_decisions(["key"])
    send_conflict(sender)

    # Then each is a dead letter with its reason, in words that do not quote it
    system.wait_for_decisions(sender.decided)
    system.wait_until_nothing_is_left()
    letters = {letter.dead_letter_id: letter for letter in system.client.dead_letters(limit=1000)}
    assert {key: letter.reason for key, letter in letters.items() if key not in sender.refused} == {}
    for dead_letter_id, (what, reason) in sender.refused.items():
        assert dead_letter_id in letters, f"{what} led to no dead letter"
        letter = letters[dead_letter_id]
        assert (what, letter.reason) == (what, reason)
        assert SECRET not in letter.detail, what
        kept = 0 if "compression" in what else min(letter.payload_bytes, MAX_PAYLOAD_BYTES)
        assert len(letter.payload) == kept, what
    assert not intruded.exists()
    # And the good ones are decided
    assert sorted(row.submission_id for row in system.decisions()) == sorted(sender.decided)
    # And the same process still answers, and has written no text into its log
    assert worker.is_running
    assert system.client.nodes() == ([worker.node], [])
    assert SECRET not in worker.log()


def test_mutated_messages_harm_nobody(system: System, texts: list[str]) -> None:
    # Given a worker, and 2,000 messages broken in every way with good ones among them
    worker = system.start_worker()
    good = iter(texts)
    ids: list[str] = []
    for burst in range(20):
        system.redis.lpush(MODERATE_QUEUE, *mutated(burst, 100))
        ids += system.client.submit_many(list(islice(good, 4)))
    # Then every good one is decided, nothing is left, and the worker is the same
    system.wait_for_decisions(ids)
    system.wait_until_nothing_is_left()
    assert worker.is_running
    assert system.client.nodes() == ([worker.node], [])
