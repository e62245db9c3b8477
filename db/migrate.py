"""Brings a database to this release's schema, or back. Owns when a migration runs; what it does is in migrations/."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, delete, func, insert, inspect, select, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.schema import CreateIndex, DropIndex

from db.describing import describe
from db.session import DatabaseProblem, open_database, reading, writing
from db.tables import BESIDE_WORKERS, Base, SchemaCompatibility

logger = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).resolve().parent / "migrations"
# It introduces itself at each look at the schema.
logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)

UPGRADE_LOCK = 6_877_836_932
"""PostgreSQL's advisory lock of whoever migrates; any number that nobody else uses."""
FINISH_LOCK = 6_877_836_931
"""The same, of the process that builds indexes after the transaction."""
LOCK_PAUSE_S = 0.2


class SchemaMismatch(DatabaseProblem):
    """The database has another schema than this release; the message says what to run."""


def upgrade(url: str) -> None:
    """Bring the database to this release's schema, whatever it is at; a second caller waits and finds it done.

    Tables of a later release that this one may run on are left as they are: so it is when a release is taken back.

    Raises:
        SchemaMismatch: they are of a later release, and this one may not run on them.
    """
    engine = open_database(url)
    try:
        if _fits_later(engine, _revision(engine)):
            return
        _migrate(url, lambda config: command.upgrade(config, "head"))
        with _finishing(engine):
            with writing(engine) as connection:
                describe(connection)
            _build_indexes(engine)
    finally:
        engine.dispose()


def downgrade(url: str, revision: str) -> None:
    """Bring the database back to an older revision, or to `base`: nothing. What the newer tables held is lost."""
    _migrate(url, lambda config: command.downgrade(config, revision))


def require_current(engine: Engine) -> None:
    """Make sure that the database has this release's schema, or a later one that this release may run on, too.

    Raises:
        SchemaMismatch: it has not.
    """
    needed = ScriptDirectory(str(MIGRATIONS)).get_current_head()
    found = _revision(engine)
    if found == needed or _fits_later(engine, found):
        return
    database = engine.url.render_as_string(hide_password=True)
    at = "has no tables yet" if found is None else f"is at schema revision {found}"
    raise SchemaMismatch(f"the database {database} {at}, but this release needs {needed}: run `moderato db upgrade`")


def _revision(engine: Engine) -> str | None:
    """What the database is at; None where it has no tables."""
    with reading(engine) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def _fits_later(engine: Engine, found: str | None) -> bool:
    """Whether what the database is at comes of a later release, and this one may run on it.

    Raises:
        SchemaMismatch: it comes of a later release, and this one may not.
    """
    known = {script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()}
    if found is None or found in known:
        return False
    if _oldest_compatible(engine) not in known:
        database = engine.url.render_as_string(hide_password=True)
        raise SchemaMismatch(
            f"the database {database} is at schema revision {found}, which this release does not know and may not run "
            "on: run the release that upgraded it, or let that one run `moderato db downgrade`"
        )
    logger.warning("the database is at schema revision %s, of a later release; this one may run on it", found)
    return True


def _oldest_compatible(engine: Engine) -> str | None:
    """Of a later schema: the oldest revision whose release may run on it; None where that cannot be told."""
    try:
        with reading(engine) as connection:
            return connection.scalar(select(SchemaCompatibility.oldest_revision))
    except (ProgrammingError, OperationalError):
        return None


def _note_compatibility(connection: Connection) -> None:
    """Write down for older releases whether they may run on what the database has become."""
    if not inspect(connection).has_table(SchemaCompatibility.__tablename__):
        return
    revision = MigrationContext.configure(connection).get_current_revision()
    assert revision is not None  # there is a table
    script = ScriptDirectory(str(MIGRATIONS)).get_revision(revision)
    connection.execute(delete(SchemaCompatibility))
    connection.execute(insert(SchemaCompatibility).values(oldest_revision=script.module.oldest_compatible))


@contextmanager
def _finishing(engine: Engine) -> Iterator[None]:
    """On PostgreSQL: alone, in no transaction."""
    if engine.dialect.name == "sqlite":
        yield
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        # Asked again and again: whoever waits for a lock holds a snapshot, and building an index waits for those.
        while not connection.scalar(select(func.pg_try_advisory_lock(FINISH_LOCK))):
            time.sleep(LOCK_PAUSE_S)
        try:
            yield
        finally:
            connection.execute(select(func.pg_advisory_unlock(FINISH_LOCK)))


def _build_indexes(engine: Engine) -> None:
    """Build what is missing of the indexes of large tables. On PostgreSQL workers write to the tables meanwhile.

    There an upgrade that was interrupted leaves an index that is not valid: it is dropped and built anew.
    """
    marked = [index for table in Base.metadata.sorted_tables for index in table.indexes if BESIDE_WORKERS in index.info]
    if engine.dialect.name == "sqlite":
        with writing(engine) as connection:
            for index in marked:
                index.create(connection, checkfirst=True)
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        names = [str(index.name) for index in marked]
        is_valid: dict[str, bool] = dict(connection.execute(_INDEXES, {"names": names}).all())
        for name, index in zip(names, marked, strict=True):
            if is_valid.get(name):
                continue
            if name in is_valid:
                _execute_concurrently(connection, DropIndex(index))
            _execute_concurrently(connection, CreateIndex(index))


def _execute_concurrently(connection: Connection, statement: CreateIndex | DropIndex) -> None:
    sql = str(statement.compile(dialect=connection.dialect))
    connection.execute(text(sql.replace(" INDEX ", " INDEX CONCURRENTLY ", 1)))


_INDEXES = text("""
SELECT relname, indisvalid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
WHERE relname = ANY(:names) AND pg_table_is_visible(pg_class.oid)
""")


def _migrate(url: str, step: Callable[[Config], None]) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    engine = open_database(url)
    try:
        # One transaction around it all: a migration that fails leaves nothing behind. On SQLite it also keeps a
        # second migrating process waiting, as the lock does on PostgreSQL.
        with writing(engine) as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(UPGRADE_LOCK)))
            config.attributes["connection"] = connection
            step(config)
            _note_compatibility(connection)
    finally:
        engine.dispose()
