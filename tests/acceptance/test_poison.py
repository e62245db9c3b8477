"""A message that kills whoever works on it: it is set aside by itself, and costs its neighbours nothing."""

import signal
from contextlib import closing
from pathlib import Path

import pytest
from celery import Celery

from config.names import MODERATE_QUEUE, MODERATE_TASK, Reason
from tests.acceptance.system import CeleryProcess, System
from worker.intake import MAX_DELIVERIES

POISON = "zanzibar"

pytestmark = pytest.mark.parametrize("empty_database_url", ["sqlite"], indirect=True)


@pytest.mark.parametrize("store_text", [True, False])
def test_a_message_that_kills_its_workers_is_set_aside(
    store_text: bool, system: System, texts: list[str], tmp_path: Path
) -> None:
    # Given a comment that kills its worker, among others
    ids = [system.client.submit(text) for text in texts[:10]]
    with Celery(broker=system.broker_url, set_as_current=False) as producer:
        comment = {"text": f"{POISON} {texts[0]}", "store_text": store_text}
        poison = producer.send_task(MODERATE_TASK, [[comment]], queue=MODERATE_QUEUE).id
    ids.extend(system.client.submit(text) for text in texts[10:20])

    def start_worker(name: str) -> CeleryProcess:
        log = tmp_path / f"{name}.log"
        environment = {**system.environment, "POISON": POISON}
        return CeleryProcess("tests.acceptance.mortal_worker", MODERATE_QUEUE, name, environment, log)

    # When one worker after the other dies of it
    for death in range(MAX_DELIVERIES):
        with closing(start_worker(f"mortal-{death}")) as mortal:
            assert mortal.wait() == -signal.SIGKILL
    with closing(start_worker("survivor")) as survivor:
        # Then it is a dead letter that says so, and all others are decided
        system.wait_for_decisions(ids)
        system.wait_until_nothing_is_left()
        [letter] = system.client.dead_letters()
        assert (letter.dead_letter_id, letter.reason) == (poison, Reason.WORKER_DIED)
        assert f"delivered {MAX_DELIVERIES} times" in letter.detail
        # And its text is kept unless it must not be
        assert (POISON.encode() in letter.payload) == store_text
        assert sorted(row.submission_id for row in system.decisions()) == sorted(ids)
        # And the worker lives, and no log holds the text
        assert survivor.is_running
        assert not any(POISON in log.read_text() for log in tmp_path.glob("*.log"))
