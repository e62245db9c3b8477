"""The same text is scored once: while it is on its way, others join it; afterwards its scores are kept for a while."""

from collections import OrderedDict
from collections.abc import Iterable

from worker.job import Job, TextScores


class Reuse:
    """The jobs on their way and the scores of recent texts, by version and hash. Used under the pipeline's lock."""

    def __init__(self, max_texts: int) -> None:
        """Keep the scores of at most this many texts; 0 switches off joining, too."""
        self._max_texts = max_texts
        self._running: dict[tuple[str, bytes], Job] = {}
        self._recent: OrderedDict[tuple[str, bytes], TextScores] = OrderedDict()
        self.joined = 0
        """Comments that waited for the forward pass of an identical one."""
        self.recalled = 0
        """Comments whose text was scored shortly before."""

    def sort(self, jobs: Iterable[Job]) -> tuple[list[Job], list[Job]]:
        """Jobs that must be scored, and jobs that have their scores already; the others joined one on its way."""
        new, answered = [], []
        for job in jobs:
            if not self._max_texts:
                new.append(job)
                continue
            if scores := self._recent.get(job.key):
                self._recent.move_to_end(job.key)
                self.recalled += len(job.items)
                job.recall(scores)
                answered.append(job)
            elif running := self._running.get(job.key):
                self.joined += len(job.items)
                running.items.extend(job.items)
            else:
                self._running[job.key] = job
                new.append(job)
        return new, answered

    def end(self, job: Job) -> None:
        """From now on nobody joins it; scores that it has are kept."""
        if not self._max_texts:
            return
        del self._running[job.key]
        if job.scores is not None:
            self._recent[job.key] = job.scores
            if len(self._recent) > self._max_texts:
                self._recent.popitem(last=False)
