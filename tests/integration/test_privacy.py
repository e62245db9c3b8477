"""Erasing on both databases: what goes, what stays, what is written down, and that the bytes are gone."""

import hashlib
import sqlite3
import uuid
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, insert, make_url, select, text, update

from api_client.client import ModerationClient
from config.names import Reason
from db import dead_letters, privacy
from db.durable import database_time, take_sweep_lock
from db.privacy import Subject, erasable, erase, erase_expired, reclaim, retention_is_due
from db.queries import record_decisions
from db.session import open_database, reading, writing
from db.tables import DeadLetter, Erasure, Submission
from tests.integration.rows import NOON, letter, minutes, prepare, scored
from worker.retention import Retention

MARKER = "zanzibar"
NOWHERE = "redis://127.0.0.1:1/0"


def pending(submission_id: str, **changes: Any) -> dict[str, Any]:
    """A durable submission that waits for its decision."""
    row = {
        "submission_id": submission_id,
        "community": "news",
        "comment_id": "7",
        "author": "ann",
        "text": f"{MARKER} waits",
        "text_sha256": "0" * 64,
        "submitted_at": NOON,
        "state": "pending",
        "queue": "toxicity",
        "enqueued_at": NOON,
    }
    return row | changes


def fill_rows(connection: Connection) -> None:
    prepare(connection, "v1")
    ann: dict[str, Any] = {"author": "ann", "text": f"{MARKER} by ann", "context": {"title": MARKER}}
    record_decisions(
        connection,
        [
            scored("a", community="news", comment_id="7", **ann),
            scored("b", community="sport", comment_id="7", **ann),
            scored("c", community="news", comment_id="8", **ann),
            scored("d", community="news", comment_id="9", author="bob", text="good morning"),
        ],
    )
    about_ann = letter("l", community="news", comment_id="7", author="ann", payload=MARKER.encode())
    dead_letters.record(connection, [about_ann, replace(about_ann, dead_letter_id="m", author="bob", comment_id="9")])
    connection.execute(insert(Submission), [pending("p")])


def fill(engine: Engine) -> None:
    with writing(engine) as connection:
        fill_rows(connection)


def holding_text(engine: Engine) -> set[str]:
    """Ids of the submissions, and dead letters, that hold anything written by their author."""
    with reading(engine) as connection:
        kept = connection.execute(select(Submission)).all()
        letters = connection.execute(select(DeadLetter)).all()
    return {row.submission_id for row in kept if row.text or row.context} | {
        row.dead_letter_id for row in letters if row.payload
    }


@pytest.mark.parametrize(
    ("subject", "left", "counts"),
    [
        (Subject("comment", "7", "news"), "bcdm", (2, 1, 1)),
        (Subject("comment", "7"), "cdm", (3, 1, 1)),
        (Subject("author", "ann"), "dm", (4, 1, 1)),
        (Subject("author", "ann", "sport"), "acdlmp", (1, 0, 0)),
        (Subject("author", "eve"), "abcdlmp", (0, 0, 0)),
    ],
    ids=["comment", "comment in all communities", "author", "author in one community", "nobody"],
)
def test_an_erasure_takes_what_is_its_subjects(
    engine: Engine, subject: Subject, left: str, counts: tuple[int, int, int]
) -> None:
    # Given texts of two authors, one of them not yet decided
    fill(engine)
    with reading(engine) as connection:
        expected = erasable(connection, subject)
    # When some are erased
    with writing(engine) as connection:
        erased = erase(connection, subject, by="dpo", reason="asked for", now=minutes(5))
    # Then their texts are gone and the others' are there, as it was said before
    assert holding_text(engine) == set(left)
    assert erased == expected == privacy.Erased(*counts)
    with reading(engine) as connection:
        # And it is written down, of an author without the name
        [row] = connection.execute(select(Erasure)).all()
        name = hashlib.sha256(subject.name.encode()).hexdigest() if subject.kind == "author" else subject.name
        assert (row.kind, row.subject, row.community, row.until) == (subject.kind, name, subject.community, None)
        assert (row.submissions, row.dead_letters) == counts[:2]
        assert (row.erased_by, row.reason, row.erased_at) == ("dpo", "asked for", minutes(5))
        # And a second one finds nothing to do
        assert erasable(connection, subject) == privacy.Erased(0, 0)


