"""The worker's Celery app: `celery -A worker worker -Q toxicity`. Celery finds it by this module's name."""

import faulthandler
import signal
from typing import Any

from celery import Celery
from celery.signals import worker_ready

from config.logs import follow_celery
from config.names import MODERATE_QUEUE, WORKER_CONTROL_EXCHANGE
from config.pools import require_event_loop
from config.settings import SettingsError, settings
from worker import transport
from worker.intake import Intake
from worker.namesake import look_for_namesake

STDERR = 2
"""The process's own: Celery puts its log in the place of Python's."""

try:
    _settings = settings()
except SettingsError as error:
    raise SystemExit(f"moderato: {error}") from None

transport.install()
follow_celery(_settings.log_format)
require_event_loop()

app = Celery("worker")
app.conf.update(
    broker_url=_settings.broker_url,
    broker_transport_options={
        **transport.transport_options(_settings.worker.visibility_timeout_s),
        **_settings.broker_options.for_celery(),
    },
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # What Redis refuses while a connection begins is tried again too (see Consumer), or it would end the worker.
    broker_channel_error_retry=True,
    accept_content=["json"],
    task_serializer="json",
    task_default_queue=MODERATE_QUEUE,
    control_exchange=WORKER_CONTROL_EXCHANGE,
    worker_consumer="worker.intake:Consumer",
    # The pool stays idle: intake takes messages straight into the pipeline, whose threads do the work.
    worker_pool="solo",
    # Intake itself bounds what is held, in comments and bytes rather than in messages.
    worker_prefetch_multiplier=0,
    worker_enable_prefetch_count_reduction=False,
    # Nothing runs in the pool; unset or False, every lost connection would print a page about it.
    worker_cancel_long_running_tasks_on_connection_loss=True,
)
app.steps["consumer"].add(Intake)


@worker_ready.connect
def _answer_sigusr1_with_stacks_alone(**_: Any) -> None:
    # Celery's own answer prints what every thread's local variables hold: comments.
    faulthandler.register(signal.SIGUSR1, file=STDERR)


@worker_ready.connect
def _look_for_namesake(sender: Any, **_: Any) -> None:
    look_for_namesake(app, sender.hostname)
