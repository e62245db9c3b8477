"""Durable submissions whose messages are gone: sent again, once, and nothing else with them."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from kombu import transport as kombu_transport
from redis import Redis
from sqlalchemy import Engine, select

from config.settings import Settings, load_settings
from db.durable import PendingSubmission, database_time, record_pending
from db.session import reading, writing
from db.tables import Submission
from tests.integration.rows import minutes, pending
from worker import clock, resending
from worker.message import parse_message
from worker.resending import Resending
from worker.sweeper import Sweeper


@pytest.fixture
def app(make_app: Callable[..., Celery], redis_url: str) -> Celery:
    return make_app(redis_url)


def settings(**client: str) -> Settings:
    return load_settings({f"MODERATO_CLIENT__{name.upper()}": value for name, value in client.items()})


def ago(engine: Engine, seconds: float) -> datetime:
    """So long before now, by the database's clock."""
    with reading(engine) as connection:
        return database_time(connection) - timedelta(seconds=seconds)


def submit(engine: Engine, *rows: PendingSubmission) -> None:
    with writing(engine) as connection:
        assert record_pending(connection, rows) == []


def enqueued_at(engine: Engine) -> dict[str, datetime]:
    with reading(engine) as connection:
        rows = connection.execute(select(Submission.submission_id, Submission.enqueued_at)).all()
    return {submission_id: time for submission_id, time in rows if time is not None}


def sent_by(app: Celery, sent_at: datetime, queue: str = "toxicity") -> None:
    """A message of somebody's, which says when it was sent."""
    headers = {"submitted_at": sent_at.timestamp()}
    app.send_task("worker.moderate", [[{"text": "hello"}]], queue=queue, headers=headers, ignore_result=True)


def messages(redis: Redis, queue: str = "toxicity") -> list[tuple[dict[str, Any], bytes]]:
    """What waits, the next first: headers and body."""
    raw = [json.loads(each) for each in reversed(redis.lrange(queue, 0, -1))]
    channel = kombu_transport.virtual.Base64()
    return [(each["headers"], channel.decode(each["body"])) for each in raw]


def ids(redis: Redis, queue: str = "toxicity") -> list[str]:
    """The submissions that wait, as a worker would name them."""
    parsed = [parse_message(headers, body, now=clock.now()) for headers, body in messages(redis, queue)]
    return [each.submission_id for one in parsed for each in one.submitted]


def test_what_redis_has_lost_is_sent_again(engine: Engine, app: Celery, redis: Redis) -> None:
    # Given submissions of two queues that wait for long, one of them with every field, and one that waits since now
    long_ago, expires_at = ago(engine, 120), ago(engine, -3600)
    full = pending("full", author="ann", language="en", context={"thread": 3}, created_at=minutes(-5))
    full.expires_at, full.enqueued_at = expires_at, long_ago
    bulk = pending("bulk", queue="toxicity.bulk", enqueued_at=long_ago, submitted_at=long_ago)
    many = [pending(f"{n:04}", enqueued_at=long_ago, submitted_at=long_ago) for n in range(300)]
    submit(engine, full, bulk, *many, pending("fresh", enqueued_at=ago(engine, 0)))
    # When Redis has nothing of them
    sweep = Resending(engine, app, settings())
    assert not sweep()
    # Then those that wait for long are sent again, in lists of what was submitted together
    assert sorted(ids(redis)) == sorted(["full", *(row.submission_id for row in many)])
    assert [len(json.loads(body)[0][0]) for _, body in messages(redis)] == [256, 44, 1]
    assert ids(redis, "toxicity.bulk") == ["bulk"]
    # And as they were
    [(headers, body)] = [each for each in messages(redis) if b"full" in each[1]]
    [submitted] = parse_message(headers, body, now=clock.now()).submitted
    sent = submitted.comment
    assert (sent.text, sent.id, sent.community) == (full.text, full.comment_id, "default")
    assert (sent.author, sent.language, sent.context) == ("ann", "en", {"thread": 3})
    assert (sent.created_at, sent.expires_at) == (full.created_at, expires_at)
    assert headers["submitted_at"] == full.submitted_at.timestamp()
    assert full.text not in json.dumps(headers)
    assert sweep.resent == 302
    # And they are fresh now, so that nobody sends them once more
    assert min(enqueued_at(engine).values()) > ago(engine, 60)
    assert not sweep()
    redis.delete("toxicity")
    assert not sweep()
    assert redis.llen("toxicity") == 0


