"""Looking at what the database says is active: every few seconds, and at once when a broadcast says so."""

import logging
import threading
from collections.abc import Callable

from db.outage import Outage

logger = logging.getLogger(__name__)


class Watch:
    """Looks from a thread of its own as long as the process lives; that it cannot is said once, and once when it can.

    The look is the truth. The broadcast only makes it come sooner: a worker that is down or busy never hears it.
    """

    def __init__(self, what: str, poll_s: float) -> None:
        """Prepare.

        Args:
            what: is looked for, in a word.
            poll_s: seconds between two looks.
        """
        self._what = what
        self._poll_s = poll_s
        self._now = threading.Event()

    def start(self, look: Callable[[], None], in_use: Callable[[], str]) -> None:
        """Begin, with a look at once.

        Args:
            look: does what is to be done; whatever it raises, it is called again.
            in_use: the name of what goes on meanwhile.
        """
        self._now.set()
        threading.Thread(target=self._run, args=(look, in_use), name=f"watch {self._what}", daemon=True).start()

    def look_now(self) -> None:
        """Look at once rather than at the next poll."""
        self._now.set()

    def _run(self, look: Callable[[], None], in_use: Callable[[], str]) -> None:
        unreachable = Outage()
        while True:
            self._now.wait(max(self._poll_s, unreachable.pause_s()) if unreachable.lasts else self._poll_s)
            # Cleared before looking: a broadcast that comes during a look must lead to another one.
            self._now.clear()
            try:
                look()
                if unreachable.end():
                    logger.warning("it can be seen again which %s is active", self._what)
            except Exception as error:
                # The database is away, or worse; what is in use goes on either way.
                if unreachable.begin():
                    kind = type(error).__name__
                    logger.error("cannot see which %s is active (%s); %s goes on", self._what, kind, in_use())
