"""What `moderato doctor` asks of a database: its version, its clock, whether it takes writes. Nothing is written.

Like `db.queries`: functions take a connection and never commit.
"""

import sqlite3
from pathlib import Path

from sqlalchemy import Connection, text

BUSY_S = 3.0
"""How long a SQLite writer is waited for."""
WRITTEN = ("submissions", "decisions", "dead_letters")
"""Tables into which a worker writes."""


def postgresql_version(connection: Connection) -> tuple[int, int]:
    """Of the server, such as (16, 4)."""
    number = int(connection.execute(text("SHOW server_version_num")).scalar_one())
    return number // 10_000, number % 10_000


def is_read_only(connection: Connection) -> bool:
    """Whether this PostgreSQL takes no writes: a standby, or set so."""
    return connection.execute(text("SHOW transaction_read_only")).scalar_one() == "on"


def not_insertable(connection: Connection) -> list[str]:
    """Those of the tables that a worker writes into which this role may not."""
    may_insert = text("SELECT has_table_privilege(:table, 'INSERT')")
    return [table for table in WRITTEN if not connection.execute(may_insert, {"table": table}).scalar_one()]


def try_sqlite(file: Path) -> None:
    """Take the writer's lock of a SQLite database and give it back.

    Raises:
        sqlite3.Error: there is no database, it is not to be written to, or somebody has held the lock for BUSY_S.
    """
    # Opened so that a file which is not there is not made.
    connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=rw", uri=True, timeout=BUSY_S, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    finally:
        connection.close()
