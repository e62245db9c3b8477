"""Celery's own tools, workers and monitor stand beside ours as beside any other Celery app."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from api_client.client import ModerationClient
from config.names import BULK_QUEUE, INTERACTIVE_QUEUE, MODERATE_QUEUE, MODERATE_TASK, Reason
from config.settings import ROOT
from tests.acceptance.system import SMALL_STEPS, TIMEOUT_S, CeleryProcess, System
from tests.services import free_port, wait_until

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


def celery(system: System, *arguments: str) -> str:
    """What a `celery` command prints."""
    command = [sys.executable, "-m", "celery", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=system.environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    ).stdout


@contextmanager
def plain_worker(system: System, queue: str, directory: Path) -> Iterator[CeleryProcess]:
    """A worker of another team, on our Redis database with Celery's default keys."""
    app = "tests.acceptance.plain_worker"
    with closing(CeleryProcess(app, queue, "plain", system.environment, directory / "plain.log")) as process:
        yield process.wait_until_ready()


@pytest.fixture
def producer(system: System) -> Iterator[Celery]:
    with Celery(broker=system.broker_url, set_as_current=False) as app:
        yield app


def test_ping_and_shutdown_reach_our_processes_and_no_others(system: System) -> None:
    # Given a worker and a trainer on one Redis
    worker = system.start_worker()
    trainer = system.start_trainer()

    # When each app is pinged, then its own process answers and no other
    answer = celery(system, "-A", "worker", "inspect", "ping", "--timeout", "3")
    assert f"{worker.node}: OK" in answer
    assert "1 node online" in answer
    answer = celery(system, "-A", "trainer", "inspect", "ping", "--timeout", "3")
    assert f"{trainer.node}: OK" in answer
    assert "1 node online" in answer

    # When the worker is told to shut down, then it ends well, and the trainer goes on
    celery(system, "-A", "worker", "control", "shutdown")
    assert worker.wait() == 0
    assert trainer.is_running


def test_inspect_and_revoke(system: System, producer: Celery) -> None:
    # Given a worker
    worker = system.start_worker()

    # When it is asked for its queues and statistics, then it answers as any worker
    queues = json.loads(celery(system, "-A", "worker", "inspect", "active_queues", "--json", "--timeout", "3"))
    assert [queue["name"] for queue in queues[worker.node]] == [MODERATE_QUEUE]
    stats = json.loads(celery(system, "-A", "worker", "inspect", "stats", "--json", "--timeout", "3"))
    assert stats[worker.node]["broker"]["transport"] == "redis"

    # When comments wait in a queue that it does not take from, then the status names it
    system.client.submit("a", queue=BULK_QUEUE)
    assert system.client.activity().queues_without_worker == [BULK_QUEUE]
    system.redis.delete(BULK_QUEUE)

    # When a message is revoked before it is taken
    celery(system, "-A", "worker", "control", "revoke", "unwanted")
    assert json.loads(celery(system, "-A", "worker", "inspect", "revoked", "--json", "--timeout", "3")) == {
        worker.node: ["unwanted"]
    }
    producer.send_task(MODERATE_TASK, [[{"text": "a"}]], queue=MODERATE_QUEUE, task_id="unwanted")
    wanted = producer.send_task(MODERATE_TASK, [[{"text": "a"}]], queue=MODERATE_QUEUE).id

    # Then it is a dead letter, and no other is
    system.wait_for_decisions([f"{wanted}:0"])
    [letter] = system.client.dead_letters()
    assert (letter.dead_letter_id, letter.reason) == ("unwanted:0", Reason.REVOKED)
    assert system.count_decisions() == 1
    system.wait_until_nothing_is_left()


def test_stock_producers_may_use_priorities_compression_and_our_other_queues(
    system: System, producer: Celery, texts: list[str]
) -> None:
    # Given a worker of all three queues
    log = system.versions_dir.parent / "worker-of-three.log"
    queues = f"{INTERACTIVE_QUEUE},{MODERATE_QUEUE},{BULK_QUEUE}"
    with closing(CeleryProcess("worker", queues, "w3", system.environment, log)) as worker:
        worker.wait_until_ready()
        # When stock producers send in whatever way Celery has for it
        ways: list[dict[str, Any]] = [
            {"queue": queue, "priority": priority, "compression": compression}
            for queue in queues.split(",")
            for priority in (None, 0, 5, 9)
            for compression in (None, "zlib")
        ]
        sent = [
            producer.send_task(MODERATE_TASK, [[{"text": text}]], **way).id
            for way, text in zip(ways, texts, strict=False)
        ]
        # Then every comment is decided
        system.wait_for_decisions([f"{task_id}:0" for task_id in sent])
        assert system.client.dead_letters() == []
        assert len(sent) == 24


