"""What others must not see or do: texts in errors, files of the database, code in what is read."""

import os
import stat
import traceback
from pathlib import Path

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError

from api_client.client import ModerationClient
from config.settings import load_settings
from db.session import DatabaseProblem, open_database, reading, writing
from tests.integration.rows import decide, scored
from tests.integration.test_transport_servers import certificate, tls_in_front_of
from tests.services import free_port

__all__ = ["certificate"]

MARKER = "zanzibar"

REFUSING = {
    "sqlite": [
        "CREATE TRIGGER refuse BEFORE INSERT ON reviews BEGIN SELECT RAISE(ABORT, 'refused'); END",
    ],
    # Whose error quotes the whole row.
    "postgresql": ["ALTER TABLE reviews ADD CHECK (note IS NULL)"],
}


def test_the_clients_errors_quote_no_row(database_url: str) -> None:
    # Given a database that refuses a row, and says what it held
    decide(database_url, scored("a"))
    engine = open_database(database_url)
    with writing(engine) as connection:
        for statement in REFUSING[engine.dialect.name]:
            connection.exec_driver_sql(statement)
    # When a note is written there
    with (
        ModerationClient(f"redis://127.0.0.1:{free_port()}/0", database_url) as client,
        pytest.raises(DatabaseProblem) as raised,
    ):
        client.review("a", action="allow", reviewer="ann", note=MARKER)
    # Then neither the error nor its traceback, as an application would log it, holds the note
    assert "cannot be used" in str(raised.value)
    assert MARKER not in "".join(traceback.format_exception(raised.value))
    engine.dispose()


def test_sqlites_files_are_their_owners_alone(empty_sqlite_url: str) -> None:
    # Given a machine whose new files everyone may read
    before = os.umask(0o022)
    try:
        # When the database is used for the first time
        engine = open_database(empty_sqlite_url)
        with writing(engine) as connection:
            connection.exec_driver_sql("CREATE TABLE t (x)")
        # Then its files are private, the write-ahead log too
        with reading(engine) as connection:
            connection.exec_driver_sql("SELECT * FROM t")
            files = list(Path(str(make_url(empty_sqlite_url).database)).parent.iterdir())
            assert len(files) == 3
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    finally:
        os.umask(before)
    engine.dispose()


def test_postgresql_is_reached_through_tls_and_only_if_it_is_the_one_meant(
    postgres_url: str, certificate: tuple[Path, Path]
) -> None:
    # Given a PostgreSQL behind TLS, whose certificate only its own file vouches for
    server = make_url(postgres_url)
    socket = f"{server.query['host']}/.s.PGSQL.5432"
    if not Path(socket).exists():
        pytest.skip("the tests' PostgreSQL has no socket here")
    with tls_in_front_of(socket, *certificate, as_postgresql=True) as port:

        def ask(host: str, root: Path | str) -> int:
            trusted = {"sslmode": "verify-full", "sslrootcert": str(root)}
            url = server.set(host=host, port=port, query=trusted).render_as_string(hide_password=False)
            engine = open_database(load_settings({"MODERATO_DATABASE_URL": url}).database_url)
            try:
                with reading(engine) as connection:
                    return int(connection.execute(text("SELECT 1")).scalar_one())
            finally:
                engine.dispose()

        # When it is asked by its name, then it answers
        assert ask("localhost", certificate[0]) == 1
        # And under another name, or where others are trusted, it is not spoken to
        with pytest.raises(OperationalError, match="does not match host name"):
            ask("127.0.0.1", certificate[0])
        with pytest.raises(OperationalError, match="certificate verify failed"):
            ask("localhost", "system")
