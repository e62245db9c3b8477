"""Celery's own command line speaks to our apps as to any other."""

import subprocess
import sys

import pytest

from config.settings import ROOT
from tests.acceptance.system import TIMEOUT_S, System

pytestmark = pytest.mark.parametrize("empty_database_url", ["sqlite"], indirect=True)


def celery(system: System, *arguments: str) -> str:
    """What a `celery` command prints."""
    command = [sys.executable, "-m", "celery", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=system.environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    ).stdout


def test_ping_and_shutdown_reach_our_processes_and_no_others(system: System) -> None:
    # Given a worker and a trainer on one Redis
    worker = system.start_worker()
    trainer = system.start_trainer()

    # When each app is pinged, then its own process answers and no other
    answer = celery(system, "-A", "worker", "inspect", "ping", "--timeout", "3")
    assert f"{worker.node}: OK" in answer
    assert "1 node online" in answer
    answer = celery(system, "-A", "trainer", "inspect", "ping", "--timeout", "3")
    assert f"{trainer.node}: OK" in answer
    assert "1 node online" in answer

    # When the worker is told to shut down, then it ends well, and the trainer goes on
    celery(system, "-A", "worker", "control", "shutdown")
    assert worker.wait() == 0
    assert trainer.is_running
