"""A second version beside the active one: in the database, and in a pipeline with real scorers."""

import gc
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from sqlalchemy import Engine, text

from bench.tiny import HOLDOUT, copy_version
from config.names import LABELS
from config.policy import parse_policy
from config.settings import load_settings
from db import queries, trials
from db.queries import NoSuchVersion, record_decisions
from db.session import open_database, reading, writing
from db.trials import NothingToTry, NoTrial, TrialIsLive, TrialRow, TrialScoreRow, record_trial_scores
from model.engine import Scorer, Scores, load_scorer
from model.trial import chooses
from tests.integration.moderator import POLICY, Moderator, wrapped
from tests.integration.rows import NOON, minutes, prepare, scored
from tests.integration.test_pipeline import CountingEncoder
from tests.services import wait_until
from trainer.dataset import read_csv
from worker.trial import LiveTrial, judge_canary

NOW = minutes(4)
BOUNDS = load_settings({}).trial.model_dump()


def start(
    engine: Engine,
    kind: Literal["canary", "ab", "shadow"] = "canary",
    candidate: str = "v2",
    now: datetime = NOON,
) -> TrialRow:
    """A trial since noon of `candidate` beside what is active."""
    with writing(engine) as connection:
        trials.start_trial(
            connection,
            kind=kind,
            candidate=candidate,
            share=0.25,
            bounds=BOUNDS,
            by="ada",
            reason="to see",
            now=now,
        )
        return trials.newest_trial(connection, kind)


def activate(engine: Engine, version: str, now: datetime = NOW) -> int:
    with writing(engine) as connection:
        return queries.activate(
            connection, instead_of=queries.active(connection), version=version, by="bob", reason="better", now=now
        )


def newest(engine: Engine, kind: Literal["canary", "ab", "shadow"] = "canary") -> TrialRow:
    with reading(engine) as connection:
        return trials.newest_trial(connection, kind)


def trial_scores(engine: Engine) -> dict[str, Any]:
    with reading(engine) as connection:
        return {row.submission_id: row for row in connection.execute(text("SELECT * FROM trial_scores"))}


def decided_by(engine: Engine) -> dict[str, str]:
    with reading(engine) as connection:
        return {row.submission_id: row.model_version for row in queries.results(connection)}


