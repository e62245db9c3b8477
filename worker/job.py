"""What travels through the pipeline: a message's delivery, its comments, and the texts to be scored for them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from model.engine import Scorer
from model.text import normalise, readable
from worker import clock
from worker.message import Submitted
from worker.trial import LiveTrial


@dataclass(slots=True, eq=False)
class Delivery:
    """One message on its way: it may be acknowledged when `open` reaches nothing.

    `open` is counted down by the recorder alone.
    """

    acknowledge: Callable[[], None]
    queue: str
    received_at: datetime
    submitted_at: datetime
    comments: int
    text_bytes: int
    answer_to: str | None = None
    """The token of a producer that waits: see `config.names.ANSWER_TO_HEADER`."""
    answers: list[bytes] = field(default_factory=list)
    """What it is to be told of comments that are committed."""
    open: int = field(init=False)

    def __post_init__(self) -> None:
        self.open = self.comments


class Item(NamedTuple):
    """One comment on its way, and the message it came in."""

    submitted: Submitted
    delivery: Delivery


class TextScores(NamedTuple):
    """What a version says of a text."""

    labels: list[float]
    """Six probabilities, in the order of `config.names.LABELS`; of several windows each label's highest."""
    windows: int


class Job:
    """One text, scored once for every comment that has it, by the version that was current when it was prepared.

    A long text's windows may be scored at the same time, so it is changed under the pipeline's lock only.
    """

    __slots__ = (
        "_windows_left",
        "compute_ms",
        "failed",
        "items",
        "key",
        "readable",
        "scorer",
        "scores",
        "started_at",
        "trial",
    )

    def __init__(self, item: Item, scorer: Scorer, trial: LiveTrial | None = None) -> None:
        self.scorer = scorer
        self.trial = trial
        """Whose candidate is to score it; none of what the active version scores."""
        self.items = [item]
        normalised = normalise(item.submitted.comment.text)
        self.key = (scorer.version, hashlib.sha256(normalised.encode()).digest())
        """Jobs with the same key have the same scores. Of the whole text, also where only its beginning is read."""
        self.readable = readable(normalised)
        self.scores: TextScores | None = None
        self.failed = False
        self.started_at: datetime | None = None
        """When the first of its forward passes began."""
        self.compute_ms = 0.0
        """The sum of its forward passes."""
        self._windows_left = 0

    @property
    def is_shadow(self) -> bool:
        """Whether its comments are decided by another job, whatever becomes of this one."""
        return self.trial is not None and self.trial.is_shadow

    def expect(self, windows: int) -> None:
        """It is complete when so many windows have been added."""
        self._windows_left = windows

    def add(self, windows: Sequence[list[float]], started_at: datetime, compute_ms: float) -> bool:
        """Take in the labels of all windows that one forward pass scored; whether they were the last.

        The pass counts once, however many of its windows are this text's.
        """
        before = () if self.scores is None else (self.scores.labels,)
        labels = [max(scores) for scores in zip(*before, *windows, strict=True)]
        self.scores = TextScores(labels, len(windows) + (0 if self.scores is None else self.scores.windows))
        # With several lanes the pass that ends first need not be the one that began first.
        self.started_at = started_at if self.started_at is None else min(self.started_at, started_at)
        self.compute_ms += compute_ms
        self._windows_left -= len(windows)
        return not self._windows_left and not self.failed

    def recall(self, scores: TextScores) -> None:
        """Take over what was found of the same text before."""
        self.scores = scores
        self.started_at = clock.now()


class Piece(NamedTuple):
    """One window of a text: what an engine scores."""

    job: Job
    ids: list[int]
