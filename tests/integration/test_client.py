"""The producers' client on a real Redis and real databases; no worker runs, so what it leaves there can be read."""

import itertools
import json
import select
import socket
import socketserver
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, tzinfo
from functools import partial
from pathlib import Path
from typing import Any, Self
from uuid import RFC_4122, UUID

import pytest
from celery import Celery
from celery.signals import before_task_publish
from kombu import Connection, Consumer, Message, Queue
from kombu.pidbox import Mailbox
from redis import Redis
from sqlalchemy import Engine

from api_client.client import (
    ActiveChanged,
    AlreadyRolledBack,
    BrokerUnavailable,
    InvalidComment,
    ModerationClient,
    NothingToRollBack,
    RefusedByGate,
    UnknownQueue,
    WaitTimeout,
)
from api_client.connecting import MAX_CONNECTIONS
from api_client.limits import Limits, QueueFull, RateLimited, TryLater
from api_client.publishing import ask, new_task_id, push
from config.names import ACTIVATION_CHANGED, DECIDED_CHANNEL, MODERATE_QUEUES, RETRAIN_QUEUE, WORKER_CONTROL_EXCHANGE
from config.policy import PolicyError
from config.queues import priority_list
from config.settings import ROOT, SettingsError, settings
from db import queries
from db.durable import database_time, overdue
from db.migrate import SchemaMismatch
from db.privacy import Subject
from db.queries import NoSuchDecision, NoSuchVersion
from db.session import DatabaseProblem, open_database, reading, sqlite_file, writing
from db.tables import Base, UtcDateTime
from tests.integration.rows import NOON, POLICY_VERSION, decide, letter, minutes, scored
from tests.services import locks_waited_for, wait_until

MILD = "communities: {default: {toxic: {hide: 0.9}}}"
NOWHERE = "redis://:secret@127.0.0.1:1/0"


@pytest.fixture
def client(redis_url: str, database_url: str) -> Iterator[ModerationClient]:
    with ModerationClient(redis_url, database_url) as client:
        yield client


@pytest.fixture
def producer(redis_url: str, empty_sqlite_url: str) -> Iterator[ModerationClient]:
    """A client that only submits: its database has no tables, and is never asked."""
    with ModerationClient(redis_url, empty_sqlite_url) as client:
        yield client


@pytest.fixture
def set_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Changes settings of the section client, for clients made afterwards."""

    def change(**changes: Any) -> None:
        for name, value in changes.items():
            monkeypatch.setenv(f"MODERATO_CLIENT__{name.upper()}", str(value))
        settings.cache_clear()

    yield change
    settings.cache_clear()


def totals_of(client: ModerationClient) -> queries.Totals:
    with reading(client._engine) as connection:
        return queries.totals(connection)


def received(url: str, queue: str = "toxicity") -> list[tuple[Any, Message]]:
    """Every message in the queue, as plain kombu reads it: the decoded body, and the message."""
    messages: list[tuple[Any, Message]] = []
    with Connection(url) as broker, broker.channel() as channel:
        while message := Queue(queue)(channel).get(no_ack=True):
            messages.append((message.payload, message))
    return messages


def envelopes(redis: Redis) -> list[Any]:
    """What waits in the queue, oldest first, as it lies there."""
    return [json.loads(raw) for raw in reversed(redis.lrange("toxicity", 0, -1))]


def bindings(redis: Redis) -> dict[Any, Any]:
    """Everything but the messages: how kombu's exchanges lead to queues."""
    return {key: redis.smembers(key) for key in redis.scan_iter() if key != b"toxicity"}


@contextmanager
def losing_first_answer_to_a_push(redis_url: str, *, every: bool = False) -> Iterator[int]:
    """A port on which Redis answers, but that the first connection to push something is cut before its answer.

    Or every one.
    """
    lost = threading.Event()

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.socket(socket.AF_UNIX) as redis:
                redis.connect(redis_url.removeprefix("redis+socket://"))
                pushed = False
                while True:
                    ready, _, _ = select.select([self.request, redis], [], [])
                    if redis in ready:
                        answer = redis.recv(65_536)
                        if pushed and (every or not lost.is_set()):
                            lost.set()
                            return
                        self.request.sendall(answer)
                    if self.request in ready:
                        if not (asked := self.request.recv(65_536)):
                            return
                        pushed = pushed or b"LPUSH" in asked
                        redis.sendall(asked)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()
    assert lost.is_set()


