"""Nobody but Redis and the database hears of what is moderated: not the makers of the libraries that do it either."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from config.settings import ROOT
from tests.acceptance.system import System

WATCHED_S = 60
PAUSE_S = 0.25
LISTENING = "0A"
LOAD_ONNXRUNTIME = {"model", "trainer", "bench"}
TELLS = "print(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
OPT_OUTS = {"ORT_DISABLE_TELEMETRY": "0", "HF_HUB_DISABLE_TELEMETRY": "0", "DO_NOT_TRACK": "0"}
"""Set against us: it must not count."""


def family(pid: int) -> Iterator[int]:
    """The process and all that it has begun."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                yield from family(int(child))


def connections(pid: int) -> set[str]:
    """The internet sockets of a process now, but for those that only listen: protocol, local and remote address."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{protocol}").read_text().splitlines()[1:]:
            _, local, remote, state, *_, inode = line.split()[:10]
            if inode in inodes and state != LISTENING:
                found.add(f"{protocol} {local} {remote}")
    return found


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_worker_tells_nobody_what_it_does(new_system: System, texts: list[str], tmp_path: Path) -> None:
    # Given a worker with an empty home, Redis on a unix socket and a database in a file: it needs no network at all
    home = tmp_path / "home"
    home.mkdir()
    system = new_system
    system.environment |= {"HOME": str(home), **OPT_OUTS}
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        system.environment.pop(name, None)
    worker = system.start_worker()
    # When it decides comments for a minute
    heard: set[str] = set()
    kept: set[str] = set()
    ids: list[str] = []
    ends_at = time.monotonic() + WATCHED_S
    while time.monotonic() < ends_at:
        if len(ids) < len(texts) // 10:
            ids += system.client.submit_many(texts[len(ids) : len(ids) + 4])
        for pid in family(worker.pid):
            with suppress(OSError):
                heard |= connections(pid)
        kept |= {str(file.relative_to(home)) for file in home.rglob("*")}
        time.sleep(PAUSE_S)
    system.wait_for_decisions(ids)
    # Then it has spoken to nobody, and left nothing to be sent later
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        assert connections(os.getpid())  # it would have been seen
    assert (heard, kept) == (set(), set())


def test_what_libraries_would_send_is_switched_off_before_any_is_loaded() -> None:
    loading = {
        file.relative_to(ROOT).parts[0]
        for package in ("api_client", "cli", "config", "db", "model", "trainer", "worker", "bench")
        for file in (ROOT / package).rglob("*.py")
        if "import onnxruntime" in file.read_text(encoding="utf-8")
    }
    assert loading == LOAD_ONNXRUNTIME
    # Whichever module of such a package comes first, the package itself comes before it
    for package in LOAD_ONNXRUNTIME:
        told = subprocess.run(
            [sys.executable, "-c", f"import {package}, os, sys; {TELLS}"],
            cwd=ROOT,
            env=OPT_OUTS,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert told.split() == ["1", "False"]
