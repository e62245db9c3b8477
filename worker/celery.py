"""The worker's Celery app: `celery -A worker worker -Q toxicity`. Celery finds it by this module's name."""

from celery import Celery

from config.names import MODERATE_QUEUE, WORKER_CONTROL_EXCHANGE
from config.settings import SettingsError, settings
from worker import transport
from worker.intake import Intake

try:
    _settings = settings()
except SettingsError as error:
    raise SystemExit(f"moderato: {error}") from None

transport.install()

app = Celery("worker")
app.conf.update(
    broker_url=_settings.broker_url,
    broker_transport_options={
        **transport.transport_options(_settings.worker.visibility_timeout_s),
        **_settings.broker_options.model_dump(),
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
