"""Which submissions a trial takes, and when a candidate is out of bounds."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from config.names import LABELS
from config.settings import ROOT, TrialSettings
from db.trials import Side
from model.trial import chooses, judge, wilson_interval

BOUNDS = TrialSettings(min_decisions=200, max_error_rate=0.01, max_mean_score_shift=0.05, max_action_share_shift=0.05)


def side(version: str, decisions: int, *, mean: float = 0.2, not_allowed: int = 0, errors: int = 0) -> Side:
    """Scores with a standard deviation of 0.1."""
    return Side(
        version=version,
        decisions=decisions,
        not_allowed=not_allowed,
        actions={},
        means=dict.fromkeys(LABELS, mean) if decisions else {},
        variances=dict.fromkeys(LABELS, 0.01) if decisions else {},
        errors=errors,
    )


class TestShare:
    def test_is_what_was_asked_and_grows_without_swapping(self) -> None:
        ids = [f"task-{n}:{n % 7}" for n in range(20_000)]
        taken = [{each for each in ids if chooses(3, share, each)} for share in (0.0, 0.05, 0.5, 1.0)]
        assert [len(chosen) / len(ids) for chosen in taken] == pytest.approx([0, 0.05, 0.5, 1], abs=0.01)
        assert all(smaller <= larger for smaller, larger in pairwise(taken))

    def test_another_trial_takes_others(self) -> None:
        ids = [str(n) for n in range(20_000)]
        both = [each for each in ids if chooses(1, 0.5, each) and chooses(2, 0.5, each)]
        assert len(both) / len(ids) == pytest.approx(0.25, abs=0.02)

    def test_another_process_takes_the_same(self) -> None:
        code = "from model.trial import chooses; print([n for n in range(99) if chooses(7, 0.3, f'ä{n}:0')])"
        other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert other.stdout.strip() == str([n for n in range(99) if chooses(7, 0.3, f"ä{n}:0")])


class TestErrors:
    @pytest.mark.parametrize(
        ("decisions", "errors", "rolls_back"),
        [
            (0, 1, False),  # all there is, and yet one
            (0, 4, False),
            (0, 5, True),  # none was scored
            (95, 5, True),
            (195, 5, False),  # 2.5 %, which chance makes of 1 % now and then
            (9_900, 100, False),  # just what is allowed
            (97_000, 3_000, True),
        ],
    )
    def test_are_judged_early_but_not_by_one_of_few(self, decisions: int, errors: int, rolls_back: bool) -> None:
        found = judge(side("v2", decisions, errors=errors), side("v1", 100), BOUNDS)
        assert found.rolls_back is rolls_back
        assert f"failed to score {errors}" in found.reason


class TestScores:
    def test_are_judged_when_both_have_enough(self) -> None:
        far = side("v2", 199, mean=0.9)
        early = judge(far, side("v1", 5_000), BOUNDS)
        assert (early.rolls_back, early.missing) == (False, 1)
        assert "1 decisions are missing" in early.reason
        late = judge(replace(far, decisions=200), side("v1", 5_000), BOUNDS)
        assert (late.rolls_back, late.missing) == (True, 0)
        assert "toxic moved by +0.7000 to 0.9000, more than the 0.05 allowed" in late.reason
        assert "v2 decided 200 and failed to score 0, v1 decided 5000" in late.reason
        # The active version's count matters as well
        assert not judge(side("v2", 5_000, mean=0.9), side("v1", 199), BOUNDS).rolls_back

    def test_what_chance_explains_does_not_count(self) -> None:
        # Three standard errors are 3 · 0.1 · √(2/199) = 0.0301 with 200 decisions each
        assert not judge(side("v2", 200, mean=0.279), side("v1", 200), BOUNDS).rolls_back
        assert judge(side("v2", 200, mean=0.281), side("v1", 200), BOUNDS).rolls_back
        # And little with many: the same shift is beyond the bound then
        assert judge(side("v2", 9_000, mean=0.279), side("v1", 9_000), BOUNDS).rolls_back
        assert judge(side("v2", 9_000, mean=0.121), side("v1", 9_000), BOUNDS).rolls_back, "downwards too"

    def test_one_decision_each_says_nothing(self) -> None:
        hasty = BOUNDS.model_copy(update={"min_decisions": 1})
        assert not judge(side("v2", 1, mean=1.0, not_allowed=1), side("v1", 1, mean=0.0), hasty).rolls_back

    def test_actions_are_judged_too(self) -> None:
        found = judge(side("v2", 1_000, not_allowed=300), side("v1", 1_000, not_allowed=100), BOUNDS)
        assert found.rolls_back
        assert "not allowed moved by +0.2000 to 0.3000" in found.reason
        assert not judge(side("v2", 1_000, not_allowed=130), side("v1", 1_000, not_allowed=100), BOUNDS).rolls_back

    def test_nothing_decided_yet_is_within_bounds(self) -> None:
        found = judge(side("v2", 0), side("v1", 0), BOUNDS)
        assert (found.rolls_back, found.missing, found.shifts) == (False, 200, [])


def test_the_interval_is_wilsons() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson_interval(0, 0) == (0, 1)
