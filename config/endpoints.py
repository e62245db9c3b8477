"""What monitoring reads of a process: /metrics, /healthz and /readyz, on a port of its own.

Owns the small HTTP server. What the paths say belongs to worker and trainer.
"""

import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

METRICS_PATH, HEALTH_PATH, READY_PATH = "/metrics", "/healthz", "/readyz"
TEXT = "text/plain; charset=utf-8"
MAX_REQUESTS = 8
"""Answered at the same time; further ones are turned away."""
SILENCE_S = 5.0
"""For a client to say something, or to take something of the answer."""
REQUEST_S = 60.0
"""For a request and its answer, however slowly: else a few who drip would keep all others out."""
KEPT_S = 2.0
"""How long the answer of a probe counts."""
COUNTED_LEVELS = ("WARNING", "ERROR", "CRITICAL")

Trouble = str | None
"""Why something is not as it should be, in words; None where it is."""


class Probe:
    """A look that may take long, or hang: made by a thread of its own, and once for all who ask within KEPT_S.

    So a probe costs the process little, however many ask.
    """

    def __init__(self, what: str, look: Callable[[], Trouble], timeout_s: float) -> None:
        """Prepare, looking at nothing.

        Args:
            what: is looked at, in words that may begin a sentence.
            look: may raise, which is trouble.
            timeout_s: after which whoever asks is told that there is no answer.
        """
        self._what = what
        self._look = look
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._done: threading.Event | None = None
        self._began = self._ended = 0.0
        self._found: Trouble = None

    def __call__(self) -> Trouble:
        with self._lock:
            if self._done is None or (self._done.is_set() and time.monotonic() > self._ended + KEPT_S):
                self._done = threading.Event()
                self._began = time.monotonic()
                threading.Thread(target=self._run, args=(self._done,), name="probe", daemon=True).start()
            done = self._done
        if not done.wait(self._timeout_s):
            return f"{self._what} has not answered for {time.monotonic() - self._began:.0f} s"
        return self._found

    def _run(self, done: threading.Event) -> None:
        try:
            self._found = self._look()
        except Exception as error:
            # Its class alone: what drivers say may quote a row, or a password.
            self._found = f"{self._what} failed ({type(error).__name__})"
        self._ended = time.monotonic()
        done.set()


class LogCounter(logging.Handler):
    """Counts warnings and worse. Each is said once when it begins, so that a few in an hour are news."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._counts = Counter(dict.fromkeys(COUNTED_LEVELS, 0))

    def emit(self, record: logging.LogRecord) -> None:
        self._counts[record.levelname] += 1

    def collect(self) -> Iterable[Metric]:
        counted = CounterMetricFamily("moderato_log_records", "Lines of the log, by level.", labels=["level"])
        for level in COUNTED_LEVELS:
            counted.add_metric([level.lower()], self._counts[level])
        yield counted


class _Handler(BaseHTTPRequestHandler):
    timeout = SILENCE_S
    server: "Endpoints"
    server_version = "moderato"
    sys_version = ""

    def do_GET(self) -> None:
        try:
            status, content_type, body = self._response()
        except Exception as error:
            logger.error("%s cannot be answered (%s)", self.path, type(error).__name__)
            status, content_type, body = 500, TEXT, f"{type(error).__name__}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _response(self) -> tuple[int, str, bytes]:
        path = self.path.partition("?")[0]
        if path == METRICS_PATH:
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            return 200, content_type, encode(self.server.registry)
        if look := self.server.looks.get(path):
            trouble = look()
            return (200, TEXT, b"ok\n") if trouble is None else (503, TEXT, f"{trouble}\n".encode())
        return 404, TEXT, f"there is {', '.join([METRICS_PATH, *self.server.looks])}\n".encode()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


class Endpoints(ThreadingHTTPServer):
    """The server: listening when it is made, and answering from threads of its own once it is started."""

    daemon_threads = True

    def __init__(self, host: str, port: int, collector: Collector, looks: Mapping[str, Callable[[], Trouble]]) -> None:
        """Listen.

        Args:
            collector: of the process' own metrics; those that every process has are added.
            looks: by path, such as /healthz, what says whether all is well.

        Raises:
            OSError: the address cannot be listened on.
        """
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.looks = looks
        self.registry = CollectorRegistry()
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__((host, port), _Handler)
        log_counter = LogCounter()
        logging.getLogger().addHandler(log_counter)
        self.registry.register(collector)
        self.registry.register(log_counter)
        ProcessCollector(registry=self.registry)
        # A training's process would go on listening when the trainer is gone, and keep the port from the next one.
        os.register_at_fork(after_in_child=self.socket.close)

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, name="endpoints", daemon=True).start()

    def server_bind(self) -> None:
        # Not by way of HTTPServer, which asks the name service who this is, and may wait for it.
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        end = threading.Timer(REQUEST_S, _hang_up, (request,))
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # As a rule the client has gone away; http.server would print a page about it.
        logger.debug("a request was not answered", exc_info=True)


def _hang_up(request: socket.socket) -> None:
    """Whoever reads or writes there is done at once."""
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


def serve(host: str, port: int, collector: Collector, looks: Mapping[str, Callable[[], Trouble]]) -> None:
    """Answer on this address while the process lives. Where it cannot be had that is said, and the process goes on.

    Whoever watches sees that nothing answers; comments must not wait for that.

    Args:
        port: 0 answers nothing.
    """
    if not port:
        return
    try:
        Endpoints(host, port, collector, looks).start()
    except OSError as error:
        logger.error(
            "%s:%d cannot be listened on (%s), so nobody sees this process' metrics and health; it goes on without. "
            "Each process of one host needs a port of its own: see `metrics` in config/default.yaml",
            host,
            port,
            error.strerror or error,
        )
    else:
        logger.info("%s:%d answers %s", host, port, ", ".join([METRICS_PATH, *looks]))