class TestSubmitting:
    def test_a_comment_becomes_a_message_that_any_celery_worker_reads(
        self, producer: ModerationClient, redis_url: str
    ) -> None:
        # Given a comment with an id of the site's own
        before = time.time()
        submission_id = producer.submit("hello", id=7, community="news", created_at=NOON, context={"thread": 3})
        # Then one Celery message waits, with one list of one comment as its only argument
        [(body, message)] = received(redis_url)
        args, kwargs, _ = body
        assert args == [
            [
                {
                    "text": "hello",
                    "id": "7",
                    "community": "news",
                    "created_at": "2026-11-22T12:00:00Z",
                    "context": {"thread": 3},
                    "store_text": True,
                }
            ]
        ]
        assert kwargs == {}
        assert message.content_type == "application/json"
        assert message.headers["task"] == "worker.moderate"
        assert before <= message.headers["submitted_at"] <= time.time()
        # And the submission is named by its community, the message's id and the place in the list
        assert submission_id == f"news/{message.headers['id']}:0"

    def test_no_comment_text_stands_in_the_headers(self, producer: ModerationClient, redis_url: str) -> None:
        # Given a comment whose text would be seen
        producer.submit("do not show me")
        # Then the headers, which monitors and logs show, do not hold it
        [(_, message)] = received(redis_url)
        assert "do not show me" not in json.dumps(message.headers)

    def test_an_idempotency_key_is_the_submissions_id(self, producer: ModerationClient) -> None:
        assert producer.submit("hello", idempotency_key="post-7") == "post-7"

    def test_an_invalid_comment_is_refused_before_it_is_sent(self, producer: ModerationClient, redis_url: str) -> None:
        with pytest.raises(InvalidComment, match="'text' is empty"):
            producer.submit(" ")
        assert received(redis_url) == []

    @pytest.mark.parametrize(
        ("queue", "meant"),
        [("toxicty", "toxicity"), ("bulk", "toxicity.bulk"), ("retrain", None), ("", None)],
    )
    def test_a_queue_that_no_worker_takes_from_is_refused(
        self, producer: ModerationClient, redis_url: str, queue: str, meant: str | None
    ) -> None:
        # When comments are submitted to it, in any of the three ways, or none at all
        for submit in (
            partial(producer.submit, "hello"),
            partial(producer.submit, "hello", durable=True),
            partial(producer.moderate, "hello", timeout_s=1),
            partial(producer.submit_many, ["hello"]),
            partial(producer.submit_many, []),
        ):
            # Then the error names the three, and which one may be meant
            with pytest.raises(UnknownQueue) as refused:
                submit(queue=queue)
            assert all(known in str(refused.value) for known in MODERATE_QUEUES)
            assert (refused.value.queue, refused.value.meant) == (queue, meant)
        # And nothing of them is in Redis
        assert producer.activity().queue_depths == dict.fromkeys(MODERATE_QUEUES, 0)
        assert not queue or received(redis_url, queue) == []

    @pytest.mark.parametrize(
        ("broker_url", "database_url"),
        [("redis://:sec/ret@h/0", None), ("redis://:123#ret@h/0", None), ("redis://h/0", "postgres://me:sec@ret@h/x")],
    )
    def test_a_url_that_cannot_be_read_is_refused_and_not_shown(
        self, broker_url: str, database_url: str | None
    ) -> None:
        with pytest.raises(SettingsError) as refused:
            ModerationClient(broker_url, database_url)
        assert not [part for part in ("sec", "ret@", "123") if part in str(refused.value)]

    def test_a_broker_that_is_not_there_is_named_without_its_password(self, empty_sqlite_url: str) -> None:
        # Given a Redis that nobody started
        with ModerationClient(NOWHERE, empty_sqlite_url) as client, pytest.raises(BrokerUnavailable) as raised:
            client.submit("hello")
        # Then the error says where it should be
        assert "redis://:***@127.0.0.1:1/0" in str(raised.value)
        assert "secret" not in str(raised.value)

    def test_whether_something_may_have_been_submitted_is_told(self, redis_url: str, empty_sqlite_url: str) -> None:
        def complaint(url: str) -> str:
            with ModerationClient(url, empty_sqlite_url) as client, pytest.raises(BrokerUnavailable) as raised:
                client.submit("hello")
            return str(raised.value)

        # Given brokers that refuse the connection, are not there, or do not know the password
        unknown = redis_url.replace("://", "://nobody:wrong@")
        for url in (NOWHERE, "redis+socket:///nowhere/redis.sock", unknown):
            assert "may or may not" not in complaint(url)
        # And one that goes away each time after it was sent something
        with losing_first_answer_to_a_push(redis_url, every=True) as port:
            assert "may or may not" in complaint(f"redis://127.0.0.1:{port}/0")


def test_task_ids_are_uuids_in_the_order_of_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = [new_task_id() for _ in range(10_000)]
    after = time.time_ns() // 1_000_000
    assert len(set(ids)) == len(ids)
    assert {(UUID(each).version, UUID(each).variant) for each in ids} == {(7, RFC_4122)}
    times = [UUID(each).int >> 80 for each in ids]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= after


class TestTheWireForm:
    def test_is_that_of_celerys_send_task_field_by_field(self, producer: ModerationClient, redis_url: str) -> None:
        # Given a comment submitted by the client
        producer.submit("hello", id="7")
        with Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as redis:
            [ours], our_bindings = envelopes(redis), bindings(redis)
            # And the same message sent by plain Celery to an empty Redis
            redis.flushall()
            # On a connection of its own: Celery's pool may have one that knows the queue from before.
            with Celery(broker=redis_url, set_as_current=False) as plain, plain.connection_for_write() as broker:
                plain.send_task(
                    "worker.moderate",
                    [[{"text": "hello", "id": "7", "store_text": True}]],
                    task_id=ours["headers"]["id"],
                    queue="toxicity",
                    headers={"submitted_at": ours["headers"]["submitted_at"]},
                    connection=broker,
                    ignore_result=True,
                )
            [stock], stock_bindings = envelopes(redis), bindings(redis)
        # Then they differ in nothing but two ids that Celery draws: the app's address for replies, and the delivery's
        for drawn in ("reply_to", "delivery_tag"):
            assert UUID(ours["properties"].pop(drawn)) != UUID(stock["properties"].pop(drawn))
        # And in that Celery's words for the arguments would show the comment
        assert "hello" in stock["headers"].pop("argsrepr")
        assert ours["headers"].pop("argsrepr") == "(1 comments,)"
        assert ours == stock
        # And Redis knows of the same queues and bindings
        assert our_bindings == stock_bindings

    def test_many_messages_arrive_in_their_order(self, producer: ModerationClient, redis_url: str) -> None:
        producer.submit_many(map(str, range(200)))
        lists = [body[0][0] for body, _ in received(redis_url)]
        assert [comment["text"] for listed in lists for comment in listed] == list(map(str, range(200)))
        assert [len(listed) for listed in lists] == [64, 64, 64, 8]

    def test_keys_have_the_prefix_that_kombu_is_told(self, redis_url: str) -> None:
        # Given two sites that share one Redis, each with a prefix of its own
        with Celery(broker=redis_url, set_as_current=False) as app:
            app.conf.broker_transport_options = {"global_keyprefix": "site:"}
            with app.connection_for_write() as broker:
                limits = Limits(max_queue_messages=2, rates=[("default", 1, 1)])
                messages = [("task-1", [{"text": "hello"}])]
                push(app, broker, "toxicity", messages, {"submitted_at": time.time()}, limits)
                ask(broker, "toxicity", 1, Limits(max_queue_messages=2, rates=[]))
                with pytest.raises(QueueFull):
                    ask(broker, "toxicity", 2, Limits(max_queue_messages=2, rates=[]))
        # Then every key is the site's
        with Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as redis:
            keys = list(redis.scan_iter())
        assert b"site:toxicity" in keys
        assert all(key.startswith(b"site:") for key in keys)

    def test_what_traces_tasks_may_add_its_headers(self, producer: ModerationClient, redis_url: str) -> None:
        # Given a listener, as tracing libraries have one
        def trace(headers: dict[str, Any], **_: Any) -> None:
            headers["traceparent"] = "00-1"

        before_task_publish.connect(trace)
        try:
            producer.submit("hello")
        finally:
            before_task_publish.disconnect(trace)
        # Then its header travels with the message
        [(_, message)] = received(redis_url)
        assert message.headers["traceparent"] == "00-1"


