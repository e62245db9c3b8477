"""Every question asked of the database, on SQLite and on PostgreSQL."""

import random
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, delete, insert, text
from sqlalchemy.exc import DataError

from config.identity import TEXT_HASH_CHARS, SubmissionId, refused_id
from config.names import LABELS, Action
from db import dead_letters, queries
from db.activations import ActiveChanged
from db.queries import (
    NoSuchDecision,
    NoSuchRun,
    NoSuchVersion,
    Recorded,
    RunIsOver,
    ScoredSubmission,
    Totals,
    VersionConflict,
    record_decisions,
)
from db.rows import STREAM_ROWS
from db.session import is_outage, open_database, reading, writing
from db.tables import Decision, Submission
from tests.integration.rows import NOON, letter, minutes, prepare, scored, set_aside
from tests.services import locks_waited_for, wait_until


def ask(engine: Engine, question: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """The answer in a read transaction of its own, all of it where it streams."""
    with reading(engine) as connection:
        answer = question(connection, *args, **named)
        return list(answer) if hasattr(answer, "__next__") else answer


def tell(engine: Engine, statement: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """The same in a write transaction, which is committed."""
    with writing(engine) as connection:
        return statement(connection, *args, **named)


def record(engine: Engine, *rows: ScoredSubmission) -> Recorded:
    with writing(engine) as connection:
        prepare(connection)
        return record_decisions(connection, rows)


def review(engine: Engine, submission_id: str, action: str = "hide", **labels: bool) -> int:
    with writing(engine) as connection:
        return queries.add_review(
            connection, submission_id=submission_id, action=action, labels=labels, reviewer="mod", note=None, now=NOON
        )


def outcome(recorded: Recorded) -> tuple[list[int], list[int], list[int]]:
    return sorted(recorded.recorded), sorted(recorded.repeated), sorted(recorded.conflicts)


class TestRecordingDecisions:
    def test_every_column_comes_back_as_it_was_given(self, engine: Engine) -> None:
        # Given a submission with every optional column set
        row = scored(
            "1",
            text="Ünïcode 🙂 — and 'quotes'",
            author="me",
            language="en",
            context={"thread": [1, 2.5, None], "nested": {"é": True}},
            created_at=minutes(-60),
            action=Action.HIDE,
            fired_label="threat",
            fired_threshold=0.25,
            truncated=True,
        )
        record(engine, row)
        # Then its result says the same, and nobody reviewed it
        result = ask(engine, queries.result, "1")
        given = {name: value for name, value in asdict(row).items() if name != "name"}
        assert {name: getattr(result, name) for name in given} == given
        assert result.model_action == "hide"
        assert result.scores == {label: getattr(row, label) for label in LABELS}
        assert (result.reviewer, result.note, result.reviewed_at) == (None, None, None)

    def test_what_was_not_given_is_null(self, engine: Engine) -> None:
        record(engine, scored("1"))
        with reading(engine) as connection:
            found = connection.execute(text("SELECT count(*) FROM submissions WHERE context IS NULL")).scalar()
        assert found == 1

    def test_a_repetition_writes_nothing(self, engine: Engine) -> None:
        # Given a submission that was decided
        record(engine, scored("1", toxic=0.3))
        # When it comes again beside a new one, scored differently
        became = record(engine, scored("1", toxic=0.9), scored("2"))
        # Then only the new one is written, and the first decision stays
        assert outcome(became) == ([1], [0], [])
        assert ask(engine, queries.result, "1").toxic == 0.3

    def test_the_same_id_with_another_text_is_a_conflict(self, engine: Engine) -> None:
        record(engine, scored("1", text="first"))
        became = record(engine, scored("1", text="second"))
        assert outcome(became) == ([], [], [0])
        assert ask(engine, queries.result, "1").text == "first"

    def test_the_first_of_an_id_within_one_batch_counts(self, engine: Engine) -> None:
        became = record(
            engine,
            scored("1", text="a"),
            scored("2"),
            scored("1", text="b"),
            scored("1", text="a"),
            scored("1", text="b"),
        )
        assert outcome(became) == ([0, 1], [3], [2, 4])
        assert ask(engine, queries.result, "1").text == "a"

    def test_no_rows_are_no_work(self, engine: Engine) -> None:
        assert outcome(record(engine)) == ([], [], [])

    def test_a_large_batch(self, engine: Engine) -> None:
        # Given more rows than a statement can have parameters, in no order
        rows = [scored(f"{n}") for n in range(5000)]
        random.Random(0).shuffle(rows)
        assert len(record(engine, *rows).recorded) == 5000
        # When half of them come again among as many new ones
        again = record(engine, *rows[:2500], *(scored(f"new {n}") for n in range(2500)))
        # Then each is what it is, by its place
        assert outcome(again) == (list(range(2500, 5000)), list(range(2500)), [])

    def test_a_thousand_of_every_kind(self, engine: Engine) -> None:
        # Given submissions that were decided
        record(engine, *(scored(f"{n}") for n in range(500)))
        # When they come again, every fifth with another text, shuffled among new ones that come twice
        rows = [scored(f"{n}", text="another" if n % 5 == 0 else None) for n in range(500)]
        rows += [scored(f"new {n % 250}") for n in range(500)]
        random.Random(0).shuffle(rows)
        became = record(engine, *rows)
        # Then each is what it is, by its place
        recorded = {rows[i].submission_id for i in became.recorded}
        assert recorded == {f"new {n}" for n in range(250)}
        assert {rows[i].submission_id for i in became.conflicts} == {f"{n}" for n in range(0, 500, 5)}
        assert len(became.repeated) == 400 + 250
        assert became.recorded | became.repeated | became.conflicts == set(range(1000))
        assert ask(engine, queries.totals).decisions == 750

    @pytest.mark.parametrize("large_number", [False, True])
    def test_the_rows_are_those_that_sqlalchemy_would_have_written(self, engine: Engine, large_number: bool) -> None:
        # Given rows with what is easily written in two ways, and their like without
        row = scored(
            "1",
            text='"quotes" \\ \x01\r\n\t \u2028 ünïcode 🙂 \\u0041',
            author="",
            language="en",
            context={"é": [1, 2.5, -0.0, None, True, {}], "\\": "\x7f"},
            created_at=datetime(2026, 11, 22, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=-3, minutes=-30))),
            submitted_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            toxic=float(np.float32(0.1)),
            severe_toxic=5e-324,
            obscene=1 / 3,
            threat=1.0,
            insult=0.0,
            identity_hate=1e-7,
            fired_label="threat",
            fired_threshold=0.1,
            truncated=True,
            queue_ms=1e16,
        )
        rows = [row, scored("2"), replace(scored("3"), text=None, context={})]
        if large_number:
            rows.append(scored("4", context={"large": 10**30, "é": 0.1}))
        # When they are recorded, and written again by an insert of every column
        record(engine, *rows)
        recorded = ask(engine, every_stored_value)
        with writing(engine) as connection:
            connection.execute(delete(Decision))
            connection.execute(delete(Submission))
            for table in (Submission, Decision):
                names = [each.name for each in table.__table__.c if hasattr(ScoredSubmission, each.name)]
                connection.execute(insert(table), [{name: getattr(row, name) for name in names} for row in rows])
        # Then the database holds the same, to the last bit
        assert recorded == ask(engine, every_stored_value)

    def test_a_row_that_the_database_refuses_keeps_its_batch_out(self, postgres_url: str) -> None:
        engine = open_database(postgres_url)
        # Given a text that PostgreSQL cannot store, between others
        with pytest.raises(DataError) as refused:
            record(engine, scored("1"), scored("2", text="a\x00b"), scored("3"))
        # Then nothing is written, and it is known that trying again would not help
        assert not is_outage(refused.value)
        assert ask(engine, queries.totals).decisions == 0
        engine.dispose()

    def test_workers_recording_the_same_submissions_at_once_write_each_once(
        self, engine: Engine, database_url: str
    ) -> None:
        # Given several workers that all record the same submissions, each in an order of its own
        ids = [f"{n}" for n in range(200)]
        recorded: list[str] = []
        repeated: list[str] = []
        errors: list[BaseException] = []
        tell(engine, prepare)

        def work(seed: int) -> None:
            mine = random.Random(seed).sample(ids, len(ids))
            own = open_database(database_url)
            try:
                for start in range(0, len(mine), 20):
                    batch = [scored(submission_id) for submission_id in mine[start : start + 20]]
                    became = tell(own, record_decisions, batch)
                    recorded.extend(batch[i].submission_id for i in became.recorded)
                    repeated.extend(batch[i].submission_id for i in became.repeated)
            except BaseException as error:
                errors.append(error)
            finally:
                own.dispose()

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Then each submission is written by exactly one of them, and the others are told so
        assert errors == []
        assert sorted(recorded) == sorted(ids)
        assert sorted(repeated) == sorted(ids * 3)
        assert ask(engine, queries.totals).decisions == 200

    @pytest.mark.parametrize("first_commits", [True, False])
    def test_a_worker_waits_for_another_that_is_writing_the_same(self, postgres_url: str, first_commits: bool) -> None:
        # Given a worker that has written a submission and not yet committed
        engine = open_database(postgres_url)
        tell(engine, prepare)
        became: list[Recorded] = []
        second = threading.Thread(
            target=lambda: became.append(tell(engine, record_decisions, [scored("1", toxic=0.9)]))
        )
        with engine.connect() as first:
            record_decisions(first, [scored("1", toxic=0.3)])
            # When another records the same one
            second.start()
            wait_until(lambda: ask(engine, locks_waited_for), what="the second worker waiting")
            if first_commits:
                first.commit()
            else:
                first.rollback()
        second.join()
        # Then it finds it done where the first committed, and does it itself where the first did not
        assert outcome(became[0]) == (([], [0], []) if first_commits else ([0], [], []))
        assert ask(engine, queries.result, "1").toxic == (0.3 if first_commits else 0.9)
        engine.dispose()

    def test_without_the_policy_nothing_is_written(self, engine: Engine) -> None:
        with pytest.raises(Exception, match=r"(?i)foreign key"):
            tell(engine, record_decisions, [scored("1", policy_version="unheard of")])
        assert ask(engine, queries.result, "1") is None


