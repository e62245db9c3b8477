"""What every process is watched by: bounded looks, the small server, and the form of its log."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import httpx2
import pytest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from config import endpoints
from config.endpoints import MAX_REQUESTS, Endpoints, Probe, Trouble, serve
from config.logs import JsonLines

FOR_EVER_S = 1e9


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


class Broken:
    def collect(self) -> Iterator[Metric]:
        raise OSError("secret")


class One:
    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("moderato_one", "1.", value=1)


@pytest.fixture
def server() -> Iterator[Callable[..., str]]:
    """Starts a server with these looks; its address."""
    handlers = logging.getLogger().handlers[:]
    with ExitStack() as open_servers:

        def start(collector: object = None, host: str = "127.0.0.1", **looks: Callable[[], Trouble]) -> str:
            started = Endpoints(host, 0, collector or One(), {f"/{name}": look for name, look in looks.items()})  # type: ignore[arg-type]
            open_servers.callback(started.server_close)
            open_servers.callback(started.shutdown)
            started.start()
            return f"http://{f'[{host}]' if ':' in host else host}:{started.server_address[1]}"

        yield start
    logging.getLogger().handlers[:] = handlers


def get(url: str) -> tuple[int, str]:
    answer = httpx2.get(url, timeout=60, trust_env=False)
    return answer.status_code, answer.text.strip()


class TestProbe:
    def test_many_who_ask_cost_one_look(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Given a look that takes until it is let go
        monkeypatch.setattr(endpoints, "KEPT_S", FOR_EVER_S)
        let_go, looks = threading.Event(), []

        def look() -> Trouble:
            looks.append(let_go.wait(60))
            return "none"

        probe = Probe("it", look, timeout_s=60)
        # When several ask at once, and again afterwards
        answers: list[Trouble] = []
        askers = [threading.Thread(target=lambda: answers.append(probe())) for _ in range(5)]
        for asker in askers:
            asker.start()
        let_go.set()
        for asker in askers:
            asker.join()
        answers.append(probe())
        # Then all have the answer of one look
        assert answers == ["none"] * 6
        assert len(looks) == 1
        # And when it no longer counts, there is another
        monkeypatch.setattr(endpoints, "KEPT_S", -1)
        assert probe() == "none"
        assert len(looks) == 2

    def test_one_that_hangs_is_trouble_and_is_not_begun_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(endpoints, "KEPT_S", -1)
        let_go, looks = threading.Event(), threading.Semaphore(0)

        def look() -> Trouble:
            looks.release()
            let_go.wait(60)
            return None

        probe = Probe("the engine", look, timeout_s=0.01)
        for _ in range(3):
            assert (probe() or "").startswith("the engine has not answered for ")
        assert looks.acquire(timeout=60)
        assert not looks.acquire(blocking=False)
        let_go.set()

    def test_one_that_raises_is_trouble_without_its_words(self) -> None:
        def look() -> Trouble:
            raise ValueError("a row of the database")

        assert Probe("the database", look, timeout_s=60)() == "the database failed (ValueError)"


class TestServer:
    def test_its_paths(self, server: Callable[..., str]) -> None:
        address = server(healthz=lambda: None, readyz=lambda: "shutting down")
        assert get(f"{address}/healthz?x=1") == (200, "ok")
        assert get(f"{address}/readyz") == (503, "shutting down")
        assert get(f"{address}/else") == (404, "there is /metrics, /healthz, /readyz")
        status, metrics = get(f"{address}/metrics")
        assert status == 200
        assert {"moderato_one 1.0", 'moderato_log_records_total{level="error"} 0.0'} <= set(metrics.splitlines())
        assert "process_start_time_seconds" in metrics

    def test_it_counts_what_is_logged_as_going_wrong(self, server: Callable[..., str]) -> None:
        address = server()
        logging.getLogger("worker.some").error("wrong")
        logging.getLogger("worker.some").info("fine")
        metrics = get(f"{address}/metrics")[1].splitlines()
        assert 'moderato_log_records_total{level="error"} 1.0' in metrics
        assert 'moderato_log_records_total{level="warning"} 0.0' in metrics

    def test_what_breaks_is_said_without_its_words(self, server: Callable[..., str]) -> None:
        assert get(f"{server(Broken())}/metrics") == (500, "OSError")

    def test_too_many_at_once_are_turned_away(self, server: Callable[..., str]) -> None:
        # Given as many who ask as are answered at once, none of which has its answer
        let_go, asking = threading.Event(), threading.Semaphore(0)

        def look() -> Trouble:
            asking.release()
            let_go.wait(60)
            return None

        address = server(healthz=look)
        answers: list[tuple[int, str]] = []
        askers = [
            threading.Thread(target=lambda: answers.append(get(f"{address}/healthz"))) for _ in range(MAX_REQUESTS)
        ]
        for asker in askers:
            asker.start()
        for _ in askers:
            assert asking.acquire(timeout=60)
        # When one more comes, then it is turned away, and the others have theirs
        with pytest.raises(httpx2.HTTPError):
            get(f"{address}/healthz")
        let_go.set()
        for asker in askers:
            asker.join()
        assert answers == [(200, "ok")] * MAX_REQUESTS

    def test_whoever_drips_is_hung_up_on(self, server: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(endpoints, "REQUEST_S", 0.2)
        host, port = server().removeprefix("http://").split(":")
        with closing(socket.create_connection((host, int(port)))) as client:
            # When a client begins a header that never ends, and never falls silent for long
            client.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
            with pytest.raises(ConnectionError):
                for _ in range(6_000):
                    client.sendall(b"x")
                    time.sleep(0.01)

    @pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
    def test_ipv6(self, server: Callable[..., str]) -> None:
        assert get(f"{server(host='::1', healthz=lambda: None)}/healthz") == (200, "ok")

    def test_a_taken_port_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            serve("127.0.0.1", taken.getsockname()[1], One(), {})
        assert "cannot be listened on (Address already in use)" in caplog.text
        assert "metrics" in caplog.text


def test_a_line_of_json() -> None:
    # Given a record about a submission, with what would break a line
    record = logging.LogRecord("worker.pipeline", logging.INFO, "file", 1, "%r is refused", ("a\n:0",), None)
    record.submission_id = "a\n:0"
    line = JsonLines().format(record)
    # Then it is one line, with these fields first
    assert "\n" not in line
    fields = json.loads(line)
    assert [*fields] == ["time", "level", "logger", "message", "submission_id"]
    assert fields["message"] == "'a\\n:0' is refused"
    assert fields["time"].endswith("+00:00")
