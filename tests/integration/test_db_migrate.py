"""Migrations: an empty database becomes the tables, and nothing again."""

import subprocess
import sys

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, make_url, text

from config.settings import ROOT
from db.migrate import MIGRATIONS, SchemaMismatch, _migrate, downgrade, require_current, upgrade
from db.queries import add_review, record_decisions
from db.session import open_database, reading, writing
from db.tables import CURRENT_ACTIONS, Base
from tests.integration.rows import minutes, prepare, scored
from tests.services import wait_until


def test_upgrading_an_empty_database_equals_the_tables(engine: Engine) -> None:
    # Given a database made by the migrations alone
    with reading(engine) as connection:
        # Then it has every table, column, type, key and index of db.tables and nothing else
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        assert inspect(connection).get_view_names() == ["current_actions"]


def test_psql_shows_what_tables_and_columns_mean(postgres_url: str) -> None:
    engine = open_database(postgres_url)
    for name in Base.metadata.tables:
        assert inspect(engine).get_table_comment(name)["text"], name
    comments = {column["name"]: column["comment"] for column in inspect(engine).get_columns("decisions")}
    assert comments["queue_ms"] and "millisecond" in comments["queue_ms"]
    engine.dispose()


def test_the_migrated_view_is_the_one_in_the_tables(engine: Engine) -> None:
    # Given a comment whose older text was decided last, one whose decision was overturned twice, and one left alone
    with writing(engine) as connection:
        prepare(connection)
        record_decisions(
            connection,
            [
                scored("1", comment_id="edited", action="hide", decided_at=minutes(2)),
                scored("2", comment_id="edited", submitted_at=minutes(1), decided_at=minutes(1)),
                scored("3", comment_id="overturned", action="remove"),
                scored("4", comment_id="alone", action="label"),
            ],
        )
        for action in ("hide", "allow"):
            add_review(
                connection, submission_id="3", action=action, labels={}, reviewer="mod", note=None, now=minutes(2)
            )
    with reading(engine) as connection:
        now = connection.execute(text("SELECT * FROM current_actions ORDER BY comment_id")).mappings().all()
        definition = connection.execute(text(f"{CURRENT_ACTIONS} ORDER BY comment_id")).mappings().all()
    # Then the view says what holds now, by whom, and equals the definition in db.tables
    assert [(row["comment_id"], row["submission_id"], row["action"], row["decided_by"]) for row in now] == [
        ("alone", "4", "label", "model"),
        ("edited", "2", "allow", "model"),
        ("overturned", "3", "allow", "mod"),
    ]
    assert now == definition


def test_downgrading_to_base_leaves_nothing(engine: Engine, database_url: str) -> None:
    downgrade(database_url, "base")
    # Then only Alembic's own empty table is left
    assert inspect(engine).get_table_names() == ["alembic_version"]
    assert inspect(engine).get_view_names() == []
    # and the database can be upgraded again
    upgrade(database_url)
    require_current(engine)


def test_upgrading_again_keeps_what_is_there(engine: Engine, database_url: str) -> None:
    with writing(engine) as connection:
        prepare(connection)
        record_decisions(connection, [scored("1")])
    upgrade(database_url)
    with reading(engine) as connection:
        assert connection.scalar(text("SELECT count(*) FROM decisions")) == 1


