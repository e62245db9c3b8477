"""Our worker, but for one thing: after its start it looks at what is active only when a broadcast says so."""

import threading

from worker.celery import app
from worker.watch import Watch

__all__ = ["app"]

_prepare = Watch.__init__


def _prepare_without_looks(self: Watch, what: str, poll_s: float) -> None:
    _prepare(self, what, threading.TIMEOUT_MAX)


Watch.__init__ = _prepare_without_looks  # type: ignore[method-assign]
