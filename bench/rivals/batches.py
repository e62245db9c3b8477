"""celery-batches: `celery -A bench.rivals.batches worker`, with a Celery older than ours."""

import os
from functools import cache
from typing import Any

from celery import Celery
from celery_batches import Batches

from bench.engines import ScoreTexts, load_int8
from bench.rivals.rows import save

app = Celery("rival", broker=os.environ["RIVAL_BROKER_URL"])
# Without a limit, as its documentation asks: more than a batch must be fetched for one to fill.
app.conf.update(task_ignore_result=True, worker_prefetch_multiplier=0)


@cache
def model() -> ScoreTexts:
    """Loaded once in each process of the pool."""
    return load_int8(int(os.environ["RIVAL_THREADS"]), sort=os.environ["RIVAL_SORT"] == "True")


@app.task(
    name="rival.moderate",
    base=Batches,
    flush_every=int(os.environ["RIVAL_FLUSH_EVERY"]),
    flush_interval=float(os.environ["RIVAL_FLUSH_INTERVAL"]),
)
def moderate(requests: list[Any]) -> None:
    comments = [tuple(request.args) for request in requests]
    save(comments, model()([text for _, text in comments]))
