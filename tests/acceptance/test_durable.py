"""Durable submissions outlive a Redis that loses everything, and one that was never there."""

import pytest

from api_client.client import ModerationClient
from tests.acceptance.system import SMALL_STEPS, System


@pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)
def test_a_redis_that_loses_everything_only_delays(system: System, postgres_url: str, texts: list[str]) -> None:
    # Given a worker in the middle of durable submissions, some of which never reached Redis
    ids: list[str] = []
    with ModerationClient("redis://127.0.0.1:1/0", postgres_url) as cut_off:
        cut_off.submit_many(texts[:100], durable=True, on_sent=ids.extend)
    system.client.submit_many(texts[100:500], durable=True, on_sent=ids.extend)
    ids.extend(system.client.submit(text, durable=True) for text in texts[500:700])
    worker = system.start_worker(**SMALL_STEPS, resubmit_after_s="3")
    system.wait_for_count(100)

    # When Redis loses everything
    assert system.waiting_messages() > 0, "the queue was empty already, which tests nothing"
    system.redis.flushall()

    # Then each is decided once, and nothing is left
    system.wait_for_decisions(ids)
    system.wait_until_nothing_is_left()
    assert sorted(row.submission_id for row in system.decisions()) == sorted(ids)
    assert sorted(row.text or "" for row in system.decisions()) == sorted(texts[:700])
    totals = system.client.status().totals
    assert totals is not None
    assert (totals.pending, totals.dead_letters) == (0, 0)
    assert worker.is_running