def every_stored_value(connection: Any) -> list[tuple[Any, ...]]:
    """As the driver hands them out, with no word from the tables' column types; but for the order of recording."""
    stored = []
    for table in (Submission, Decision):
        columns = ", ".join(each.name for each in table.__table__.c if each.name != "position")
        rows = connection.execute(text(f"SELECT {columns} FROM {table.__tablename__} ORDER BY submission_id"))
        stored += [tuple(row) for row in rows]
    return stored


class TestDeadLetters:
    def test_the_newest_come_first_and_a_redelivery_adds_none(self, engine: Engine) -> None:
        # Given letters, one of which comes again with other words, in the same batch and in a later one
        old, new = letter("old"), letter("new", payload=b"\x00\xff", received_at=minutes(1))
        tell(engine, dead_letters.record, [new, old, replace(old, detail="again")])
        tell(engine, dead_letters.record, [replace(new, detail="again")])
        # Then each is there once, as it first came
        assert ask(engine, dead_letters.newest, limit=10) == [new, old]
        assert ask(engine, dead_letters.newest, limit=1) == [new]

    def test_no_letters_are_no_work(self, engine: Engine) -> None:
        tell(engine, dead_letters.record, [])
        assert ask(engine, dead_letters.newest, limit=10) == []


def of_text(submission_id: str, text: str | None = None) -> SubmissionId:
    """As `submit` returns it."""
    row = scored(submission_id, text)
    return SubmissionId(submission_id, row.community, row.text_sha256[:TEXT_HASH_CHARS])


