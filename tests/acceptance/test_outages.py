"""Redis or the database is away for a while: the worker waits, and goes on by itself."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from api_client.embedded import EmbeddedRedis
from tests.acceptance.system import SMALL_STEPS, System


@pytest.fixture
def own_redis() -> Iterator[EmbeddedRedis]:
    """A Redis that this test may stop."""
    # In /tmp itself, because a socket's path has at most 107 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="moderato-redis-", dir="/tmp") as folder,
        EmbeddedRedis(Path(folder), data=Path(folder, "data"), log=Path(folder, "redis.log")) as redis,
    ):
        yield redis


def test_a_worker_outlives_a_restart_of_redis(
    own_redis: EmbeddedRedis, sqlite_url: str, tiny_version: Path, tmp_path: Path, texts: list[str]
) -> None:
    with System(own_redis.url, sqlite_url, tmp_path) as system:
        # Given a worker in the middle of a queue
        system.add_version(tiny_version, "v1")
        system.client.activate("v1", by="the test", reason="first")
        ids = [system.client.submit(text) for text in texts[:1000]]
        worker = system.start_worker(**SMALL_STEPS)
        system.wait_for_count(100)

        # When Redis stops, and comes back
        own_redis.stop()
        worker.wait_for_log("Connection to broker lost")
        own_redis.start()
        assert system.waiting_messages() > 0, "the queue was empty already, which tests nothing"

        # Then the same process goes on: all that was submitted before and after is decided once
        system.client.submit_many(texts[1000:], on_sent=ids.extend)
        system.wait_for_decisions(ids)
        system.wait_until_nothing_is_left()
        assert system.count_decisions() == len(ids)
        assert worker.is_running
        assert system.client.nodes() == ([worker.node], [])


@contextmanager
def closed_to_everyone(postgres_url: str) -> Iterator[None]:
    """The database ends every connection and takes no new one while the block runs."""
    url = make_url(postgres_url)
    server = create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    end_connections = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
    try:
        with server.connect() as connection:
            connection.execute(text(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS false"))
            connection.execute(end_connections, {"name": url.database})
            yield
            connection.execute(text(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS true"))
    finally:
        server.dispose()


@pytest.mark.parametrize("empty_database_url", ["postgres"], indirect=True)
def test_decisions_wait_for_a_database_that_is_away(system: System, postgres_url: str, texts: list[str]) -> None:
    # Given a worker in the middle of a queue
    ids = [system.client.submit(text) for text in texts[:1000]]
    worker = system.start_worker(**SMALL_STEPS)
    system.wait_for_count(100)

    # When the database is away
    with closed_to_everyone(postgres_url):
        worker.wait_for_log("the database cannot be written to")
        # Then the worker says so, still answers, and holds what it has
        assert system.client.nodes() == ([worker.node], [])
        assert system.held_messages() > 0
        assert system.waiting_messages() > 0
        system.client.submit_many(texts[1000:], on_sent=ids.extend)

    # And when it is back, everything is decided once
    worker.wait_for_log("the database can be written to again")
    system.wait_for_decisions(ids)
    system.wait_until_nothing_is_left()
    assert system.count_decisions() == len(ids)
    assert worker.is_running