def test_processes_that_upgrade_at_once_all_succeed(empty_database_url: str) -> None:
    # Given several processes started together on an empty database
    program = [sys.executable, "-c", "import sys; from db.migrate import upgrade; upgrade(sys.argv[1])"]
    processes = [
        subprocess.Popen([*program, empty_database_url], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    # Then each finds the schema made, by itself or by another
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0], said
    engine = open_database(empty_database_url)
    require_current(engine)
    engine.dispose()


def test_an_interrupted_upgrade_is_repeated_while_workers_write(empty_postgres_url: str) -> None:
    # Given filled tables of an older release, and somebody who reads for long
    _migrate(empty_postgres_url, lambda config: command.upgrade(config, "0003"))
    engine = open_database(empty_postgres_url)
    columns = "submission_id, community, comment_id, text_sha256, submitted_at, state"
    insert = f"INSERT INTO submissions ({columns}) SELECT n::text, 'default', 'c', '0', now(), 'dead' FROM "
    with writing(engine) as connection:
        connection.execute(text(f"{insert} generate_series(1, 5000) AS n"))
    long_reader = engine.connect().execution_options(isolation_level="REPEATABLE READ")
    long_reader.execute(text("SELECT 1 FROM pg_class LIMIT 1"))
    program = [sys.executable, "-c", "import sys; from db.migrate import upgrade; upgrade(sys.argv[1])"]
    upgrading = subprocess.Popen([*program, empty_postgres_url], cwd=ROOT, stderr=subprocess.DEVNULL)

    def invalid() -> list[str]:
        with reading(engine) as connection:
            unready = "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid"
            return list(connection.scalars(text(unready)))

    try:
        # When the upgrade builds an index, then others write all the while
        wait_until(invalid, what="an index being built")
        with writing(engine) as connection:
            connection.execute(text("SET lock_timeout = '5s'"))
            connection.execute(text(f"{insert} generate_series(5001, 5001) AS n"))
        assert upgrading.poll() is None
        # And where it ends in the middle, the next one builds it anew
        with reading(engine) as connection:
            connection.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_progress_create_index"))
        assert upgrading.wait(60) != 0
        assert invalid()
    finally:
        upgrading.kill()
        upgrading.wait()
        long_reader.close()
    upgrade(empty_postgres_url)
    assert not invalid()
    with reading(engine) as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_a_migration_that_fails_leaves_nothing_behind(empty_database_url: str) -> None:
    # Given a database in which the last thing that the migration makes is there already
    engine = open_database(empty_database_url)
    with writing(engine) as connection:
        connection.execute(text("CREATE VIEW current_actions AS SELECT 1 AS one"))
    with pytest.raises(Exception, match="already exists"):
        upgrade(empty_database_url)
    # Then none of the tables before it stayed
    assert inspect(engine).get_table_names() == []
    engine.dispose()


def test_a_database_without_tables_is_told_what_to_run(empty_database_url: str) -> None:
    engine = open_database(empty_database_url)
    with pytest.raises(SchemaMismatch, match=r"has no tables yet, but .*: run `moderato db upgrade`"):
        require_current(engine)
    engine.dispose()


def test_a_database_of_a_later_release_says_whether_this_one_may_run_on_it(engine: Engine, database_url: str) -> None:
    # Given a database that a release of tomorrow has upgraded, and only added to
    with writing(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from-tomorrow'"))
    require_current(engine)
    # And where a release is taken back, its upgrade finds nothing to do
    upgrade(database_url)
    # When one of the day after has taken away what this release needs
    with writing(engine) as connection:
        connection.execute(text("UPDATE schema_compatibility SET oldest_revision = 'from-tomorrow'"))
    # Then this one does not run on it; nor where it cannot be told
    for statement in "SELECT 1", "DELETE FROM schema_compatibility", "DROP TABLE schema_compatibility":
        with writing(engine) as connection:
            connection.execute(text(statement))
        with pytest.raises(SchemaMismatch, match="from-tomorrow, which this release does not know and may not run on"):
            require_current(engine)
    with pytest.raises(SchemaMismatch, match="from-tomorrow, which this release does not know and may not run on"):
        upgrade(database_url)


def test_the_database_tells_older_releases_what_its_migration_says(engine: Engine, database_url: str) -> None:
    scripts = ScriptDirectory(str(MIGRATIONS))
    head = scripts.get_revision(scripts.get_current_head() or "")
    earlier = [script.revision for script in scripts.walk_revisions()]
    for _ in range(2):
        with reading(engine) as connection:
            found = connection.execute(text("SELECT oldest_revision FROM schema_compatibility")).scalars().all()
        # Then it names a revision up to its own, also when it was upgraded again
        assert found == [head.module.oldest_compatible] and found[0] in earlier
        upgrade(database_url)


def test_a_complaint_about_the_schema_hides_the_password(empty_postgres_url: str) -> None:
    url = make_url(empty_postgres_url)
    password = url.password or "secret"
    engine = open_database(url.set(password=password).render_as_string(hide_password=False))
    with pytest.raises(SchemaMismatch) as raised:
        require_current(engine)
    assert password not in str(raised.value)
    engine.dispose()