class TestSendingAgain:
    def test_a_lost_answer_repeats_the_same_submissions(self, redis_url: str, empty_sqlite_url: str) -> None:
        # Given a connection that breaks after Redis took the messages, before it could say so
        with (
            losing_first_answer_to_a_push(redis_url) as port,
            ModerationClient(f"redis://127.0.0.1:{port}/0", empty_sqlite_url) as producer,
        ):
            ids = producer.submit_many(map(str, range(100)))
        # Then each message is there twice, under the id that makes it one submission
        task_ids = [message.headers["id"] for _, message in received(redis_url)]
        assert task_ids == [*dict.fromkeys(task_ids)] * 2
        assert list(ids) == [f"{task_ids[n // 64]}:{n % 64}" for n in range(100)]

    def test_a_full_redis_takes_all_or_nothing(self, producer: ModerationClient, redis_url: str) -> None:
        # Given a Redis at its limit
        with Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as redis:
            redis.config_set("maxmemory", 1)
            try:
                with pytest.raises(BrokerUnavailable, match="maxmemory"):
                    producer.submit_many(map(str, range(500)))
            finally:
                redis.config_set("maxmemory", 0)
        # Then nothing of it was sent, and when there is room again the client goes on
        assert received(redis_url) == []
        producer.submit("hello")
        assert len(received(redis_url)) == 1


class TestLimits:
    @pytest.fixture
    def redis(self, redis_url: str) -> Iterator[Redis]:
        with Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as redis:
            yield redis

    def test_a_full_queue_takes_nothing(
        self, set_client: Callable[..., None], redis_url: str, sqlite_url: str, redis: Redis
    ) -> None:
        # Given a queue that takes two messages
        set_client(max_queue_messages=2)
        with ModerationClient(redis_url, sqlite_url) as client:
            # Then what comes together is taken whole by an empty queue, however much it is
            client.submit_many(map(str, range(200)))
            assert redis.llen("toxicity") == 4
            redis.ltrim("toxicity", 0, 0)
            # And by one with room for all of it, or not at all, durable or not
            for durable in (False, True):
                with pytest.raises(QueueFull, match=r"1 messages wait .* up to 2 .*nothing was submitted") as full:
                    client.submit_many(map(str, range(100)), durable=durable)
                assert (full.value.depth, full.value.limit, full.value.wait_s) == (1, 2, 1.0)
            assert redis.llen("toxicity") == 1
            assert totals_of(client).pending == 0
            client.submit("one more", durable=True)
            with pytest.raises(QueueFull):
                client.submit("too much")
            # And what another producer gave a priority counts as well
            redis.rename("toxicity", priority_list("toxicity", 7))
            with pytest.raises(QueueFull):
                client.submit("too much")
            # And another queue has room of its own
            client.submit("hello", queue="toxicity.bulk")

    def test_who_waits_for_room_goes_on(
        self, set_client: Callable[..., None], redis_url: str, empty_sqlite_url: str, redis: Redis
    ) -> None:
        # Given a full queue that is emptied after a while
        set_client(max_queue_messages=1)
        waits: list[TryLater] = []

        def wait(later: TryLater) -> None:
            waits.append(later)
            if len(waits) == 3:
                redis.delete("toxicity")

        with ModerationClient(redis_url, empty_sqlite_url) as producer:
            producer.submit("before")
            ids = producer.submit_many(map(str, range(10)), on_full=wait)
        # Then the step was tried again each time, and sent once
        assert [type(later) for later in waits] == [QueueFull] * 3
        [(_, message)] = received(redis_url)
        assert list(ids) == [f"{message.headers['id']}:{n}" for n in range(10)]

    def test_a_lost_answer_is_not_taken_for_a_full_queue(
        self, set_client: Callable[..., None], redis_url: str, empty_sqlite_url: str
    ) -> None:
        # Given a queue that is full of the very messages whose answer was lost
        set_client(max_queue_messages=2)
        with (
            losing_first_answer_to_a_push(redis_url) as port,
            ModerationClient(f"redis://127.0.0.1:{port}/0", empty_sqlite_url) as producer,
        ):
            ids = producer.submit_many(map(str, range(100)))
        # Then they are sent again under their ids
        task_ids = [message.headers["id"] for _, message in received(redis_url)]
        assert task_ids == [*dict.fromkeys(task_ids)] * 2
        assert ids[0] == f"{task_ids[0]}:0"

    def test_a_community_may_submit_so_many_in_a_minute(
        self, set_client: Callable[..., None], redis_url: str, sqlite_url: str, redis: Redis
    ) -> None:
        # Given a limit for all communities and others for some
        set_client(
            max_comments_per_minute=2,
            community_max_comments_per_minute__news=1,
            community_max_comments_per_minute__staff=0,
        )

        def pass_time(community: str, seconds: float) -> None:
            redis.incrbyfloat(f"moderato.rate.{community}", -seconds)

        with ModerationClient(redis_url, sqlite_url) as client:
            # When one has submitted a minute's worth
            client.submit_many(["one", "two"])
            # Then no more of it is taken, nor what comes together with it, durable or not
            for durable in (False, True):
                with pytest.raises(
                    RateLimited, match=r"'default' may submit 2 comments in a minute .*again in"
                ) as limited:
                    client.submit_many([{"text": "news", "community": "news"}, "three"], durable=durable)
                assert (limited.value.community, limited.value.limit) == ("default", 2)
                assert 0 < limited.value.wait_s <= 30
            # And others go on, as does one without a limit
            client.submit("news", community="news", durable=True)
            client.submit_many({"text": str(n), "community": "staff"} for n in range(10))
            # And it, too, after the time it was told to wait, once
            pass_time("default", 30)
            client.submit("three")
            with pytest.raises(RateLimited):
                client.submit("four")
            # And a batch larger than a minute's worth passes whole, and is waited for
            pass_time("news", 60)
            client.submit_many({"text": str(n), "community": "news"} for n in range(10))
            with pytest.raises(RateLimited) as limited:
                client.submit("news", community="news")
            assert limited.value.limit == 1
            assert 500 < limited.value.wait_s <= 600
            assert totals_of(client).pending == 1
        # And Redis forgets a community that submits no more
        ttl = redis.ttl("moderato.rate.news")
        assert isinstance(ttl, int)
        assert 500 < ttl <= 601
        assert len(received(redis_url)) == 5
        assert set(redis.scan_iter("moderato.rate.*")) == {b"moderato.rate.default", b"moderato.rate.news"}


