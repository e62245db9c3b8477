"""Fixtures that every test may ask for: a real Redis, and real databases with and without our tables."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from redis import Redis
from sqlalchemy import URL, Engine, QueuePool
from xdist.plugin import pytest_xdist_auto_num_workers as number_of_cores

from api_client.embedded import EmbeddedRedis
from db.migrate import upgrade
from db.session import open_database
from tests.services import new_database, postgres_server, wait_until

SQL_TESTED_ELSEWHERE = {
    "test_client",
    "test_doctor",
    "test_pipeline",
    "test_policy_following",
    "test_retraining",
    "test_swap",
}
"""Modules that are about something else, and ask only what the tests of db/ ask of both databases."""

# A shell ignores SIGINT for what it starts in the background, and so would every process that a test starts and
# interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# pytest-xdist tells its processes that a terminal has 80 columns. The commands that tests run write into pipes.
os.environ.pop("COLUMNS", None)

# How long an example takes says more about the machine than about the code.
settings.register_profile("moderato", deadline=None)
settings.load_profile("moderato")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """For `-n auto` one process more than cores: acceptance tests wait for much of their time."""
    return int(number_of_cores(config)) + 1


@pytest.fixture(scope="session")
def _redis() -> Iterator[EmbeddedRedis]:
    # In /tmp itself, because a socket's path has at most 107 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="moderato-redis-", dir="/tmp") as folder,
        EmbeddedRedis(Path(folder), data=Path(folder, "data"), log=Path(folder, "redis.log")) as redis,
    ):
        yield redis


@pytest.fixture
def redis_url(_redis: EmbeddedRedis) -> str:
    """An empty Redis, as Celery writes its URL."""
    with Redis(unix_socket_path=str(_redis.socket)) as client:
        client.flushall()
    return _redis.url


@pytest.fixture(scope="session")
def _postgres() -> Iterator[URL]:
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def _postgres_with_tables(_postgres: URL) -> Iterator[str]:
    """To be copied, which takes less than the migrations."""
    with new_database(_postgres) as url:
        upgrade(url)
        yield url


@pytest.fixture(scope="session")
def _sqlite_with_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a file of SQLite's."""
    file = tmp_path_factory.mktemp("with-tables") / "moderato.db"
    upgrade(f"sqlite:///{file}")
    return file


@pytest.fixture
def empty_postgres_url(_postgres: URL) -> Iterator[str]:
    """A PostgreSQL database without tables."""
    with new_database(_postgres) as url:
        yield url


@pytest.fixture
def empty_sqlite_url(tmp_path: Path) -> str:
    """A SQLite database without tables; its file is not there yet."""
    return f"sqlite:///{tmp_path / 'database' / 'moderato.db'}"


@pytest.fixture
def postgres_url(_postgres: URL, _postgres_with_tables: str) -> Iterator[str]:
    """A PostgreSQL database with our tables."""
    with new_database(_postgres, like=_postgres_with_tables) as url:
        yield url


@pytest.fixture
def sqlite_url(empty_sqlite_url: str, _sqlite_with_tables: Path) -> str:
    """A SQLite database with our tables."""
    file = Path(empty_sqlite_url.removeprefix("sqlite:///"))
    file.parent.mkdir(mode=0o700)
    shutil.copy(_sqlite_with_tables, file)
    return empty_sqlite_url


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of `database_url` runs on SQLite and again on PostgreSQL, or on SQLite alone; it may say so itself."""
    says_itself = any("database_kind" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "database_kind" in metafunc.fixturenames and not says_itself:
        module = metafunc.module.__name__.rpartition(".")[2]
        kinds = ["sqlite"] if module in SQL_TESTED_ELSEWHERE else ["sqlite", "postgres"]
        metafunc.parametrize("database_kind", kinds, indirect=True)


@pytest.fixture
def database_kind(request: pytest.FixtureRequest) -> str:
    """`sqlite` or `postgres`."""
    return str(request.param)


@pytest.fixture
def empty_database_url(request: pytest.FixtureRequest, database_kind: str) -> str:
    """A database without tables."""
    return str(request.getfixturevalue(f"empty_{database_kind}_url"))


@pytest.fixture
def database_url(request: pytest.FixtureRequest, database_kind: str) -> str:
    """A database with our tables."""
    return str(request.getfixturevalue(f"{database_kind}_url"))


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on `database_url`."""
    engine = open_database(database_url)
    yield engine
    pool = engine.pool
    assert isinstance(pool, QueuePool)
    # Threads that look at the database for ever take from another pool from now on: this one is done when they have
    # given back what they hold. A connection that they gave back after its end would be left open.
    engine.dispose(close=False)
    wait_until(lambda: pool.checkedout() == 0, what="every connection being given back")
    pool.dispose()


@pytest.fixture(scope="session")
def tiny_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small real version, "tiny-1". Shared: a test that changes it takes a copy."""
    from bench.tiny import write_tiny_version  # here: it loads torch, which most tests do without

    return write_tiny_version(tmp_path_factory.mktemp("versions"), "tiny-1").directory
