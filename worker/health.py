"""Whether a worker works, and whether it can take work now: what /healthz and /readyz answer.

/healthz fails for what a new process may mend, /readyz also for what it may not: a supervisor that started workers anew
because Redis or the database is away would only lose the version they have loaded.
"""

import time
from typing import TYPE_CHECKING

import numpy as np
from celery import Celery
from sqlalchemy import select

from config.endpoints import Probe, Trouble
from db.session import reading
from worker.metrics import QueueWatch

if TYPE_CHECKING:
    from worker.intake import Intake

SCORE_TIMEOUT_S = 10.0
"""For a forward pass with one comment, beside as many others as the engine takes."""
ASK_TIMEOUT_S = 3.0
"""For Redis and the database; Prometheus itself waits for ten seconds."""
STUCK_S = 120.0
"""Longer than any batch or transaction takes."""
NO_VERSION = "no version is loaded yet"


class Standstill:
    """For how long comments have waited while nothing was done, as far as that was looked at."""

    def __init__(self) -> None:
        self._done: object = None
        self._since_s = 0.0

    def __call__(self, now_s: float, *, waiting: bool, done: object) -> float:
        """Seconds.

        Args:
            now_s: by a monotonic clock.
            waiting: whether there is anything to do.
            done: anything that changes when something is done.
        """
        if not waiting or done != self._done:
            # With nothing to do the next look begins anew.
            self._done = done if waiting else None
            self._since_s = now_s
        return now_s - self._since_s


class Health:
    """The looks. Each is bounded in time and made at most every other second, however many ask."""

    def __init__(self, intake: "Intake", app: Celery) -> None:
        self._intake = intake
        self._standstill = Standstill()
        self.queue_watch = QueueWatch(app)
        self.engine = Probe("the engine", self._score, SCORE_TIMEOUT_S)
        self.broker = Probe("Redis", self.queue_watch.look, ASK_TIMEOUT_S)
        self.database = Probe("the database", self._ask_database, ASK_TIMEOUT_S)

    def healthy(self) -> Trouble:
        """A forward pass with one comment."""
        return self.engine()

    def ready(self) -> Trouble:
        """Whether it takes messages, scores them, and can record what comes of them."""
        if self._intake.is_stopping:
            return "shutting down"
        if self._intake.pipeline is None:
            return NO_VERSION
        if not self._intake.is_connected:
            return "not connected to Redis"
        return self.broker() or self.database()

    def _score(self) -> Trouble:
        pipeline = self._intake.pipeline
        if pipeline is None:
            return NO_VERSION
        counters = pipeline.counters()
        stuck_s = self._standstill(
            time.monotonic(),
            waiting=counters.arrived - counters.recorded - counters.set_aside > 0 and not pipeline.database_is_away,
            done=(counters.prepared, counters.batches, counters.decided, counters.set_aside, counters.recorded),
        )
        if stuck_s > STUCK_S:
            return f"comments wait, and none has gone a step further for {stuck_s:.0f} s"
        scores = pipeline.scorer.score_texts(["ok"])
        return None if np.isfinite(scores).all() else f"version {pipeline.scorer.version} gives no finite score"

    def _ask_database(self) -> Trouble:
        pipeline, database = self._intake.pipeline, self._intake.database
        if database is None:
            return NO_VERSION
        if pipeline is not None and pipeline.database_is_away:
            return "the database is away"
        with reading(database) as connection:
            connection.execute(select(1))
        return None