class TestInTheDatabase:
    @pytest.fixture
    def registered(self, engine: Engine) -> Engine:
        """v1 is active; v2 and v3 are known."""
        with writing(engine) as connection:
            prepare(connection, "v1", "v2", "v3")
        activate(engine, "v1", minutes(-9))
        return engine

    def test_a_trial_from_start_to_promotion(self, registered: Engine) -> None:
        # Given a canary
        trial = start(registered)
        assert (trial.version, trial.baseline, trial.share, trial.outcome) == ("v2", "v1", 0.25, None)
        assert trial.bounds == BOUNDS
        with reading(registered) as connection:
            assert trials.live_trial(connection) == trial
        # Then no other begins beside it
        with pytest.raises(TrialIsLive, match=r"canary of v2 beside v1, started by ada; .* moderato canary stop"):
            start(registered, "shadow", "v3")
        # And the active version activated again changes nothing
        activate(registered, "v1")
        assert newest(registered).outcome is None
        # When it is promoted
        with writing(registered) as connection:
            trials.promote_trial(connection, trial, by="ada", reason="good", now=minutes(5))
        # Then it is the active version, and the trial says so
        with reading(registered) as connection:
            active = queries.active(connection)
            assert trials.live_trial(connection) is None
        assert active is not None and active.version == "v2"
        over = newest(registered)
        assert (over.outcome, over.ended_by, over.verdict, over.ended_at) == ("promoted", "ada", "good", minutes(5))
        # And that happens once
        with pytest.raises(NoTrial, match="over; nothing was activated"), writing(registered) as connection:
            trials.promote_trial(connection, trial, by="ada", reason="again", now=minutes(6))
        with writing(registered) as connection:
            assert not trials.end_trial(
                connection, trial.trial_id, outcome="stopped", by="ada", verdict="late", now=minutes(7)
            )

    def test_what_cannot_be_tried(self, engine: Engine) -> None:
        with writing(engine) as connection:
            prepare(connection, "v1", "v2")
        with pytest.raises(NothingToTry, match="no version is active"):
            start(engine)
        activate(engine, "v2")
        with pytest.raises(NothingToTry, match="v2 is the active version already"):
            start(engine)
        with pytest.raises(NoSuchVersion, match="'v9'"):
            start(engine, candidate="v9")
        with pytest.raises(NoTrial, match="there is no ab, and never was"):
            newest(engine, "ab")

    @pytest.mark.parametrize("version", ["v2", "v3"], ids=["the candidate", "another"])
    def test_an_activation_ends_it_in_the_same_transaction(self, registered: Engine, version: str) -> None:
        start(registered)
        activation = f"version {version} was activated by bob: better"
        with pytest.raises(ZeroDivisionError), writing(registered) as connection:
            queries.activate(
                connection, instead_of=queries.active(connection), version=version, by="bob", reason="better", now=NOW
            )
            raise ZeroDivisionError
        assert newest(registered).outcome is None
        activate(registered, version)
        over = newest(registered)
        assert (over.outcome, over.ended_by, over.verdict) == ("stopped", "bob", activation)

    def test_a_start_waits_for_an_activation_under_way(self, postgres_url: str) -> None:
        """On PostgreSQL; a writer of SQLite is alone."""
        engine = open_database(postgres_url)
        with writing(engine) as connection:
            prepare(connection, "v1", "v2", "v3")
        activate(engine, "v1")
        # When a trial is started while an activation is not committed yet
        started: list[TrialRow] = []
        with writing(engine) as connection:
            queries.activate(
                connection, instead_of=queries.active(connection), version="v3", by="bob", reason="better", now=NOW
            )
            starting = threading.Thread(target=lambda: started.append(start(engine)))
            starting.start()
            waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
            wait_until(lambda: connection.scalar(waiting) or started, what="the start's wait")
        starting.join()
        # Then it stands beside the new version, not beside one that decides no longer
        assert [trial.baseline for trial in started] == ["v3"]
        engine.dispose()

    @pytest.mark.parametrize("ahead_minutes", [-10, 10])
    def test_both_sides_in_figures(self, registered: Engine, ahead_minutes: int) -> None:
        # Given a database whose clock is not Redis', by which comments are decided
        at = minutes(ahead_minutes)
        # And decisions of both versions, one before the trial, one by a third version, and one after it
        rows = [
            scored("c1", model_version="v2", toxic=0.2),
            scored("c2", model_version="v2", toxic=0.6, action="hide"),
            scored("c3", model_version="v2", toxic=0.7, action="remove"),
            scored("b1", model_version="v1", toxic=0.3),
            scored("b2", model_version="v1", toxic=0.9),
            scored("x1", model_version="v3", toxic=0.9),
        ]
        with writing(registered) as connection:
            record_decisions(connection, [scored("early", model_version="v2", toxic=1.0)])
        trial = start(registered, now=at)
        with writing(registered) as connection:
            record_decisions(connection, rows)
            error = TrialScoreRow(trial_id=trial.trial_id, submission_id="b1", error="RuntimeError", scored_at=NOW)
            record_trial_scores(connection, [error])
            record_trial_scores(connection, [error])  # a redelivery
            candidate, baseline = trials.sides(connection, trial)
        # Then each has what it decided since the start
        assert (candidate.decisions, candidate.not_allowed, candidate.errors) == (3, 2, 1)
        assert candidate.actions == {"allow": 1, "hide": 1, "remove": 1}
        assert candidate.means["toxic"] == pytest.approx(0.5)
        assert candidate.variances["toxic"] == pytest.approx((0.3**2 + 0.1**2 + 0.2**2) / 3)
        assert candidate.variances["insult"] == pytest.approx(0, abs=1e-9)
        assert (baseline.decisions, baseline.errors, baseline.means["toxic"]) == (2, 0, pytest.approx(0.6))
        # And of one that is over, until its end; errors too
        activate(registered, "v3", at)
        with writing(registered) as connection:
            record_decisions(connection, [scored("late", model_version="v1")])
            late = TrialScoreRow(trial_id=trial.trial_id, submission_id="late", error="RuntimeError", scored_at=NOW)
            record_trial_scores(connection, [late])
        with reading(registered) as connection:
            candidate, baseline = trials.sides(connection, newest(registered))
            assert (candidate.errors, baseline.decisions) == (1, 2)
        # And reviews are counted for the version that decided, the newest one of each
        with writing(registered) as connection:
            for submission, action in (("c1", "hide"), ("c1", "allow"), ("c2", "allow"), ("b1", "allow")):
                queries.add_review(
                    connection, submission_id=submission, action=action, labels={}, reviewer="r", note=None, now=NOW
                )
            of_candidate, of_baseline = trials.reviewed_sides(connection, newest(registered))
        assert (of_candidate.decisions, of_candidate.reviewed, of_candidate.overturned) == (3, 2, 1)
        assert (of_baseline.decisions, of_baseline.reviewed, of_baseline.overturned) == (2, 1, 0)

    def test_a_shadow_beside_the_decisions(self, registered: Engine) -> None:
        trial = start(registered, "shadow")
        shadowed = {"a": (0.1, "allow"), "b": (0.9, "hide"), "c": (0.4, "allow")}
        with writing(registered) as connection:
            record_decisions(connection, [scored(each, action="allow") for each in shadowed])
            same: dict[str, Any] = {
                "severe_toxic": 0.02,
                "obscene": 0.03,
                "threat": 0.04,
                "insult": 0.05,
                "identity_hate": 0.06,
            }
            rows = [
                TrialScoreRow(
                    trial_id=trial.trial_id, submission_id=each, toxic=toxic, action=action, scored_at=NOW, **same
                )
                for each, (toxic, action) in shadowed.items()
            ]
            failed = TrialScoreRow(trial_id=trial.trial_id, submission_id="d", error="RuntimeError", scored_at=NOW)
            record_trial_scores(connection, [*rows, failed])
            found = trials.shadow_comparison(connection, trial, limit=2)
        assert (found.compared, found.changed, found.errors) == (3, 1, 1)
        assert found.actions == {"allow": {"allow": 2, "hide": 1}}
        assert found.mean_differences == pytest.approx(dict.fromkeys(LABELS, 0.0) | {"toxic": (0.8 + 0.3) / 3})
        assert [(each.submission_id, each.shadow_action) for each in found.differences] == [
            ("b", "hide"),
            ("c", "allow"),
        ]
        assert found.differences[0].most == pytest.approx(0.8)

    @pytest.mark.parametrize(("kind", "outcome"), [("canary", "rolled_back"), ("ab", None)])
    def test_only_a_canary_is_rolled_back(
        self, registered: Engine, kind: Literal["canary", "ab"], outcome: str | None
    ) -> None:
        # Given a candidate that hides everything
        start(registered, kind)
        bad: dict[str, Any] = {"model_version": "v2", "action": "hide", "toxic": 0.95}
        with writing(registered) as connection:
            record_decisions(connection, [scored(f"c{n}", **bad) for n in range(200)])
            record_decisions(connection, [scored(f"b{n}") for n in range(199)])
        # Then nothing happens before there are enough decisions
        assert judge_canary(registered, "w1") is None
        with writing(registered) as connection:
            record_decisions(connection, [scored("b199")])
        # And then it does, once
        verdict = judge_canary(registered, "w1")
        assert newest(registered, kind).outcome == outcome
        assert judge_canary(registered, "w2") is None
        if outcome:
            assert verdict is not None and "toxic moved by +0.8500" in verdict
            assert (newest(registered).verdict, newest(registered).ended_by) == (verdict, "w1")