def test_everything_stays_behind_a_key_prefix(system: System, texts: list[str]) -> None:
    # Given a system whose keys have a prefix, and a stock producer with the same
    system.environment["MODERATO_BROKER_OPTIONS__GLOBAL_KEYPREFIX"] = "team:"
    system.environment["MODERATO_WORKER__MAX_HELD_COMMENTS"] = "8"
    worker = system.start_worker()
    options = {"global_keyprefix": "team:"}
    with Celery(broker=system.broker_url, broker_transport_options=options, set_as_current=False) as producer:
        sent = [producer.send_task(MODERATE_TASK, [[{"text": text}]], queue=MODERATE_QUEUE).id for text in texts[:50]]
    # When it and our own client submit, and remote control asks, then all find each other
    with ModerationClient(system.broker_url, system.environment["MODERATO_DATABASE_URL"], options) as client:
        sent += [client.submit(text) for text in texts[50:60]]
        assert client.nodes() == ([worker.node], [])
    assert f"{worker.node}: OK" in celery(system, "-A", "worker", "inspect", "ping", "--timeout", "3")
    system.wait_for_decisions([id_ if ":" in id_ else f"{id_}:0" for id_ in sent])
    # And nothing in Redis lacks the prefix
    wait_until(lambda: not system.redis.exists("team:moderato.worker.unacked"), TIMEOUT_S, "the acknowledgements")
    assert [key for key in system.redis.scan_iter() if not key.startswith(b"team:")] == []


def test_a_stock_worker_beside_ours_keeps_what_it_holds(
    system: System, producer: Celery, texts: list[str], tmp_path: Path
) -> None:
    # Given another team's worker in the middle of a task, acknowledged late, that outlasts our visibility timeout
    with plain_worker(system, "news", tmp_path):
        producer.send_task("news.digest", queue="news")
        wait_until(lambda: system.redis.llen("ran") == 1, TIMEOUT_S, "the other team's task")
        assert system.redis.hlen("unacked") == 1

        # When a worker of ours dies, and the next gets its messages back after the timeout
        ids = [system.client.submit(text) for text in texts[:300]]
        victim = system.start_worker(**SMALL_STEPS)
        system.wait_for_count(50)
        victim.kill()
        assert system.held_messages() > 0
        system.start_worker()
        system.wait_for_decisions(ids)
        system.wait_until_nothing_is_left()

        # Then the other team's task is still held by its worker, and has run once when it ends
        assert system.redis.hlen("unacked") == 1
        system.redis.set("finish", 1)
        wait_until(lambda: system.redis.hlen("unacked") == 0, TIMEOUT_S, "the end of the other team's task")
        assert system.redis.lrange("ran", 0, -1) == [b"digest"]
        assert system.redis.llen("news") == 0


def test_a_stock_worker_can_take_our_queue_over(system: System, texts: list[str], tmp_path: Path) -> None:
    # Given what a worker of ours left in the queue when it was stopped
    system.client.submit_many(texts[:200])
    for text in texts[200:600]:
        system.client.submit(text)
    worker = system.start_worker(**SMALL_STEPS)
    system.wait_for_count(100)
    worker.terminate()
    assert worker.wait() == 0
    left = system.waiting_messages()
    assert left > 0

    # When a stock worker takes the queue
    with plain_worker(system, MODERATE_QUEUE, tmp_path):
        wait_until(lambda: system.redis.llen("ran") == left, TIMEOUT_S, "every message that was left")

    # Then all comments are with one or the other
    ran = system.redis.lrange("ran", 0, -1)
    assert isinstance(ran, list)
    taken = [comment["text"] for message in ran for comment in json.loads(message)]
    assert sorted(taken + [row.text or "" for row in system.decisions()]) == sorted(texts[:600])


def test_flower_shows_our_worker(system: System, tmp_path: Path) -> None:
    # Given a worker, and Flower started by the command that its users type
    worker = system.start_worker()
    port = free_port()
    command = [sys.executable, "-m", "celery", "-A", "worker", "flower", "--address=127.0.0.1", f"--port={port}"]
    environment = {**system.environment, "FLOWER_UNAUTHENTICATED_API": "true"}
    with (tmp_path / "flower.log").open("wb") as log:
        flower = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def get(path: str) -> bytes | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=TIMEOUT_S) as answer:
                return bytes(answer.read())
        except OSError:
            return None  # not yet, or no longer

    try:
        wait_until(lambda: get("/healthcheck") == b"OK", TIMEOUT_S, "Flower")

        # When it is asked for the workers, then ours is there with its queue, as remote control told
        def workers() -> Any:
            return json.loads(get("/api/workers?refresh=1") or b"{}")

        details = wait_until(lambda: workers().get(worker.node), TIMEOUT_S, "our worker in Flower")
        assert [queue["name"] for queue in details["active_queues"]] == [MODERATE_QUEUE]
        # And it is online, as the events of its heart tell
        wait_until(
            lambda: json.loads(get("/api/workers?status=1") or b"{}").get(worker.node),
            TIMEOUT_S,
            "the heartbeat in Flower",
        )
    finally:
        flower.terminate()
        flower.wait(TIMEOUT_S)
        print((tmp_path / "flower.log").read_text()[-3000:])
