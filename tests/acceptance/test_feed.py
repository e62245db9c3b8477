"""Answers to those who wait, and the feed of decisions, from a real worker that is killed."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

import pytest

from api_client.client import InvalidComment, ModerationClient
from api_client.waiting import SetAside, verdict_of
from tests.acceptance.system import SMALL_STEPS, TIMEOUT_S, System
from tests.services import wait_until


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_producer_that_waits_is_answered_by_the_worker_alone(
    system: System, texts: list[str], tmp_path: Path
) -> None:
    worker = system.start_worker()
    client = system.client
    # Given a producer whose database has no tables, so that only what the worker publishes can tell it
    nowhere = f"sqlite:///{tmp_path / 'none.db'}"
    with ModerationClient(system.broker_url, nowhere) as deaf, ThreadPoolExecutor(8) as pool:
        answered = pool.map(lambda text: deaf.moderate(text, timeout_s=TIMEOUT_S), texts[:32])
        verdicts = {verdict.submission_id: verdict for verdict in answered}
    # Then each has the verdict that was recorded for it
    assert len(verdicts) == 32
    assert {row.submission_id: verdict_of(row) for row in system.decisions()} == verdicts
    # And a comment that is decided already keeps its verdict, whatever the version says now
    first = client.moderate(texts[0], timeout_s=TIMEOUT_S, idempotency_key="once")
    assert client.moderate(texts[0], timeout_s=TIMEOUT_S, idempotency_key="once") == first
    with pytest.raises(InvalidComment):
        client.moderate(texts[1], timeout_s=TIMEOUT_S, idempotency_key="once")
    # And one that is refused says so
    with pytest.raises(SetAside) as raised:
        client.moderate(texts[0], timeout_s=TIMEOUT_S, expires_at=datetime.now(UTC) - timedelta(days=1))
    assert raised.value.letter.reason == "expired"
    # And a durable one is answered as well
    assert client.moderate(texts[2], timeout_s=TIMEOUT_S, durable=True).model_version == "v1"
    assert "Redis refuses" not in worker.log()


@pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)
def test_a_follower_that_is_resumed_sees_every_decision_though_workers_die(system: System, texts: list[str]) -> None:
    worker = system.start_worker(**SMALL_STEPS)
    stop = threading.Event()
    seen: list[str] = []

    def follow() -> None:
        """Again and again from the cursor of the 20th of 30 decisions, as after a crash."""
        cursor = "0"
        while not stop.is_set():
            with closing(system.client.follow(cursor, stop=stop)) as feed:
                for number, row in enumerate(islice(feed, 30)):
                    seen.append(row.submission_id)
                    if number < 20:
                        cursor = row.cursor

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow)
        # When comments stream in, and the worker is killed with -9 in the middle of them
        with system.stream(texts[:400]) as ids:
            system.wait_for_count(60)
            worker.kill()
            system.start_worker(node="w2", **SMALL_STEPS)
            system.wait_for_count(200)
        system.wait_for_decisions(ids)
        # Then the follower has every one of them
        with closing(system.client.follow("0")) as feed:
            in_order = [row.submission_id for row in islice(feed, len(ids))]
        wait_until(lambda: following.done() or set(ids) <= set(seen), TIMEOUT_S, "all of them at the follower")
        stop.set()
        following.result(TIMEOUT_S)
    assert sorted(in_order) == sorted(ids)
    # And in the order of the feed, but for what came again
    assert list(dict.fromkeys(seen)) == in_order
