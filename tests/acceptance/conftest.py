"""Fixtures of the acceptance tests: a system, real comments, versions to score with, and a Redis to break."""

import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from api_client.embedded import EmbeddedRedis
from config.settings import ROOT
from tests.acceptance.system import System

COMMENTS_CSV = ROOT / "samples" / "comments.csv"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """2,000 real comments, no two alike."""
    with COMMENTS_CSV.open(encoding="utf-8", newline="") as file:
        return [row["comment_text"] for row in csv.DictReader(file)]


@pytest.fixture
def own_redis() -> Iterator[EmbeddedRedis]:
    """A Redis with an append-only file of its own, which the test may stop."""
    # In /tmp itself, because a socket's path has at most 107 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="moderato-redis-", dir="/tmp") as folder,
        EmbeddedRedis(Path(folder), data=Path(folder, "data"), log=Path(folder, "redis.log")) as redis,
    ):
        yield redis


@pytest.fixture
def new_system(redis_url: str, database_url: str, tmp_path: Path) -> Iterator[System]:
    """A system where no version was ever active, so that its first worker takes the starter."""
    with System(redis_url, database_url, tmp_path) as system:
        yield system


@pytest.fixture
def system(new_system: System, tiny_version: Path) -> System:
    """A system with the tiny version `v1` active."""
    new_system.add_version(tiny_version, "v1")
    new_system.client.activate("v1", instead_of=new_system.client.active(), by="the test", reason="first")
    return new_system
