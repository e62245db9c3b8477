"""Which submissions a trial takes, and whether a candidate stays within its bounds. Pure."""

import hashlib
import math
from dataclasses import dataclass

from config.names import LABELS
from config.settings import TrialSettings
from db.trials import Side

STANDARD_ERRORS = 3.0
"""What chance explains: beyond it one comparison in 370 of equal versions would lie."""
LEAST_ERRORS = 5
"""Errors before anything is said of their share: one of the first few would be a large one."""


def chooses(trial_id: int, share: float, submission_id: str) -> bool:
    """Whether a submission belongs to a trial's share.

    A matter of the two ids alone, so that a redelivered comment meets the same version on every worker; and of the
    trial's, so that the next one takes others.
    """
    digest = hashlib.sha256(f"{trial_id}:{submission_id}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


@dataclass(frozen=True, slots=True)
class Shift:
    """How far a mean lies from the active version's, and how far it may."""

    name: str
    """A label, or `not allowed`: the share of comments with any action but `allow`."""
    candidate: float
    baseline: float
    standard_error: float
    """Of the difference: infinite where a version has less than two decisions."""
    bound: float

    @property
    def difference(self) -> float:
        return self.candidate - self.baseline

    @property
    def limit(self) -> float:
        """The bound, and what chance explains beyond it."""
        return self.bound + STANDARD_ERRORS * self.standard_error

    @property
    def is_beyond(self) -> bool:
        return abs(self.difference) > self.limit


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a candidate must be rolled back, and the reason in words with the numbers that led to it."""

    rolls_back: bool
    reason: str
    shifts: list[Shift]
    """Empty before both versions have a decision."""
    missing: int
    """Decisions still to come, of the version that has fewer, before the scores are judged."""


def judge(candidate: Side, baseline: Side, bounds: TrialSettings) -> Judgement:
    """Roll back a candidate that fails too often, or whose scores or actions moved further than the bounds allow.

    Failures are judged early, from the fifth on, by the least share that chance leaves likely: the lower end of
    Wilson's interval at three standard errors. Scores and actions are judged when both versions have `min_decisions`,
    and a difference counts only as far as it exceeds three standard errors. Which submissions the candidate gets is
    drawn by hash, so a flood of like texts falls on both alike.
    """
    missing = max(0, bounds.min_decisions - min(candidate.decisions, baseline.decisions))
    tried = candidate.decisions + candidate.errors
    shifts = compare(candidate, baseline, bounds)
    counted = (
        f"{candidate.version} decided {candidate.decisions} and failed to score {candidate.errors}, "
        f"{baseline.version} decided {baseline.decisions}"
    )
    failures = []
    surely_failed = wilson_interval(candidate.errors, tried, STANDARD_ERRORS)[0]
    if candidate.errors >= LEAST_ERRORS and surely_failed > bounds.max_error_rate:
        failures.append(
            f"it failed to score {candidate.errors} of {tried} comments ({candidate.errors / tried:.1%}), surely more "
            f"than {surely_failed:.1%} where {bounds.max_error_rate:.1%} is allowed"
        )
    if not missing:
        failures += [
            f"{shift.name} moved by {shift.difference:+.4f} to {shift.candidate:.4f}, more than the {shift.bound:g} "
            f"allowed and the {STANDARD_ERRORS * shift.standard_error:.4f} that chance explains"
            for shift in shifts
            if shift.is_beyond
        ]
    if failures:
        return Judgement(True, f"out of bounds: {'; '.join(failures)}. {counted}", shifts, missing)
    if missing:
        return Judgement(False, f"{missing} decisions are missing to judge the scores. {counted}", shifts, missing)
    return Judgement(False, f"within bounds. {counted}", shifts, missing)


def compare(candidate: Side, baseline: Side, bounds: TrialSettings) -> list[Shift]:
    """The mean of each label's scores, and the share of comments that are not allowed; none without decisions."""
    if not (candidate.decisions and baseline.decisions):
        return []
    shifts = [
        Shift(
            label,
            candidate.means[label],
            baseline.means[label],
            _standard_error(candidate.variances[label], candidate.decisions, baseline.variances[label], baseline),
            bounds.max_mean_score_shift,
        )
        for label in LABELS
    ]
    new, old = candidate.not_allowed / candidate.decisions, baseline.not_allowed / baseline.decisions
    error = _standard_error(new * (1 - new), candidate.decisions, old * (1 - old), baseline)
    return [*shifts, Shift("not allowed", new, old, error, bounds.max_action_share_shift)]


def _standard_error(variance: float, count: int, other_variance: float, other: Side) -> float:
    """Of the difference of two means. One decision says nothing about how far the next may lie."""
    if min(count, other.decisions) < 2:
        return math.inf
    return math.sqrt(variance / (count - 1) + other_variance / (other.decisions - 1))


def wilson_interval(hits: int, of: int, standard_errors: float = 1.96) -> tuple[float, float]:
    """Between which shares the true one lies, by Wilson: sound for few and for none. 1.96 makes it a 95 % interval."""
    if not of:
        return 0.0, 1.0
    share, z2 = hits / of, standard_errors**2
    middle = share + z2 / (2 * of)
    reach = standard_errors * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    return max(0.0, (middle - reach) / (1 + z2 / of)), min(1.0, (middle + reach) / (1 + z2 / of))
