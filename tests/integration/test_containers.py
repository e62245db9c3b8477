"""The servers of docker-compose.yml, started outside containers by the commands it holds."""

import subprocess
from contextlib import closing, suppress
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import NoPermissionError, RedisError

from api_client.embedded import redis_server_executable
from tests.services import free_port, wait_until
from tests.unit.test_containers import SERVICES, make_secrets


def test_redis_starts_as_composed_and_knows_each_users_password(tmp_path: Path) -> None:
    # Given the secrets, and a Redis that is started by the very command
    secrets = make_secrets(tmp_path / "secrets")
    command = [
        word.replace("/run/secrets/redis_users", f"{secrets}/redis_users.acl") for word in SERVICES["redis"]["command"]
    ]
    assert command[0] == "redis-server"
    port = free_port()
    here = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    with (tmp_path / "redis.log").open("wb") as log:
        server = subprocess.Popen([str(redis_server_executable()), *command[1:], *here], stdout=log, stderr=log)
    try:
        # Then it becomes healthy by what the health check asks
        with closing(Redis(port=port, username="health", password="any")) as health:

            def answers() -> bool:
                with suppress(RedisError):
                    return bool(health.ping())
                return False

            wait_until(answers, what="a healthy Redis")
        # And everyone comes in by the URL that was made for them, and does their own work alone
        for user in ("producer", "worker", "trainer", "operator"):
            url = (secrets / f"broker_url_{user}").read_text().strip().replace("@redis:6379", f"@127.0.0.1:{port}")
            with closing(Redis.from_url(url)) as client:
                assert client.ping()
                with pytest.raises(NoPermissionError):
                    client.config_get("maxmemory-policy")
    finally:
        server.kill()
        server.wait()
    # And it keeps what is queued
    assert (tmp_path / "appendonlydir").exists() or (tmp_path / "appendonly.aof").exists()
