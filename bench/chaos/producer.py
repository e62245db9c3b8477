"""A producer that may die at any instant, and the journal that says what `submit` returned for.

`python -m bench.chaos.producer NAME STYLE SEED JOURNAL`, where STYLE is singles, keyed, lists or mutated. Runs until
SIGTERM. A line is in the kernel before the next step is taken, and on the disk before the next submission: so what was
returned is known whatever becomes of the process. A journal goes on where the one before it died.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from redis import Redis
from redis.exceptions import RedisError

from api_client.client import BrokerUnavailable, ModerationClient
from api_client.limits import QueueFull
from bench.context import read_texts
from bench.mutate import mutated
from config.names import MODERATE_QUEUE
from config.settings import settings
from db.session import DatabaseProblem
from worker.envelope import MalformedMessage, malformed_envelope, read_envelope
from worker.message import parse_message

SINGLES_PAUSE_S = 0.05
LISTS_PAUSE_S = 1.5
LONGEST_LIST = 150
MUTATED_AT_ONCE = 60
MUTATED_PAUSE_S = 0.2
AFTER_FAILURE_S = 0.5
COMMON_ID = str(UUID(int=0)).encode()[:24]
"""With which the ids of all messages begin that are mutated."""

REFUSALS = (BrokerUnavailable, DatabaseProblem, QueueFull)
"""What `submit` raises when something is away."""


@dataclass(slots=True)
class Journal:
    """What one producer noted."""

    returned: dict[str, str] = field(default_factory=dict)
    """Submission id: sha256 of its text."""
    returned_at: dict[str, float] = field(default_factory=dict)
    """By submission id, seconds since the epoch."""
    tried: dict[str, str] = field(default_factory=dict)
    """The comments' own ids, of which nobody knows whether they were submitted: sha256 of the text."""
    failures: dict[str, int] = field(default_factory=dict)
    """How often submitting raised what."""
    attempts: int = 0


def read_journal(path: Path) -> Journal:
    """A last line that is cut short was never followed by anything."""
    journal = Journal()
    if not path.exists():
        return journal
    trying: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            note = json.loads(line)
        except ValueError:
            continue  # the producer died while it wrote; nothing had been sent
        if "tries" in note:
            trying = note["tries"]
            journal.tried |= trying
            journal.attempts += 1
        elif "returned" in note:
            for submission_id, comment_id in zip(note["returned"], trying, strict=True):
                journal.returned[submission_id] = trying[comment_id]
                journal.returned_at[submission_id] = note["at"]
                journal.tried.pop(comment_id, None)
        elif "raised" in note:
            journal.failures[note["raised"]] = journal.failures.get(note["raised"], 0) + 1
    return journal


class Writer:
    """Appends to a journal."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._file.write(b"\n")  # after what a predecessor may have cut short

    def note(self, *, sync: bool = False, **facts: Any) -> None:
        self._file.write(json.dumps(facts | {"at": time.time()}).encode() + b"\n")
        if sync:
            os.fsync(self._file.fileno())


# --- Comments --------------------------------------------------------------------------------------------------------


def produce(name: str, style: str, seed: int, journal: Path) -> Iterator[float]:
    """Submit again and again; gives the pause to make before the next time, in seconds."""
    # Not the seed alone: one that was killed and started again would repeat itself.
    chance = random.Random(f"{seed} {name} {journal.stat().st_size if journal.exists() else 0}")
    texts = read_texts()
    writer = Writer(journal)
    numbers = iter(range(time.time_ns(), 2**63))
    with ModerationClient() as client:
        while True:
            count = chance.randint(1, LONGEST_LIST) if style == "lists" else 1
            comments = []
            for _ in range(count):
                comment_id = f"{name}-{next(numbers)}"
                comments.append({"id": comment_id, "text": f"{chance.choice(texts)[:2000]} {comment_id}"})
            if style == "keyed":
                comments[0]["idempotency_key"] = f"key-{comments[0]['id']}"
            # A key makes it safe to submit again, so a keyed one is until that returns; the others are not.
            while not _submit(client, style, comments, writer) and style == "keyed":
                yield AFTER_FAILURE_S
            yield LISTS_PAUSE_S if style == "lists" else SINGLES_PAUSE_S


def _submit(client: ModerationClient, style: str, comments: list[dict[str, str]], writer: Writer) -> bool:
    writer.note(tries={c["id"]: hashlib.sha256(c["text"].encode()).hexdigest() for c in comments})
    try:
        ids = list(client.submit_many(comments)) if style == "lists" else [client.submit(**comments[0])]  # type: ignore[arg-type]
    except REFUSALS as error:
        writer.note(raised=type(error).__name__)
        return False
    writer.note(returned=ids, sync=True)
    return True


# --- Mutated messages ------------------------------------------------------------------------------------------------


def mutate(name: str, seed: int, journal: Path) -> Iterator[float]:
    """Push mutated messages again and again; the journal says what is to become of each: the ids of its rows."""
    chance = random.Random(f"{seed} {name} {journal.stat().st_size if journal.exists() else 0}")
    writer = Writer(journal)
    with Redis(unix_socket_path=settings().broker_url.removeprefix("redis+socket://"), socket_timeout=15) as redis:
        while True:
            messages = [
                # All are made of the same few, which would be one submission each.
                raw.replace(COMMON_ID, str(UUID(int=chance.getrandbits(128))).encode()[: len(COMMON_ID)])
                for raw in mutated(chance.getrandbits(64), MUTATED_AT_ONCE)
            ]
            expected = [sorted(expected_ids(message)) for message in messages]
            writer.note(mutated=expected)
            try:
                redis.lpush(MODERATE_QUEUE, *messages)
            except (RedisError, OSError) as error:
                writer.note(raised=type(error).__name__)
                yield AFTER_FAILURE_S
                continue
            writer.note(pushed=len(messages))
            yield MUTATED_PAUSE_S


def expected_ids(raw: bytes) -> set[str]:
    """Under which ids decisions or dead letters of this message are to be found."""
    try:
        envelope = read_envelope(raw)
    except MalformedMessage as reason:
        envelope = malformed_envelope(raw, str(reason))
    parsed = parse_message(envelope["headers"], envelope["body"], now=datetime.now(UTC))
    return {submitted.submission_id for submitted in parsed.submitted} | {
        refused.dead_letter_id for refused in parsed.refused
    }


@dataclass(slots=True)
class MutatedJournal:
    """What the sender of mutated messages noted."""

    pushed: list[list[str]] = field(default_factory=list)
    """The expected ids of each message that Redis took."""
    unknown: list[list[str]] = field(default_factory=list)
    """Of each that Redis may or may not have taken."""


def read_mutated_journal(path: Path) -> MutatedJournal:
    journal = MutatedJournal()
    tries: list[list[str]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            note = json.loads(line)
        except ValueError:
            continue
        if "mutated" in note:
            journal.unknown += tries
            tries = note["mutated"]
        elif "pushed" in note:
            journal.pushed += tries
            tries = []
    journal.unknown += tries
    return journal


def main() -> None:
    name, style, seed, journal = sys.argv[1:]
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    steps: Callable[[], Iterator[float]] = (
        (lambda: mutate(name, int(seed), Path(journal)))
        if style == "mutated"
        else (lambda: produce(name, style, int(seed), Path(journal)))
    )
    for pause_s in steps():
        if stopped:
            return
        time.sleep(pause_s)


if __name__ == "__main__":
    main()