class TestOutcomes:
    def test_each_is_decided_dead_or_absent(self, engine: Engine) -> None:
        # Given a decision, a dead letter, a letter of what could not be read, and another text under a decided id
        record(engine, scored("decided"), scored("both"))
        tell(engine, dead_letters.record, [set_aside("dead"), letter(refused_id("m:0")), set_aside("both", "edited")])
        # When they are asked for by their ids, then whatever stands under an id counts
        found = ask(engine, queries.outcomes, ["decided", "dead", "m:0", "both", "on its way"])
        assert found == ["decided", "dead", "dead", "decided", None]
        # And as submit returned them, it is what became of each text
        asked = [of_text("both"), of_text("both", "edited"), of_text("both", "not come yet"), of_text("dead")]
        assert ask(engine, queries.outcomes, asked) == ["decided", "dead", None, "dead"]

    def test_more_ids_than_one_statement_takes(self, engine: Engine) -> None:
        ids = [f"{n}" for n in range(1201)]
        record(engine, *map(scored, ids))
        assert ask(engine, queries.outcomes, [*ids, "another"]) == ["decided"] * len(ids) + [None]


class TestResults:
    @pytest.fixture
    def decided(self, engine: Engine) -> Engine:
        record(
            engine,
            scored("1", community="news", author="ann", toxic=0.2),
            scored("2", community="news", comment_id="c2", toxic=0.8, action="hide", fired_label="toxic"),
            scored("3", author="ann", threat=0.9, action="remove", fired_label="threat", decided_at=minutes(5)),
            scored("4", model_version="v2", toxic=0.5, decided_at=minutes(10)),
        )
        return engine

    def test_filters_and_orders(self, decided: Engine) -> None:
        expected: list[tuple[dict[str, Any], list[str]]] = [
            ({}, ["4", "3", "2", "1"]),
            ({"order": "oldest"}, ["1", "2", "3", "4"]),
            ({"order": "toxic"}, ["2", "4", "1", "3"]),
            ({"order": "threat", "limit": 1}, ["3"]),
            ({"limit": 2}, ["4", "3"]),
            ({"community": "news"}, ["2", "1"]),
            ({"comment_id": "c2"}, ["2"]),
            ({"author": "ann"}, ["3", "1"]),
            ({"action": "hide"}, ["2"]),
            ({"label": "threat"}, ["3"]),
            ({"label": "toxic", "min_score": 0.5}, ["4", "2"]),
            ({"min_score": 0.8}, ["3", "2"]),
            ({"model_version": "v2"}, ["4"]),
            ({"since": minutes(5)}, ["4", "3"]),
            ({"until": minutes(5)}, ["2", "1"]),
            ({"since": minutes(1), "until": minutes(6), "author": "ann"}, ["3"]),
            ({"author": "nobody"}, []),
        ]
        for asked, ids in expected:
            assert [result.submission_id for result in ask(decided, queries.results, **asked)] == ids, asked

    def test_a_review_changes_the_action_that_is_found(self, decided: Engine) -> None:
        # Given a hidden comment that a reviewer first removed and then allowed
        review(decided, "2", action="remove")
        review(decided, "2", action="allow")
        # Then it is found under what holds now, beside what the model said
        assert ask(decided, queries.results, action="hide") == []
        found = ask(decided, queries.results, action="allow", community="news", comment_id="c2")
        assert [(result.action, result.model_action, result.reviewer) for result in found] == [("allow", "hide", "mod")]

    def test_no_decision_is_no_result(self, decided: Engine) -> None:
        assert ask(decided, queries.result, "5") is None

    def test_a_long_answer_is_streamed(self, decided: Engine) -> None:
        # Given more results than are held in memory at a time
        record(decided, *(scored(f"more {n}") for n in range(2 * STREAM_ROWS + 1)))
        # Then all of them come, and taking the first few is enough
        assert len({result.submission_id for result in ask(decided, queries.results)}) == 2 * STREAM_ROWS + 5
        with reading(decided) as connection:
            assert next(queries.results(connection)).submission_id == "4"

    @pytest.mark.parametrize("asked", [{"label": "rude"}, {"order": "rude"}])
    def test_an_unknown_label_is_refused(self, decided: Engine, asked: dict[str, str]) -> None:
        with pytest.raises(ValueError, match=r"'rude'.*identity_hate"):
            ask(decided, queries.results, **asked)

    def test_totals(self, decided: Engine) -> None:
        review(decided, "1")
        tell(decided, dead_letters.record, [letter("5")])
        assert ask(decided, queries.totals) == Totals(
            decisions=4, actions={"allow": 2, "hide": 1, "remove": 1}, dead_letters=1, reviews=1, pending=0
        )

    def test_totals_of_nothing(self, engine: Engine) -> None:
        assert ask(engine, queries.totals) == Totals(decisions=0, actions={}, dead_letters=0, reviews=0, pending=0)


