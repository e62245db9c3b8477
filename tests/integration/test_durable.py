"""Durable submissions in the database: pending, then decided or dead, once, whoever comes first."""

import random
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from datetime import timedelta

import pytest
from sqlalchemy import Engine, select, text, update

from config.identity import id_of_text, refused_id
from db import dead_letters, queries
from db.durable import (
    PendingSubmission,
    database_time,
    overdue,
    overdue_queues,
    record_pending,
    renew,
    take_sweep_lock,
)
from db.queries import Recorded, record_decisions
from db.session import open_database, reading, writing
from db.tables import Submission
from tests.integration.rows import NOON, letter, minutes, pending, prepare, scored, set_aside
from tests.services import wait_until


@pytest.fixture
def database(engine: Engine) -> Engine:
    with writing(engine) as connection:
        prepare(connection)
    return engine


def submit(engine: Engine, *rows: PendingSubmission) -> list[str]:
    with writing(engine) as connection:
        return record_pending(connection, rows)


def decide(engine: Engine, *rows: queries.ScoredSubmission) -> Recorded:
    with writing(engine) as connection:
        return record_decisions(connection, rows)


def outcome(recorded: Recorded) -> tuple[list[int], list[int], list[int]]:
    return sorted(recorded.recorded), sorted(recorded.repeated), sorted(recorded.conflicts)


def states(engine: Engine) -> dict[str, str]:
    with reading(engine) as connection:
        return dict(connection.execute(select(Submission.submission_id, Submission.state)).all())


def decided_ids(engine: Engine) -> list[str]:
    with reading(engine) as connection:
        return sorted(connection.execute(text("SELECT submission_id FROM decisions")).scalars())


class TestSubmitting:
    def test_every_column_is_written_as_it_was_given(self, engine: Engine) -> None:
        # Given a submission with every column set, one with a number that fits no machine word, and a bare one
        full = pending(
            "1",
            text="Ünïcode 🙂 — and 'quotes'",
            author="me",
            language="en",
            context={"thread": [1, 2.5, None]},
            created_at=minutes(-60),
            queue="toxicity.bulk",
            expires_at=minutes(60),
        )
        rows = [full, pending("2", context={"large": 10**30}), pending("3")]
        # When they are submitted, and again
        assert submit(engine, *rows) == []
        assert submit(engine, *rows) == []
        # Then each is there once, as it was given, and waits
        columns = [getattr(Submission, field.name) for field in fields(PendingSubmission)]
        with reading(engine) as connection:
            written = [dict(row) for row in connection.execute(select(*columns).order_by("submission_id")).mappings()]
            assert queries.totals(connection).pending == 3
        assert written == [asdict(row) for row in rows]
        assert set(states(engine).values()) == {"pending"}

    def test_an_id_that_belongs_to_another_text_is_named(self, database: Engine) -> None:
        # Given submissions that wait, are decided, are dead, and were erased
        submit(database, pending("waits"), pending("dead"), pending("erased"))
        decide(database, scored("decided"), scored("erased"))
        with writing(database) as connection:
            dead_letters.record(connection, [set_aside("dead")])
            connection.execute(update(Submission).where(Submission.submission_id == "erased").values(erased_at=NOON))
        # When each of their ids comes with another text, and a new one with two
        taken = ["dead", "decided", "erased", "new", "waits"]
        again = [pending(known, text="another") for known in taken]
        # Then all are named: an erased text leaves its hash
        assert sorted(submit(database, *again, pending("new"))) == taken


