"""One comment per Celery task on a stock worker: `celery -A bench.rivals.one_per_task worker`."""

import os
from functools import cache

from celery import Celery

from bench.engines import ScoreTexts, load_fp32, load_int8
from bench.rivals.rows import save

app = Celery("rival", broker=os.environ["RIVAL_BROKER_URL"])
app.conf.update(
    task_ignore_result=True,
    worker_prefetch_multiplier=int(os.environ["RIVAL_PREFETCH"]),
)


@cache
def model() -> ScoreTexts:
    """Loaded once in each process of the pool."""
    load = load_fp32 if os.environ["RIVAL_ENGINE"] == "fp32" else load_int8
    return load(int(os.environ["RIVAL_THREADS"]))


@app.task(name="rival.moderate")
def moderate(comment_id: str, text: str) -> None:
    save([(comment_id, text)], model()([text]))
