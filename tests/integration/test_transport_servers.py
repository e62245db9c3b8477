"""The transport on Redis as it is run elsewhere: behind TLS, and as a master that Sentinel replaces."""

import asyncio
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import celery
import pytest
import redis
from redis import Redis
from redis.exceptions import RedisError

from api_client.embedded import redis_server_executable
from api_client.listening import AnswerLine
from cli.checks import check_broker
from config.names import ANSWER_CHANNEL, MODERATE_QUEUE
from config.settings import load_settings
from tests.integration.test_transport import HubConsumer, ids, send
from tests.services import free_port, wait_until

SENTINEL_PASSWORD = "watch-word"
POSTGRESQL_SSL_REQUEST = bytes.fromhex("0000000804d2162f")
"""https://www.postgresql.org/docs/current/protocol-message-formats.html"""


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except (ConnectionError, ssl.SSLError):
        pass  # the client has gone
    finally:
        writer.transport.abort()


@contextmanager
def tls_in_front_of(unix_socket: str, certificate: Path, key: Path, *, as_postgresql: bool = False) -> Iterator[int]:
    """A port that speaks TLS and hands everything on to a server on a unix socket.

    Args:
        as_postgresql: a client asks for TLS in the clear first, as PostgreSQL's do.
    """

    async def serve(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        if as_postgresql:
            assert await client.readexactly(8) == POSTGRESQL_SSL_REQUEST
            to_client.write(b"S")
            await to_client.start_tls(context)
        server, to_server = await asyncio.open_unix_connection(unix_socket)
        await asyncio.gather(_pump(client, to_server), _pump(server, to_client))

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(
        asyncio.start_server(serve, "127.0.0.1", 0, ssl=None if as_postgresql else context)
    )
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(listening.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for localhost that only it itself vouches for, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl on the PATH to make a certificate with")
    paths = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject]
    subprocess.run([*command, "-out", paths[0], "-keyout", paths[1]], check=True, capture_output=True)
    return paths


def test_messages_arrive_through_tls(redis_url: str, certificate: tuple[Path, Path]) -> None:
    with tls_in_front_of(redis_url.removeprefix("redis+socket://"), *certificate) as port:
        # Given a consumer that waits behind TLS, and trusts this server's certificate only
        trust = f"ssl_cert_reqs=required&ssl_ca_certs={certificate[0]}"
        url = f"rediss://localhost:{port}/0?{trust}"
        with celery.Celery(broker=url, set_as_current=False) as producer:
            consumer = HubConsumer(url, queues=("first", MODERATE_QUEUE))
            assert consumer.channel.connection_class_ssl
            consumer.wait_for_an_hour()
            # When messages are sent through TLS, small ones and one larger than TLS' records
            sent = send(producer, "a", "b", "x" * 100_000, priority=5)
            # Then they arrive
            assert sorted(ids(consumer.receive(3))) == sorted(sent)
            for message in consumer.messages:
                message.ack()
            # And an answer is heard through it by the producer that waits
            line = AnswerLine(producer.connection_for_write())
            consumer.channel.qos.publish(ANSWER_CHANNEL + line.token, b"decided")
            consumer.tick()
            assert line.hear(60) == b"decided"
            line.close()
            consumer.close()


class Servers:
    """A master, its replica, and a Sentinel that looks after them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.sentinel = free_port()

    def start(self) -> None:
        directory = self._directory
        master = self._start("master", "--appendonly", "no")
        self._start("replica", "--replicaof", "127.0.0.1", str(master))
        self.master = master
        configuration = directory / "sentinel.conf"
        configuration.write_text(
            f"port {self.sentinel}\nbind 127.0.0.1\ndir {directory}\n"
            f"requirepass {SENTINEL_PASSWORD}\nsentinel monitor mymaster 127.0.0.1 {master} 1\n"
            "sentinel down-after-milliseconds mymaster 500\nsentinel failover-timeout mymaster 3000\n"
        )
        self._run(self.sentinel, str(configuration), "--sentinel")

    def _start(self, name: str, *options: str) -> int:
        port = free_port()
        folder = self._directory / name
        folder.mkdir()
        # Without a pause before the full copy, which the test would wait for.
        fast = ["--repl-diskless-sync-delay", "0", "--repl-diskless-sync", "yes"]
        self._run(port, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", *fast, *options)
        return port

    def _run(self, port: int, *arguments: str) -> None:
        command = [str(redis_server_executable()), *arguments]
        with (self._directory / f"{port}.log").open("wb") as log:
            self._processes[port] = subprocess.Popen(command, stdout=log, stderr=log)

        def answers() -> bool:
            with suppress(RedisError), self.client(port) as client:
                return bool(client.ping())
            return False

        wait_until(answers, what="a Redis server")

    def client(self, port: int) -> Redis:
        return Redis(port=port, password=SENTINEL_PASSWORD if port == self.sentinel else None)

    def wait_for_replica(self) -> None:
        """Until Sentinel knows the replica, and the replica holds all that the master does."""

        def known() -> bool:
            with self.client(self.sentinel) as sentinel:
                return bool(sentinel.execute_command("SENTINEL", "REPLICAS", "mymaster"))

        wait_until(known, what="Sentinel's knowledge of the replica")
        with self.client(self.master) as master:
            wait_until(lambda: master.wait(1, 1000) == 1, what="the replica")

    def kill_master(self) -> None:
        """SIGKILL; returns when Sentinel has named another."""
        self._processes[self.master].kill()

        def another() -> bool:
            with self.client(self.sentinel) as sentinel:
                address: Any = sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster")
            if int(address[1]) == self.master:
                return False
            with suppress(RedisError), self.client(int(address[1])) as client:
                return bool(client.info("replication")["role"] == "master")
            return False

        wait_until(another, what="another master")

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    with ExitStack() as stack:
        servers = Servers(tmp_path)
        stack.callback(servers.close)
        servers.start()
        yield servers


def test_sentinels_new_master_hands_out_what_the_old_one_held(servers: Servers) -> None:
    # Given a consumer that waits at the master that Sentinel names
    url = f"sentinel://127.0.0.1:{servers.sentinel}/0"
    # And Sentinel asks for a password of its own
    variable = {"MODERATO_BROKER_OPTIONS__SENTINEL_PASSWORD": SENTINEL_PASSWORD}
    named = load_settings(variable).broker_options.for_celery()
    options: dict[str, Any] = {**named, "visibility_timeout": 1, "unacked_restore_interval": 0.5}
    # (which whoever does not give is told, without a page about each connection)
    [finding] = check_broker(load_settings({"MODERATO_BROKER_URL": url}))
    assert finding.said.endswith(
        f"No master found for 'mymaster' : 127.0.0.1:{servers.sentinel} - auth:AuthenticationError"
    )
    assert next(iter(variable)) in finding.advice
    consumer = HubConsumer(url, transport="SentinelTransport", **options)
    consumer.wait_for_an_hour()
    # When it holds a message, and the master dies
    with celery.Celery(broker=url, broker_transport_options=named, set_as_current=False) as producer:
        held = send(producer, "held", priority=5)
    assert ids(consumer.receive(1)) == held
    servers.wait_for_replica()
    servers.kill_master()
    # Then the consumer hears of it, as Celery does, which connects anew
    with pytest.raises(redis.exceptions.ConnectionError):
        consumer.run_until(lambda: False, "the end of the connection")
    consumer.connection.collect(socket_timeout=1)
    consumer.hub.close()
    # And the next one gets that message, and what is sent now, from the new master
    successor = HubConsumer(url, transport="SentinelTransport", **options)
    with celery.Celery(broker=url, broker_transport_options=named, set_as_current=False) as producer:
        sent = held + send(producer, "new", priority=5)
        successor.run_until(lambda: set(ids(successor.messages)) >= set(sent), "both messages")
        # And an answer is heard there by who waits
        line = AnswerLine(producer.connection_for_write())
        successor.channel.qos.publish(ANSWER_CHANNEL + line.token, b"decided")
        successor.tick()
        assert line.hear(60) == b"decided"
        line.close()
    successor.close()
