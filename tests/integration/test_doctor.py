"""`moderato doctor` on real servers: what is sound is said to be, what is not is named with what to do."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import text

from bench.tiny import copy_version
from cli import checks
from cli.checks import (
    Check,
    Finding,
    check_broker,
    check_database,
    check_disks,
    check_gpu,
    check_permissions,
    check_policy,
    check_processes,
    check_queues,
    check_versions,
)
from cli.doctor import examine
from config.settings import ROOT, Settings, load_settings
from db import policies, queries
from db.session import open_database, writing
from model.version import ONNX_FILE, read_manifest


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as redis:
        yield redis


def found(check: Check, settings: Settings) -> dict[str, str]:
    """What a check says, by level; each line with its advice."""
    levels: dict[str, str] = {}
    for finding in check(settings):
        levels[finding.level] = f"{levels.get(finding.level, '')}{finding.said} → {finding.advice}\n"
    return levels


def with_urls(broker_url: str, database_url: str, **more: str) -> Settings:
    return load_settings({"MODERATO_BROKER_URL": broker_url, "MODERATO_DATABASE_URL": database_url, **more})


def test_what_is_sound_is_said_to_be(redis_url: str, database_url: str, tiny_version: Path) -> None:
    # Given servers with tables, and an active version and policy that are there
    engine = open_database(database_url)
    with writing(engine) as connection:
        now = datetime.now(UTC)
        queries.register_version(connection, read_manifest(tiny_version).model_dump(), now)
        queries.activate(
            connection, instead_of=queries.active(connection), version="tiny-1", by="t", reason="first", now=now
        )
        policies.activate(
            connection,
            "communities: {default: {}}",
            instead_of=policies.active(connection),
            by="t",
            reason="first",
            now=now,
        )
    engine.dispose()
    settings = with_urls(redis_url, database_url, MODERATO_VERSIONS_DIR=str(tiny_version.parent))
    # Then there is nothing to complain of
    for check in (check_broker, check_database, check_versions, check_policy, check_queues):
        assert [*found(check, settings)] == ["ok"], check.__name__
    assert "tiny-1 is whole" in found(check_versions, settings)["ok"]
    assert "is active in the database" in found(check_policy, settings)["ok"]
    for check in (check_gpu, check_disks):
        assert found(check, settings).keys() <= {"ok", "warning"}
    # But that nobody works
    assert "start one: celery -A worker worker -Q toxicity" in found(check_processes, settings)["warning"]


def test_a_database_of_another_schema(redis_url: str, empty_database_url: str) -> None:
    settings = with_urls(redis_url, empty_database_url)
    file = Path(empty_database_url.removeprefix("sqlite:///"))
    # Given a database without tables: a file that is not there, or a server's that is empty
    assert "run `moderato db upgrade`" in found(check_database, settings)["problem"]
    assert "without the database" in found(check_versions, settings)["unknown"]
    # Then looking at it has not made it
    assert not file.exists()


def test_a_database_that_others_hold(redis_url: str, sqlite_url: str) -> None:
    engine = open_database(sqlite_url)
    with writing(engine) as connection:
        connection.execute(text("SELECT 1"))
        assert "locked by a writer" in found(check_database, with_urls(redis_url, sqlite_url))["warning"]
    engine.dispose()


def test_servers_that_do_not_answer(sqlite_url: str) -> None:
    broken = with_urls("redis://:secret@127.0.0.1:1/0", "postgresql://me:secret@127.0.0.1:1/x")
    for check in (check_broker, check_database):
        said = found(check, broken)["problem"]
        assert "refused" in said and "secret" not in said
    assert list(check_queues(broken)) == []
    assert "could not be asked" in found(check_processes, broken)["unknown"]


def test_a_redis_that_would_lose_comments(redis: Redis, redis_url: str, sqlite_url: str) -> None:
    settings = with_urls(redis_url, sqlite_url)
    before = {name: str(redis.config_get(name)[name]) for name in ("appendonly", "maxmemory", "maxmemory-policy")}
    try:
        redis.config_set("maxmemory-policy", "allkeys-lru")
        redis.config_set("maxmemory", 1 << 30)
        redis.config_set("appendonly", "no")
        levels = found(check_broker, settings)
        assert "at its limit it would drop what is queued" in levels["problem"]
        assert "no append-only file" in levels["warning"]
    finally:
        for name, value in before.items():
            redis.config_set(name, value)


def test_a_queue_that_nobody_takes_from(redis: Redis, redis_url: str, sqlite_url: str) -> None:
    # Given a message of an hour ago, before one that does not say
    settings = with_urls(redis_url, sqlite_url)
    redis.lpush("toxicity", json.dumps({"headers": {"submitted_at": time.time() - 3600}}), "no message at all")
    assert "toxicity: 2 messages wait, the oldest for 3,6" in found(check_queues, settings)["warning"]
    assert "no worker answers, and 2 messages wait" in found(check_processes, settings)["problem"]
    # And where the oldest does not say, its age is not made up
    redis.rpop("toxicity")
    assert "toxicity: 1 messages wait →" in found(check_queues, settings)["ok"]


def test_a_version_that_is_damaged_or_gone(redis_url: str, sqlite_url: str, tiny_version: Path, tmp_path: Path) -> None:
    directory = copy_version(tiny_version, tmp_path, "v1")
    settings = with_urls(redis_url, sqlite_url, MODERATO_VERSIONS_DIR=str(tmp_path))
    engine = open_database(sqlite_url)
    with writing(engine) as connection:
        now = datetime.now(UTC)
        queries.register_version(connection, read_manifest(directory).model_dump(), now)
        activation_id = queries.activate(
            connection, instead_of=queries.active(connection), version="v1", by="t", reason="first", now=now
        )
        queries.record_load(
            connection, activation_id=activation_id, worker="w2", version="v0", error="no such folder", now=now
        )
    engine.dispose()
    with (directory / ONNX_FILE).open("ab") as file:
        file.write(b"x")
    said = found(check_versions, settings)["problem"]
    assert "w2 refused the active version and continues with v0: no such folder" in said
    assert f"version v1: {ONNX_FILE} is damaged" in said
    directory.rename(tmp_path / "away")
    assert "version v1: there is no directory" in found(check_versions, settings)["problem"]


def test_files_that_everybody_may_read(
    redis_url: str, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_urls(redis_url, sqlite_url)
    config, secret = tmp_path / "moderato.yaml", tmp_path / "broker_url"
    for path, content in (config, "broker_url: redis://:hunter2@queue/0\n"), (secret, "redis://:hunter2@queue/0"):
        path.write_text(content)
    monkeypatch.setenv("MODERATO_CONFIG", str(config))
    monkeypatch.setenv("MODERATO_BROKER_URL_FILE", str(secret))
    # Given files that their owner alone may read
    config.chmod(0o600)
    secret.chmod(0o600)
    assert "problem" not in found(check_permissions, settings)
    # When all may
    config.chmod(0o644)
    secret.chmod(0o604)
    levels = found(check_permissions, settings)
    assert f"{config}, which holds a password → chmod o-rwx {config}" in levels["problem"]
    assert f"{secret}, which MODERATO_BROKER_URL_FILE names" in levels["warning"]
    # But in a container, to which the secret was mounted, there is nobody else
    monkeypatch.setattr(checks, "CONTAINER_SECRETS", tmp_path)
    assert "warning" in found(check_permissions, settings)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == secret)
    assert "warning" not in found(check_permissions, settings)
    # And where there is no password in it, that is nobody's business
    config.write_text("log_format: json\n")
    assert "problem" not in found(check_permissions, settings)


def test_a_policy_that_cannot_be_read(redis_url: str, sqlite_url: str, tmp_path: Path) -> None:
    # Given a policy file that is broken, which decides where none is active
    (tmp_path / "policy.yaml").write_text("communities: {}")
    settings = with_urls(redis_url, sqlite_url, MODERATO_POLICY_FILE=str(tmp_path / "policy.yaml"))
    assert "a worker does not start with it\n" in found(check_policy, settings)["problem"]
    # When a sound one is active, then a worker starts; and when that is broken too, it does not
    engine = open_database(sqlite_url)
    sound = (ROOT / "config/policy.yaml").read_text()
    for active, level in ((sound, "warning"), ("of: tomorrow", "problem")):
        with writing(engine) as connection:
            policies.activate(
                connection, active, instead_of=policies.active(connection), by="t", reason="r", now=datetime.now(UTC)
            )
        levels = found(check_policy, settings)
        assert str(tmp_path) in levels[level] and {"warning", "problem"} & set(levels) == {level}
    engine.dispose()
    assert "a worker does not start with it\n" in levels["problem"]
    assert "another release activated it" in levels["problem"]
    # And without the database nobody knows
    nowhere = settings.model_copy(update={"database_url": f"sqlite:///{tmp_path}/none.db"})
    assert "unless another is active" in found(check_policy, nowhere)["problem"]


def test_a_directory_of_versions_that_is_not_there(tmp_path: Path) -> None:
    absent, there = (
        list(check_disks(load_settings({"MODERATO_VERSIONS_DIR": str(directory)})))
        for directory in (tmp_path / "absent", tmp_path)
    )
    assert absent[0].level == "problem"
    assert len(absent) == len(there) + 1


def test_a_check_that_hangs_or_breaks_hides_no_other() -> None:
    forever = threading.Event()

    def hangs(_: Settings) -> Iterator[Finding]:
        yield Finding("slow", "ok", "first")
        forever.wait()

    def breaks(_: Settings) -> Iterator[Finding]:
        raise ValueError("out of order\nand more")

    def works(_: Settings) -> Iterator[Finding]:
        yield Finding("sound", "ok", "well")

    findings = list(examine(load_settings({}), {"slow": (hangs, 0.2), "odd": (breaks, 60), "sound": (works, 60)}))
    forever.set()
    assert [(each.part, each.level, each.said) for each in findings] == [
        ("slow", "ok", "first"),
        ("slow", "problem", "no answer within 0.2 s"),
        ("odd", "problem", "could not be checked: ValueError: out of order"),
        ("sound", "ok", "well"),
    ]


def test_the_command_ends_with_1_where_there_is_a_problem(redis_url: str, empty_sqlite_url: str) -> None:
    environment = os.environ | {"MODERATO_BROKER_URL": redis_url, "MODERATO_DATABASE_URL": empty_sqlite_url}
    command = [sys.executable, "-m", "cli.main", "doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert {"broker", "database", "policy", "disk", "versions"} <= {each["part"] for each in report["findings"]}
