"""Where prepared texts wait for the engine, and how they leave in batches. Used under the pipeline's lock."""

from collections import deque

from model.batching import Batching, plan_batches
from model.engine import Engine
from model.text import Windows
from worker.job import Job, Piece


class Line:
    """Texts in the order they came, taken a window at a time, each window as batches of like lengths."""

    def __init__(self) -> None:
        self._short: deque[Piece] = deque()
        self._long: deque[Piece] = deque()
        self._planned: deque[list[Piece]] = deque()

    def __bool__(self) -> bool:
        return bool(self._planned or self._short or self._long)

    def add(self, job: Job, windows: Windows) -> None:
        """Behind all others."""
        (self._short if len(windows) == 1 else self._long).extend([Piece(job, ids) for ids in windows])

    @property
    def engine(self) -> Engine:
        """That of the next batch. Only of a line where something waits."""
        pieces = self._planned[0] if self._planned else self._short or self._long
        return pieces[0].job.scorer.engine

    def next_batch(self) -> list[Piece]:
        """The next of the window; when there is none left, the first of a new one: everything that came meanwhile."""
        if not self._planned:
            window = take_window(self._short, self._long, (self._short or self._long)[0].job.scorer.batching)
            # Two versions only meet in a window while they are being exchanged.
            for scorer in dict.fromkeys(piece.job.scorer for piece in window):
                same = [piece for piece in window if piece.job.scorer is scorer]
                batches = plan_batches([len(piece.ids) for piece in same], scorer.batching)
                self._planned.extend([same[index] for index in batch] for batch in batches)
        return self._planned.popleft()


def take_window(short: deque[Piece], long: deque[Piece], batching: Batching) -> list[Piece]:
    """Take the pieces for the next window, first come first served.

    Long texts' pieces are all alike, so they gain nothing from a large window, and a short text should not wait for
    all of one's windows. They get one batch, or, where many short texts wait, as many tokens as those.
    """
    window: list[Piece] = []
    tokens = 0
    while short and tokens < batching.window_tokens:
        tokens += len(short[0].ids)
        window.append(short.popleft())
    room = max(tokens, batching.max_batch_tokens)
    while long and room > 0:
        room -= len(long[0].ids)
        window.append(long.popleft())
    return window
