"""Drift, measured by the sweeper for whoever reads the metrics; see `db.drift`."""

import time

from sqlalchemy import Engine

from db.drift import Drift, measure_drift
from db.durable import database_time, take_sweep_lock
from db.session import reading

PAUSE_S = 60.0
"""Between two measurements."""
PAUSE_FACTOR = 100
"""The same in times of what the last one took: at most one part in a hundred of the database's time for each worker."""
KEPT_S = 900.0
"""A measurement that is older says nothing of now."""


class DriftWatch:
    """The chore; see `worker.sweeper`."""

    def __init__(self, database: Engine) -> None:
        self._database = database
        self._measured: Drift | None = None
        self._measured_at = self._next_at = 0.0

    def __call__(self) -> bool:
        started = time.monotonic()
        if started < self._next_at:
            return False
        with reading(self._database) as connection:
            if not take_sweep_lock(connection):
                return False  # another worker is at it; the next sweep comes soon
            self._measured = measure_drift(connection, now=database_time(connection))
        self._measured_at = time.monotonic()
        self._next_at = self._measured_at + max(PAUSE_S, PAUSE_FACTOR * (self._measured_at - started))
        return False

    @property
    def newest(self) -> Drift | None:
        """The last measurement, while it is young enough to count."""
        return self._measured if time.monotonic() < self._measured_at + KEPT_S else None