class TestDeciding:
    def test_a_pending_submission_is_decided_once(self, database: Engine) -> None:
        # Given pending submissions, some of which became dead letters or were erased meanwhile
        submit(database, *map(pending, ("1", "2", "dead", "erased")))
        with writing(database) as connection:
            dead_letters.record(connection, [set_aside("dead")])
        decide(database, scored("erased"))
        with writing(database) as connection:
            connection.execute(update(Submission).where(Submission.submission_id == "erased").values(erased_at=NOON))
        # When a worker records them, one with another text, and one that was never pending
        rows = [
            scored("1"),
            scored("2", text="another"),
            scored("new"),
            scored("dead", text="another"),
            scored("erased", text="another"),
            scored("dead"),
        ]
        # Then each becomes what it is, by its place, and nobody's text or way is changed
        assert outcome(decide(database, *rows)) == ([0, 2], [5], [1, 3, 4])
        assert states(database) == {
            "1": "decided",
            "2": "pending",
            "dead": "dead",
            "erased": "decided",
            "new": "decided",
        }
        assert decided_ids(database) == ["1", "erased", "new"]
        # And a second time there is nothing more to decide
        assert outcome(decide(database, *rows)) == ([], [0, 2, 5], [1, 3, 4])
        assert decided_ids(database) == ["1", "erased", "new"]

    def test_workers_recording_the_same_pending_submissions_decide_each_once(
        self, database: Engine, database_url: str
    ) -> None:
        # Given pending submissions and new ones that several workers record at once, each in an order of its own
        ids = [f"{n}" for n in range(200)]
        submit(database, *map(pending, ids[::2]))

        def work(seed: int) -> list[str]:
            mine = random.Random(seed).sample(ids, len(ids))
            own = open_database(database_url)
            recorded = []
            for start in range(0, len(mine), 20):
                batch = [scored(submission_id) for submission_id in mine[start : start + 20]]
                recorded += [batch[index].submission_id for index in decide(own, *batch).recorded]
            own.dispose()
            return recorded

        with ThreadPoolExecutor(4) as pool:
            recorded = [submission_id for each in pool.map(work, range(4)) for submission_id in each]
        # Then each is decided by exactly one of them
        assert sorted(recorded) == sorted(ids)
        assert decided_ids(database) == sorted(ids)
        assert set(states(database).values()) == {"decided"}

    @pytest.mark.parametrize("first_commits", [True, False])
    def test_a_worker_waits_for_another_that_is_deciding_the_same(self, postgres_url: str, first_commits: bool) -> None:
        # Given a worker that has decided a pending submission and not yet committed
        engine = open_database(postgres_url)
        with writing(engine) as connection:
            prepare(connection)
        submit(engine, pending("1"))
        became: list[Recorded] = []
        second = threading.Thread(target=lambda: became.append(decide(engine, scored("1", toxic=0.9))))
        with engine.connect() as first:
            record_decisions(first, [scored("1", toxic=0.3)])
            # When another records the same one
            second.start()
            waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watching:
                wait_until(lambda: watching.execute(waiting).scalar(), what="the second worker waiting")
            if first_commits:
                first.commit()
            else:
                first.rollback()
        second.join()
        # Then it finds it done where the first committed, and does it itself where the first did not
        assert outcome(became[0]) == (([], [0], []) if first_commits else ([0], [], []))
        with reading(engine) as connection:
            result = queries.result(connection, "1")
        assert result is not None
        assert result.toxic == (0.3 if first_commits else 0.9)
        engine.dispose()

    def test_a_dead_letter_ends_the_wait(self, database: Engine) -> None:
        # Given pending submissions, one of them decided
        submit(database, *map(pending, ("decided", "dead", "waits")))
        decide(database, scored("decided"))
        # When letters are recorded of them, of another text under the same id, and of what could not be read
        other = set_aside("waits", "another")
        beside = id_of_text("waits", other.text_sha256 or "")
        with writing(database) as connection:
            given = [set_aside("dead"), set_aside("decided"), other, letter(refused_id("other"))]
            stand = {each.dead_letter_id for each in dead_letters.record(connection, given)}
        # Then the one that waited is dead, and stays it; the other text's letter is beside the one that waits still
        assert stand == {"dead", beside, refused_id("other")}
        assert states(database) == {"decided": "decided", "dead": "dead", "waits": "pending", beside: "dead"}
        assert outcome(decide(database, scored("dead"))) == ([], [0], [])
        # And each is what it is to those who wait, also where the letter was thrown away
        for _ in range(2):
            with writing(database) as connection:
                found = queries.outcomes(connection, ["decided", "dead", "waits"])
                assert found == ["decided", "dead", None]
                connection.execute(text("DELETE FROM dead_letters"))
        assert decided_ids(database) == ["decided"]


class TestSweeping:
    def test_what_waits_too_long_is_found_by_queue_the_oldest_first(self, database: Engine) -> None:
        # Given submissions of several queues, put there at different times, one of them decided
        submit(
            database,
            pending("late", enqueued_at=minutes(3)),
            pending("b", enqueued_at=minutes(1)),
            pending("a", enqueued_at=minutes(1)),
            pending("decided", enqueued_at=minutes(0)),
            pending("bulk", queue="toxicity.bulk", enqueued_at=minutes(2)),
            pending("fresh", queue="another", enqueued_at=minutes(5)),
        )
        decide(database, scored("decided"))

        def ids(rows: Iterable[PendingSubmission]) -> list[str]:
            return [row.submission_id for row in rows]

        with writing(database) as connection:
            # Then they are found within the bounds that are asked for
            assert overdue_queues(connection, before=minutes(4)) == ["toxicity", "toxicity.bulk"]
            assert ids(overdue(connection, queue="toxicity", before=minutes(4), limit=9)) == ["a", "b", "late"]
            assert ids(overdue(connection, queue="toxicity", before=minutes(3), limit=1)) == ["a"]
            # And as they were submitted
            assert overdue(connection, queue="toxicity.bulk", before=minutes(4), limit=1) == [
                pending("bulk", queue="toxicity.bulk", enqueued_at=minutes(2))
            ]
            # And no longer once their time is renewed
            renew(connection, ["a", "b", "decided"], minutes(4))
            assert ids(overdue(connection, queue="toxicity", before=minutes(4), limit=9)) == ["late"]

    def test_the_index_of_pending_submissions_answers(self, sqlite_url: str) -> None:
        # Given SQLite, which uses a partial index only where the statement's text names its condition
        engine = open_database(sqlite_url)
        asked: list[str] = []
        with writing(engine) as connection:
            connection.connection.driver_connection.set_trace_callback(asked.append)  # type: ignore[union-attr]
            overdue_queues(connection, before=NOON)
            overdue(connection, queue="toxicity", before=NOON, limit=1)
            queries.totals(connection)
            connection.connection.driver_connection.set_trace_callback(None)  # type: ignore[union-attr]
            selects = [statement for statement in asked if "pending" in statement]
            plans = [str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {each}").all()) for each in selects]
        assert len(plans) == 3
        assert all("ix_submissions_pending" in plan for plan in plans), plans
        engine.dispose()

    def test_only_one_sweeps_at_a_time(self, postgres_url: str) -> None:
        # Given somebody who sweeps
        engine = open_database(postgres_url)
        with writing(engine) as first, writing(engine) as second:
            assert take_sweep_lock(first)
            # Then another does not, and does not wait
            assert not take_sweep_lock(second)
            first.rollback()
            # And may when the first has ended
            assert take_sweep_lock(second)
        engine.dispose()

    def test_the_databases_clock_goes_on(self, engine: Engine) -> None:
        with reading(engine) as connection:
            before = database_time(connection)
        with reading(engine) as connection:
            assert before <= database_time(connection) < before + timedelta(hours=1)
            assert before.utcoffset() == timedelta(0)
