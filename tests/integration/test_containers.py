"""The servers of docker-compose.yml, started outside containers by the commands it holds."""

import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from api_client.embedded import redis_server_executable
from tests.services import free_port, wait_until
from tests.unit.test_containers import SERVICES, make_secrets


def test_redis_starts_as_composed_knows_each_users_password_and_keeps_what_is_queued(tmp_path: Path) -> None:
    # Given the secrets, and a Redis that is started by the very command
    secrets = make_secrets(tmp_path / "secrets")
    port = free_port()
    with composed_redis(secrets, port, tmp_path), closing(Redis(port=port)) as anonymous:
        # Then everyone comes in by the URL that was made for them, and does their own work alone
        for user in ("producer", "worker", "trainer", "operator"):
            with closing(Redis.from_url(url_of(user, secrets, port))) as client:
                assert client.ping()
                with pytest.raises(NoPermissionError):
                    client.config_get("maxmemory-policy")
        with pytest.raises(AuthenticationError):
            anonymous.ping()
        # When a message is queued, another one was taken by a script as workers do, and Redis is started anew
        with closing(Redis.from_url(url_of("worker", secrets, port))) as worker:
            worker.lpush("toxicity", "taken", "waits")
            worker.eval(
                "redis.call('HSET', KEYS[2], 'tag', redis.call('RPOP', KEYS[1]))", 2, "toxicity", "toxicity.leases"
            )
    # Then it knows of both afterwards
    with composed_redis(secrets, port, tmp_path), closing(Redis.from_url(url_of("worker", secrets, port))) as worker:
        assert worker.lrange("toxicity", 0, -1) == [b"waits"]
        assert worker.hvals("toxicity.leases") == [b"taken"]


def url_of(user: str, secrets: Path, port: int) -> str:
    return (secrets / f"broker_url_{user}").read_text().strip().replace("@redis:6379", f"@127.0.0.1:{port}")


@contextmanager
def composed_redis(secrets: Path, port: int, directory: Path) -> Iterator[None]:
    """A Redis that was started by the compose file's command, and is healthy by its health check; then stopped."""
    command = [
        word.replace("/run/secrets/redis_users", f"{secrets}/redis_users.acl") for word in SERVICES["redis"]["command"]
    ]
    assert command[0] == "redis-server"
    here = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
    with (directory / "redis.log").open("ab") as log:
        server = subprocess.Popen([str(redis_server_executable()), *command[1:], *here], stdout=log, stderr=log)
    try:
        with closing(Redis(port=port, username="health", password="any")) as health:

            def answers() -> bool:
                with suppress(RedisError):
                    return bool(health.ping())
                return False

            wait_until(answers, what="a healthy Redis")
        yield
    finally:
        server.terminate()
        server.wait()
