"""The retrain task, and the watch over runs whose process died. Loaded by the parent: imports no torch."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from celery import bootsteps
from celery.signals import task_failure
from sqlalchemy import Engine

from config.names import RETRAIN_QUEUE, RETRAIN_TASK
from config.settings import settings
from db import queries
from db.session import open_database, reading, writing
from trainer.celery import app

logger = logging.getLogger(__name__)

WATCH_S = 10.0
SILENT_FOR = timedelta(seconds=60)
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
    now = datetime.now(UTC)
    with _database() as database, writing(database) as connection:
        run = queries.run(connection, args[0])
        if run is not None and run.state in ("requested", "running"):
            queries.finish_run(connection, run.run_id, state="failed", reason=reason, now=now)
    logger.error("run %s: %s", args[0], reason)


class RunWatch(bootsteps.StartStopStep):
    """Fails runs that stopped without a word, and asks again for those whose message was lost."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        _ask_again()
        # On the event loop rather than a thread: a child forked while a thread held a lock would wait for it forever.
        self._timer = consumer.timer.call_repeatedly(WATCH_S, _fail_silent_runs)

    def stop(self, consumer: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()


app.steps["consumer"].add(RunWatch)


@contextmanager
def _database() -> Iterator[Engine]:
    """Opened for each look and closed after it: the forked child must not inherit a connection."""
    engine = open_database(settings().database_url)
    try:
        yield engine
    finally:
        engine.dispose()


def _fail_silent_runs() -> None:
    now = datetime.now(UTC)
    try:
        with _database() as database, writing(database) as connection:
            failed = queries.fail_abandoned_runs(connection, silent_since=now - SILENT_FOR, now=now)
    except Exception as error:
        # An absent database must not end the event loop; the next look comes soon.
        logger.warning("cannot look for abandoned runs: %s", type(error).__name__)
        return
    for run_id in failed:
        logger.error("run %s: its process stopped without a word", run_id)


def _ask_again() -> None:
    """A message taken by a trainer that was then killed may be gone. A run asked for twice is claimed once."""
    try:
        with _database() as database, reading(database) as connection:
            waiting = [run.run_id for run in queries.runs(connection, limit=100) if run.state == "requested"]
    except Exception as error:
        logger.warning("cannot look for waiting runs: %s", type(error).__name__)
        return
    for run_id in waiting:
        app.send_task(RETRAIN_TASK, [run_id], queue=RETRAIN_QUEUE)
