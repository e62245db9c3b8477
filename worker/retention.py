"""Texts that have grown older than the settings allow are erased: the sweeper's chore, a bounded step at a time."""

import logging

from sqlalchemy import Engine

from db.durable import database_time, take_sweep_lock
from db.privacy import erase_expired, retention_is_due
from db.session import reading, writing

logger = logging.getLogger(__name__)


class Retention:
    """The chore; see `worker.sweeper`."""

    def __init__(self, database: Engine, keep_text_days: float, worker: str) -> None:
        """Prepare.

        Args:
            keep_text_days: 0 keeps them for ever.
            worker: who erases, for the record.
        """
        self._database = database
        self._keep_days = keep_text_days
        self._worker = worker
        self._within_round = False

    def __call__(self) -> bool:
        if not self._keep_days:
            return False
        if not self._within_round:
            # Only read: on SQLite a look every few seconds must not wait for whoever writes.
            with reading(self._database) as connection:
                now = database_time(connection)
                if not retention_is_due(connection, keep_days=self._keep_days, now=now):
                    return False
        with writing(self._database) as connection:
            if not take_sweep_lock(connection):
                return False
            now = database_time(connection)
            erased, more = erase_expired(connection, keep_days=self._keep_days, by=self._worker, now=now)
        self._within_round = more
        if erased.submissions or erased.dead_letters:
            logger.info("erased what has grown old: %d texts, %d payloads", erased.submissions, erased.dead_letters)
        return more
