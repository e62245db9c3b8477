"""A trial as a worker sees it: the candidate it has loaded, and the end of a canary that leaves its bounds."""

import logging
import time
from dataclasses import dataclass

from sqlalchemy import Engine

from config.settings import TrialSettings
from db import trials
from db.durable import database_time, take_sweep_lock
from db.session import reading, writing
from model.engine import Scorer
from model.trial import chooses, judge

logger = logging.getLogger(__name__)

JUDGING_PAUSE = 100
"""Between two judgements of a canary, in times of what the last one took: the sums grow with what it has decided."""


@dataclass(frozen=True, slots=True)
class LiveTrial:
    """A trial whose candidate is loaded here, beside the active version."""

    trial_id: int
    share: float
    is_shadow: bool
    """Its scores are recorded and never acted on; else it decides its share."""
    scorer: Scorer

    def chooses(self, submission_id: str) -> bool:
        """Whether the submission belongs to its share."""
        return chooses(self.trial_id, self.share, submission_id)


class Judging:
    """The sweeper's chore: rolls the live canary back when it is out of bounds."""

    def __init__(self, database: Engine, worker: str) -> None:
        self._database = database
        self._worker = worker
        self._judge_at = 0.0

    def __call__(self) -> bool:
        """Judge, if enough time has passed since the last judgement; nothing is left to be done at once."""
        if time.monotonic() >= self._judge_at:
            started = time.monotonic()
            verdict = judge_canary(self._database, self._worker)
            if verdict is not None:
                logger.error("the canary is rolled back: %s", verdict)
            self._judge_at = time.monotonic() + JUDGING_PAUSE * (time.monotonic() - started)
        return False


def judge_canary(database: Engine, by: str) -> str | None:
    """Roll the live canary back if it is out of bounds; the verdict then, else None."""
    with reading(database) as connection:
        trial = trials.live_trial(connection)
        if trial is None or trial.kind != "canary" or not take_sweep_lock(connection):
            return None
        candidate, baseline = trials.sides(connection, trial)
    judgement = judge(candidate, baseline, TrialSettings(**trial.bounds))
    if not judgement.rolls_back:
        return None
    # Only now: on SQLite nobody could record a decision while the sums are made.
    with writing(database) as connection:
        ended = trials.end_trial(
            connection,
            trial.trial_id,
            outcome="rolled_back",
            by=by,
            verdict=judgement.reason,
            now=database_time(connection),
        )
    return judgement.reason if ended else None