class TestReviews:
    def test_a_review_needs_a_decision(self, engine: Engine) -> None:
        with pytest.raises(NoSuchDecision, match="'9'"):
            review(engine, "9")

    def test_a_review_speaks_of_known_labels_only(self, engine: Engine) -> None:
        record(engine, scored("1"))
        with pytest.raises(ValueError, match="unknown labels rude; "):
            review(engine, "1", rude=True)


class TestVersions:
    def test_registering_again_changes_nothing(self, engine: Engine) -> None:
        manifest = {"version": "v2", "parent": "v1", "thresholds": {"toxic": 0.1}, "labels": ("toxic",)}
        tell(engine, queries.register_version, manifest, NOON)
        tell(engine, queries.register_version, manifest, minutes(1))
        row = ask(engine, queries.version, "v2")
        assert (row.version, row.parent, row.registered_at) == ("v2", "v1", NOON)
        assert row.manifest == manifest | {"labels": ["toxic"]}

    def test_another_manifest_under_the_same_name_is_a_conflict(self, engine: Engine) -> None:
        tell(engine, queries.register_version, {"version": "v1", "weights": "a"}, NOON)
        with pytest.raises(VersionConflict, match="'v1'"):
            tell(engine, queries.register_version, {"version": "v1", "weights": "b"}, NOON)
        assert ask(engine, queries.version, "v1").manifest["weights"] == "a"

    def test_the_newest_comes_first(self, engine: Engine) -> None:
        for minute, name in enumerate(["b", "c", "a"]):
            tell(engine, queries.register_version, {"version": name}, minutes(minute))
        assert [row.version for row in ask(engine, queries.versions)] == ["a", "c", "b"]

    def test_a_version_never_registered_is_not_there(self, engine: Engine) -> None:
        assert ask(engine, queries.version, "v9") is None