class TestDurable:
    def test_a_submission_is_a_row_before_it_is_a_message(self, client: ModerationClient, redis_url: str) -> None:
        # Given comments with and without keys and other fields
        comments: list[dict[str, Any]] = [{"text": f"comment {n}"} for n in range(70)]
        comments[1] |= {"idempotency_key": "post-7", "id": 7, "community": "news", "author": "ann", "language": "en"}
        comments[1] |= {"created_at": NOON, "expires_at": minutes(5), "context": {"thread": 3}}
        # When they are submitted durably, and one of them again, alone
        ids = client.submit_many(comments, durable=True, queue="toxicity.bulk")
        again = {"idempotency_key": "post-7", "community": "news", "durable": True, "queue": "toxicity.bulk"}
        assert client.submit("comment 1", **again) == "news/post-7"  # type: ignore[arg-type]
        # Then every one is a pending row, under the id that a worker will give it
        with reading(client._engine) as connection:
            rows = overdue(connection, queue="toxicity.bulk", before=minutes(10_000_000), limit=100)
        found = {row.submission_id: row for row in rows}
        assert sorted(found) == sorted(ids)
        assert [found[submission_id].text for submission_id in ids] == [comment["text"] for comment in comments]
        row = found["news/post-7"]
        assert row.name == "post-7"
        assert (row.comment_id, row.community, row.author, row.language) == ("7", "news", "ann", "en")
        assert (row.created_at, row.expires_at, row.context) == (NOON, minutes(5), {"thread": 3})
        # And a message, which says when that was
        messages = received(redis_url, "toxicity.bulk")
        assert [f"{message.headers['id']}:{n}" for _, message in messages[:1] for n in (0, 2)] == [ids[0], ids[2]]
        assert [len(body[0][0]) for body, _ in messages] == [64, 6, 1]
        assert messages[0][1].headers["enqueued_at"] == row.enqueued_at.timestamp()
        assert messages[0][1].headers["submitted_at"] == pytest.approx(row.submitted_at.timestamp())

    def test_a_key_that_belongs_to_another_text_is_refused(self, client: ModerationClient, redis_url: str) -> None:
        client.submit("first", idempotency_key="post-7", durable=True)
        with pytest.raises(InvalidComment, match="'post-7'"):
            client.submit_many(["new", {"text": "second", "idempotency_key": "post-7"}], durable=True)
        assert len(received(redis_url)) == 1
        assert totals_of(client).pending == 1

    def test_a_text_that_must_not_be_stored_is_refused(self, producer: ModerationClient, redis_url: str) -> None:
        with pytest.raises(InvalidComment, match="store_text=False forbids what durable needs"):
            producer.submit("hello", store_text=False, durable=True)
        with pytest.raises(InvalidComment, match=r"comment 0 .*store_text=False"):
            producer.submit_many([{"text": "hello", "store_text": False}], durable=True)
        assert received(redis_url) == []

    def test_redis_may_be_away(self, sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
        # Given a Redis that nobody started
        with ModerationClient(NOWHERE, sqlite_url) as client:
            # When comments are submitted durably
            client.submit("one", durable=True)
            client.submit_many(["two", "three"], durable=True)
            # Then they are kept, and it is said once
            assert totals_of(client).pending == 3
        [said] = caplog.records
        assert "redis://:***@127.0.0.1:1/0 cannot be used" in said.message
        assert "kept in the database" in said.message

    def test_a_database_that_is_away_takes_nothing(self, producer: ModerationClient, redis_url: str) -> None:
        with pytest.raises(DatabaseProblem, match="comments were not submitted"):
            producer.submit("hello", durable=True)
        assert received(redis_url) == []

    def test_the_setting_is_the_default(self, sqlite_url: str, redis_url: str, set_client: Callable[..., None]) -> None:
        set_client(durable=True)
        with ModerationClient(redis_url, sqlite_url) as client:
            client.submit("kept")
            client.submit_many(["not kept"], durable=False)
            assert totals_of(client).pending == 1


class TestThreads:
    def test_one_client_serves_many_at_once(self, producer: ModerationClient, redis_url: str) -> None:
        # Given more threads than the client has connections, each with comments of its own
        def submit(thread: int) -> list[str]:
            texts = [f"{thread}-{n}" for n in range(100)]
            return [producer.submit(text) for text in texts[:50]] + list(producer.submit_many(texts[50:]))

        with ThreadPoolExecutor(2 * MAX_CONNECTIONS) as pool:
            ids = [submission_id for ids in pool.map(submit, range(2 * MAX_CONNECTIONS)) for submission_id in ids]
        # Then every comment is there once, under the id that its thread was given
        sent = {
            f"{message.headers['id']}:{place}": comment["text"]
            for body, message in received(redis_url)
            for place, comment in enumerate(body[0][0])
        }
        assert [sent[submission_id] for submission_id in ids] == [
            f"{thread}-{n}" for thread in range(2 * MAX_CONNECTIONS) for n in range(100)
        ]
        assert len(sent) == len(ids)


class TestSubmittingMany:
    def test_every_comment_in_order_up_to_64_in_a_message(self, producer: ModerationClient, redis_url: str) -> None:
        # Given more comments than one round trip takes, from a generator, some with keys
        announced: list[str] = []
        comments = (
            {"text": f"comment {n}", "idempotency_key": f"key {n}" if n % 5 == 0 else None} for n in range(1_100)
        )
        ids = producer.submit_many(comments, on_sent=announced.extend)
        # Then each is in exactly one message, in order
        messages = received(redis_url)
        lists = [body[0][0] for body, _ in messages]
        assert [comment["text"] for listed in lists for comment in listed] == [f"comment {n}" for n in range(1_100)]
        assert max(map(len, lists)) == 64
        # And each id is the one that a worker will give the submission
        assert list(ids) == announced
        assert announced == [
            comment.get("idempotency_key", f"{message.headers['id']}:{index}")
            for (body, message) in messages
            for index, comment in enumerate(body[0][0])
        ]

    def test_nothing_needs_to_be_consumed(self, producer: ModerationClient, redis_url: str) -> None:
        # Given a caller that ignores what is returned
        producer.submit_many(iter(["one"]))
        # Then the comment is there
        assert len(received(redis_url)) == 1

    def test_an_endless_source_is_sent_as_it_is_read(self, producer: ModerationClient, redis_url: str) -> None:
        # Given comments without an end, whose reader gives up after some were sent
        ids: list[str] = []

        class Enough(Exception):
            pass

        def stop_after_two_steps(sent: list[str]) -> None:
            ids.extend(sent)
            if len(ids) == 2_048:
                raise Enough

        with pytest.raises(Enough):
            producer.submit_many(map(str, itertools.count()), on_sent=stop_after_two_steps)
        # Then those that were announced are there, and no others
        assert sum(len(body[0][0]) for body, _ in received(redis_url)) == 2_048

    def test_long_comments_do_not_gather_in_memory(self, producer: ModerationClient) -> None:
        # Given 60 MB of comments from a generator
        text = "x" * 20_000
        tracemalloc.start()
        try:
            producer.submit_many(text[:-4] + f"{n:04}" for n in range(3_000))
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # Then only a few steps of 4 MiB, in their forms on the way to Redis, are held at once
        assert peak_bytes < 45_000_000

    def test_a_bad_comment_is_named_and_those_before_it_are_sent(
        self, producer: ModerationClient, redis_url: str
    ) -> None:
        ids: list[str] = []
        with pytest.raises(InvalidComment, match=r"^comment 2 \(counted from 0\): 'text' is empty"):
            producer.submit_many(["one", "two", "", "four"], on_sent=ids.extend)
        [(body, _)] = received(redis_url)
        assert body[0] == [[{"text": "one"}, {"text": "two"}]]
        assert len(ids) == 2

    def test_a_source_that_fails_loses_nothing_it_gave(self, producer: ModerationClient, redis_url: str) -> None:
        def comments() -> Iterator[str]:
            yield "one"
            raise OSError("the file is gone")

        with pytest.raises(OSError, match="the file is gone"):
            producer.submit_many(comments())
        assert len(received(redis_url)) == 1


class TestWaiting:
    def test_until_each_is_decided_or_dead(
        self, client: ModerationClient, redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Given one dead letter, and somebody who waits, and would look again unasked tomorrow
        monkeypatch.setattr("api_client.waiting.LONGEST_LOOK_S", 86_400)
        decide(database_url, letters=[letter("b")])
        seen: list[tuple[int, int]] = []
        channel = f"/0.{DECIDED_CHANNEL}"
        with (
            ThreadPoolExecutor(1) as pool,
            Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as redis,
        ):
            waiting = pool.submit(
                client.wait, ["a", "b", "a"], timeout_s=60, on_progress=lambda *told: seen.append(told)
            )
            wait_until(lambda: redis.pubsub_numsub(channel)[0][1], what="the subscription")
            # When a worker decides the other, and says so
            decide(database_url, scored("a"))

            def heard() -> bool:
                redis.publish(channel, b"")
                return waiting.done()

            wait_until(heard, what="the outcomes")
        # Then both are returned, and it was told how far it came
        assert waiting.result() == {"a": "decided", "b": "dead"}
        assert seen[0] == (1, 2)
        assert seen[-1] == (2, 2)

    def test_without_redis(self, database_url: str) -> None:
        with ModerationClient(NOWHERE, database_url) as client, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.wait, ["a"], timeout_s=60)
            decide(database_url, scored("a"))
            assert waiting.result(timeout=60) == {"a": "decided"}

    def test_too_long_says_how_many_are_missing_and_where_to_look(
        self, client: ModerationClient, database_url: str
    ) -> None:
        decide(database_url, scored("a"))
        with pytest.raises(WaitTimeout, match=r"2 of 3 comments have no decision after 0 s, the first of them b; "):
            client.wait(["a", "b", "c"], timeout_s=0)

    def test_for_nothing_returns_at_once(self, client: ModerationClient) -> None:
        assert client.wait([], timeout_s=0) == {}


class TestResults:
    def test_one_and_many(self, client: ModerationClient, database_url: str) -> None:
        decide(database_url, scored("a", action="hide", toxic=0.95), scored("b", decided_at=minutes(1)))
        # One by its id
        assert client.result("nobody") is None
        one = client.result("a")
        assert one is not None
        assert (one.action, one.scores["toxic"]) == ("hide", pytest.approx(0.95))
        # Many by filters, as often as they are asked for
        results = client.results(action="hide")
        assert [row.submission_id for row in results] == ["a"]
        assert [row.submission_id for row in results] == ["a"]

    def test_as_a_frame(self, client: ModerationClient, database_url: str) -> None:
        decide(database_url, scored("a"), scored("b", decided_at=minutes(1)))
        frame = client.results(order="oldest").to_frame()
        assert frame["submission_id"].tolist() == ["a", "b"]
        assert frame["toxic"].tolist() == pytest.approx([0.1, 0.1])
        # And no rows are a frame with the same columns
        assert client.results(action="remove").to_frame().columns.tolist() == frame.columns.tolist()

    def test_a_database_without_tables_says_what_to_run(
        self, producer: ModerationClient, empty_sqlite_url: str
    ) -> None:
        with pytest.raises(SchemaMismatch, match="run `moderato db upgrade`"):
            producer.result("a")
        # And asking has not made the file
        file = sqlite_file(empty_sqlite_url)
        assert file is not None and not file.exists()

    def test_a_database_that_is_not_there_is_named_without_its_password(self, redis_url: str) -> None:
        absent = "postgresql+psycopg://me:secret@127.0.0.1:1/x"
        with ModerationClient(redis_url, absent) as client, pytest.raises(DatabaseProblem) as raised:
            client.result("a")
        assert "postgresql+psycopg://me:***@127.0.0.1:1/x cannot be used" in str(raised.value)
        assert "secret" not in str(raised.value)


class TestReviewing:
    def test_a_review_holds_from_then_on(self, client: ModerationClient, database_url: str) -> None:
        decide(database_url, scored("a", action="hide"))
        client.review("a", action="allow", labels={"toxic": 0, "insult": False}, reviewer="ada", note="irony")
        row = client.result("a")
        assert row is not None
        assert (row.action, row.model_action, row.reviewer, row.note) == ("allow", "hide", "ada", "irony")

    def test_what_cannot_be_reviewed(self, client: ModerationClient, database_url: str) -> None:
        decide(database_url, scored("a"))
        with pytest.raises(NoSuchDecision):
            client.review("nobody", action="allow", reviewer="ada")
        with pytest.raises(ValueError, match="unknown action 'delete'; the actions are allow, label"):
            client.review("a", action="delete", reviewer="ada")
        with pytest.raises(ValueError, match="unknown labels rude"):
            client.review("a", action="hide", labels={"rude": 1}, reviewer="ada")
        with pytest.raises(ValueError, match="label toxic must be true or false"):
            client.review("a", action="hide", labels={"toxic": 2}, reviewer="ada")


class TestRetraining:
    def test_a_row_and_then_a_message_with_its_id(self, client: ModerationClient, redis_url: str) -> None:
        # When a training is asked for with settings of its own
        run_id = client.retrain(requested_by="ada", epochs=1, max_rows=300)
        # Then its row says so
        run = client.training_run(run_id)
        assert run is not None
        assert (run.state, run.requested_by, run.overrides) == ("requested", "ada", {"epochs": 1, "max_rows": 300})
        # And the trainer's message names the row
        [(body, message)] = received(redis_url, RETRAIN_QUEUE)
        assert body[0] == [run_id]
        assert message.headers["task"] == "trainer.retrain"

    def test_a_wrong_setting_asks_for_nothing(self, client: ModerationClient, redis_url: str) -> None:
        with pytest.raises(SettingsError, match=r"unknown setting trainer.epoch in the request; did you mean epochs\?"):
            client.retrain(requested_by="ada", epoch=1)
        with pytest.raises(SettingsError, match=r"setting trainer\.epochs = -1 in the request is wrong"):
            client.retrain(requested_by="ada", epochs=-1)
        assert client.status().last_run is None
        assert received(redis_url, RETRAIN_QUEUE) == []

    def test_a_request_that_could_not_be_sent_is_a_failed_run(self, sqlite_url: str) -> None:
        with ModerationClient(NOWHERE, sqlite_url) as client:
            with pytest.raises(BrokerUnavailable):
                client.retrain(requested_by="ada")
            run = client.status().last_run
        assert run is not None
        assert run.state == "failed"
        assert run.reason is not None and "the training was not requested" in run.reason


class TestVersions:
    def test_activating_and_going_back(self, client: ModerationClient, database_url: str) -> None:
        decide(database_url)
        assert client.active() is None
        # When the first is activated and then the second
        client.activate("v1", instead_of=client.active(), by="ada", reason="the first")
        with pytest.raises(NothingToRollBack):
            client.rollback(instead_of=client.active(), by="ada")
        second = client.activate("v2", instead_of=client.active(), by="ada", reason="better")
        # Then the second is active
        active = client.active()
        assert active is not None
        assert (active.activation_id, active.version, active.reason) == (second, "v2", "better")
        # And going back makes the first active again
        client.rollback(instead_of=client.active(), by="bob")
        assert [(row.version, row.activated_by, row.reason) for row in client.activations(limit=2)] == [
            ("v1", "bob", "rollback"),
            ("v2", "ada", "better"),
        ]

    @pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)
    def test_going_back_while_another_activates_goes_nowhere(
        self, client: ModerationClient, database_url: str, engine: Engine
    ) -> None:
        decide(database_url)
        client.activate("v1", instead_of=None, by="ada", reason="the first")
        seen = client.active()
        with ThreadPoolExecutor(1) as pool:
            # Given an activation that is not committed yet
            with writing(engine) as connection:
                queries.activate(connection, version="v2", instead_of=seen, by="ada", reason="better", now=NOON)
                # When somebody goes back from what they see
                going_back = pool.submit(client.rollback, instead_of=seen, by="bob")
                with reading(engine) as other:
                    wait_until(lambda: locks_waited_for(other), what="bob waiting")
            # Then that is refused, as it is not active any more
            with pytest.raises(ActiveChanged):
                going_back.result()
        assert [row.version for row in client.activations(limit=3)] == ["v2", "v1"]

    def test_two_people_who_go_back_go_back_once(self, client: ModerationClient, database_url: str) -> None:
        decide(database_url)
        client.register({"version": "v3", "parent": None})
        for version in ("v1", "v2", "v3"):
            client.activate(version, instead_of=client.active(), by="ada", reason="better")
        seen = client.active()
        client.rollback(instead_of=seen, by="ann")
        # When another goes back from the bad version, at the same time and a little later
        with pytest.raises(ActiveChanged):
            client.rollback(instead_of=seen, by="bob")
        with pytest.raises(AlreadyRolledBack):
            client.rollback(instead_of=client.active(), by="bob")
        # And the active version is activated once more, which is no way out
        client.activate("v2", instead_of=client.active(), by="ann", reason="to be sure")
        with pytest.raises(AlreadyRolledBack):
            client.rollback(instead_of=client.active(), by="bob")
        # Then only a name leads further back, and only to what was active
        for wrong in ("v2", "v9"):
            with pytest.raises(NothingToRollBack):
                client.rollback(instead_of=client.active(), to=wrong, by="bob")
        client.rollback(instead_of=client.active(), to="v1", by="bob")
        assert [row.version for row in client.activations(limit=9)] == ["v1", "v2", "v2", "v3", "v2", "v1"]
        # And from what was activated afterwards the way back does not lead to the bad version
        client.activate("v2", instead_of=client.active(), by="ann", reason="better")
        assert client.rollback_target()[1] == "v1"

    def test_a_policy_is_gone_back_from_once_and_the_first_one_to_that_of_the_file(
        self, client: ModerationClient, database_url: str
    ) -> None:
        # Given what a policy file decided, and the first policy that somebody activates
        decide(database_url, scored("by the file"))
        with pytest.raises(NothingToRollBack):
            client.rollback_policy_target()
        with pytest.raises(PolicyError):
            client.activate_policy("communities: {default: {toxic: {ban: 1}}}", instead_of=None, by="ann", reason="no")
        client.activate_policy(MILD, instead_of=None, by="ann", reason="milder")
        seen = client.active_policy()
        with pytest.raises(ActiveChanged):
            client.activate_policy(MILD, instead_of=None, by="bob", reason="the same")
        # When two go back from it
        client.rollback_policy(instead_of=seen, by="ann")
        for instead_of, error in ((seen, ActiveChanged), (client.active_policy(), AlreadyRolledBack)):
            with pytest.raises(error):
                client.rollback_policy(instead_of=instead_of, by="bob")
        # Then the file's policy decides again, and only a name leads elsewhere
        active = client.active_policy()
        assert active is not None and active.policy_version == POLICY_VERSION
        assert seen is not None
        client.rollback_policy(instead_of=active, to=seen.policy_version[:8], by="bob")
        history = [row.policy_version == POLICY_VERSION for row in client.policy_activations()]
        assert history == [False, True, False, True]

    def test_a_version_that_nobody_registered(self, client: ModerationClient) -> None:
        with pytest.raises(NoSuchVersion):
            client.activate("v9", instead_of=client.active(), by="ada", reason="hope")

    def test_a_version_that_the_gate_refused_needs_force(self, client: ModerationClient, database_url: str) -> None:
        decide(database_url)
        engine = open_database(database_url)
        with writing(engine) as connection:
            queries.request_run(connection, run_id="r", requested_by="ada", overrides={}, now=NOON)
            queries.finish_run(connection, "r", state="refused", reason="toxic fell", version="v2", now=NOON)
        engine.dispose()
        with pytest.raises(RefusedByGate, match="toxic fell"):
            client.activate("v2", instead_of=client.active(), by="ada", reason="hope")
        assert client.active() is None
        client.activate("v2", instead_of=client.active(), by="ada", reason="hope", force=True)
        active = client.active()
        assert active is not None and active.version == "v2"

    def test_the_workers_are_told(self, redis_url: str, sqlite_url: str) -> None:
        # Given somebody who listens where workers do
        decide(sqlite_url)
        heard: list[str] = []
        with Connection(redis_url) as broker, broker.channel() as channel:
            mailbox = Mailbox(WORKER_CONTROL_EXCHANGE, type="fanout", accept=["json"], serializer="json")(broker)
            with Consumer(
                channel,
                [mailbox.get_queue("listener")],
                accept=["json"],
                callbacks=[lambda body, _: heard.append(body["method"])],
                no_ack=True,
            ):
                with suppress(TimeoutError):
                    broker.drain_events(timeout=0.5)  # kombu subscribes when it first waits
                with ModerationClient(redis_url, sqlite_url) as client:
                    client.activate("v1", instead_of=client.active(), by="ada", reason="first")
                while not heard:
                    broker.drain_events(timeout=30)
        # Then it hears of the activation
        assert heard == [ACTIVATION_CHANGED]

    def test_without_a_broker_the_row_is_still_written(self, sqlite_url: str) -> None:
        decide(sqlite_url)
        with ModerationClient(NOWHERE, sqlite_url) as client:
            client.activate("v1", instead_of=client.active(), by="ada", reason="first")
            active = client.active()
        assert active is not None and active.version == "v1"


