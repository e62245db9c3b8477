"""The trainer's Celery app: `celery -A trainer worker -Q retrain`. Celery finds it by this module's name.

A run trains in the child of the prefork pool, so that this parent never loads torch and answers meanwhile.
"""

import time
from typing import Any

from celery import Celery
from celery.worker.consumer import Consumer as CeleryConsumer

from config.logs import follow_celery
from config.names import RETRAIN_QUEUE, TRAINER_CONTROL_EXCHANGE, TRAINER_UNACKED_KEY
from config.pools import require_event_loop
from config.settings import SettingsError, settings
from trainer.monitoring import Monitor

try:
    _settings = settings()
except SettingsError as error:
    raise SystemExit(f"moderato: {error}") from None

follow_celery(_settings.log_format)
require_event_loop()

RECONNECT_PAUSE_S = 1.0

monitor = Monitor()
"""Of this process; only the parent's is asked."""


class Consumer(CeleryConsumer):
    """Pauses before it connects anew.

    Celery pauses between attempts to connect. A Redis that takes the connection and then refuses what is needed to
    start on it would be tried without end, and without pause.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Gossip is of no use here, and prints a page of its own about every lost connection.
        super().__init__(*args, **{**kwargs, "without_gossip": True})

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        monitor.is_connected = False
        super().on_connection_error_after_connected(exc)
        time.sleep(RECONNECT_PAUSE_S)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        super().on_connection_error_before_connected(exc)
        time.sleep(RECONNECT_PAUSE_S)


app = Celery("trainer", include=["trainer.tasks"])
app.conf.update(
    broker_url=_settings.broker_url,
    # Keys of our own: see config.names. A run's message is acknowledged when the run begins, and its row takes over.
    broker_transport_options={
        "visibility_timeout": 300,
        "unacked_key": TRAINER_UNACKED_KEY,
        "unacked_index_key": f"{TRAINER_UNACKED_KEY}_index",
        "unacked_mutex_key": f"{TRAINER_UNACKED_KEY}_mutex",
        **_settings.broker_options.for_celery(),
    },
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # What Redis refuses while a connection begins, as at its maxmemory, is tried again too (see Consumer), or it would
    # end the trainer.
    broker_channel_error_retry=True,
    worker_consumer="trainer.celery:Consumer",
    accept_content=["json"],
    task_serializer="json",
    task_ignore_result=True,
    task_default_queue=RETRAIN_QUEUE,
    control_exchange=TRAINER_CONTROL_EXCHANGE,
    worker_pool="prefork",
    worker_concurrency=1,
    worker_prefetch_multiplier=1,
    # A fresh process for every run: what torch took is given back, and a crash leaves nothing behind.
    worker_max_tasks_per_child=1,
)
