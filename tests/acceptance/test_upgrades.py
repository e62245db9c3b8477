"""Around an upgrade: the release before works beside this one, and processes refuse tables older than they are."""

import json
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text

from config.settings import ROOT
from db.migrate import MIGRATIONS, _migrate, upgrade
from db.session import open_database, reading, writing
from tests.acceptance.system import SMALL_STEPS, TIMEOUT_S, System
from tests.services import wait_until

SUBMIT = """
import json, sys
from api_client.client import ModerationClient
ids = []
with ModerationClient() as client:
    client.submit_many(json.load(sys.stdin), on_sent=ids.extend)
print(json.dumps(ids))
"""


FIRST_MIGRATION_SINCE = "0004"
"""The first migration that the release before did not have."""
FILLED = 20_000
FILL = (
    "INSERT INTO submissions (submission_id, community, comment_id, text_sha256, submitted_at, state) "
    "SELECT 'filled:' || n, 'default', n::text, '0', now(), 'decided' FROM generate_series(1, :rows) AS n",
    "INSERT INTO decisions (submission_id, toxic, severe_toxic, obscene, threat, insult, identity_hate, action, "
    "model_version, policy_version, windows, truncated, queue_ms, compute_ms, decided_at) "
    "SELECT 'filled:' || n, 0, 0, 0, 0, 0, 0, 'allow', 'v1', policy_version, 1, false, 0, 0, now() "
    "FROM generate_series(1, :rows) AS n, policies",
)


@pytest.fixture
def release_before(tmp_path: Path) -> Path:
    """The code as it was before this release's first migration, out of this repository's own history."""
    newest = ScriptDirectory(str(MIGRATIONS)).get_revision(FIRST_MIGRATION_SINCE)
    if shutil.which("git") is None:
        pytest.skip("there is no git here")
    added = ["git", "log", "--diff-filter=A", "--format=%H", "-1", "--", newest.path]
    commit = subprocess.run(added, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    archive = tmp_path / "before.tar"
    packing = ["git", "archive", f"--output={archive}", f"{commit}^"]
    if not commit or subprocess.run(packing, cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("git does not find the release before in the history here")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "before", filter="data")
    return tmp_path / "before"


def run_of(release: Path, system: System, *arguments: str, given: str = "") -> str:
    """What a Python of this release prints."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=release,
        env=system.environment,
        input=given,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    ).stdout


def test_the_release_before_works_beside_this_one(
    release_before: Path, redis_url: str, empty_postgres_url: str, texts: list[str], tmp_path: Path
) -> None:
    with System(redis_url, empty_postgres_url, tmp_path) as system:

        def submit_as_before(texts: list[str]) -> list[str]:
            ids: list[str] = json.loads(run_of(release_before, system, "-c", SUBMIT, given=json.dumps(texts)))
            return ids

        # Given worker, producer and tables of the release before
        run_of(release_before, system, "-m", "cli.main", "db", "upgrade")
        old = system.begin_worker(release_before, node="old", **SMALL_STEPS).wait_until_ready()
        ids = submit_as_before(texts[:200])
        system.wait_for_count(len(ids))
        database = open_database(empty_postgres_url)
        with writing(database) as connection:
            for statement in FILL:
                connection.execute(text(statement), {"rows": FILLED})

        # When the tables are upgraded beneath them, which takes as long as somebody reads
        reader = database.connect().execution_options(isolation_level="REPEATABLE READ")
        reader.execute(text("SELECT 1 FROM pg_class LIMIT 1"))
        with ThreadPoolExecutor(1) as pool:
            try:
                upgrading = pool.submit(upgrade, empty_postgres_url)
                wait_until(lambda: _builds_an_index(database), TIMEOUT_S, "an index being built")
                # Then the worker decides meanwhile
                ids += submit_as_before(texts[200:250])
                system.wait_for_decisions(ids)
                assert not upgrading.done()
            finally:
                reader.close()
            upgrading.result(TIMEOUT_S)
        database.dispose()
        # And afterwards
        ids += submit_as_before(texts[250:300])
        system.wait_for_decisions(ids)

        # When a worker of this release comes, and is killed with what it took
        with system.stream(texts[300:]) as streamed:
            new = system.start_worker(node="new", **SMALL_STEPS)
            system.wait_for_count(FILLED + len(ids) + 100)
            new.kill()
        ids += streamed
        # Then the older one decides that too, as this release's client sent it
        system.wait_for_decisions(ids)

        # When the next one comes, and the older one is killed
        with system.stream(texts[300:]) as streamed:
            system.start_worker(node="new", **SMALL_STEPS)
            before = system.count_decisions()
            system.wait_for_count(before + 100)
            ids += submit_as_before(texts[:100])
            old.kill()
        ids += streamed
        # Then it decides all there is, nothing is lost, and nothing left
        system.wait_for_decisions(ids)
        system.wait_until_nothing_is_left()
        decided = {decision.submission_id for decision in system.decisions()}
        assert {each for each in decided if not each.startswith("filled:")} == set(ids)


def _builds_an_index(database: Engine) -> bool:
    with reading(database) as connection:
        return bool(connection.scalar(text("SELECT count(*) FROM pg_stat_progress_create_index")))


def test_worker_and_trainer_say_what_to_run_on_older_tables(
    redis_url: str, empty_sqlite_url: str, tmp_path: Path
) -> None:
    # Given tables of the first release
    _migrate(empty_sqlite_url, lambda config: command.upgrade(config, "0001"))
    with System(redis_url, empty_sqlite_url, tmp_path) as system:
        # When worker and trainer are started
        processes = [system.begin_worker(), system.begin_trainer()]
        # Then both end, and say why and what to do
        for process in processes:
            assert process.wait() == 1, process.log()
            assert "cannot start: the database " in process.log()
            assert "is at schema revision 0001, but this release needs " in process.log()
            assert "run `moderato db upgrade`" in process.log()
