"""Brings a database to this release's schema, or back. Owns when a migration runs; what it does is in migrations/."""

import logging
from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, delete, func, insert, inspect, select
from sqlalchemy.exc import OperationalError, ProgrammingError

from db.describing import describe
from db.session import DatabaseProblem, open_database, reading, writing
from db.tables import SchemaCompatibility

logger = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).resolve().parent / "migrations"
# It introduces itself at each look at the schema.
logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)

UPGRADE_LOCK = 6_877_836_932
"""PostgreSQL's advisory lock of whoever migrates; any number that nobody else uses."""


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
        with writing(engine) as connection:
            describe(connection)
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
