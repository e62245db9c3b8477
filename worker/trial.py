"""A trial as a worker sees it: the candidate it has loaded, and the end of a canary that leaves its bounds."""

from dataclasses import dataclass

from sqlalchemy import Engine

from config.settings import TrialSettings
from db import trials
from db.session import reading, writing
from model.engine import Scorer
from model.trial import chooses, judge
from worker import clock


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


def judge_canary(database: Engine, by: str) -> str | None:
    """Roll the live canary back if it is out of bounds; the verdict then, else None."""
    with reading(database) as connection:
        trial = trials.live_trial(connection)
        if trial is None or trial.kind != "canary":
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
            now=clock.now(),
        )
    return judgement.reason if ended else None
