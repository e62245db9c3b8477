"""Webhooks as they are in production: the process that delivers them, killed at will, and a receiver that fails."""

import base64
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from config.settings import ROOT
from db.privacy import Subject
from tests.acceptance.system import TIMEOUT_S, System
from tests.integration.rows import decide, scored
from tests.services import wait_until

ENDPOINT_TIMEOUT_S = 2
SECRET = "whsec_" + base64.b64encode(b"k" * 32).decode()


@pytest.fixture(scope="module")
def receiver_class(tmp_path_factory: pytest.TempPathFactory) -> type[BaseHTTPRequestHandler]:
    """The receiver in docs/feed.md, as it stands there."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "feed.md").read_text(encoding="utf-8"), re.DOTALL)
    [block] = [block for block in blocks if "class Receiver" in block]
    file = tmp_path_factory.mktemp("docs") / "receiver.py"
    file.write_text(block, encoding="utf-8")
    return runpy.run_path(str(file))["Receiver"]


@dataclass
class Endpoint:
    """What the receiver was posted, and what it answers."""

    url: str
    seen: dict[str, dict[str, Any]]
    attempts: Counter[str] = field(default_factory=Counter)
    """By webhook-id, those that it did not answer well too."""
    answers: list[int] = field(default_factory=list)
    """Statuses of the next answers, 0 for none at all; then as the receiver does."""
    open: threading.Event = field(default_factory=threading.Event)
    """Cleared, it takes what is posted and answers nothing."""

    def submissions(self) -> Counter[str]:
        """Of the decisions."""
        return Counter(
            body["data"]["submission_id"] for body in self.seen.values() if body["type"] == "comment.decided"
        )

    def told(self, submission_id: str) -> list[tuple[str, str | None]]:
        """Of one submission, in the order in which it came: what happened, and the action since."""
        bodies = [body for body in self.seen.values() if body["data"].get("submission_id") == submission_id]
        return [(body["type"], body["data"].get("action")) for body in bodies]


@pytest.fixture
def endpoint(receiver_class: type[BaseHTTPRequestHandler]) -> Iterator[Endpoint]:
    received: dict[str, dict[str, Any]] = {}

    class Receiver(receiver_class):  # type: ignore[misc, valid-type]
        secret = SECRET
        seen = received

        def do_POST(self) -> None:  # noqa: N802
            posted.attempts[self.headers["webhook-id"]] += 1
            status = posted.answers.pop(0) if posted.answers else None
            if status == 0 or not posted.open.is_set():
                time.sleep(ENDPOINT_TIMEOUT_S + 1)
                posted.open.wait(TIMEOUT_S)
                self.close_connection = True
            elif status is not None:
                self.send_error(status)
            else:
                super().do_POST()

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        posted = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/hook", received)
        posted.open.set()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield posted
        posted.open.set()
        server.shutdown()


class Deliverer:
    """`moderato webhooks run`, as a process."""

    def __init__(self, system: System, endpoint: Endpoint, log: Path, **variables: str) -> None:
        self.environment = system.environment | {
            "MODERATO_WEBHOOKS__ENDPOINTS__NEWS__URL": endpoint.url,
            "MODERATO_WEBHOOKS__ENDPOINTS__NEWS__MIN_ACTION": "hide",
            "MODERATO_WEBHOOKS__ENDPOINTS__NEWS__TIMEOUT_S": str(ENDPOINT_TIMEOUT_S),
            "MODERATO_WEBHOOKS__ENDPOINTS__NEWS__SECRET": SECRET,
            **variables,
        }
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another `moderato webhooks` command, with the same settings."""
        command = [sys.executable, "-m", "cli.main", "webhooks", *arguments]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", "webhooks", "run"],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8") if self._log.exists() else ""


@pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)
def test_nothing_is_lost_whatever_the_receiver_does_and_whoever_is_killed(
    new_system: System, database_url: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    deliverer = Deliverer(new_system, endpoint, tmp_path / "webhooks.log")
    client = new_system.client
    # Given an endpoint that takes a signed ping, and has begun
    ping = deliverer.command("test", "news")
    assert (ping.returncode, ping.stderr) == (0, "endpoint news took a ping\n")
    assert [body["type"] for body in endpoint.seen.values()] == ["ping"]
    with deliverer.running():
        wait_until(lambda: "news" in client.webhook_backlogs(), TIMEOUT_S, "the endpoint's begin")
        # When it refuses, fails, answers nothing in time, and only then takes what is posted
        endpoint.answers += [400, 500, 0]
        decide(database_url, scored("mild", action="label"), *(scored(f"a{n}", action="hide") for n in range(30)))
        expected = {f"a{n}" for n in range(30)}
        wait_until(lambda: endpoint.submissions().keys() == expected, TIMEOUT_S, "every decision to hide")
        assert max(endpoint.attempts.values()) > 1
        # And the process is killed while it waits for answers
        endpoint.open.clear()
        before = sum(endpoint.attempts.values())
        decide(database_url, *(scored(f"b{n}", action="remove") for n in range(30)))
        expected |= {f"b{n}" for n in range(30)}
        wait_until(lambda: sum(endpoint.attempts.values()) > before, TIMEOUT_S, "a post that hangs")
        # while people overturn what it has and has not delivered, in both directions, and have a text erased
        for submission_id, action in ("a0", "allow"), ("a0", "remove"), ("b0", "allow"), ("mild", "hide"):
            client.review(submission_id, action=action, reviewer="ann")
        client.erase(Subject("comment", "comment of b0"), by="ann")
    assert endpoint.submissions().keys() != expected
    # Then the next one delivers what it left, and what was decided meanwhile, each under one id
    decide(database_url, scored("c", action="hide"))
    endpoint.open.set()
    with deliverer.running() as process:
        expected.add("c")
        wait_until(lambda: endpoint.submissions().keys() == expected, TIMEOUT_S, "what the killed process left")
        assert set(endpoint.submissions().values()) == {1}
        wait_until(lambda: client.webhook_backlogs()["news"].delivered == 61 + 5, TIMEOUT_S, "all of it noted")
        # and of each comment what came last comes last
        reviewed = "comment.reviewed"
        assert endpoint.told("a0") == [("comment.decided", "hide"), (reviewed, "allow"), (reviewed, "remove")]
        assert endpoint.told("b0") == [("comment.decided", "remove"), (reviewed, "allow"), ("comment.erased", None)]
        assert endpoint.told("mild") == [(reviewed, "hide")]
        # And what the process is told to end in is finished
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
    assert "text of" not in deliverer.log()
    assert "endpoint news answered 400 to a delivery; it is tried again" in deliverer.log()
    assert "endpoint news takes deliveries again" in deliverer.log()


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_what_an_endpoint_never_takes_is_dead_until_it_is_retried(
    new_system: System, database_url: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    one_attempt = {
        "MODERATO_WEBHOOKS__MAX_ATTEMPTS": "1",
        "MODERATO_WEBHOOKS__ENDPOINTS__NEWS__INCLUDE_TEXT": "true",
        "MODERATO_WEBHOOKS__ENDPOINTS__NEWS__COMMUNITIES": "[news]",
        # A receiver that still has the old one verifies as well.
        "MODERATO_WEBHOOKS__ENDPOINTS__NEWS__SECRET": f"whsec_{base64.b64encode(b'n' * 32).decode()} {SECRET}",
    }
    deliverer = Deliverer(new_system, endpoint, tmp_path / "webhooks.log", **one_attempt)
    with deliverer.running():
        wait_until(lambda: "news" in new_system.client.webhook_backlogs(), TIMEOUT_S, "the endpoint's begin")
        # When an endpoint refuses a delivery as often as it is tried
        endpoint.answers.append(400)
        decide(database_url, scored("a", action="hide", community="news"), scored("b", action="hide"))
        wait_until(lambda: new_system.client.dead_deliveries(), TIMEOUT_S, "the delivery given up")
        # Then it is listed with the reason
        assert "answered 400" in deliverer.command("dead").stdout
        # And delivered when somebody says so, with its text where the settings ask for it
        assert deliverer.command("retry", "--endpoint", "news").stderr == "deliveries that are tried again: 1\n"
        wait_until(lambda: endpoint.seen, TIMEOUT_S, "the delivery")
        [body] = endpoint.seen.values()
        assert (body["data"]["submission_id"], body["data"]["text"]) == ("a", "the text of a")
        wait_until(lambda: new_system.client.webhook_backlogs()["news"].delivered, TIMEOUT_S, "its note")
    listed = deliverer.command("list", "--json").stdout
    assert '"delivered": 1' in listed
    assert '"dead": 0' in listed
