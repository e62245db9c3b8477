"""Transactions on both databases, and which errors are worth another try with the same data."""

import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import URL, Engine, delete, insert, make_url, select, text, update
from sqlalchemy.exc import IntegrityError, ProgrammingError

from db import session
from db.migrate import upgrade
from db.queries import record_decisions
from db.session import (
    SET_POSITIONS,
    DatabaseProblem,
    is_foreign_key_missing,
    is_outage,
    open_database,
    reading,
    without_rows,
    writing,
)
from db.tables import DeadLetter, Policy, Review
from tests.integration.rows import NOON, decide, scored
from tests.services import new_database

A_POLICY = {"policy_version": "a", "text": "", "first_used_at": NOON}


def add_policy(engine: Engine, **changes: str) -> None:
    with writing(engine) as connection:
        connection.execute(insert(Policy).values(A_POLICY | changes))


def policies(engine: Engine) -> list[str]:
    with reading(engine) as connection:
        return sorted(connection.scalars(select(Policy.policy_version)))


def failure(engine: Engine, **changes: str) -> BaseException:
    with pytest.raises(Exception) as raised:
        add_policy(engine, **changes)
    return raised.value


class TestTransactions:
    def test_a_write_is_committed_at_the_end(self, engine: Engine) -> None:
        add_policy(engine)
        assert policies(engine) == ["a"]

    def test_a_write_is_rolled_back_when_the_body_raises(self, engine: Engine) -> None:
        # Given a transaction that has written a row
        with pytest.raises(KeyError), writing(engine) as connection:
            connection.execute(insert(Policy).values(A_POLICY))
            # When its body raises
            raise KeyError("stop")
        # Then the row is not there
        assert policies(engine) == []

    def test_a_foreign_key_holds(self, engine: Engine) -> None:
        with pytest.raises(IntegrityError) as raised, writing(engine) as connection:
            connection.execute(
                insert(Review).values(submission_id="nobody's", action="hide", reviewer="me", reviewed_at=NOON)
            )
        assert is_foreign_key_missing(raised.value)
        add_policy(engine)
        assert not is_foreign_key_missing(failure(engine))


