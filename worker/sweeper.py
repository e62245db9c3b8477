"""What is done every few seconds by one worker for all: a thread in each, and a lock in the database.

Owns the loop. What it does are chores, each in a module of its own.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping

from db.outage import Outage

logger = logging.getLogger(__name__)

SWEEP_S = 5.0
"""Between two sweeps."""

Chore = Callable[[], bool]
"""Does a bounded piece of work, where `db.durable.take_sweep_lock` lets its transaction; whether more is to be done
at once. It may raise: that is said, and it is tried again."""


class Sweeper:
    """Does its chores again and again, from a thread of its own."""

    def __init__(self, chores: Mapping[str, Chore]) -> None:
        """Prepare.

        Args:
            chores: by what they do, in words.
        """
        self._chores = [(name, chore, Outage()) for name, chore in chores.items()]
        self.sweeps = 0

    def start(self) -> None:
        threading.Thread(target=self._sweep_for_ever, name="sweeper", daemon=True).start()

    def _sweep_for_ever(self) -> None:
        while True:
            time.sleep(SWEEP_S)
            self.sweep()

    def sweep(self) -> None:
        """Every chore once, or as long as there is something to do."""
        for name, chore, outage in self._chores:
            try:
                while chore():
                    pass
            except Exception as error:
                # Its class alone: what drivers say may quote a row.
                if outage.begin():
                    logger.error("%s failed (%s); it is tried again", name, type(error).__name__)
            else:
                if outage.end():
                    logger.warning("%s goes on", name)
        self.sweeps += 1
