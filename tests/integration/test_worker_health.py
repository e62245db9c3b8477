"""What a worker that is watched looks at: its engine, and what waits in Redis."""

import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from celery import Celery
from redis import Redis
from sqlalchemy import Engine

from config import endpoints
from config.names import BULK_QUEUE, INTERACTIVE_QUEUE, MODERATE_QUEUE, MODERATE_TASK, WORKER_UNACKED_KEY
from model.engine import Scorer, load_scorer
from tests.integration.moderator import Moderator, wrapped
from worker import health
from worker.health import Health
from worker.metrics import QueueWatch

NOTHING_WAITS: tuple[int, None] = (0, None)


@pytest.fixture(scope="module")
def scorer(tiny_version: Path) -> Scorer:
    return load_scorer(tiny_version, device="cpu", threads=1)


@pytest.fixture
def health_of(
    sqlite_url: str, engine: Engine, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Scorer], Health]:
    """The health of a worker with this scorer; every look is a new one."""
    monkeypatch.setattr(endpoints, "KEPT_S", -1)

    def make(scorer: Scorer) -> Health:
        intake: Any = SimpleNamespace(pipeline=Moderator(scorer, engine).pipeline)
        return Health(intake, app)

    return make


@pytest.fixture
def app(make_app: Callable[..., Celery], redis_url: str) -> Celery:
    return make_app(redis_url)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
class TestEngine:
    def test_a_forward_pass_is_made_and_must_succeed(
        self, scorer: Scorer, health_of: Callable[[Scorer], Health]
    ) -> None:
        # Given an engine that scores, and then fails, and then gives nonsense
        passes, failure, nonsense = [], [False], [False]

        def before(token_ids: Any) -> None:
            passes.append(len(token_ids))
            if failure[0]:
                raise RuntimeError("the device fell off the bus")

        def after(token_ids: Any, scores: Any) -> None:
            if nonsense[0]:
                scores[:] = np.nan

        watched = health_of(wrapped(scorer, before, after))
        # Then that is what is said of it
        assert watched.healthy() is None
        assert passes == [1]
        failure[0] = True
        assert watched.healthy() == "the engine failed (RuntimeError)"
        failure[0], nonsense[0] = False, True
        assert watched.healthy() == f"version {scorer.version} gives no finite score"

    def test_one_that_hangs_is_not_waited_for(
        self, scorer: Scorer, health_of: Callable[[Scorer], Health], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(health, "SCORE_TIMEOUT_S", 0.01)
        watched = health_of(wrapped(scorer, lambda token_ids: time.sleep(0.5)))
        assert (watched.healthy() or "").startswith("the engine has not answered for ")


def test_what_waits_in_every_list_of_a_queue_and_for_how_long(
    make_app: Callable[..., Celery], redis_url: str, redis: Redis
) -> None:
    # Given queues with a prefix: one with messages of several priorities, one whose producer does not say when
    app = make_app(redis_url, global_keyprefix="team:")
    sent: datetime = datetime.now(UTC).replace(microsecond=0)

    def send(queue: str, minutes_ago: float | None, **how: Any) -> None:
        at = None if minutes_ago is None else (sent - timedelta(minutes=minutes_ago)).timestamp()
        headers = {} if at is None else {"submitted_at": at}
        app.send_task(MODERATE_TASK, [[{"text": "a"}]], queue=queue, headers=headers, ignore_result=True, **how)

    send(MODERATE_QUEUE, 5)
    send(MODERATE_QUEUE, 1)
    send(MODERATE_QUEUE, 7, priority=9)
    send(BULK_QUEUE, None)
    redis.hset(f"team:{WORKER_UNACKED_KEY}", "tag", "held")

    # When it is looked at, then each queue is told by its oldest message
    watch = QueueWatch(app)
    watch.look()
    with closing(watch):
        found = {name: (state.messages, state.oldest_sent_at) for name, state in watch.queues.items()}
        assert found[MODERATE_QUEUE] == (3, sent - timedelta(minutes=7))
        assert found[BULK_QUEUE] == (1, None)
        assert found[INTERACTIVE_QUEUE] == NOTHING_WAITS
        assert watch.unacknowledged == 1


def test_a_redis_that_is_away_is_said_and_looked_at_anew(make_app: Callable[..., Celery]) -> None:
    watch = QueueWatch(make_app("redis://127.0.0.1:1/0"))
    watch.unacknowledged = 3
    for _ in range(2):
        with pytest.raises(Exception, match=r"refused|connecting"):
            watch.look()
    assert (watch.queues, watch.unacknowledged) == ({}, None)
