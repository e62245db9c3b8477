"""Something that fails for a while: said once when it begins, once when it ends, and tried after growing pauses."""

import random

FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 30.0


class Outage:
    """Whether it lasts, and how long to wait before the next try. One thread fails and ends it; any may look."""

    __slots__ = ("_pause_s", "lasts")

    def __init__(self) -> None:
        self.lasts = False
        self._pause_s = FIRST_PAUSE_S

    def begin(self) -> bool:
        """It failed. True the first time, which is when to say so."""
        began, self.lasts = not self.lasts, True
        return began

    def end(self) -> bool:
        """It worked. True where it had failed before, which is when to say so."""
        ended, self.lasts = self.lasts, False
        self._pause_s = FIRST_PAUSE_S
        return ended

    def pause_s(self) -> float:
        """Seconds until the next try: twice as long each time up to LAST_PAUSE_S, and up to a third less by chance.

        Without chance all workers would come back to a server that has just started in the same instant.
        """
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LAST_PAUSE_S)
        return pause_s * random.uniform(2 / 3, 1)
