"""What the database says of reviews, on SQLite and on PostgreSQL."""

from dataclasses import replace
from typing import Any

from sqlalchemy import Engine

from config.names import LABELS, Action
from db import policies, queries, reviews, trials
from db.queries import ScoredSubmission
from db.reviews import JudgedText, Opinion, UnreviewedDecision
from db.session import reading, writing
from db.trials import TrialScoreRow, record_trial_scores
from tests.integration.rows import NOON, POLICY, POLICY_VERSION, minutes, prepare, scored


def record(engine: Engine, *rows: ScoredSubmission) -> None:
    with writing(engine) as connection:
        prepare(connection)
        queries.record_decisions(connection, rows)


def review(engine: Engine, submission_id: str, reviewer: str = "mod", **labels: bool) -> None:
    with writing(engine) as connection:
        queries.add_review(
            connection,
            submission_id=submission_id,
            action="hide",
            labels=labels,
            reviewer=reviewer,
            note=None,
            now=NOON,
        )


def test_what_each_reviewer_says_of_each_text(engine: Engine) -> None:
    # Given a text that was submitted twice and is stored once, one that is not stored, and one that nobody reviewed
    record(engine, replace(scored("a1", text="a"), text=None), scored("a2", text="a"), scored("c"))
    record(engine, replace(scored("b", text="b"), text=None))
    # When one reviewer reviews a submission twice, and then its copy, and another one speaks as well
    review(engine, "a1", "ann", toxic=True, insult=True)
    review(engine, "a1", "ann", toxic=True)
    review(engine, "a1", "bob's", threat=False)
    review(engine, "a2", "ann", toxic=False)
    review(engine, "b", "ann", obscene=True)
    # Then each text is one, with the newest words of each
    with reading(engine) as connection:
        found = list(reviews.judged_texts(connection))
    nothing = dict.fromkeys(LABELS)
    assert sorted(found, key=lambda each: each.text is None) == [
        JudgedText("a", {"ann": nothing | {"toxic": False}, "bob's": nothing | {"threat": False}}),
        JudgedText(None, {"ann": nothing | {"obscene": True}}),
    ]


def unreviewed(engine: Engine, community: str | None = None, among: int = 100) -> list[UnreviewedDecision]:
    with reading(engine) as connection:
        return list(reviews.unreviewed_decisions(connection, community=community, among=among))


def test_decisions_that_wait_for_a_word(engine: Engine) -> None:
    # Given decisions: one reviewed, a copy of its text, one without a text, and three that nobody spoke of
    record(
        engine,
        scored("reviewed", text="x", decided_at=minutes(5)),
        scored("copy", text="x", decided_at=minutes(4)),
        replace(scored("erased", decided_at=minutes(3)), text=None),
        scored("new", decided_at=minutes(2), community="news", action="hide", threat=0.7),
        scored("old", decided_at=minutes(1)),
        scored("oldest"),
    )
    review(engine, "reviewed")
    # Then those three wait, the newest first, each with all that tells why it should be looked at
    new, *others = unreviewed(engine)
    assert new == UnreviewedDecision(
        submission_id="new",
        community="news",
        text="the text of new",
        text_sha256=scored("new").text_sha256,
        scores=(0.1, 0.02, 0.03, 0.7, 0.05, 0.06),
        action=Action.HIDE,
        model_version="v1",
        policy_version=POLICY_VERSION,
        decided_at=minutes(2),
        shadow=None,
    )
    assert [each.submission_id for each in others] == ["old", "oldest"]
    # And fewer where fewer of the newest are looked at, or one community only
    assert unreviewed(engine, among=5) == [new, others[0]]
    assert unreviewed(engine, community="default", among=5) == [others[0]]
    with reading(engine) as connection:
        assert policies.texts(connection, {POLICY_VERSION, "?"}) == {POLICY_VERSION: POLICY}


def test_what_the_newest_shadow_says(engine: Engine) -> None:
    # Given a shadow that is over, and the newest, which scored one comment, failed on another and decided a third
    record(engine, scored("scored"), scored("failed"), scored("its own", model_version="v3"))
    half: dict[str, Any] = dict.fromkeys(LABELS, 0.5)
    with writing(engine) as connection:
        prepare(connection, "v1", "v2", "v3")
        queries.activate(
            connection, instead_of=queries.active(connection), version="v1", by="me", reason="first", now=NOON
        )
        for candidate in ("v2", "v3"):
            trial_id = trials.start_trial(
                connection, kind="shadow", candidate=candidate, share=1, bounds={}, by="me", reason="", now=NOON
            )
            failed = TrialScoreRow(trial_id=trial_id, submission_id="failed", error="RuntimeError", scored_at=NOON)
            scores = [
                TrialScoreRow(trial_id=trial_id, submission_id=name, action="review", scored_at=NOON, **half)
                for name in ("scored", "its own")
            ]
            record_trial_scores(connection, [failed, *scores])
            trials.end_trial(connection, trial_id, outcome="stopped", by="me", verdict="", now=NOON)
    # Then its word stands beside the decision of another version
    assert {each.submission_id: each.shadow for each in unreviewed(engine)} == {
        "scored": Opinion("v3", Action.REVIEW, (0.5,) * 6),
        "failed": None,
        "its own": None,
    }
