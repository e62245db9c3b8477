"""The whole system on one machine: Redis, database, worker, trainer, webhooks; started together, stopped in order."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Self

from cli.terminal import Problem, err, say
from config.names import MODERATE_QUEUES, RETRAIN_QUEUE
from config.settings import ROOT, Settings

if TYPE_CHECKING:
    from api_client.embedded import EmbeddedRedis

LOG_DIRECTORY = ROOT / "var" / "log"
READY_TIMEOUT_S = 120
"""The worker answers once its model is loaded and checked."""
STOP_TIMEOUT_S = {"worker": 30.0, "trainer": 5.0, "webhooks": 30.0}
"""The worker finishes what it holds; a training is not waited for, and changes nothing where it is cut off. What is
being posted to an endpoint comes to its end, or would be posted again."""
WATCH_S = 1.0
SHORTEST_LIFE_S = 5.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Service:
    """A process we started, in a session and so a process group of its own."""

    name: str
    command: list[str]
    process: "subprocess.Popen[bytes]"
    log: Path
    log_start: int
    """Where in the log this process began."""
    started_at: float
    """Monotonic, seconds."""

    def send(self, number: int) -> None:
        """Signal the whole group: a prefork pool's child is in it."""
        if self.process.poll() is None or number == signal.SIGKILL:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def last_lines(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-15:])


@contextmanager
def embedded_system(
    settings: Settings, redis: "EmbeddedRedis | None", log_directory: Path = LOG_DIRECTORY
) -> Iterator[list[Service]]:
    """Everything runs and answers while the context is open; on leaving it, however that comes, nothing is left.

    Ctrl-C, SIGTERM and SIGHUP stop it in order: worker, trainer, Redis. A second one while it stops kills what is left.
    Under nohup SIGHUP stays ignored.

    Args:
        redis: started first and stopped last; None where the settings name another broker.

    Raises:
        RedisProblem: the embedded Redis cannot be started.
        Problem: the worker or the trainer ended, or did not answer in time; the message holds its last words.
    """
    from db.migrate import upgrade

    services: list[Service] = []
    with _Signals(on_repeated=lambda: _kill(services)) as signals:
        try:
            if redis is not None:
                with signals.deferred():
                    redis.start()
            upgrade(settings.database_url)
            for name, command in _commands(settings).items():
                with signals.deferred():
                    services.append(_start(name, command, log_directory))
            _wait_until_ready(services)
            yield services
        finally:
            try:
                # A signal from here on is a repeated one; one that comes before it still finds the stop below.
                signals.stopping = True
            finally:
                _stop(services)
                if redis is not None:
                    redis.stop()


class _Signals:
    """Turns the first of SIGNALS into an exception; calls `on_repeated` for every other while the stop is under way."""

    def __init__(self, on_repeated: Callable[[], None]) -> None:
        self.stopping = False
        self._on_repeated = on_repeated
        self._deferring = False
        self._received: int | None = None

    def __enter__(self) -> Self:
        # SIGINT is taken also where a shell started this in the background with SIGINT ignored: processes started from
        # here would ignore it too, and it is how people stop things.
        under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        taken = [number for number in SIGNALS if not (under_nohup and number == signal.SIGHUP)]
        self._previous = {number: signal.signal(number, self._receive) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold an exception back until the body is done: raised while a process starts it would leave it behind."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self._raise()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.stopping:
            # Raising here would leave the stop half done.
            self._on_repeated()
            return
        self._received = number
        if not self._deferring:
            self._raise()

    def _raise(self) -> None:
        if self._received is None:
            return
        self.stopping = True
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._received)


def _commands(settings: Settings) -> dict[str, list[str]]:
    """What the README tells people to run, by the name of the process."""
    commands = {}
    for app, queues in (("worker", ",".join(MODERATE_QUEUES)), ("trainer", RETRAIN_QUEUE)):
        celery = [sys.executable, "-m", "celery", "-A", app, "worker", "-Q", queues]
        commands[app] = [*celery, "-n", f"{app}@%h", "--loglevel", "INFO"]
    if settings.webhooks.endpoints:
        commands["webhooks"] = [sys.executable, "-m", "cli.main", "webhooks", "run"]
    return commands


def _start(name: str, command: list[str], log_directory: Path) -> Service:
    log_directory.mkdir(parents=True, exist_ok=True)
    log = log_directory / f"{name}.log"
    with log.open("ab") as output:
        return Service(
            name,
            command,
            subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # The terminal's Ctrl-C must not reach it before us, who stop things in order.
                start_new_session=True,
                preexec_fn=_die_with_parent,
            ),
            log,
            output.tell(),
            time.monotonic(),
        )


def _die_with_parent() -> None:
    """Even where this command is killed with SIGKILL, the worker finishes what it holds and ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_ready(services: list[Service]) -> None:
    from api_client.client import BrokerUnavailable, ModerationClient

    expected = {f"{name}@{socket.gethostname()}" for name in ("worker", "trainer")}
    deadline = time.monotonic() + READY_TIMEOUT_S
    with ModerationClient() as client, err.status("starting the worker and the trainer"):
        while True:
            _check_alive(services)
            try:
                workers, trainers = client.nodes()
            except BrokerUnavailable as unavailable:
                raise Problem(str(unavailable)) from None
            if expected <= {*workers, *trainers}:
                return
            if time.monotonic() > deadline:
                logs = ", ".join(str(service.log) for service in services)
                raise Problem(f"worker and trainer did not both answer within {READY_TIMEOUT_S} s; see {logs}")


def _check_alive(services: list[Service]) -> None:
    for service in services:
        if (status := service.process.poll()) is not None:
            raise Problem(f"the {service.name} ended with status {status}; {service.log} says:\n{service.last_lines()}")


def keep_running(services: list[Service]) -> None:
    """Until a signal ends the system, start what dies again: what it held comes back to it.

    Raises:
        Problem: a process died soon after its start, so another start would be in vain.
    """
    while True:
        time.sleep(WATCH_S)
        for index, service in enumerate(services):
            if service.process.poll() is None:
                continue
            if time.monotonic() - service.started_at < SHORTEST_LIFE_S:
                _check_alive([service])
            service.send(signal.SIGKILL)  # a child of its pool may be left
            say(f"the {service.name} ended with status {service.process.returncode}; starting it again")
            services[index] = _start(service.name, service.command, service.log.parent)


def _kill(services: list[Service]) -> None:
    for service in services:
        service.send(signal.SIGKILL)


def _stop(services: list[Service]) -> None:
    for service in services:
        service.send(signal.SIGTERM)
    for service in services:
        with suppress(subprocess.TimeoutExpired):
            service.process.wait(STOP_TIMEOUT_S[service.name])
        # Also where it ended by itself: a child of its pool may be left.
        service.send(signal.SIGKILL)
        service.process.wait()
