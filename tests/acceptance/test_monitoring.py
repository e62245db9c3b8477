"""What worker, trainer and sender of webhooks say of themselves; and the alerts and the dashboard built on it."""

import base64
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from celery import Celery
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from config.drift import score_histogram
from config.names import LABELS, MODERATE_QUEUE, MODERATE_TASK
from config.settings import ROOT
from db import queries as rows
from db.queries import record_decisions
from db.session import writing
from model.version import MANIFEST_FILE
from tests.acceptance.system import SMALL_STEPS, TIMEOUT_S, System
from tests.integration.outage import outage
from tests.integration.rows import prepare, scored
from tests.queries import queries, unanswerable
from tests.services import free_port, wait_until

pytestmark = pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)

ENOUGH = 500
"""Decisions on each day for the drift between them to be measured."""


@dataclass
class Asked:
    """The endpoints of a process."""

    port: int

    def get(self, path: str) -> tuple[int, str]:
        """Status and text; 0 where nothing answers."""
        try:
            answer = httpx2.get(f"http://127.0.0.1:{self.port}{path}", timeout=TIMEOUT_S, trust_env=False)
        except httpx2.HTTPError as error:
            return 0, str(error)
        return answer.status_code, answer.text.strip()

    def wait_for(self, path: str, status: int) -> str:
        """The text, once that is the status."""
        return wait_until(lambda: self._text_of(path, status), TIMEOUT_S, f"{path} answering {status}")

    def _text_of(self, path: str, status: int) -> str | None:
        answered, text = self.get(path)
        return text if answered == status else None

    def metrics(self) -> "Exposed":
        status, exposition = self.get("/metrics")
        assert status == 200, exposition
        return Exposed(exposition)

    def metrics_with(self, condition: "Callable[[Exposed], object]", what: str) -> "Exposed":
        """The metrics, once they are so."""

        def metrics_if_so() -> Exposed | None:
            seen = self.metrics()
            return seen if condition(seen) else None

        return wait_until(metrics_if_so, TIMEOUT_S, what)


class Exposed:
    """Samples by name, as Prometheus would keep them."""

    def __init__(self, exposition: str) -> None:
        self.samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(exposition):
            for sample in family.samples:
                self.samples.setdefault(sample.name, []).append((sample.labels, sample.value))

    def sum(self, name: str, **labels: str) -> float:
        """Over the samples with these labels."""
        found = [value for its, value in self.samples.get(name, []) if labels.items() <= its.items()]
        assert found, f"no sample of {name} has {labels}: {self.samples.get(name)}"
        return sum(found)


def own_metrics(exposed: Exposed) -> dict[str, tuple[str, ...]]:
    """Labels of each metric that is ours, by its name without what a histogram adds."""
    found: dict[str, set[str]] = {}
    for name, samples in exposed.samples.items():
        if name.startswith("moderato_"):
            labels = found.setdefault(re.sub(r"_(bucket|sum|count)$", "", name), set())
            labels.update(label for its, _ in samples for label in its if label != "le")
    return {name: tuple(sorted(labels)) for name, labels in found.items()}