def test_decisions_stay_and_the_author_goes_only_with_the_author(engine: Engine, database_url: str) -> None:
    fill(engine)
    with ModerationClient(NOWHERE, database_url) as client:
        before = client.result("a")
        # When a comment is erased, then its row keeps all but text and context
        client.erase(Subject("comment", "7", "news"), by="dpo")
        assert before is not None
        assert client.result("a") == replace(before, text=None, context=None)
        # And what waited for its decision is a dead letter without a payload
        letters = {row.dead_letter_id: row for row in client.dead_letters()}
        assert (letters["p"].reason, letters["p"].payload, letters["p"].author) == (Reason.ERASED, b"", "ann")
        assert letters["l"].author == "ann"
        assert client.wait(["p"], timeout_s=0) == {"p": "dead"}
        # When its author is, then the name goes too, also where the text went before
        client.erase(Subject("author", "ann"), by="dpo")
        assert client.result("a") == replace(before, text=None, context=None, author=None)
        assert {row.author for row in client.dead_letters()} == {None, "bob"}
    with reading(engine) as connection:
        assert dict(connection.execute(select(Submission.submission_id, Submission.state)).all()) == {
            **dict.fromkeys("abcd", "decided"),
            "p": "dead",
        }
        # And a message that comes again finds the decision, and writes nothing
    with writing(engine) as connection:
        again = record_decisions(connection, [scored("a", f"{MARKER} by ann", community="news")])
        assert again.repeated == {0}
    assert "a" not in holding_text(engine)


