"""Around an upgrade: the release before works beside this one, and processes refuse tables older than they are."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory

from config.settings import ROOT
from db.migrate import MIGRATIONS, _migrate, upgrade
from tests.acceptance.system import SMALL_STEPS, TIMEOUT_S, System

SUBMIT = """
import json, sys
from api_client.client import ModerationClient
ids = []
with ModerationClient() as client:
    client.submit_many(json.load(sys.stdin), on_sent=ids.extend)
print(json.dumps(ids))
"""


@pytest.fixture
def release_before(tmp_path: Path) -> Path:
    """The code as it was before the newest migration, out of this repository's own history."""
    newest = ScriptDirectory(str(MIGRATIONS)).get_revision("head")
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

        # When the tables are upgraded beneath them
        upgrade(empty_postgres_url)
        # Then the worker goes on
        ids += submit_as_before(texts[200:300])
        system.wait_for_decisions(ids)

        # When a worker of this release comes, and is killed with what it took
        with system.stream(texts[300:]) as streamed:
            new = system.start_worker(node="new", **SMALL_STEPS)
            system.wait_for_count(len(ids) + 100)
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
        assert {decision.submission_id for decision in system.decisions()} == set(ids)


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
