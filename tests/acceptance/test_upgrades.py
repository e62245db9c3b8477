"""Around an upgrade: processes refuse tables that are older than they are."""

from pathlib import Path

from alembic import command

from db.migrate import _migrate
from tests.acceptance.system import System


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
