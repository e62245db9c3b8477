"""Our trainer, but for one thing: it gives a silent training up after a third of the time."""

from trainer import tasks
from trainer.celery import app

__all__ = ["app"]

tasks.SILENT_S = 20.0
tasks.WATCH_S = 1.0