OUR_MODULES = ("api_client", "config", "db")


@pytest.mark.parametrize("ahead", [timedelta(minutes=-10), timedelta(minutes=10)])
def test_what_operators_write_is_stamped_by_the_databases_clock(
    client: ModerationClient, database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, ahead: timedelta
) -> None:
    class WrongClock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + ahead

    def columns() -> Iterator[tuple[str, datetime]]:
        with reading(engine) as connection:
            for table in Base.metadata.sorted_tables:
                for column in table.c:
                    if isinstance(column.type, UtcDateTime):
                        values = connection.scalars(table.select().with_only_columns(column).where(column.is_not(None)))
                        yield from ((str(column), value) for value in values if value != NOON)

    # Given an operator whose machine's clock is wrong
    decide(database_url, scored("1", author="ann"), scored("2"))
    for name, module in sys.modules.items():
        if name.partition(".")[0] in OUR_MODULES and getattr(module, "datetime", None) is datetime:
            monkeypatch.setattr(module, "datetime", WrongClock)
    with reading(engine) as connection:
        before = database_time(connection)
    # When they do all that there is to do
    client.register({"version": "v3", "parent": None})
    for version in ("v1", "v2"):
        client.activate(version, instead_of=client.active(), by="bob", reason="better")
    client.rollback(instead_of=client.active(), by="bob")
    client.activate_policy(MILD, instead_of=None, by="bob", reason="milder")
    client.rollback_policy(instead_of=client.active_policy(), by="bob")
    client.stop_trial(client.start_trial("canary", "v2", share=0.1, by="bob", reason="see"), by="bob", reason="seen")
    client.promote_trial(client.start_trial("ab", "v3", share=0.1, by="bob", reason="see"), by="bob", reason="good")
    client.retrain(requested_by="bob")
    client.review("1", action="hide", reviewer="bob")
    client.erase(Subject("author", "ann"), by="bob")
    # Then every time that was written lies between two looks at the database's clock
    with reading(engine) as connection:
        after = database_time(connection)
    written = dict(columns())
    assert {name for name, time in written.items() if not before <= time <= after} == set()
    assert written.keys() >= {
        "activations.activated_at",
        "erasures.erased_at",
        "policy_activations.activated_at",
        "reviews.reviewed_at",
        "training_runs.requested_at",
        "trials.ended_at",
        "trials.started_at",
    }


