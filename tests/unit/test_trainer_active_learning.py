"""Which decisions are shown first, and what is said of each."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.names import LABELS, Action
from config.policy import parse_policy
from db.reviews import Opinion, UnreviewedDecision
from tests.integration.rows import NOON
from trainer.active_learning import informativeness, most_informative

POLICY = parse_policy(
    """communities:
  default:
    toxic: {label: 0.5, hide: 0.9}
    insult: {hide: 0.8}
    threat: {hide: 0.6, remove: 0.95}
    obscene: {review: 0.7}
  strict: {toxic: {hide: 0.4}}
"""
)


def scores(**given: float) -> tuple[float, ...]:
    """Those given, and no doubt about the others."""
    return tuple(given.get(label, 0.01) for label in LABELS)


def ask(given: dict[str, float], *opinions: Opinion, community: str = "default") -> tuple[float, list[str]]:
    """Of a decision that the policy made of these scores."""
    action = POLICY.decide(community, scores(**given)).action
    return informativeness(scores(**given), action, POLICY.rules(community), opinions)


def decision(submission_id: str, text: str | None = None, **changes: Any) -> UnreviewedDecision:
    row = UnreviewedDecision(
        submission_id=submission_id,
        community="default",
        text=text or submission_id,
        text_sha256=f"hash of {text or submission_id}",
        scores=scores(),
        action=Action.ALLOW,
        model_version="v1",
        policy_version=POLICY.version,
        decided_at=NOON,
        shadow=None,
    )
    return replace(row, **changes)


class TestReasons:
    @pytest.mark.parametrize(
        ("given", "reasons"),
        [
            ({}, []),
            ({"toxic": 0.48}, ["toxic 0.48, 0.02 below label at 0.50"]),
            # Below a threshold of the same or a milder action than the one taken: crossing it changes nothing
            (
                {"toxic": 0.83, "insult": 0.79, "threat": 0.89},
                ["threat 0.89, 0.06 below remove at 0.95"],
            ),
            # One label is close to letting the action go, but the other holds it
            ({"toxic": 0.91, "insult": 0.99}, ["severe: hide"]),
            ({"insult": 0.83}, ["insult 0.83, 0.03 above hide at 0.80", "severe: hide"]),
            ({"obscene": 0.53}, ["obscene 0.53: unsure"]),
            ({"obscene": 0.85}, ["the policy asks for a review"]),
            ({"severe_toxic": 0.7, "identity_hate": 0.75}, ["identity_hate 0.75, severe_toxic 0.70"]),
        ],
        ids=[
            "none",
            "close below",
            "above what changes nothing",
            "held",
            "close above",
            "unsure",
            "asked for",
            "severe",
        ],
    )
    def test_of_one_decision(self, given: dict[str, float], reasons: list[str]) -> None:
        assert ask(given)[1] == reasons

    def test_another_version_that_would_have_acted_otherwise(self) -> None:
        agreeing = Opinion("v2", Action.ALLOW, scores(toxic=0.3))
        disputing = Opinion("v3", Action.REVIEW, scores(insult=0.83, toxic=0.4))
        assert ask({"toxic": 0.2}, agreeing) == (0, [])
        assert ask({"toxic": 0.2}, agreeing, disputing)[1] == ["v3 would have it reviewed: insult 0.83"]

    def test_the_thresholds_are_those_of_the_community(self) -> None:
        assert ask({"toxic": 0.39})[1] == []
        assert ask({"toxic": 0.39}, community="strict")[1] == ["toxic 0.39, 0.01 below hide at 0.40"]

    @given(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.sampled_from(Action))
    def test_any_decision_has_some(self, given: list[float], action: Action) -> None:
        # Also one that these rules would never have made
        points, reasons = informativeness(given, action, POLICY.rules("default"), [])
        assert 0 <= points <= 2
        assert bool(points) == bool(reasons)


def test_the_closer_the_more() -> None:
    assert 0 < ask({"toxic": 0.43})[0] < ask({"toxic": 0.47})[0] < ask({"toxic": 0.499})[0]


class TestOrder:
    def test_the_most_informative_first_and_then_the_newest(self) -> None:
        # Given decisions, newest first
        decisions = [
            decision("dull"),
            decision("newer", scores=scores(toxic=0.49)),
            decision("older", scores=scores(toxic=0.49)),
            decision("disputed", scores=scores(toxic=0.49), shadow=Opinion("v2", Action.HIDE, scores(toxic=0.95))),
            decision("of an unknown policy", scores=scores(insult=0.79), policy_version="?"),
        ]
        found = most_informative(decisions, {POLICY.version: POLICY}, 4)
        assert [each.decision.submission_id for each in found] == ["disputed", "newer", "older", "dull"]

    def test_one_of_equal_texts_with_what_another_version_made_of_a_copy(self) -> None:
        # Given a text that an older version, one in another community, and the same version decided otherwise
        hidden: dict[str, Any] = {"action": Action.HIDE, "scores": scores(toxic=0.97)}
        copies = [
            decision("again", "text", model_version="v1", **hidden),
            decision("elsewhere", "text", model_version="v3", community="strict", **hidden),
            decision("before", "text", model_version="v2", **hidden),
        ]
        [only] = most_informative([decision("newest", "text"), *copies], {}, 10)
        # Then it is shown once, with the word of the other version in its own community
        assert only.decision.submission_id == "newest"
        assert only.reasons == ["v2 would hide it: toxic 0.97"]
