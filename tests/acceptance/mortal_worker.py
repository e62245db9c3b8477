"""Our worker, but for one thing: a comment with the word in $POISON kills its process, as a broken library would."""

import os
import signal
from collections.abc import Sequence

from model.engine import Scorer
from worker.celery import app

__all__ = ["app"]

_encode = Scorer.encode_readable


def _encode_or_die(self: Scorer, texts: Sequence[str]) -> object:
    if any(os.environ["POISON"] in text for text in texts):
        os.kill(os.getpid(), signal.SIGKILL)
    return _encode(self, texts)


Scorer.encode_readable = _encode_or_die  # type: ignore[assignment, method-assign]
