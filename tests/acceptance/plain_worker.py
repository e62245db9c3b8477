"""A Celery app that knows nothing of this project: `celery -A tests.acceptance.plain_worker worker -Q …`.

Notes in Redis what it ran: the list `ran` has one entry for each run.
"""

import json
import os
import time

from celery import Celery
from redis import Redis

BROKER_URL = os.environ["MODERATO_BROKER_URL"]

app = Celery("plain", broker=BROKER_URL)
app.conf.update(worker_pool="solo", task_acks_late=True)
redis = Redis(unix_socket_path=BROKER_URL.removeprefix("redis+socket://"))


@app.task(name="news.digest")
def digest() -> None:
    """Runs until someone sets the key `finish`."""
    redis.rpush("ran", "digest")
    while not redis.exists("finish"):
        time.sleep(0.05)


@app.task(name="worker.moderate")
def moderate(comments: list[dict[str, object]]) -> None:
    """What another team would write to take our queue over."""
    redis.rpush("ran", json.dumps(comments))
