"""mosec with dynamic batching: `python -m bench.rivals.mosec_server --port …`."""

import os
from typing import Any

from mosec import Server, Worker

from bench.engines import load_int8
from config.names import LABELS

TIMEOUT_S = 60
"""Longer than its default, which a full queue would run into."""


class Moderate(Worker):
    def __init__(self) -> None:
        super().__init__()
        self._model = load_int8(int(os.environ["RIVAL_THREADS"]), sort=os.environ["RIVAL_SORT"] == "True")

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, float]]:
        scores = self._model([comment["text"] for comment in data])
        return [dict(zip(LABELS, row, strict=True)) for row in scores.tolist()]


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Moderate,
        num=int(os.environ["RIVAL_PROCESSES"]),
        max_batch_size=int(os.environ["RIVAL_MAX_BATCH_SIZE"]),
        max_wait_time=int(os.environ["RIVAL_MAX_WAIT_MS"]),
        timeout=TIMEOUT_S,
    )
    server.run()
