"""Our worker with a tokenizer and an engine that take no time: `celery -A bench.instant worker -Q toxicity`.

What is left is the host's work: Redis, checking, planning, the policy, the database. Each thread carries its name in
/proc, so that the time of each stage can be read from outside.
"""

import sys
import threading
from pathlib import Path
from typing import Any

from bench.engines import load_instant_scorer
from worker import swap
from worker.celery import app as app

swap.load_scorer = load_instant_scorer  # type: ignore[attr-defined]


def _name_thread(*_: Any) -> None:
    thread = threading.current_thread()
    Path(f"/proc/self/task/{thread.native_id}/comm").write_text(thread.name[:15])
    sys.setprofile(None)  # this was only the way to run something first in each new thread


threading.setprofile(_name_thread)