def test_erased_bytes_are_gone_from_sqlites_files(sqlite_url: str) -> None:
    # Given rows that moved about in their pages before they were erased, one of them many pages long
    engine = open_database(sqlite_url)
    path = Path(str(make_url(sqlite_url).database))
    with writing(engine) as connection:
        waiting = [pending(f"{n * 7919 % 1000:03}", text=f"{MARKER} " + "x" * (n * 37 % 900)) for n in range(1000)]
        connection.execute(insert(Submission), [*waiting, pending("long", text=MARKER * 5000)])
    with writing(engine) as connection:
        wider = {"state": "decided", "context": {"title": "y" * 300}}
        connection.execute(update(Submission).where(Submission.submission_id < "5"), wider)

    def copies() -> int:
        return sum(file.read_bytes().count(MARKER.encode()) for file in path.parent.iterdir())

    assert copies() > 1000
    # When they are erased while somebody reads, then what is left to do is said
    event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA busy_timeout = 0"))
    engine.dispose()
    with closing(sqlite3.connect(path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM submissions").fetchone()
        with writing(engine) as connection:
            erase(connection, Subject("author", "ann"), by="dpo", reason=None, now=NOON)
        remains = reclaim(engine)
    assert remains is not None
    assert "run the command again" in remains
    assert copies() > 0
    engine.dispose()
    # And when that is done, no file holds them
    with ModerationClient(NOWHERE, sqlite_url) as client:
        assert client.erase(Subject("author", "ann"), by="dpo") == (privacy.Erased(0, 0), None)
    assert copies() == 0


def test_a_role_that_may_not_vacuum_is_told_so(postgres_url: str) -> None:
    # Given somebody who may change the rows, and owns nothing
    role = f"moderato_test_{uuid.uuid4().hex}"
    owner = open_database(postgres_url)
    with writing(owner) as connection:
        fill_rows(connection)
        connection.execute(text(f"CREATE ROLE {role} LOGIN"))
        connection.execute(text(f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO {role}"))
        connection.execute(text(f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role}"))
    try:
        # When they erase, then it is done, and the warning says what is not
        url = make_url(postgres_url).set(username=role).render_as_string()
        with ModerationClient(NOWHERE, url) as client:
            erased, remains = client.erase(Subject("comment", "7", "news"), by="dpo")
        assert erased == privacy.Erased(2, 1, 1)
        assert remains is not None
        assert "permission denied to vacuum" in remains
        # And the owner is not warned
        with ModerationClient(NOWHERE, postgres_url) as client:
            assert client.erase(Subject("comment", "7"), by="dpo") == (privacy.Erased(1, 0), None)
    finally:
        with writing(owner) as connection:
            connection.execute(text(f"DROP OWNED BY {role}"))
            connection.execute(text(f"DROP ROLE {role}"))
        owner.dispose()


def days(number: float) -> datetime:
    """This long after noon."""
    return NOON + timedelta(days=number)


def test_old_texts_are_erased_in_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given texts decided one a day, a batch of more than a step at one time, and dead letters, two of them durable, and
    # a text whose letter somebody purged
    monkeypatch.setattr(privacy, "RETENTION_STEP", 3)
    with writing(engine) as connection:
        prepare(connection, "v1")
        daily = [scored(f"day {n}", decided_at=days(n)) for n in range(10)]
        batch = [scored(f"batch {n}", decided_at=days(2)) for n in range(7)]
        record_decisions(connection, [*daily, *batch])
        dead_letters.record(connection, [letter(f"dead {n}", received_at=days(n)) for n in range(10)])
        unscored = [pending("dead 1", state="dead"), pending("dead 9", state="dead"), pending("waits")]
        unscored.append(pending("purged", state="dead", submitted_at=days(1)))
        connection.execute(insert(Submission), unscored)

    def erase_at(day: float) -> list[tuple[int, int]]:
        with reading(engine) as connection:
            more = retention_is_due(connection, keep_days=4, now=days(day))
        steps: list[tuple[int, int]] = []
        while more:
            with writing(engine) as connection:
                step, more = erase_expired(connection, keep_days=4, by="w1", now=days(day))
            steps.append((step.submissions, step.dead_letters))
        return steps

    # When what is older than four days is erased, then it is in steps, none much larger than it may be
    steps = erase_at(8)
    assert sum(count for count, _ in steps) == 4 + 7 + 2
    assert sum(count for _, count in steps) == 4
    assert max(count for count, _ in steps) <= 3 + 7
    # And what is younger is there, and what waits for its decision
    young = {f"day {n}" for n in range(4, 10)} | {f"dead {n}" for n in range(4, 10)} | {"waits"}
    assert holding_text(engine) == young
    # And a moment later nothing is due, a day later what has grown old since
    assert erase_at(8.01) == []
    assert sum(map(sum, erase_at(9.5))) == 4
    assert holding_text(engine) == young - {"day 4", "day 5", "dead 4", "dead 5"}
    # And it is written down how far it came
    with reading(engine) as connection:
        rows = connection.execute(select(Erasure).order_by(Erasure.erasure_id)).all()
        untouched = connection.scalars(select(Submission.submission_id).where(Submission.erased_at.is_(None))).all()
        # What an older release says of a letter may quote its text
        details = connection.execute(select(DeadLetter.detail, DeadLetter.received_at < days(6))).all()
    assert {(detail != "text is empty", is_old) for detail, is_old in details} == {(True, True), (False, False)}
    assert {(row.kind, row.subject, row.erased_by) for row in rows} == {("retention", "4", "w1")}
    assert [row.until for row in rows] == sorted({row.until for row in rows})
    assert rows[-1].until == days(5.5)
    assert set(untouched) == {f"day {n}" for n in range(6, 10)} | {"dead 9", "waits"}


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_step_reads_its_own_rows_only(engine: Engine) -> None:
    # Given retention that has come some way
    with writing(engine) as connection:
        prepare(connection, "v1")
        record_decisions(connection, [scored(f"{n}", decided_at=minutes(n)) for n in range(100)])
        erase_expired(connection, keep_days=1, by="w1", now=days(1) + timedelta(minutes=50))
    seen: list[tuple[str, Any]] = []
    event.listen(engine, "before_cursor_execute", lambda *given: seen.append((given[2], given[3])))
    # When it goes on
    with writing(engine) as connection:
        erase_expired(connection, keep_days=1, by="w1", now=days(2))
        # Then each question about decisions is answered by the index of their times, from where it had come
        asked = [(sql, given) for sql, given in seen if "decisions.decided_at" in sql]
        assert len(asked) == 2
        for sql, given in asked:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", given).all()
            assert "ix_decisions_decided_at" in str(plan)
            assert "decided_at >= " in sql


def test_one_worker_erases_what_is_old_by_the_databases_clock(engine: Engine) -> None:
    # Given a text of two days ago and one of now, as the database counts
    with writing(engine) as connection:
        prepare(connection, "v1")
        now = database_time(connection)
        record_decisions(connection, [scored("old", decided_at=now - timedelta(days=2)), scored("new", decided_at=now)])
    # When nothing is to be erased, or another worker sweeps, then all of it stays
    assert not Retention(engine, 0, "w1")()
    if engine.dialect.name == "postgresql":  # on SQLite a writer is alone
        with writing(engine) as other:
            assert take_sweep_lock(other)
            assert not Retention(engine, 1, "w1")()
    assert holding_text(engine) == {"old", "new"}
    # And when one may, the old one goes
    assert not Retention(engine, 1, "w1")()
    assert holding_text(engine) == {"new"}
