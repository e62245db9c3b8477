"""Which of Celery's pools an app of ours can run in."""

from typing import Any


def require_event_loop() -> None:
    """End the process at its start, with status 1, where `-P gevent` or `-P eventlet` takes the place of Celery's loop.

    The worker passes messages on in that loop, and a training would keep every greenlet waiting. The other pools work.
    """
    from celery.signals import worker_init

    worker_init.connect(_refuse_without, weak=False)


def _refuse_without(sender: Any, **_: Any) -> None:
    if not sender.use_eventloop:
        raise SystemExit("moderato: the pools gevent and eventlet cannot be used; start it again without -P")
