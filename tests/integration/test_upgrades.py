"""Two releases on one database: what the older one writes works, and the newer one takes it for its own."""

from datetime import datetime
from typing import Any

from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text

from api_client.client import ModerationClient
from db.migrate import MIGRATIONS, _migrate, upgrade
from db.queries import Result
from db.session import open_database, writing
from db.tables import UtcDateTime
from tests.integration.rows import NOON, POLICY, POLICY_VERSION

WRITTEN_BY_0002: dict[str, dict[str, Any]] = {
    "policies": {"policy_version": POLICY_VERSION, "text": POLICY, "first_used_at": NOON},
    "model_versions": {"version": "v1", "parent": None, "manifest": '{"version": "v1"}', "registered_at": NOON},
    "activations": {"version": "v1", "activated_at": NOON, "activated_by": "w1", "reason": "first start"},
    "version_loads": {"activation_id": 1, "worker": "w1", "version": "v1", "error": None, "loaded_at": NOON},
    "submissions": {
        "submission_id": "old", "community": "default", "comment_id": "42", "author": None, "text": "hello",
        "text_sha256": "0" * 64, "language": None, "context": '{"page": 1}', "created_at": None, "submitted_at": NOON,
        "state": "decided",
    },
    "decisions": {
        "submission_id": "old", "toxic": 0.1, "severe_toxic": 0.1, "obscene": 0.1, "threat": 0.1, "insult": 0.1,
        "identity_hate": 0.1, "action": "allow", "fired_label": None, "fired_threshold": None, "model_version": "v1",
        "policy_version": POLICY_VERSION, "windows": 1, "truncated": False, "queue_ms": 1.0, "compute_ms": 1.0,
        "decided_at": NOON,
    },
    "reviews": {
        "submission_id": "old", "action": "hide", "toxic": True, "reviewer": "mod", "note": None, "reviewed_at": NOON,
    },
    "dead_letters": {
        "dead_letter_id": "letter", "queue": "toxicity", "reason": "expired", "detail": "too late", "payload": b"{}",
        "payload_bytes": 2, "payload_sha256": "0" * 64, "text_sha256": None, "community": None, "comment_id": None,
        "author": None, "received_at": NOON,
    },
}  # fmt: skip
"""The columns that its worker and client name when they write, as they stand in its statements."""


def test_what_the_release_before_writes_is_taken_as_ones_own(engine: Engine, database_url: str) -> None:
    # Given tables of this release, and a worker and a client of the one before that were not stopped
    with writing(engine) as connection:
        to_column = UtcDateTime().dialect_impl(connection.dialect).bind_processor(connection.dialect) or (lambda t: t)
        for table, row in WRITTEN_BY_0002.items():
            values = {name: to_column(value) if isinstance(value, datetime) else value for name, value in row.items()}
            statement = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(f':{name}' for name in row)})"
            connection.execute(text(statement), values)
    # When this release's client asks
    with ModerationClient("redis://127.0.0.1:1/0", database_url) as client:
        result, explained = client.result("old"), client.explain("old")
        letter = client.dead_letter("letter")
    # Then it sees all of it
    assert isinstance(result, Result) and explained is not None and letter is not None
    assert (result.action, result.model_action, result.reviewer, result.context) == (
        "hide",
        "allow",
        "mod",
        {"page": 1},
    )
    assert explained["version"]["activation"]["activated_by"] == "w1"
    assert letter.reason == "expired"


def test_migrations_only_add_for_the_releases_that_may_run_beside_this_one(
    empty_database_url: str,
) -> None:
    # Given the tables of the oldest release that may, as they were and as they are
    scripts = ScriptDirectory(str(MIGRATIONS))
    oldest = scripts.get_revision(scripts.get_current_head() or "").module.oldest_compatible
    _migrate(empty_database_url, lambda config: command.upgrade(config, oldest))
    database = open_database(empty_database_url)
    before = {table: _Columns(database, table) for table in inspect(database).get_table_names()}
    upgrade(empty_database_url)
    after = {table: _Columns(database, table) for table in before}
    database.dispose()
    for table, was in before.items():
        now = after[table]
        # Then each of its columns is there, as it was
        assert {name: now.columns.get(name) for name in was.columns} == was.columns
        # And what was added need not be written
        added = now.columns.keys() - was.columns.keys()
        assert not [name for name in added if name in now.required]
        # And is all that may newly be unique
        assert all(names in was.unique or names <= added for names in now.unique)


class _Columns:
    """What a release sees of a table when it writes."""

    def __init__(self, database: Engine, table: str) -> None:
        look = inspect(database)
        found = look.get_columns(table)
        self.columns = {column["name"]: (str(column["type"]), column["nullable"]) for column in found}
        self.required = [each["name"] for each in found if not each["nullable"] and each.get("default") is None]
        self.unique: list[set[str | None]] = [set(each["column_names"]) for each in look.get_unique_constraints(table)]
        self.unique += [set(each["column_names"]) for each in look.get_indexes(table) if each["unique"]]