class TestActivations:
    @pytest.fixture
    def registered(self, engine: Engine) -> Engine:
        tell(engine, prepare, "v1", "v2", "v3")
        return engine

    def activate(self, engine: Engine, version: str) -> int:
        seen = ask(engine, queries.active)
        return int(tell(engine, queries.activate, version=version, instead_of=seen, by="me", reason="to see", now=NOON))

    def test_before_the_first_nothing_is_active(self, registered: Engine) -> None:
        assert ask(registered, queries.active) is None
        assert ask(registered, queries.previous_version) is None

    def test_the_newest_row_is_the_active_one(self, registered: Engine) -> None:
        self.activate(registered, "v1")
        newest = self.activate(registered, "v2")
        row = ask(registered, queries.active)
        assert (row.activation_id, row.version, row.activated_by) == (newest, "v2", "me")
        assert (row.activated_at, row.reason) == (NOON, "to see")
        assert [row.version for row in ask(registered, queries.activations, limit=5)] == ["v2", "v1"]

    def test_a_version_never_registered_cannot_be_active(self, registered: Engine) -> None:
        with pytest.raises(NoSuchVersion, match="'v9'"):
            self.activate(registered, "v9")

    def test_an_activation_replaces_only_what_its_caller_saw(self, registered: Engine) -> None:
        first = self.activate(registered, "v1")
        seen = ask(registered, queries.active)
        newest = self.activate(registered, "v2")
        # When somebody who saw the first activation, or none, activates another version or rolls back
        stale: dict[str, Any] = {"by": "bob", "reason": "late", "now": NOON}
        for instead_of in (seen, None):
            with pytest.raises(ActiveChanged):
                tell(registered, queries.activate, version="v3", instead_of=instead_of, **stale)
            with pytest.raises(ActiveChanged):
                tell(registered, queries.roll_back, instead_of=instead_of, to=None, **stale)
        # Then nothing was written
        assert [row.activation_id for row in ask(registered, queries.activations, limit=5)] == [newest, first]

    def test_the_previous_version_is_the_last_other_one(self, registered: Engine) -> None:
        # Given a version that was activated twice in a row
        for version in ("v1", "v2", "v3", "v3"):
            self.activate(registered, version)
        # Then the one before it is the last one that differs
        assert ask(registered, queries.previous_version) == "v2"
        # and after going back, the one before that
        self.activate(registered, "v2")
        assert ask(registered, queries.previous_version) == "v1"

    def test_a_version_that_no_worker_could_load_is_no_previous_one(self, registered: Engine) -> None:
        # Given one version that loaded, one that was refused, one that was refused at first, and the active one
        outcomes: list[tuple[str, list[str | None]]] = [
            ("v1", [None]),
            ("v2", ["damaged"]),
            ("v1", ["not there yet", None]),
            ("v2", ["damaged", "damaged"]),
            ("v3", [None]),
        ]
        for version, errors in outcomes:
            activation = self.activate(registered, version)
            for error in errors:
                load = {"activation_id": activation, "worker": "a", "version": "v1", "error": error, "now": NOON}
                tell(registered, queries.record_load, **load)
        # Then going back leads to the newest that worked
        assert ask(registered, queries.previous_version) == "v1"

    def test_the_only_version_has_no_previous_one(self, registered: Engine) -> None:
        self.activate(registered, "v1")
        self.activate(registered, "v1")
        assert ask(registered, queries.previous_version) is None

    def test_each_workers_newest_word_on_an_activation(self, registered: Engine) -> None:
        # Given two activations, and a worker that first refused the second
        first, second = self.activate(registered, "v1"), self.activate(registered, "v2")

        def load(activation: int, worker: str, version: str, error: str | None = None) -> None:
            tell(
                registered,
                queries.record_load,
                activation_id=activation,
                worker=worker,
                version=version,
                error=error,
                now=NOON,
            )

        load(first, "a", "v1")
        load(second, "b", "v1", error="sha256 of model.safetensors differs")
        load(second, "a", "v1", error="not there yet")
        load(second, "a", "v2")
        # Then each worker is heard once, by its newest word
        assert [(row.worker, row.version, row.error) for row in ask(registered, queries.loads, second)] == [
            ("a", "v2", None),
            ("b", "v1", "sha256 of model.safetensors differs"),
        ]
        assert [row.worker for row in ask(registered, queries.loads, first)] == ["a"]


