"""A comment that kills whoever works on it: it is set aside by itself, and costs its neighbours nothing."""

import signal
from contextlib import closing
from pathlib import Path

import pytest
from celery import Celery

from config.identity import refused_id
from config.names import MODERATE_QUEUE, MODERATE_TASK, Reason
from tests.acceptance.system import TIMEOUT_S, CeleryProcess, System
from tests.services import wait_until
from worker.intake import MAX_DELIVERIES
from worker.transport import SUSPECT_RETURNS

POISON = "zanzibar"

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


def test_a_comment_that_kills_its_workers_is_set_aside(system: System, texts: list[str], tmp_path: Path) -> None:
    # Given comments that kill their workers, one by itself, one in a list among others, and a bad one in that list too
    ids = [system.client.submit(text) for text in texts[:10]]
    with Celery(broker=system.broker_url, set_as_current=False) as producer:

        def send(*comments: object) -> str:
            return str(producer.send_task(MODERATE_TASK, [comments], queue=MODERATE_QUEUE).id)

        poison = {"text": f"{POISON} {texts[0]}"}
        alone = send(poison)
        before, after = ([{"text": text} for text in some] for some in (texts[20:30], texts[30:40]))
        listed = send(*before, poison | {"store_text": False}, {"text": ""}, *after)
    ids.extend(system.client.submit(text) for text in texts[10:20])
    ids.extend(f"{listed}:{place}" for place in range(22) if place not in (10, 11))

    def start_worker(number: int) -> CeleryProcess:
        log = tmp_path / f"mortal-{number}.log"
        environment = {**system.environment, "POISON": POISON}
        return CeleryProcess("tests.acceptance.mortal_worker", MODERATE_QUEUE, f"mortal-{number}", environment, log)

    def is_done() -> bool:
        return system.count_decisions() >= len(ids) and len(system.client.dead_letters()) >= 3

    # When one worker after the other dies of them: twice of all together, then of each poison alone
    deaths = SUSPECT_RETURNS + 2 * (MAX_DELIVERIES - SUSPECT_RETURNS)
    for death in range(deaths):
        with closing(start_worker(death)) as mortal:
            assert mortal.wait() == -signal.SIGKILL
    with closing(start_worker(deaths)) as survivor:
        # Then each is a dead letter that says so, and keeps its text unless it must not
        wait_until(is_done, TIMEOUT_S, "an outcome of every comment")
        system.wait_until_nothing_is_left()
        letters = {letter.dead_letter_id: letter for letter in system.client.dead_letters()}
        assert {key: letter.reason for key, letter in letters.items()} == {
            f"{alone}:0": Reason.WORKER_DIED,
            f"{listed}:10": Reason.WORKER_DIED,
            refused_id(f"{listed}:11"): Reason.INVALID_COMMENT,
        }
        assert f"delivered {MAX_DELIVERIES} times" in letters[f"{listed}:10"].detail
        assert POISON.encode() in letters[f"{alone}:0"].payload
        assert letters[f"{listed}:10"].payload == b""
        # And all others are decided, those of the list too
        assert sorted(row.submission_id for row in system.decisions()) == sorted(ids)
        # And the worker lives, and no log holds the text
        assert survivor.is_running
        assert not any(POISON in log.read_text() for log in tmp_path.glob("*.log"))
