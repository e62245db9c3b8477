"""The retrain task, and the watch over runs whose process died. Loaded by the parent: imports no torch."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from celery import bootsteps
from celery.signals import task_failure
from sqlalchemy import Engine

from config.endpoints import HEALTH_PATH, READY_PATH, serve
from config.names import RETRAIN_QUEUE, RETRAIN_TASK
from config.settings import settings
from db import queries
from db.durable import database_time
from db.migrate import SchemaMismatch, require_current
from db.outage import Outage
from db.session import open_database, reading, writing
from trainer.celery import app, monitor
from trainer.monitoring import look

logger = logging.getLogger(__name__)

WATCH_S = 10.0
SILENT_S = 60.0
"""A run's process gives a sign of life every few seconds; after this long without one it is dead."""


@app.task(name=RETRAIN_TASK)
def retrain(run_id: str) -> None:
    """Carry out one training run; its row says how it goes and how it ended."""
    from trainer.retraining import carry_out  # here, in the child: the parent stays small and answers

    carry_out(run_id, settings())


@task_failure.connect(sender=retrain)
def _record_lost_run(exception: BaseException | None = None, args: tuple[Any, ...] | None = None, **_: Any) -> None:
    """The child was killed, by the system for want of memory as a rule; this is the parent."""
    if not args:
        return
    reason = f"the training process died: {exception}"
    with _database() as database, writing(database) as connection:
        now = database_time(connection)
        run = queries.run(connection, args[0])
        if run is not None and run.state in ("requested", "running"):
            queries.finish_run(connection, run.run_id, state="failed", reason=reason, now=now)
    logger.error("run %s: %s", args[0], reason)


class RunWatch(bootsteps.StartStopStep):
    """Fails runs whose process stopped, and sends the message of each requested run whose own was lost."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._timer: Any = None
        self._outage = Outage()
        self._is_schema_known = False
        self._asked: set[str] = set()
        """The requested runs whose message this process has sent once more since it connected."""
        self._heard: dict[str, tuple[datetime | None, float]] = {}
        """Of each running run the last sign of life, and when it was first seen by the monotonic clock."""
        metrics = settings().metrics
        serve(
            metrics.host,
            metrics.trainer_port,
            monitor,
            {HEALTH_PATH: monitor.healthy, READY_PATH: monitor.ready},
        )

    def start(self, consumer: Any) -> None:
        self._asked, self._is_schema_known = set(), False
        self._watch()
        # On the event loop rather than a thread: a child forked while a thread held a lock would wait for it forever.
        self._timer = consumer.timer.call_repeatedly(WATCH_S, self._watch)
        monitor.is_connected = True

    def stop(self, consumer: Any) -> None:
        monitor.is_connected = False
        monitor.is_stopping = consumer.blueprint.state != bootsteps.RUN
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        try:
            with _database() as database:
                if not self._is_schema_known:
                    require_current(database)
                    self._is_schema_known = True
                self._asked |= _ask_again(database, self._asked)
                self._fail_silent_runs(database)
                with reading(database) as connection:
                    monitor.note(look(connection, self._longest_silence_s()))
        except SchemaMismatch as mismatch:
            logger.critical("cannot start: %s", mismatch)
            raise SystemExit(1) from None
        except Exception as error:
            # Neither an absent database nor an absent Redis must end the event loop; the next look comes soon. Nobody
            # could give a sign of life meanwhile, so all are heard anew.
            self._heard = {}
            monitor.note(None)
            if self._outage.begin():
                logger.error("cannot look after training runs (%s); trying again and again", type(error).__name__)
        else:
            if self._outage.end():
                logger.warning("training runs are looked after again")

    def _fail_silent_runs(self, database: Engine) -> None:
        now_s = time.monotonic()
        with reading(database) as connection:
            heartbeats = queries.heartbeats(connection)
        # How old a sign of life is cannot be told from its time: that is another clock's, which may be wrong or jump.
        self._heard = {
            run_id: heard if (heard := self._heard.get(run_id)) and heard[0] == heartbeat_at else (heartbeat_at, now_s)
            for run_id, heartbeat_at in heartbeats.items()
        }
        for run_id, (heartbeat_at, since_s) in self._heard.items():
            if now_s - since_s <= SILENT_S:
                continue
            with writing(database) as connection:
                now = database_time(connection)
                failed = queries.fail_abandoned_run(connection, run_id, heartbeat_at=heartbeat_at, now=now)
            if failed:
                logger.error("run %s: its process stopped without a word", run_id)

    def _longest_silence_s(self) -> float | None:
        since_s = [since_s for _, since_s in self._heard.values()]
        return time.monotonic() - min(since_s) if since_s else None


app.steps["consumer"].add(RunWatch)


@contextmanager
def _database() -> Iterator[Engine]:
    """Opened for each look and closed after it: the forked child must not inherit a connection."""
    engine = open_database(settings().database_url)
    try:
        yield engine
    finally:
        engine.dispose()


def _ask_again(database: Engine, asked: set[str]) -> set[str]:
    """Send the message of each run that is requested and was not asked for yet; which those are.

    The client may have died between the row and the message, or a trainer with the message. A run that is asked for
    twice is claimed once. Once for each connection is enough: Redis loses messages only when it restarts.
    """
    with reading(database) as connection:
        waiting = queries.requested_runs(connection) - asked
    for run_id in waiting:
        app.send_task(RETRAIN_TASK, [run_id], queue=RETRAIN_QUEUE)
    return waiting