class TestStatus:
    def test_everything_at_once(self, client: ModerationClient, database_url: str, redis_url: str) -> None:
        # Given two messages without and one with a priority, a decision, an activation and its refusal by a worker
        client.submit("one")
        client.submit("two")
        with Celery(broker=redis_url, set_as_current=False) as plain:
            plain.conf.broker_transport_options = {"priority_steps": list(range(10))}
            plain.send_task("worker.moderate", [[{"text": "three"}]], queue="toxicity", priority=5)
        decide(database_url, scored("a", action="hide"))
        activation_id = client.activate("v2", instead_of=client.active(), by="ada", reason="better")
        engine = open_database(database_url)
        with writing(engine) as connection:
            queries.record_load(
                connection, activation_id=activation_id, worker="worker@a", version="v1", error="damaged", now=NOON
            )
        engine.dispose()
        # Then the status tells of each
        status = client.status()
        assert status.problems == []
        assert (status.workers, status.trainers) == ([], [])
        assert status.queue_depths == {"toxicity.interactive": 0, "toxicity": 3, "toxicity.bulk": 0}
        assert (status.held_messages, status.pipelines) == (0, {})
        assert status.active is not None and status.active.version == "v2"
        assert [(load.worker, load.version, load.error) for load in status.loads] == [("worker@a", "v1", "damaged")]
        assert status.totals is not None and status.totals.actions == {"hide": 1}
        assert status.last_run is None

    def test_what_cannot_be_reached_is_said_and_the_rest_is_there(self, empty_sqlite_url: str, redis_url: str) -> None:
        # Given a Redis, but a database without tables
        with ModerationClient(redis_url, empty_sqlite_url) as client:
            status = client.status()
        assert status.held_messages == 0
        assert status.totals is None
        assert len(status.problems) == 1 and "moderato db upgrade" in status.problems[0]

    def test_activity_needs_no_database(self, producer: ModerationClient) -> None:
        # Given a message in each queue, the second of an interactive comment
        for queue in ("toxicity.interactive", "toxicity", "toxicity.bulk", "toxicity.interactive"):
            producer.submit("hello", queue=queue)
        # Then they are counted by queue
        activity = producer.activity()
        assert activity.queue_depths == {"toxicity.interactive": 2, "toxicity": 1, "toxicity.bulk": 1}
        assert (activity.held_messages, activity.workers, activity.problems) == (0, [], [])

    def test_a_stock_celery_worker_answers_and_takes_the_list(
        self, producer: ModerationClient, redis_url: str, tmp_path: Path
    ) -> None:
        # Given a worker of plain Celery, on our workers' control exchange, that writes down what it is given
        taken = tmp_path / "taken.json"
        script = f"""
import json, pathlib, sys
from celery import Celery
app = Celery(broker={redis_url!r})
app.conf.control_exchange = {WORKER_CONTROL_EXCHANGE!r}
@app.task(name="worker.moderate")
def moderate(comments):
    pathlib.Path({str(taken)!r}).write_text(json.dumps(comments))
app.worker_main(["worker", "-P", "solo", "-n", "worker@here", "-Q", "toxicity", "-l", "ERROR"])
"""
        worker = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        try:
            # Then it is found among the workers, and not among the trainers
            wait_until(lambda: producer.nodes() == (["worker@here"], []), what="the worker's answer")
            # And that it cannot tell of a pipeline does not matter
            activity = producer.activity()
            assert (activity.workers, activity.pipelines, activity.problems) == (["worker@here"], {}, [])
            # And its task is called with the list
            producer.submit_many(["one", "two"])
            wait_until(lambda: taken.exists() and taken.read_text(), what="the worker's task")
            assert json.loads(taken.read_text()) == [{"text": "one"}, {"text": "two"}]
        finally:
            worker.terminate()
            worker.wait()

    def test_passwords_are_not_shown(self) -> None:
        with ModerationClient(NOWHERE, "postgresql+psycopg://me:secret@127.0.0.1:1/x") as client:
            status = client.status()
        assert "secret" not in repr(status)
        assert len(status.problems) == 2


def test_importing_the_client_loads_no_model() -> None:
    # Given a fresh interpreter
    script = (
        "import sys, api_client.client; "
        "print(sorted({'torch', 'transformers', 'onnxruntime', 'pandas', 'model'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