class TestTrainingRuns:
    @pytest.fixture
    def requested(self, engine: Engine) -> Engine:
        self.request(engine, "run")
        return engine

    def request(self, engine: Engine, run_id: str, minute: float = 0) -> None:
        tell(
            engine,
            queries.request_run,
            run_id=run_id,
            requested_by="me",
            overrides={"max_rows": 400},
            now=minutes(minute),
        )

    def test_a_run_from_its_request_to_its_verdict(self, requested: Engine) -> None:
        # Given a requested run
        run = ask(requested, queries.run, "run")
        assert (run.state, run.requested_at, run.requested_by) == ("requested", NOON, "me")
        assert (run.overrides, run.metrics, run.started_at) == ({"max_rows": 400}, None, None)
        # When it is claimed
        assert tell(requested, queries.claim_run, "run", minutes(1))
        run = ask(requested, queries.run, "run")
        assert (run.state, run.started_at, run.heartbeat_at) == ("running", minutes(1), minutes(1))
        # and tells how far it is
        tell(requested, queries.report_progress, "run", now=minutes(2), phase="training", step=1, total_steps=9)
        tell(requested, queries.report_progress, "run", now=minutes(3), step=2, loss=0.5, seconds_left=7.0)
        run = ask(requested, queries.run, "run")
        assert (run.phase, run.step, run.total_steps, run.loss, run.seconds_left) == ("training", 2, 9, 0.5, 7.0)
        assert run.heartbeat_at == minutes(3)
        # and gets its verdict
        verdict = {"state": "promoted", "reason": "not worse", "version": "v2", "metrics": {"auc": 0.98}}
        tell(requested, queries.finish_run, "run", now=minutes(4), **verdict)
        # Then all of it is there
        run = ask(requested, queries.run, "run")
        assert {name: getattr(run, name) for name in verdict} == verdict
        assert run.finished_at == minutes(4)

    def test_a_request_twice_is_one_run(self, requested: Engine) -> None:
        tell(requested, queries.claim_run, "run", NOON)
        self.request(requested, "run")
        assert [run.state for run in ask(requested, queries.runs, limit=10)] == ["running"]

    def test_the_newest_runs_come_first(self, requested: Engine) -> None:
        self.request(requested, "later", minute=1)
        assert [run.run_id for run in ask(requested, queries.runs, limit=10)] == ["later", "run"]
        assert [run.run_id for run in ask(requested, queries.runs, limit=1)] == ["later"]

    def test_one_of_many_callers_claims_a_run(self, requested: Engine) -> None:
        # Given several trainers that got the same message
        together = threading.Barrier(5)
        claims: list[bool] = []

        def claim() -> None:
            together.wait()
            claims.append(tell(requested, queries.claim_run, "run", NOON))

        threads = [threading.Thread(target=claim) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Then one of them trains
        assert sorted(claims) == [False, False, False, False, True]

    def test_a_run_never_requested_cannot_be_claimed_or_spoken_for(self, engine: Engine) -> None:
        assert not tell(engine, queries.claim_run, "nobody's", NOON)
        assert ask(engine, queries.run, "nobody's") is None
        with pytest.raises(NoSuchRun, match="nobody's"):
            tell(engine, queries.report_progress, "nobody's", now=NOON, step=1)

    def test_a_silent_run_is_given_up(self, requested: Engine) -> None:
        # Given a run that was last heard of long ago, one heard of just now, and one that waits to be claimed
        self.request(requested, "alive")
        self.request(requested, "waiting")
        tell(requested, queries.claim_run, "run", minutes(1))
        tell(requested, queries.claim_run, "alive", minutes(1))
        # When the silent ones are looked for
        last_seen = ask(requested, queries.heartbeats)
        assert set(last_seen) == {"run", "alive"}
        # and one of them speaks before it is given up
        tell(requested, queries.report_progress, "alive", now=minutes(9))
        given_up = [
            run_id
            for run_id, heartbeat_at in last_seen.items()
            if tell(requested, queries.fail_abandoned_run, run_id, heartbeat_at=heartbeat_at, now=minutes(10))
        ]
        # Then only the first has failed, and says why
        assert given_up == ["run"]
        run = ask(requested, queries.run, "run")
        assert (run.state, run.finished_at) == ("failed", minutes(10))
        assert run.reason == "the training process stopped without a word"
        assert ask(requested, queries.run, "alive").state == "running"
        assert ask(requested, queries.run, "waiting").state == "requested"

    def test_a_run_given_up_promotes_nothing(self, requested: Engine) -> None:
        # Given a run that was given up while its process still worked
        tell(requested, prepare, "v2")
        tell(requested, queries.claim_run, "run", NOON)
        tell(requested, queries.fail_abandoned_run, "run", heartbeat_at=NOON, now=minutes(5))
        # When the process speaks again, it is told
        with pytest.raises(RunIsOver, match="it is failed"):
            tell(requested, queries.report_progress, "run", now=minutes(6), step=3)
        # and where it would promote its version in one transaction with the verdict, neither is written
        with pytest.raises(RunIsOver), writing(requested) as connection:
            queries.activate(
                connection,
                instead_of=queries.active(connection),
                version="v2",
                by="trainer",
                reason="better",
                now=minutes(7),
            )
            queries.finish_run(connection, "run", state="promoted", reason="better", version="v2", now=minutes(7))
        assert ask(requested, queries.active) is None
        assert ask(requested, queries.run, "run").state == "failed"

    def test_a_run_that_cannot_even_start_fails(self, requested: Engine) -> None:
        tell(requested, queries.finish_run, "run", state="failed", reason="no such file", now=NOON)
        assert ask(requested, queries.run, "run").state == "failed"
        assert not tell(requested, queries.claim_run, "run", NOON)