def documented(part: str) -> dict[str, tuple[str, ...]]:
    """The same, as the tables of docs/monitoring.md have it."""
    _, _, after = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8").partition(f"### Of a {part}\n")
    table = re.split(r"^#", after, maxsplit=1, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| `(moderato_\w+)` \|[^|]*\|([^|]*)\|", table, re.MULTILINE)
    return {name: tuple(sorted(re.findall(r"`(\w+)`", labels))) for name, labels in rows}


def of_running_training(system: System, trainer: Asked) -> Exposed | None:
    """The trainer's metrics, once it has seen the training; which shows life, or it would be given up."""
    with writing(system.database) as connection:
        rows.report_progress(connection, "running", now=datetime.now(UTC))
    seen = trainer.metrics()
    return seen if "moderato_training_run_info" in seen.samples else None


def with_histogram(version: Path, directory: Path) -> Path:
    """A copy of a version that says how its held-out rows scored."""
    copy = directory / "with-histogram"
    shutil.copytree(version, copy)
    manifest = json.loads((copy / MANIFEST_FILE).read_text(encoding="utf-8"))
    manifest["metrics"]["score_histogram"] = score_histogram([[0.3] * len(LABELS)] * ENOUGH)
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
    return copy


@pytest.fixture
def system(new_system: System, tiny_version: Path, tmp_path: Path) -> System:
    """A system whose version knows how it should score, with two days of decisions, a failed and a running training."""
    new_system.add_version(with_histogram(tiny_version, tmp_path), "v1")
    new_system.client.activate("v1", instead_of=new_system.client.active(), by="the test", reason="first")
    now = datetime.now(UTC)
    stored = [
        scored(f"{hours_ago} hours ago, {n}", decided_at=now - timedelta(hours=hours_ago), submitted_at=now)
        for hours_ago in (1, 30)
        for n in range(ENOUGH)
    ]
    with writing(new_system.database) as connection:
        prepare(connection)
        record_decisions(connection, stored)
        for run_id in ("failed", "running"):
            rows.request_run(connection, run_id=run_id, requested_by="the test", overrides={}, now=now)
            rows.claim_run(connection, run_id, now)
        rows.finish_run(connection, "failed", state="failed", reason="as arranged", now=now)
        rows.report_progress(connection, "running", phase="training", step=3, total_steps=4, now=now)
        rows.add_review(
            connection, submission_id="1 hours ago, 0", action="hide", labels={}, reviewer="ada", note=None, now=now
        )
    new_system.environment["MODERATO_LOG_FORMAT"] = "json"
    return new_system


@pytest.fixture
def sender(system: System) -> Iterator[Asked]:
    """`moderato webhooks run`, with an endpoint for every decision at which nobody listens."""
    asked = Asked(free_port())
    endpoint = "MODERATO_WEBHOOKS__ENDPOINTS__NEWS__"
    variables = {
        "MODERATO_METRICS__WEBHOOKS_PORT": str(asked.port),
        f"{endpoint}URL": "http://127.0.0.1:1/",
        f"{endpoint}MIN_ACTION": "allow",
        f"{endpoint}SECRET": base64.b64encode(bytes(32)).decode(),
    }
    command = [sys.executable, "-m", "cli.main", "webhooks", "run"]
    process = subprocess.Popen(command, cwd=ROOT, env=system.environment | variables, stderr=subprocess.DEVNULL)
    yield asked
    process.kill()
    process.wait()


def json_lines(log: str) -> list[dict[str, Any]]:
    """The log without Celery's banner."""
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


@contextmanager
def tables_locked(system: System) -> Iterator[None]:
    """Nothing can be recorded, though the database answers."""
    with system.database.connect() as connection, connection.begin():
        connection.execute(text("LOCK TABLE submissions IN ACCESS EXCLUSIVE MODE"))
        yield


def test_each_process_says_how_it_is(system: System, sender: Asked, texts: list[str]) -> None:
    # Given a worker, a trainer and a sender of webhooks with endpoints
    asked, trainer = Asked(free_port()), Asked(free_port())
    system.environment["MODERATO_METRICS__WORKER_PORT"] = str(asked.port)
    system.environment["MODERATO_METRICS__TRAINER_PORT"] = str(trainer.port)
    worker = system.start_worker(**SMALL_STEPS)
    system.start_trainer()

    # Then it is well, and has counted nothing
    assert asked.get("/healthz") == (200, "ok")
    assert asked.get("/readyz") == (200, "ok")
    assert asked.get("/")[0] == 404
    before = asked.metrics()
    assert before.sum("moderato_decisions_total") == 0
    assert before.sum("moderato_queue_messages", queue=MODERATE_QUEUE) == 0
    assert before.sum("moderato_model_info", version="v1") == 1
    assert before.sum("moderato_broker_up") == before.sum("moderato_database_up") == 1

    # And the trainer, too, which sees what trainings there are
    assert trainer.get("/healthz") == (200, "ok")
    assert trainer.get("/readyz") == (200, "ok")
    training = wait_until(lambda: of_running_training(system, trainer), TIMEOUT_S, "the running training")
    assert training.sum("moderato_training_progress_ratio") == 0.75
    assert training.sum("moderato_training_run_info", phase="training") == 1
    assert training.sum("moderato_training_runs", state="failed") == 1
    assert training.sum("moderato_training_last_run_info", state="failed", run_id="failed") == 1
    assert training.sum("moderato_training_waiting_reviews") == 1

    # And the sender, which has nothing to post
    sender.wait_for("/readyz", 200)
    assert sender.get("/healthz") == (200, "ok")
    idle = sender.metrics_with(lambda seen: "moderato_webhook_pending_deliveries" in seen.samples, "the endpoint")
    assert idle.sum("moderato_webhook_pending_deliveries", endpoint="news") == 0
    assert idle.sum("moderato_webhook_oldest_undelivered_age_seconds", endpoint="news") == 0
    assert idle.sum("moderato_webhook_attempts_total") == 0

    # When comments come: new ones, the same again, and a bad one
    ids = [*system.client.submit_many(texts[:200])]
    system.wait_for_decisions(ids)
    system.wait_for_decisions([*system.client.submit_many(texts[:10])])
    with Celery(broker=system.broker_url, set_as_current=False) as producer:
        bad = producer.send_task(MODERATE_TASK, [[{"text": ""}]], queue=MODERATE_QUEUE).id
    wait_until(lambda: system.client.dead_letters(), TIMEOUT_S, "the dead letter")
    # Then all of it is counted, once
    now = asked.metrics_with(lambda seen: seen.sum("moderato_held_comments") == 0, "an idle worker")
    assert now.sum("moderato_decisions_total", version="v1") == 210
    assert now.sum("moderato_dead_letters_total", reason="invalid_comment") == 1
    assert now.sum("moderato_dead_letters_total") == 1
    assert now.sum("moderato_reused_comments_total") == 10
    assert now.sum("moderato_stage_seconds_count", stage="queue") == 210
    assert now.sum("moderato_stage_seconds_bucket", stage="score", le="+Inf") == now.sum("moderato_batches_total") > 0
    assert now.sum("moderato_batch_padded_tokens_total") >= now.sum("moderato_batch_tokens_total") > 200
    assert now.sum("moderato_waiting_comments") == 0
    # And the log has two lines of the refused one, in JSON: what came, at Celery's own level, and what became of it
    refused = [line for line in json_lines(worker.log()) if line.get("submission_id") == f"{bad}:0#refused"]
    said = [(line["level"], line["logger"], line.get("reason")) for line in refused]
    assert said == [("WARNING", "worker.intake", None), ("INFO", "worker.pipeline", "invalid_comment")]
    assert datetime.fromisoformat(refused[0]["time"]).tzinfo is not None

    # And in the meantime drift was measured
    drift = asked.metrics_with(lambda seen: "moderato_score_drift_psi" in seen.samples, "drift")
    assert drift.sum("moderato_drift_decisions", period="day_before") == ENOUGH
    assert drift.sum("moderato_overturned_decisions") == 1

    # And every decision waits for the endpoint
    late = sender.metrics_with(lambda seen: seen.sum("moderato_webhook_pending_deliveries") == 210, "the deliveries")
    assert late.sum("moderato_webhook_attempts_total", endpoint="news", outcome="failed") >= 1
    assert late.sum("moderato_webhook_attempts_total", outcome="delivered") == 0
    assert late.sum("moderato_webhook_oldest_undelivered_age_seconds", endpoint="news") > 0

    # Then every alert and every panel asks for what is there
    samples = {**training.samples, **drift.samples, **late.samples}
    assert {place: problems for place, query in queries().items() if (problems := unanswerable(query, samples))} == {}
    # And the manual names all of it, and nothing else
    assert documented("worker") == own_metrics(drift)
    assert documented("trainer") == own_metrics(training)
    assert documented("sender of webhooks") == own_metrics(late)

    # When the database is away, then the worker is well, and not ready
    with outage(system.environment["MODERATO_DATABASE_URL"]):
        assert "the database" in asked.wait_for("/readyz", 503)
        assert asked.get("/healthz") == (200, "ok")
        assert asked.metrics().sum("moderato_database_up") == 0
        assert trainer.wait_for("/readyz", 503) == "the database has not answered"
        assert trainer.get("/healthz") == (200, "ok")
        assert "the database" in sender.wait_for("/readyz", 503)
        assert sender.get("/healthz") == (200, "ok")
    asked.wait_for("/readyz", 200)
    sender.wait_for("/readyz", 200)

    # When it is told to end while it holds what cannot be recorded yet
    with tables_locked(system):
        system.client.submit(texts[300])
        asked.metrics_with(lambda seen: seen.sum("moderato_held_comments") == 1, "a comment that is held")
        worker.terminate()
        # Then it is not ready, says so, and still works
        assert asked.wait_for("/readyz", 503) == "shutting down"
        assert asked.get("/healthz") == (200, "ok")
    assert worker.wait() == 0
    assert asked.get("/readyz")[0] == 0


def test_a_port_that_is_taken_does_not_keep_a_worker_from_working(system: System, texts: list[str]) -> None:
    # Given a port on which somebody else listens
    with socket.create_server(("127.0.0.1", 0)) as taken:
        system.environment["MODERATO_METRICS__WORKER_PORT"] = str(taken.getsockname()[1])
        worker = system.start_worker()
        # Then that is said, and the worker works
        assert "cannot be listened on (Address already in use)" in worker.log()
        system.wait_for_decisions([system.client.submit(texts[0])])
