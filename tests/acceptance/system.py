"""The running system as an operator has it: our two Celery apps as processes, Redis, a database, versions on disk."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from celery import Celery
from redis import Redis

from api_client.client import ModerationClient
from config.names import MODERATE_QUEUE, RETRAIN_QUEUE, TRAINER_CONTROL_EXCHANGE, WORKER_UNACKED_KEY
from config.settings import PREFIX, ROOT
from db import queries
from db.queries import LoadRow, Result, RunRow
from db.session import open_database, reading, writing
from model.version import MANIFEST_FILE, read_manifest
from tests.services import wait_until

TIMEOUT_S = 180
"""For anything: the machine may be busy."""
LOG_END_BYTES = 6_000

SMALL_STEPS = {"max_batch_tokens": "128", "window_tokens": "256", "max_held_comments": "64"}
"""Worker settings with which a queue lasts long enough to do something in the middle of it."""

QUICK_TRAINING = {
    "MODERATO_TRAINER__MIN_CORRECTIONS": "0",
    "MODERATO_TRAINER__MAX_ROWS": "96",
    "MODERATO_TRAINER__MAX_HOLDOUT_ROWS": "120",
    "MODERATO_TRAINER__BATCH_SIZE": "8",
    "MODERATO_TRAINER__EPOCHS": "2",
    "MODERATO_TRAINER__CALIBRATION_TEXTS": "16",
    # Whatever comes of it is promoted: the gate has tests of its own.
    "MODERATO_TRAINER__REPORT_TO": "[]",
    "MODERATO_TRAINER__ROBUSTNESS_ROWS": "24",
    "MODERATO_TRAINER__MAX_INT8_AUC_DROP": "1",
    "MODERATO_TRAINER__MAX_LABEL_AUC_DROP": "1",
    "MODERATO_TRAINER__MAX_MEAN_AUC_DROP": "1",
    "MODERATO_TRAINER__MAX_LABEL_LOG_LOSS_RISE": "9",
    "MODERATO_TRAINER__MAX_EVASION_AUC_DROP": "1",
    "MODERATO_TRAINER__MAX_BIAS_AUC_DROP": "1",
    "MODERATO_TRAINER__MIN_LABEL_POSITIVES": "1",
}


class CeleryProcess:
    """A Celery app started by the command that its users type, in a process group of its own, writing to a log."""

    def __init__(
        self,
        app: str,
        queue: str,
        node: str,
        environment: Mapping[str, str],
        log: Path,
        loglevel: str = "INFO",
        release: Path = ROOT,
    ) -> None:
        self.node = f"{node}@{socket.gethostname()}"
        self._log = log
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-Q", queue]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--loglevel", loglevel, "-n", f"{node}@%h"],
                cwd=release,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_for_log(self, words: str) -> None:
        """Wait until the process has said this."""

        def said() -> bool:
            assert self.is_running, f"{self.node} ended with status {self._process.returncode}:\n{self.log()}"
            return words in self.log()

        wait_until(said, TIMEOUT_S, f"{words!r} in the log of {self.node}")

    def wait_until_ready(self) -> Self:
        self.wait_for_log(f"{self.node} ready.")
        return self

    def terminate(self) -> None:
        """SIGTERM, as a supervisor stops it."""
        self._process.terminate()

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The process stands still while the block runs; signals reach it afterwards."""
        self._process.send_signal(signal.SIGSTOP)
        yield
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, with its children."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        return self._process.wait(TIMEOUT_S)

    def close(self) -> None:
        """End it, and show the end of its log, which pytest prints where the test failed."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        self.kill()
        print(f"--- {self._log.name}, status {self._process.returncode} ---\n{self.log()[-LOG_END_BYTES:]}")


class System:
    """One system under test, and the operator's ways into it."""

    def __init__(self, broker_url: str, database_url: str, directory: Path) -> None:
        """Prepare, starting nothing.

        Args:
            broker_url: of a Redis on a unix socket.
            database_url: of a database with our tables.
            directory: for the versions and the logs.
        """
        self.broker_url = broker_url
        self.versions_dir = directory / "versions"
        self.versions_dir.mkdir()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | {
            "MODERATO_BROKER_URL": broker_url,
            "MODERATO_DATABASE_URL": database_url,
            "MODERATO_VERSIONS_DIR": str(self.versions_dir),
            "MODERATO_WORKER__DEVICE": "cpu",
            "MODERATO_WORKER__VISIBILITY_TIMEOUT_S": "3",
        }
        self.redis = Redis(unix_socket_path=broker_url.removeprefix("redis+socket://"))
        self.client = ModerationClient(broker_url, database_url)
        self.database = open_database(database_url)
        self._directory = directory
        self._processes: list[CeleryProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.close()
        self.client.close()
        self.redis.close()
        self.database.dispose()

    # --- Processes ---

    def start_worker(self, *, node: str = "w1", **worker_settings: str) -> CeleryProcess:
        """`celery -A worker worker -Q toxicity`, ready. Settings are those of the section worker."""
        return self.begin_worker(node=node, **worker_settings).wait_until_ready()

    def begin_worker(
        self, release: Path = ROOT, /, *, node: str = "w1", app: str = "worker", **worker_settings: str
    ) -> CeleryProcess:
        """The same, not waited for.

        Args:
            release: the folder of the code that it runs.
            app: may be a module with a worker that differs in something.
        """
        variables = {f"MODERATO_WORKER__{name.upper()}": value for name, value in worker_settings.items()}
        return self._start(app, MODERATE_QUEUE, node, variables, release)

    def start_trainer(self, app: str = "trainer") -> CeleryProcess:
        """`celery -A trainer worker -Q retrain`, ready, with a training that lasts seconds."""
        return self.begin_trainer(app).wait_until_ready()

    def begin_trainer(self, app: str = "trainer") -> CeleryProcess:
        """The same, not waited for."""
        return self._start(app, RETRAIN_QUEUE, "t1", QUICK_TRAINING)

    def _start(
        self, app: str, queue: str, node: str, environment: Mapping[str, str], release: Path = ROOT
    ) -> CeleryProcess:
        log = self._directory / f"{app}-{len(self._processes)}.log"
        process = CeleryProcess(app, queue, node, {**self.environment, **environment}, log, release=release)
        self._processes.append(process)
        return process

    def training_processes(self) -> list[int]:
        """Process ids of the trainer's pool, as the trainer itself tells them."""
        with Celery(broker=self.broker_url, set_as_current=False) as app:
            app.conf.control_exchange = TRAINER_CONTROL_EXCHANGE
            stats = wait_until(app.control.inspect(timeout=2).stats, TIMEOUT_S, "the trainer's answer")
        return [pid for node in stats.values() for pid in node["pool"]["processes"]]

    # --- Comments ---

    @contextmanager
    def stream(self, texts: list[str]) -> Iterator[list[str]]:
        """Submit comments one burst after the other while the block runs; gives the growing list of their ids."""
        ids: list[str] = []
        stopped = threading.Event()

        bursts = itertools.cycle([texts[start : start + 16] for start in range(0, len(texts), 16)])

        def produce() -> None:
            while not stopped.wait(0.1):
                self.client.submit_many(next(bursts), on_sent=ids.extend)

        with ThreadPoolExecutor(1) as pool:
            producing = pool.submit(produce)
            try:
                yield ids
            finally:
                stopped.set()
        producing.result()

    def wait_for_decisions(self, ids: list[str]) -> None:
        """Wait until each of them is decided; a dead letter fails."""
        assert set(self.client.wait(ids, timeout_s=TIMEOUT_S).values()) == {"decided"}

    def decisions(self) -> list[Result]:
        return list(self.client.results())

    def count_decisions(self) -> int:
        with reading(self.database) as connection:
            return queries.totals(connection).decisions

    def wait_for_count(self, decisions: int) -> None:
        """Wait until there are at least so many decisions."""
        wait_until(lambda: self.count_decisions() >= decisions, TIMEOUT_S, f"{decisions} decisions")

    def waiting_messages(self) -> int:
        return int(self.redis.llen(MODERATE_QUEUE))

    def held_messages(self) -> int:
        """Taken by a worker and not acknowledged."""
        return int(self.redis.hlen(WORKER_UNACKED_KEY))

    def ids_of_held_messages(self) -> set[str]:
        held = cast(list[bytes], self.redis.hvals(WORKER_UNACKED_KEY))  # each after the name of its list
        return {json.loads(message.partition(b"\n")[2])["headers"]["id"] for message in held}

    def wait_until_nothing_is_left(self) -> None:
        """Acknowledgements follow the decisions by a moment."""

        def left() -> int:
            leases = int(self.redis.zcard(f"{WORKER_UNACKED_KEY}_index"))
            return self.waiting_messages() + self.held_messages() + leases

        wait_until(lambda: left() == 0, TIMEOUT_S, "an empty Redis")

    # --- Versions ---

    def add_version(self, source: Path, name: str) -> Path:
        """A copy of a version under another name, on disk and registered; its directory."""
        directory = self.versions_dir / name
        shutil.copytree(source, directory)
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        (directory / MANIFEST_FILE).write_text(json.dumps(manifest | {"version": name}), encoding="utf-8")
        with writing(self.database) as connection:
            queries.register_version(connection, read_manifest(directory).model_dump(), datetime.now(UTC))
        return directory

    def wait_for_load(self, activation_id: int) -> LoadRow:
        """The worker's word on an activation."""
        return wait_until(
            lambda: next(iter(self.client.loads(activation_id)), None), TIMEOUT_S, "the worker's word on the activation"
        )

    def run(self, run_id: str) -> RunRow:
        run = self.client.training_run(run_id)
        assert run is not None
        return run

    def wait_for_run(self, run_id: str, condition: Callable[[RunRow], bool], what: str) -> RunRow:
        """Wait until the run's row is so."""

        def row_if_so() -> RunRow | None:
            row = self.run(run_id)
            return row if condition(row) else None

        return wait_until(row_if_so, TIMEOUT_S, f"a training run that {what}")

    def wait_until_training(self, run_id: str) -> RunRow:
        return self.wait_for_run(run_id, lambda row: row.phase == "training" and row.state == "running", "trains")

    def wait_until_finished(self, run_id: str) -> RunRow:
        return self.wait_for_run(run_id, lambda row: row.finished_at is not None, "is finished")