@pytest.fixture(scope="module")
def scorer(tiny_version: Path) -> Scorer:
    return load_scorer(tiny_version, device="cpu", threads=1)


@pytest.fixture(scope="module")
def candidate(tiny_version: Path, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return load_scorer(copy_version(tiny_version, tmp_path_factory.mktemp("v"), "v2"), device="cpu", threads=1)


@pytest.fixture
def database(engine: Engine) -> Engine:
    """Where trial 1 runs."""
    with writing(engine) as connection:
        prepare(connection, "tiny-1", "v2")
    activate(engine, "tiny-1")
    assert start(engine).trial_id == 1
    return engine


def comments(count: int) -> list[dict[str, Any]]:
    return [{"text": f"{n}: {words}"[:2_000]} for n, words in enumerate(read_csv(HOLDOUT).texts[:count])]


def wait(event: threading.Event) -> None:
    assert event.wait(60)


def failing(scorer: Scorer, *texts: str) -> Scorer:
    """The scorer, but it cannot take these texts; without any, none."""
    poison = [scorer.encode([each])[0][0] for each in texts]

    def fail(token_ids: Sequence[Sequence[int]]) -> None:
        if not poison or any(ids in poison for ids in token_ids):
            raise RuntimeError("out of order")

    return wrapped(scorer, before=fail)


class TestInThePipeline:
    def test_a_canary_decides_its_share_by_the_ids(self, scorer: Scorer, candidate: Scorer, database: Engine) -> None:
        # Given a canary of a quarter that cannot score two texts, of which the active version cannot score one
        share, sent = 0.25, comments(200)
        mine = [n for n in range(200) if chooses(1, share, f"m:{n}")]
        of_both, of_candidate = mine[0], mine[1]
        texts = [sent[n]["text"] for n in (of_both, of_candidate)]
        moderator = Moderator(failing(scorer, texts[0]), database)
        moderator.pipeline.try_out(LiveTrial(1, share, False, failing(candidate, *texts)))
        moderator.start()
        moderator.deliver("m", *sent)
        moderator.finish()
        # Then each is decided by the version that its id chooses; the active one takes over what the candidate cannot
        expected = {f"m:{n}": "v2" if n in mine else "tiny-1" for n in range(200)} | {f"m:{of_candidate}": "tiny-1"}
        del expected[f"m:{of_both}"]
        assert decided_by(database) == expected
        # And its failures are named by their class, the dead letter by the active version
        assert {key: row.error for key, row in trial_scores(database).items()} == {
            f"m:{of_both}": "RuntimeError",
            f"m:{of_candidate}": "RuntimeError",
        }
        with reading(database) as connection:
            (letter,) = connection.execute(text("SELECT dead_letter_id, detail FROM dead_letters")).all()
        assert letter.dead_letter_id == f"m:{of_both}"
        assert "version tiny-1 could not score it" in letter.detail
        assert moderator.pipeline.stats()["waiting"] == {"prepare": 0, "score": 0, "record": 0}

    @pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
    def test_a_candidate_whose_engine_dies_costs_nothing_and_is_freed(
        self, scorer: Scorer, candidate: Scorer, database: Engine
    ) -> None:
        # Given a canary that takes everything and can score nothing, also of one text in many comments
        broken = failing(candidate)
        freed = weakref.ref(broken.engine)
        moderator = Moderator(scorer, database)
        moderator.pipeline.try_out(LiveTrial(1, 1.0, False, broken))
        moderator.start()
        moderator.deliver("m", *comments(30), *[{"text": "the same"}] * 10)
        moderator.finish()
        # Then all are decided by the active version
        assert decided_by(database) == {f"m:{n}": "tiny-1" for n in range(40)}
        assert len(trial_scores(database)) == 40
        # And it is out of memory when its trial is over
        moderator.pipeline.try_out(None)
        del broken
        moderator.deliver("later", *comments(3))
        moderator.finish()

        def gone() -> bool:
            gc.collect()
            return freed() is None

        wait_until(gone, what="the candidate's engine being freed")

    @pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
    def test_a_shadow_scores_what_others_decide_and_comes_last(
        self, scorer: Scorer, candidate: Scorer, database: Engine
    ) -> None:
        # Given a shadow of a part that moves every score, and fails on one text
        passes: list[str] = []  # of "active" and "shadow", in their order

        def shift(token_ids: Sequence[Sequence[int]], scores: Scores) -> None:
            scores[:] = 0.99

        sent = comments(60)
        mine = [n for n in range(60) if chooses(1, 0.5, f"m:{n}")]
        shadow = wrapped(candidate, before=lambda ids: passes.append("shadow"), after=shift)
        moderator = Moderator(wrapped(scorer, before=lambda ids: passes.append("active")), database)
        moderator.pipeline.try_out(LiveTrial(1, 0.5, True, failing(shadow, sent[mine[0]]["text"])))
        moderator.deliver("m", *sent)
        moderator.start()
        moderator.finish()
        # Then the active version decides all of it, before the shadow has its turn
        assert decided_by(database) == {f"m:{n}": "tiny-1" for n in range(60)}
        wait_until(lambda: len(trial_scores(database)) == len(mine), what="the shadow's scores")
        assert passes == sorted(passes)
        # And the shadow's scores are kept with what they would have led to, or why there are none
        found = trial_scores(database)
        assert set(found) == {f"m:{n}" for n in mine}
        assert (found[f"m:{mine[0]}"].error, found[f"m:{mine[0]}"].toxic) == ("RuntimeError", None)
        row = found[f"m:{mine[1]}"]
        assert [getattr(row, label) for label in LABELS] == pytest.approx([0.99] * 6)
        assert row.action == POLICY.decide("default", [0.99] * 6).action

    @pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
    def test_a_shadow_says_nothing_of_what_another_policy_decided(
        self, scorer: Scorer, candidate: Scorer, database: Engine
    ) -> None:
        # Given an active version that is busy, and a shadow that waits for its turn with the same comments
        may_go_on, encoder = threading.Event(), CountingEncoder(candidate)
        moderator = Moderator(wrapped(scorer, before=lambda ids: wait(may_go_on)), database)
        moderator.pipeline.try_out(LiveTrial(1, 1.0, True, replace(candidate, text_encoder=encoder)))
        moderator.start()
        moderator.deliver("before", *comments(20))
        # What is prepared waits for sure when something after it is prepared; of that itself nothing is sure.
        moderator.deliver("last", {"text": "the last one"})
        wait_until(lambda: encoder.texts == 21, what="preparation for the shadow")
        # When another policy takes over
        moderator.pipeline.exchange_policy(parse_policy("communities: {default: {toxic: {remove: 0.0}}}"))
        may_go_on.set()
        moderator.finish()
        moderator.deliver("after", *comments(20))
        moderator.finish()
        # Then the shadow speaks of what came since, by that policy
        wanted = {f"after:{n}" for n in range(20)}
        wait_until(lambda: set(trial_scores(database)) >= wanted, what="the shadow's scores")
        found = trial_scores(database)
        assert set(found) - {"last:0"} == wanted
        assert {row.action for row in found.values()} == {"remove"}
