"""Dead letters an operator can work with: retried without losing one, shown, purged; from Python and the terminal."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import Connection, Engine, text
from typer.testing import Result

from api_client.client import ModerationClient
from config.identity import refused_id
from config.names import MODERATE_QUEUE, Reason
from db import dead_letters, queries
from db.dead_letters import DeadLetterRow
from db.durable import record_pending
from db.session import open_database, reading, writing
from tests.commands import run_here
from tests.integration.rows import decide, letter, minutes, pending, prepare, scored, set_aside
from tests.integration.test_cli import json_lines


@pytest.fixture
def client(redis_url: str, database_url: str) -> Iterator[ModerationClient]:
    with ModerationClient(redis_url, database_url) as client:
        yield client


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_database(database_url)
    yield engine
    engine.dispose()


def holding(dead_letter_id: str, payload: object, **changes: Any) -> DeadLetterRow:
    encoded = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    columns: dict[str, Any] = {"payload": encoded, "payload_bytes": len(encoded), "reason": "worker_died"}
    if isinstance(payload, dict) and payload.get("text"):
        columns["text_sha256"] = hashlib.sha256(payload["text"].encode()).hexdigest()
        columns |= {"community": payload.get("community", "default"), "comment_id": payload.get("id")}
    return letter(dead_letter_id, **columns | changes)


def sent(redis_url: str, queue: str) -> list[dict[str, Any]]:
    """The comments of all messages in a queue, the first sent first."""
    with Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as redis:
        raw = redis.lrange(queue, 0, -1)
    bodies = [json.loads(base64.b64decode(json.loads(one)["body"])) for one in reversed(raw)]
    return [comment for body in bodies for comment in body[0][0]]


def states(engine: Engine) -> dict[str, str]:
    with reading(engine) as connection:
        return dict(connection.execute(text("SELECT submission_id, state FROM submissions")).all())


WHOLE_COMMENT = {
    "text": "hello",
    "id": "7",
    "community": "news",
    "author": "ann",
    "context": {"a": [1]},
    "created_at": "2026-11-22T12:00:00Z",
    "expires_at": "2026-11-22T12:00:01Z",
}


class TestRetry:
    def test_a_comment_and_a_message_are_on_their_way_again(
        self, client: ModerationClient, redis_url: str, database_url: str, engine: Engine
    ) -> None:
        # Given letters of a comment that expired, of one that was a durable submission, and of a whole message that an
        # older release noted under a queue of which no moderation worker takes
        message = [[[*({"text": f"{n}"} for n in range(300)), {"text": "k", "idempotency_key": "mine"}]], {}, {}]
        decide(
            database_url,
            letters=[
                holding("m:0", WHOLE_COMMENT, queue="toxicity.bulk"),
                holding(refused_id("long"), message, reason="too_many_comments", queue="retrain"),
            ],
        )
        with writing(engine) as connection:
            record_pending(connection, [pending("durable", "hello")])
            dead_letters.record(connection, [holding("durable", {"text": "hello"})])
        assert states(engine) == {"durable": "dead", "m:0": "dead"}
        # When they are retried
        retried = client.retry_dead_letters()
        # Then each is a pending submission of its own, and a message, and no letter
        expected = {"m:0", "durable", *(f"long:{n}" for n in range(300)), "mine"}
        assert (set(retried.submission_ids), retried.left) == (expected, {})
        assert states(engine) == dict.fromkeys(expected, "pending")
        [bulk] = sent(redis_url, "toxicity.bulk")
        assert bulk == {name: WHOLE_COMMENT[name] for name in WHOLE_COMMENT if name != "expires_at"} | {
            "idempotency_key": "m:0"
        }
        assert {comment["idempotency_key"] for comment in sent(redis_url, MODERATE_QUEUE)} == expected - {"m:0"}
        assert client.dead_letters() == []
        # And a worker's decision ends it
        with writing(engine) as connection:
            prepare(connection, "v1")
            queries.record_decisions(connection, [scored("durable", "hello")])
        assert states(engine)["durable"] == "decided"

    @pytest.mark.parametrize(
        ("lost", "why"),
        [
            pytest.param(holding("a", {"text": ""}), "'text' is empty", id="still wrong"),
            pytest.param(holding("a", b'{"text": "a", "text": "b"}'), "stands twice", id="repeated name"),
            pytest.param(holding("a", [[[{"text": "b"}, {}]], {}, {}]), "a:1 breaks the contract", id="one of a list"),
            pytest.param(holding("a", b'{"text": "a', payload_bytes=70_000), "the first 11 of its 70,000", id="cut"),
            pytest.param(holding("a", b"", payload_bytes=70), "its text was not stored", id="not stored"),
            pytest.param(holding("a", b"\xff"), "it is no comment", id="no JSON"),
            pytest.param(holding("a", {"body": "aGVsbG8="}), "breaks the contract still", id="an envelope"),
            pytest.param(holding("a" * 210, {"text": "a"}, text_sha256=None), "its id is too long", id="long id"),
            pytest.param(holding("a", b"", reason="erased"), "it was erased", id="erased"),
            # As older releases left them
            pytest.param(holding("decided", {"text": "a"}, text_sha256=None), "has a decision", id="decided"),
            pytest.param(holding("decided", {"text": "b"}, text_sha256=None), "another text", id="decided as another"),
        ],
    )
    def test_what_cannot_be_retried_stays_and_is_named(
        self, client: ModerationClient, redis_url: str, database_url: str, engine: Engine, lost: DeadLetterRow, why: str
    ) -> None:
        # Given such a letter (the decision came after it) beside one that can be retried
        decide(database_url, letters=[lost, holding("good", {"text": "good"}, received_at=minutes(1))])
        decide(database_url, scored("decided", "a"))
        retried = client.retry_dead_letters()
        # Then it is as it was, nothing of it was sent, and the other is on its way
        assert retried.submission_ids == ["good"]
        assert [*retried.left] == [lost.dead_letter_id]
        assert why in retried.left[lost.dead_letter_id]
        assert client.dead_letters() == [lost]
        assert [comment["text"] for comment in sent(redis_url, MODERATE_QUEUE)] == ["good"]
        assert states(engine) == {"decided": "decided", "good": "pending"}

    def test_without_redis_it_waits_in_the_database(self, database_url: str, engine: Engine) -> None:
        # Given a Redis that is away, which is as if the process died before it sent anything
        decide(database_url, letters=[holding("m:0", {"text": "a"})])
        with ModerationClient("redis+socket:///nowhere.sock", database_url) as client:
            assert client.retry_dead_letters(["m:0"]).submission_ids == ["m:0"]
            assert client.dead_letter("m:0") is None
        # Then it is pending, for a worker's sweeper to send
        assert states(engine) == {"m:0": "pending"}

    def test_a_letter_is_retried_once_and_by_its_reason(self, client: ModerationClient, database_url: str) -> None:
        decide(database_url, letters=[holding("a", {"text": "a"}), holding("b", {"text": "b"}, reason="expired")])
        assert client.retry_dead_letters(reason=Reason.EXPIRED).submission_ids == ["b"]
        again = client.retry_dead_letters(["b", "a", "a"])
        assert (again.submission_ids, again.left) == (["a"], {"b": "there is no such dead letter"})


def test_what_was_decided_gets_no_letter(database_url: str, client: ModerationClient) -> None:
    # A message may come again after its comments were recorded, and have expired, or be revoked, by then
    decide(database_url, scored("m:0"), letters=[set_aside("m:0"), set_aside("m:1")])
    assert [one.dead_letter_id for one in client.dead_letters()] == ["m:1"]


def test_a_submission_comes_to_one_end_whoever_is_first(engine: Engine) -> None:
    # Given two workers that hold the same messages: the one decides what the other refuses
    ids = [f"m:{place}" for place in range(300)]
    rows = [scored(one) for one in ids]
    letters = [letter(row.submission_id, community="default", text_sha256=row.text_sha256) for row in rows]
    with writing(engine) as connection:
        prepare(connection)
    together = threading.Barrier(2)

    def take_turns(record: Callable[[Connection, Any], object], given: list[Any]) -> None:
        for start in range(0, len(given), 10):
            together.wait(60)
            with writing(engine) as connection:
                record(connection, given[start : start + 10])

    # When both record at the same time, each beginning at the other end of a list
    with ThreadPoolExecutor(2) as pool:
        deciding = pool.submit(take_turns, queries.record_decisions, rows)
        refusing = pool.submit(take_turns, dead_letters.record, letters[::-1])
        deciding.result()
        refusing.result()
    # Then each submission has a decision or a letter, and its state says which
    with reading(engine) as connection:
        decided = {row.submission_id for row in queries.results(connection)}
        dead = set(dead_letters.ids(connection))
    assert decided | dead == set(ids)
    assert decided & dead == set()
    assert decided
    assert dead
    assert states(engine) == dict.fromkeys(decided, "decided") | dict.fromkeys(dead, "dead")


def test_purge_takes_what_fits_all_that_is_given(database_url: str, client: ModerationClient, engine: Engine) -> None:
    old, new = letter("old"), letter("new", received_at=minutes(2))
    other = replace(old, dead_letter_id="other", reason="expired")
    decide(database_url, letters=[old, new, other])
    with writing(engine) as connection:
        record_pending(connection, [pending("durable")])
        dead_letters.record(connection, [set_aside("durable", received_at=minutes(9))])
    narrow = {"reason": Reason.INVALID_COMMENT, "received_before": minutes(1)}
    assert client.count_dead_letters(**narrow) == client.purge_dead_letters(**narrow) == 1  # type: ignore[arg-type]
    assert {one.dead_letter_id for one in client.dead_letters()} == {"new", "other", "durable"}
    assert client.purge_dead_letters(received_before=minutes(1)) == 1
    # And with a letter goes the text of its submission
    texts = text("SELECT text FROM submissions WHERE submission_id = 'durable'")
    for there in True, False:
        with reading(engine) as connection:
            assert (connection.scalar(texts) is not None) == there
        assert client.purge_dead_letters() == (2 if there else 0)


class TestCommands:
    @pytest.fixture
    def moderato(self, redis_url: str, sqlite_url: str) -> Callable[..., Result]:
        return partial(run_here, {"MODERATO_BROKER_URL": redis_url, "MODERATO_DATABASE_URL": sqlite_url})

    def test_list_show_retry_and_purge(self, moderato: Callable[..., Result], sqlite_url: str) -> None:
        # Given a comment that would steer the terminal, and one that is wrong for ever
        decide(
            sqlite_url,
            letters=[
                holding("m:0", '{"text": "\x1b[31mcrimson \u202e"}'.encode(), author="ann", detail="delivered 5 times"),
                letter("bad", received_at=minutes(1)),
            ],
        )
        # When they are listed, then in words, with or without a subcommand, and without what came
        listed = moderato("dead-letters").stdout
        assert all(words in listed for words in ("its workers died", "invalid comment", "delivered 5 times"))
        assert listed == moderato("dead-letters", "list").stdout
        assert "crimson" not in listed
        limited = moderato("dead-letters", "list", "--limit", "1", "--json")
        [row] = json_lines(limited.stdout)
        assert (row["dead_letter_id"], "payload" in row) == ("bad", False)
        [row] = json_lines(moderato("dead-letters", "--reason", "worker_died", "--json").stdout)
        assert row["dead_letter_id"] == "m:0"
        # And one is shown with what to do, its payload only when asked for, and then harmless
        shown = moderato("dead-letters", "show", "m:0").stdout
        assert "retry" in shown
        assert "ann" in shown
        assert "crimson" not in shown
        shown = moderato("dead-letters", "show", "m:0", "--payload").stdout
        assert r'{"text": "\x1b[31mcrimson \u202e"}' in shown
        assert "there is no dead letter 'x'" in moderato("dead-letters", "show", "x", status=1).stderr
        # And a retry says what is on its way and what stays
        moderato("dead-letters", "retry", status=1)
        done = moderato("dead-letters", "retry", "--all", status=1)
        # (a bare escape is no JSON)
        assert "m:0 not retried" in done.stderr
        assert "bad not retried: bad breaks the contract still: 'text' is empty" in done.stderr
        # And a purge asks first
        moderato("dead-letters", "purge", "--reason", "expired")
        asked = moderato("dead-letters", "purge", "--older-than-days", "0", stdin="n\n", status=1)
        assert "for good: 2" in asked.stderr
        assert "deleted: 2" in moderato("dead-letters", "purge", "--older-than-days", "0", "--yes").stderr

    def test_a_retried_comment_is_printed(
        self, moderato: Callable[..., Result], redis_url: str, sqlite_url: str
    ) -> None:
        decide(sqlite_url, letters=[holding("m:0", {"text": "fine"})])
        done = moderato("dead-letters", "retry", "m:0")
        assert done.stdout == "m:0\n"
        assert [comment["text"] for comment in sent(redis_url, MODERATE_QUEUE)] == ["fine"]
