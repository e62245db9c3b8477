"""The engine and the scopes of a transaction. Owns what differs between SQLite and PostgreSQL at connection time."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

BUSY_TIMEOUT_S = 30
"""How long a SQLite writer waits for another one."""
POSTGRESQL_CONNECTION = {
    # Else that of the database: from one in SQL_ASCII the driver gives bytes, at which SQLAlchemy breaks.
    "client_encoding": "utf8",
    "connect_timeout": 10,
    # A server that has vanished behind a dead line is given up within half a minute, not after the system's two hours
    # (waiting for an answer) or quarter of one (sending). One that only stands still acknowledges, and is waited for.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,  # milliseconds
}
PREPARE_THRESHOLD = "prepare_threshold"
"""Of a PostgreSQL URL: executions after which a statement is prepared on its connection, or `none`."""
PREPARED_ELSEWHERE = ("26000", "42P05")
"""What PostgreSQL says of a prepared statement that is not on this connection, or is already."""


POSITIONS = "ix_decisions_position"
"""The unique index of what `db.tables.Decision` draws from a sequence."""
SET_POSITIONS = "SELECT setval('decisions_position_seq', (SELECT MAX(position) FROM decisions))"


class DatabaseProblem(Exception):
    """What was asked of the database cannot be; the message says why."""


def open_database(url: str) -> Engine:
    """An engine for one process: made after a fork, never carried across one. Connects only when first used.

    Args:
        url: `sqlite:////path/to/file.db`, which is made, with its folder, when it is first connected to, or
            `postgresql+psycopg://user@host/name`. `?prepare_threshold=none` is for a pooler that may give every
            transaction another connection: it would not know what was prepared on the last.

    A connection raises DatabaseProblem where a PostgreSQL database has another encoding than UTF-8.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed)
    connection: dict[str, Any] = dict(POSTGRESQL_CONNECTION)
    if (threshold := parsed.query.get(PREPARE_THRESHOLD)) is not None:
        connection[PREPARE_THRESHOLD] = None if threshold == "none" else int(str(threshold))
        parsed = parsed.difference_update_query([PREPARE_THRESHOLD])
    # Parameters stay out of errors, and so out of logs: they are what people wrote.
    engine = create_engine(parsed, pool_pre_ping=True, hide_parameters=True, connect_args=connection)

    @event.listens_for(engine, "connect")
    def require_unicode(driver_connection: Any, _record: Any) -> None:
        encoding = driver_connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            database = engine.url.render_as_string(hide_password=True)
            raise DatabaseProblem(
                f"the database {database} keeps text as {encoding}, which does not hold what people write: make it "
                "anew by CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
            )

    return engine


def sqlite_file(url: str) -> Path | None:
    """Where a SQLite database is kept, there or not; None of any other."""
    return _file(make_url(url))


def lacks_file(url: str) -> bool:
    """Whether this is a SQLite database that nobody made yet: opening it would make it."""
    try:
        return (file := sqlite_file(url)) is not None and not file.exists()
    except OSError:  # this user may not look; opening says why
        return False


def _file(url: URL) -> Path | None:
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection that sees one state of a SQLite database, and on PostgreSQL each statement's newest."""
    with engine.connect() as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A connection in a write transaction: committed at the end, rolled back when the body raises."""
    with engine.connect().execution_options(write=True) as connection, connection.begin():
        yield connection


def is_outage(error: BaseException) -> bool:
    """Whether the same data may succeed later: database unreachable, locked, full, read-only or not yet migrated.

    False for what the data itself caused, such as a character that PostgreSQL cannot store. A position that is taken
    already is no data's fault: PostgreSQL's sequence gave it, and is behind the table.
    """
    if isinstance(error, PoolTimeout):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    if isinstance(error, DataError | IntegrityError):
        return _constraint(error) == POSITIONS
    sqlstate: str = getattr(error.orig, "sqlstate", None) or ""
    if isinstance(error, ProgrammingError):
        # Class 42 is a missing table or privilege, 26 a statement that was prepared on another connection of a pooler;
        # any other is a value that the driver cannot send.
        return sqlstate.startswith(("42", "26"))
    # Class 54: the row is larger than PostgreSQL allows.
    return not sqlstate.startswith("54")


def is_foreign_key_missing(error: BaseException) -> bool:
    """Whether a row was refused because one that it refers to is not there."""
    return isinstance(error, IntegrityError) and (
        getattr(error.orig, "sqlstate", None) == "23503"
        or getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY
    )


def without_rows(error: DBAPIError) -> str:
    """What the driver says, but for PostgreSQL's detail and context: those quote rows, and with them comments."""
    said: str = getattr(getattr(error.orig, "diag", None), "message_primary", None) or str(error.orig)
    if _constraint(error) == POSITIONS:
        said += f"; its sequence is behind the table, as after a restore without it: {SET_POSITIONS}"
    if getattr(error.orig, "sqlstate", None) in PREPARED_ELSEWHERE:
        said += "; behind PgBouncer in transaction mode end the database's URL in ?prepare_threshold=none"
    return said


def _constraint(error: DBAPIError) -> str | None:
    """The one that was broken, if PostgreSQL says so."""
    name: str | None = getattr(getattr(error.orig, "diag", None), "constraint_name", None)
    return name


def _open_sqlite(url: URL) -> Engine:
    file = _file(url)
    engine = create_engine(url, hide_parameters=True, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "do_connect")
    def make_private(*_: Any) -> None:
        # SQLite would let everyone on this machine read it; its write-ahead log takes after it.
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.touch(mode=0o600)
        except OSError as error:
            # As the driver would say it, but with the reason: callers handle what drivers raise.
            raise sqlite3.OperationalError(f"unable to open database file: {error.strerror}") from None

    @event.listens_for(engine, "connect")
    def configure(driver_connection: Any, _record: Any) -> None:
        # The driver's own BEGIN comes late (before the first write) and is never IMMEDIATE: `begin` below does it.
        driver_connection.isolation_level = None
        _use_write_ahead_log(driver_connection)
        driver_connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A read transaction that turns to writing while another writes fails at once, whatever the busy timeout.
        # BEGIN IMMEDIATE takes its turn before it reads.
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _use_write_ahead_log(driver_connection: sqlite3.Connection) -> None:
    """Let readers and one writer work side by side. The file remembers it, so only the first connection changes it."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            driver_connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # The busy timeout does not cover this change: of two processes that open a new file at once, SQLite
            # refuses one on the spot.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