class TestSqlite:
    def test_the_databases_folder_is_made(self, tmp_path: Path) -> None:
        engine = open_database(f"sqlite:///{tmp_path}/a/b/moderato.db")
        with reading(engine) as connection:
            assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert (tmp_path / "a" / "b" / "moderato.db").exists()
        engine.dispose()

    def test_a_new_file_that_another_process_is_writing_is_waited_for(self, tmp_path: Path) -> None:
        # Given a file without a write-ahead log yet, in which another process writes
        other = sqlite3.connect(tmp_path / "moderato.db", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        finish = threading.Timer(0.3, other.execute, ("COMMIT",))
        finish.start()
        # When it is opened
        engine = open_database(f"sqlite:///{tmp_path}/moderato.db")
        with reading(engine) as connection:
            # Then it is opened once the other has finished
            assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        finish.join()
        other.close()
        engine.dispose()

    def test_a_reader_sees_one_state_and_holds_no_writer_back(self, sqlite_url: str) -> None:
        engine = open_database(sqlite_url)
        with reading(engine) as connection:
            # Given a reader that has begun to look
            assert connection.scalars(select(Policy.policy_version)).all() == []
            # When another connection writes
            add_policy(engine)
            # Then the reader sees what it saw, and the next one sees the row
            assert connection.scalars(select(Policy.policy_version)).all() == []
        assert policies(engine) == ["a"]
        engine.dispose()

    def test_transactions_that_read_before_they_write_take_turns(self, sqlite_url: str) -> None:
        # Given a number, and several threads that each read it and then write the next one, many times
        engine = open_database(sqlite_url)
        add_policy(engine, text="0")

        def count(times: int) -> None:
            for _ in range(times):
                with writing(engine) as connection:
                    number = int(connection.scalars(select(Policy.text)).one())
                    connection.execute(update(Policy).values(text=str(number + 1)))

        threads = [threading.Thread(target=count, args=(25,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Then no turn is lost
        with reading(engine) as connection:
            assert connection.scalars(select(Policy.text)).one() == "100"
        engine.dispose()


class TestOutagesOfSqlite:
    def test_locked(self, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        # Given another writer that does not finish in time
        monkeypatch.setattr(session, "BUSY_TIMEOUT_S", 0.05)
        engine, other = open_database(sqlite_url), open_database(sqlite_url)
        with writing(other):
            error = failure(engine)
        # Then it is an outage, and once the writer is gone the same data is written
        assert "locked" in str(error)
        assert is_outage(error)
        add_policy(engine)
        assert policies(engine) == ["a"]
        engine.dispose()
        other.dispose()

    def test_full(self, sqlite_url: str) -> None:
        engine = open_database(sqlite_url)
        with pytest.raises(Exception, match="full") as raised, writing(engine) as connection:
            connection.execute(text("PRAGMA max_page_count = 1"))
            connection.execute(insert(Policy).values(A_POLICY | {"text": "x" * 1_000_000}))
        assert is_outage(raised.value)
        engine.dispose()

    def test_read_only(self, sqlite_url: str) -> None:
        engine = open_database(sqlite_url)
        with pytest.raises(Exception, match="readonly") as raised, writing(engine) as connection:
            connection.execute(text("PRAGMA query_only = ON"))
            connection.execute(insert(Policy).values(A_POLICY))
        assert is_outage(raised.value)
        engine.dispose()

    def test_not_a_file(self, tmp_path: Path) -> None:
        engine = open_database(f"sqlite:///{tmp_path}")
        assert is_outage(failure(engine))
        engine.dispose()


class TestOutagesOfPostgresql:
    def test_unreachable(self, tmp_path: Path) -> None:
        engine = open_database(f"postgresql+psycopg://me@/moderato?host={tmp_path}")
        assert is_outage(failure(engine))

    def test_the_connection_is_cut(self, postgres_url: str) -> None:
        engine, other = open_database(postgres_url), open_database(postgres_url)
        # Given a transaction whose connection the server ends
        with pytest.raises(Exception, match="terminat") as raised, writing(engine) as connection:
            victim = connection.scalar(text("SELECT pg_backend_pid()"))
            with writing(other) as killer:
                killer.execute(text("SELECT pg_terminate_backend(:victim, 10000)"), {"victim": victim})
            connection.execute(insert(Policy).values(A_POLICY))
        # Then it is an outage, and the engine's next connection works
        assert is_outage(raised.value)
        add_policy(engine)
        assert policies(engine) == ["a"]
        engine.dispose()
        other.dispose()

    def test_read_only(self, postgres_url: str) -> None:
        # As after a failover, when the address still leads to the standby
        engine = open_database(postgres_url)
        with pytest.raises(Exception, match="read-only") as raised, writing(engine) as connection:
            connection.execute(text("SET TRANSACTION READ ONLY"))
            connection.execute(insert(Policy).values(A_POLICY))
        assert is_outage(raised.value)
        engine.dispose()

    def test_numbers_that_it_gives_twice(self, postgres_url: str) -> None:
        # As after a failover to a replica that was not told where the sequence stood
        engine = open_database(postgres_url)
        decide(postgres_url, scored("before"))
        with writing(engine) as connection:
            connection.execute(text("SELECT setval('decisions_position_seq', 1, false)"))
        with pytest.raises(IntegrityError) as raised, writing(engine) as connection:
            record_decisions(connection, [scored("after")])
        # Then it says what would help, and that done the same row is written
        assert is_outage(raised.value)
        assert SET_POSITIONS in without_rows(raised.value)
        with writing(engine) as connection:
            connection.execute(text(SET_POSITIONS))
            record_decisions(connection, [scored("after")])
        engine.dispose()

    def test_a_character_that_it_cannot_store_is_the_rows_fault(self, postgres_url: str) -> None:
        engine = open_database(postgres_url)
        assert not is_outage(failure(engine, text="a\0b"))
        engine.dispose()

    def test_a_value_too_long_is_the_rows_fault(self, postgres_url: str) -> None:
        engine = open_database(postgres_url)
        assert not is_outage(failure(engine, policy_version="x" * 65))
        engine.dispose()


class TestOutagesOfBoth:
    def test_tables_not_there_yet(self, empty_database_url: str) -> None:
        engine = open_database(empty_database_url)
        assert is_outage(failure(engine))
        engine.dispose()

    def test_a_key_twice_is_the_rows_fault(self, engine: Engine) -> None:
        add_policy(engine)
        assert not is_outage(failure(engine))

    def test_half_a_character_is_the_rows_fault(self, engine: Engine) -> None:
        assert not is_outage(failure(engine, text="\ud83d"))

    def test_a_value_of_the_wrong_type_is_the_rows_fault(self, engine: Engine) -> None:
        with pytest.raises(Exception) as raised, writing(engine) as connection:
            connection.execute(delete(DeadLetter).where(DeadLetter.payload == object()))
        assert not is_outage(raised.value)

    def test_what_is_not_the_databases_is_no_outage(self) -> None:
        assert not is_outage(ValueError("no"))


def test_a_database_that_is_not_in_unicode_is_refused(_postgres: URL) -> None:
    with (
        new_database(_postgres, "ENCODING 'SQL_ASCII' LOCALE 'C'") as url,
        pytest.raises(DatabaseProblem, match=r"keeps text as SQL_ASCII, .* ENCODING 'UTF8' TEMPLATE template0"),
    ):
        upgrade(url)


class TestPooler:
    @pytest.mark.parametrize("query, prepares", [("", True), ("?prepare_threshold=none", False)])
    def test_nothing_is_prepared_where_the_url_says_so(self, postgres_url: str, query: str, prepares: bool) -> None:
        """A pooler in transaction mode hands the next transaction to a connection where it is not."""
        url = make_url(postgres_url).update_query_string(query.removeprefix("?")).render_as_string(hide_password=False)
        engine = open_database(url)
        with reading(engine) as connection:
            for _ in range(10):
                connection.scalar(select(Policy.policy_version))
            prepared = connection.scalar(text("SELECT COUNT(*) FROM pg_prepared_statements WHERE NOT from_sql"))
        engine.dispose()
        assert bool(prepared) == prepares

    def test_what_a_pooler_has_lost_is_no_fault_of_the_data(self, postgres_url: str) -> None:
        """Else a comment that was scored would become a dead letter for it."""
        engine = open_database(postgres_url)
        with pytest.raises(ProgrammingError) as raised, reading(engine) as connection:
            connection.execute(text("EXECUTE prepared_elsewhere"))
        engine.dispose()
        assert is_outage(raised.value)
        # And whoever reads of it learns what would help
        assert "end the database's URL in ?prepare_threshold=none" in without_rows(raised.value)
