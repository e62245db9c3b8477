"""Least rights: each part works as the user that deploy/ makes for it, and may do nothing else."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from psycopg.errors import InsufficientPrivilege
from redis import Redis
from redis.exceptions import NoPermissionError, RedisError
from sqlalchemy import make_url, text
from sqlalchemy.exc import ProgrammingError

from api_client.client import ModerationClient
from api_client.embedded import redis_server_executable
from api_client.listening import Nudges
from bench.tiny import copy_version
from config.names import MODERATE_QUEUE, RETRAIN_QUEUE, Action
from config.settings import PREFIX, ROOT, settings
from db import feed, queries, reviews, webhooks
from db.drift import measure_drift
from db.durable import database_time
from db.migrate import upgrade
from db.privacy import Erased, Subject, erase_expired
from db.session import open_database, reading, writing
from model.version import read_manifest
from tests.acceptance.system import TIMEOUT_S, CeleryProcess
from tests.acceptance.test_monitoring import Asked
from tests.services import SERVER_VARIABLE, free_port, wait_until
from trainer.monitoring import look

USERS_FILE = ROOT / "deploy" / "redis" / "users.acl"
USERS = ("producer", "worker", "trainer", "operator")
FORBIDDEN = (
    ("CONFIG", "GET", "*"),
    ("CONFIG", "SET", "dir", "/tmp"),
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("KEYS", "*"),
    ("SCAN", "0"),
    ("SHUTDOWN",),
    ("DEBUG", "SLEEP", "0"),
    ("MONITOR",),
    ("ACL", "LIST"),
    ("CLIENT", "KILL", "ADDR", "127.0.0.1:1"),
    ("SCRIPT", "FLUSH"),
    ("REPLICAOF", "NO", "ONE"),
    ("SAVE",),
    ("GET", "of-another-system"),
    ("PUBLISH", "of-another-system", "x"),
    ("SUBSCRIBE", "of-another-system"),
    ("PSUBSCRIBE", "*"),
)


class GuardedRedis:
    """A Redis with the users that deploy/ names."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = directory

    def start(self) -> None:
        users = self._directory / "users.acl"
        users.write_text(USERS_FILE.read_text(encoding="utf-8"), encoding="utf-8")
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._directory), "--save", ""]
        command = [str(redis_server_executable()), *options, "--aclfile", str(users)]
        with (self._directory / "redis.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

        def answers() -> bool:
            with suppress(RedisError), self.connect("worker") as client:
                return bool(client.ping())
            return False

        wait_until(answers, what="a Redis server")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def url(self, user: str) -> str:
        return f"redis://{user}:{user.upper()}_PASSWORD@127.0.0.1:{self.port}/0"

    def connect(self, user: str) -> Redis:
        return Redis.from_url(self.url(user))


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[GuardedRedis]:
    redis = GuardedRedis(tmp_path)
    try:
        redis.start()
        yield redis
    finally:
        redis.stop()


def environment(broker_url: str, database_url: str, versions_dir: Path) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | {
        "MODERATO_BROKER_URL": broker_url,
        "MODERATO_DATABASE_URL": database_url,
        "MODERATO_VERSIONS_DIR": str(versions_dir),
        "MODERATO_WORKER__DEVICE": "cpu",
        "MODERATO_WORKER__VISIBILITY_TIMEOUT_S": "3",
    }


def activate(database_url: str, directory: Path) -> None:
    manifest = read_manifest(directory).model_dump()
    engine = open_database(database_url)
    with writing(engine) as connection:
        queries.register_version(connection, manifest, datetime.now(UTC))
        queries.activate(
            connection,
            instead_of=queries.active(connection),
            version=manifest["version"],
            by="test",
            reason="first",
            now=datetime.now(UTC),
        )
    engine.dispose()


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients count what a community submits."""
    monkeypatch.setenv("MODERATO_CLIENT__MAX_COMMENTS_PER_MINUTE", "10000")
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.mark.usefixtures("limited")
def test_each_user_of_redis_can_do_its_work_and_nothing_else(
    guarded: GuardedRedis, sqlite_url: str, tiny_version: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    versions_dir = tmp_path / "versions"
    versions_dir.mkdir()
    activate(sqlite_url, copy_version(tiny_version, versions_dir, "v1"))
    # Given a worker and a trainer, each as its user, and both watched
    watched = {"WORKER": Asked(free_port()), "TRAINER": Asked(free_port())}
    ports = {f"MODERATO_METRICS__{part}_PORT": str(asked.port) for part, asked in watched.items()}
    parts = {"worker": MODERATE_QUEUE, "trainer": RETRAIN_QUEUE}
    processes = {
        part: CeleryProcess(
            part,
            queue,
            part,
            environment(guarded.url(part), sqlite_url, versions_dir) | ports,
            tmp_path / f"{part}.log",
        )
        for part, queue in parts.items()
    }
    with (
        closing(processes["worker"]) as worker,
        closing(processes["trainer"]) as trainer,
        ModerationClient(guarded.url("producer"), sqlite_url) as producer,
        ModerationClient(guarded.url("operator"), sqlite_url) as operator,
        Celery(broker=guarded.url("producer"), set_as_current=False) as plain,
    ):
        worker.wait_until_ready()
        trainer.wait_until_ready()
        # When comments are submitted, by the client and by plain Celery
        ids = [producer.submit("Good morning."), *producer.submit_many(["Thank you."] * 100)]
        ids.append(operator.submit("Good evening.", durable=True))
        # and waited for, by whoever may listen to answers and to nothing else
        assert {client.moderate("Good night.", timeout_s=TIMEOUT_S).action for client in (producer, operator)}
        ids.append(f"{plain.send_task('worker.moderate', [[{'text': 'Hello.'}]], queue=MODERATE_QUEUE).id}:0")
        # Then they are decided, and forgotten
        assert set(producer.wait(ids, timeout_s=TIMEOUT_S).values()) == {"decided"}
        wait_until(lambda: operator.activity().held_messages == 0, TIMEOUT_S, "acknowledgements")
        # And whoever watches is told that all is well, and what waits
        assert [asked.get("/readyz") for asked in watched.values()] == [(200, "ok")] * 2
        assert watched["WORKER"].metrics().sum("moderato_queue_messages") == 0
        # And an operator sees both, and may ask for a training and another version
        state = operator.status()
        assert state.problems == []
        assert (state.workers, state.trainers) == ([worker.node], [trainer.node])
        assert list(state.pipelines) == [worker.node]
        operator.activate("v1", instead_of=operator.active(), by="operator", reason="again")
        run_id = operator.retrain(requested_by="operator", epochs=0.01)
        wait_until(lambda: _state(operator, run_id) != "requested", TIMEOUT_S, "the trainer's claim")
        with closing(producer.follow("0")) as following:
            assert next(following).submission_id
        nudges = Nudges(producer._app.connection_for_write)
        nudges.wait(0)
        nudges.close()
        # And nothing was refused to any of them
        assert not [record for record in caplog.records if record.name.startswith("api_client")]
        logs = worker.log() + trainer.log()
        assert not re.search(r"permission|NOPERM", logs), logs

    # And none of them can do what is not its work, nor the one that anybody may ask by whether Redis answers
    for user in (*USERS, "health"):
        with guarded.connect(user) as client:
            for command in FORBIDDEN:
                with pytest.raises(NoPermissionError):
                    client.execute_command(*command)
    # And a producer reads no comment, nor anything that a worker holds
    with guarded.connect("producer") as client:
        for command in (
            ("LRANGE", MODERATE_QUEUE, "0", "-1"),
            ("RPOP", MODERATE_QUEUE),
            ("DEL", MODERATE_QUEUE),
            ("SET", MODERATE_QUEUE, "x"),
            ("HGETALL", "moderato.worker.unacked"),
            ("LPUSH", RETRAIN_QUEUE, "x"),
            ("PUBLISH", "/0.moderato.worker.pidbox", "x"),
        ):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)
    # And nobody comes in without a password
    with Redis(port=guarded.port) as nobody, pytest.raises(RedisError):
        nobody.ping()


def _state(client: ModerationClient, run_id: str) -> str:
    run = client.training_run(run_id)
    assert run is not None
    return run.state


ROLES_FILE = ROOT / "deploy" / "postgresql" / "roles.sql"
ROLES = ("owner", "worker", "trainer", "client", "webhooks", "reader")
REFUSED_TO_ALL = (
    "ALTER TABLE submissions ADD COLUMN x int",
    "DROP TABLE reviews",
    "TRUNCATE decisions",
    "CREATE TABLE x (y int)",
    "DELETE FROM submissions",
    "DELETE FROM decisions",
    "UPDATE decisions SET action = 'allow'",
    "UPDATE reviews SET reviewer = 'x'",
    "UPDATE erasures SET reason = 'x'",
    "UPDATE alembic_version SET version_num = 'x'",
    "CREATE ROLE x",
)
REFUSED = {
    "worker": ["INSERT INTO reviews DEFAULT VALUES", "SELECT * FROM training_runs"],
    "trainer": ["UPDATE submissions SET text = 'x'", "SELECT payload FROM dead_letters"],
    "client": [
        "UPDATE submissions SET text = 'x'",
        "INSERT INTO decisions DEFAULT VALUES",
        "INSERT INTO erased_submissions DEFAULT VALUES",
    ],
    "webhooks": ["SELECT author FROM submissions", "INSERT INTO decisions DEFAULT VALUES", "SELECT * FROM erasures"],
    "reader": ["SELECT text FROM submissions", "SELECT author FROM submissions", "SELECT payload FROM dead_letters"],
}


@pytest.fixture
def role_urls(empty_postgres_url: str) -> Iterator[dict[str, str]]:
    """A database with our tables and the roles that deploy/ names: the URL of each."""
    if SERVER_VARIABLE in os.environ:
        pytest.skip("roles are the whole server's: only made on one of the tests' own")
    url = make_url(empty_postgres_url)
    urls = {role: url.set(username=f"moderato_{role}").render_as_string() for role in ROLES}
    superuser = open_database(empty_postgres_url)

    def run(script: str) -> None:
        with writing(superuser) as connection:
            driver_connection: Any = connection.connection.driver_connection
            driver_connection.execute(script)

    run(ROLES_FILE.read_text(encoding="utf-8"))
    upgrade(urls["owner"])
    run(ROLES_FILE.read_text(encoding="utf-8"))
    yield urls
    names = ", ".join(f"moderato_{role}" for role in ROLES)
    run(f"DROP OWNED BY {names} CASCADE; DROP ROLE {names}")
    superuser.dispose()


def test_each_role_of_the_database_can_do_its_work_and_nothing_else(
    role_urls: dict[str, str], redis_url: str, tiny_version: Path, tmp_path: Path
) -> None:
    versions_dir = tmp_path / "versions"
    versions_dir.mkdir()
    activate(role_urls["client"], copy_version(tiny_version, versions_dir, "v1"))
    # Given a worker as its role
    log = tmp_path / "worker.log"
    variables = environment(redis_url, role_urls["worker"], versions_dir)
    with (
        closing(CeleryProcess("worker", MODERATE_QUEUE, "w1", variables, log)) as worker,
        ModerationClient(redis_url, role_urls["client"]) as client,
        ModerationClient(redis_url, role_urls["owner"]) as owner,
    ):
        worker.wait_until_ready()
        # When comments of all kinds come, and are reviewed
        ids = [client.submit("Good morning.", author="ann"), client.submit("Thank you.", durable=True)]
        expired = client.submit("Too late.", expires_at="2020-01-01T00:00:00Z")
        assert client.wait([*ids, expired], timeout_s=TIMEOUT_S) == {**dict.fromkeys(ids, "decided"), expired: "dead"}
        client.review(ids[0], action="allow", reviewer="ann")
        client.activate("v1", instead_of=client.active(), by="client", reason="again")
        # And a policy is activated, which the worker follows
        client.activate_policy(
            "communities: {default: {}}", instead_of=client.active_policy(), by="client", reason="allow everything"
        )
        active = client.active_policy()
        assert active is not None
        wait_until(
            lambda: [each.policy_version for each in client.activity().pipelines.values()] == [active.policy_version],
            TIMEOUT_S,
            "the worker on the active policy",
        )
        # And texts are erased by the owner, and by the worker those that have grown old
        assert owner.erase(Subject("author", "ann"), by="owner")[1] is None
        engine = open_database(role_urls["worker"])
        with writing(engine) as connection:
            later = datetime.now(UTC) + timedelta(days=2)
            erased = erase_expired(connection, keep_days=1, by="w1", now=later)
            assert measure_drift(connection, now=later) is not None
        assert erased == (Erased(1, 1), False)
        engine.dispose()
        # Then the trainer finds its food, and a run that is asked for can be claimed
        engine = open_database(role_urls["trainer"])
        with writing(engine) as connection:
            queries.request_run(connection, run_id="r", requested_by="t", overrides={}, now=datetime.now(UTC))
            assert queries.claim_run(connection, "r", datetime.now(UTC))
            assert look(connection, None).runs == {"running": 1}
            assert [each.text for each in reviews.judged_texts(connection)] == [None]  # it was erased
            queries.activate(
                connection,
                instead_of=queries.active(connection),
                version="v1",
                by="trainer",
                reason="better",
                now=datetime.now(UTC),
            )
        engine.dispose()
        # And webhooks are delivered, and what was given up is tried again by an operator
        engine = open_database(role_urls["webhooks"])
        with writing(engine) as connection:
            now = database_time(connection)
            settled = feed.settled_position(connection)
            webhooks.begin(connection, "news", position=0, now=now)
            webhooks.fill(connection, "news", settled=settled, actions=list(Action), communities=["default"], now=now)
            taken, refused = webhooks.claim(connection, "news", limit=9, lease=timedelta(minutes=1), now=now)
            webhooks.delivered(connection, [taken], now=now)
            webhooks.failed(connection, refused, error="answered 400", next_attempt_at=None, now=now)
            [reviewed] = webhooks.claim(connection, "news", limit=9, lease=timedelta(minutes=1), now=now)
            webhooks.delivered(connection, [reviewed], now=now)
            [its_erasure] = webhooks.claim(connection, "news", limit=9, lease=timedelta(minutes=1), now=now)
            assert [each.event.type for each in (reviewed, its_erasure)] == ["comment.reviewed", "comment.erased"]
            assert webhooks.purge(connection, finished_before=now) == 0
        assert client.retry_dead_deliveries(endpoint="news") == 1
        engine.dispose()
        # And a reader the decisions
        engine = open_database(role_urls["reader"])
        with reading(engine) as connection:
            assert connection.execute(text("SELECT COUNT(*) FROM current_actions")).scalar_one() == 2
        engine.dispose()
        assert "permission denied" not in worker.log()

    # And nobody but the owner can do more
    for role, its_own in REFUSED.items():
        engine = open_database(role_urls[role])
        for statement in (*REFUSED_TO_ALL, *its_own):
            with pytest.raises(ProgrammingError) as raised, writing(engine) as connection:
                connection.execute(text(statement))
            assert isinstance(raised.value.orig, InsufficientPrivilege), (role, statement)
        engine.dispose()