def test_a_backlog_is_not_sent_again(engine: Engine, app: Celery, redis: Redis) -> None:
    # Given a queue whose head was sent long ago, and submissions from before and after that
    sent_by(app, ago(engine, 600))
    sent_by(app, ago(engine, 0))
    submit(
        engine,
        pending("lost", enqueued_at=ago(engine, 900)),
        pending("behind it", enqueued_at=ago(engine, 595)),
        pending("late", enqueued_at=ago(engine, 61)),
    )
    sweep = Resending(engine, app, settings())
    assert not sweep()
    # Then only what was there before the head is gone
    assert redis.llen("toxicity") == 3
    assert ids(redis)[2:] == ["lost"]
    # And the others when the head is another, one of the sweep's own among them
    redis.rpop("toxicity")
    assert not sweep()
    assert ids(redis)[1:] == ["lost", "behind it", "late"]
    redis.rpop("toxicity")
    assert not sweep()
    assert redis.llen("toxicity") == 2


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_backlog_that_does_not_say_its_age_is_not_sent_again(engine: Engine, app: Celery, redis: Redis) -> None:
    # Given messages of plain Celery, which do not say when they were sent, and a submission that may wait among them
    def backlog(*texts: str) -> None:
        for text in texts:
            app.send_task("worker.moderate", [[{"text": text}]], queue="toxicity", ignore_result=True)

    backlog("1", "2", "3")
    submit(engine, pending("waits", enqueued_at=ago(engine, 86_400)))
    sweep = Resending(engine, app, settings())
    # Then it is not sent while any of them is there, however long that takes, and however many come behind them
    for taken in range(3):
        assert not sweep()
        assert redis.llen("toxicity") == 3
        redis.rpop("toxicity")
        backlog(f"behind {taken}")
    # And once when all of them have gone, although there are others
    for _ in range(3):
        assert not sweep()
    assert sweep.resent == 1
    assert ids(redis)[3:] == ["waits"]


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_queue_that_redis_refuses_stops_no_other(
    engine: Engine, app: Celery, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    # Given submissions of three queues: Redis refuses one, and an earlier release let a producer misspell another
    long_ago = ago(engine, 120)
    redis.set("toxicity.bulk", "no list")
    queues = "toxicity.bulk", "bulk", "toxicity"
    submit(engine, *(pending(f"of {queue}", queue=queue, enqueued_at=long_ago) for queue in queues))
    sweep = Resending(engine, app, settings())
    # When it is swept again and again
    for _ in range(3):
        assert not sweep()
    # Then the others are sent, where a worker takes them, and the refusal is said and shown, once
    assert sorted(ids(redis)) == ["of bulk", "of toxicity"]
    assert redis.llen("bulk") == 0
    assert sorted(record.levelname for record in caplog.records) == ["ERROR", "WARNING", "WARNING"]
    assert sweep.refused == {"toxicity.bulk"}
    # And when Redis takes it, it is sent
    redis.delete("toxicity.bulk")
    assert not sweep()
    assert ids(redis, "toxicity.bulk") == ["of toxicity.bulk"]
    assert sweep.refused == set()


def test_no_more_than_the_queue_takes(
    engine: Engine, make_app: Callable[..., Celery], redis_url: str, redis: Redis
) -> None:
    # Given a queue with room for two messages, in a Redis that others use too
    app = make_app(redis_url, global_keyprefix="site:")
    sent_by(app, ago(engine, 0))
    rows = [pending(f"{n}", enqueued_at=ago(engine, 900 - n), submitted_at=minutes(n)) for n in range(4)]
    submit(engine, *rows)
    sweep = Resending(engine, app, settings(max_queue_messages="3"))
    # Then the longest waiting go first, and the others wait for room
    for _ in range(2):
        assert not sweep()
        assert ids(redis, "site:toxicity")[1:] == ["0", "1"]
    assert sorted(enqueued_at(engine), key=enqueued_at(engine).__getitem__)[:2] == ["2", "3"]
    redis.delete("site:toxicity")
    assert not sweep()
    assert ids(redis, "site:toxicity") == ["2", "3"]


def test_more_than_one_step(engine: Engine, app: Celery, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given more than a step takes
    monkeypatch.setattr(resending, "ROWS_PER_STEP", 10)
    submit(engine, *(pending(f"{n}", enqueued_at=ago(engine, 120)) for n in range(25)))
    # Then a sweep takes all of them, each once
    Sweeper({"the chore": Resending(engine, app, settings())}).sweep()
    assert sorted(ids(redis), key=int) == [f"{n}" for n in range(25)]


def test_two_at_once_send_once(engine: Engine, app: Celery, redis: Redis) -> None:
    # Given submissions that wait for long
    submit(engine, *(pending(f"{n}", enqueued_at=ago(engine, 120)) for n in range(300)))
    together = threading.Barrier(4)

    def sweep() -> None:
        together.wait()
        Resending(engine, app, settings())()

    # When several workers sweep at the same time
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(sweep) for _ in range(4)]:
            done.result()
    # Then each is sent once
    assert sorted(ids(redis), key=int) == [f"{n}" for n in range(300)]


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_what_cannot_be_done_is_said_once_and_tried_again(
    engine: Engine, make_app: Callable[..., Celery], redis_url: str, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    # Given a Redis that is not there, and another chore
    submit(engine, pending("1", enqueued_at=ago(engine, 120)))
    app = make_app("redis://127.0.0.1:1/0")
    done: list[str] = []

    def other() -> bool:
        done.append("once")
        return False

    sweeper = Sweeper({"sending": Resending(engine, app, settings()), "another": other})
    # When it is swept, the other is done all the same
    for _ in range(2):
        sweeper.sweep()
    assert len(done) == 2
    # Then the row still waits, and it was said once
    assert enqueued_at(engine)["1"] < ago(engine, 110)
    assert [record.message.partition(" (")[0] for record in caplog.records] == ["sending failed"]
    # And once more when it can be done
    app.conf.broker_url = app.conf.broker_write_url = redis_url
    sweeper.sweep()
    assert ids(redis) == ["1"]
    assert caplog.records[-1].message == "sending goes on"
