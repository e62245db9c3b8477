"""Workers that are killed, and workers that are stopped: nothing is lost and nothing is decided twice."""

import pytest

from tests.acceptance.system import SMALL_STEPS, System

KILLS = 4


@pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)
def test_killed_workers_lose_nothing(system: System, texts: list[str]) -> None:
    # Given comments in lists and comments alone
    ids: list[str] = []
    system.client.submit_many(texts[:1000], on_sent=ids.extend)
    ids.extend(system.client.submit(text) for text in texts[1000:])

    # When the worker is killed again and again in the middle of them
    for kill in range(1, KILLS + 1):
        worker = system.start_worker(**SMALL_STEPS)
        system.wait_for_count(kill * len(ids) // (KILLS + 2))
        worker.kill()
        assert system.held_messages(), "the worker was killed with nothing in hand, which tests nothing"

    # Then the next one finishes: one decision for each, and nothing is left in Redis
    system.start_worker()
    system.wait_for_decisions(ids)
    system.wait_until_nothing_is_left()
    assert sorted(row.submission_id for row in system.decisions()) == sorted(ids)
    assert sorted(row.text or "" for row in system.decisions()) == sorted(texts)
    assert system.client.dead_letters() == []


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_stopped_worker_finishes_what_it_holds_and_leaves_the_rest(system: System, texts: list[str]) -> None:
    # Given a worker in the middle of a queue
    ids = [system.client.submit(text) for text in texts]
    worker = system.start_worker(**SMALL_STEPS)
    system.wait_for_count(100)

    # When its supervisor stops it
    with worker.paused():
        in_hand = system.ids_of_held_messages()
        worker.terminate()
    assert in_hand
    status = worker.wait()

    # Then it has decided what it held, and the rest still waits
    assert status == 0
    assert {f"{message_id}:0" for message_id in in_hand} <= {row.submission_id for row in system.decisions()}
    assert system.held_messages() == 0
    assert system.waiting_messages() > 0
    assert system.count_decisions() + system.waiting_messages() == len(ids)
    # And the next worker finishes it
    system.start_worker()
    system.wait_for_decisions(ids)
    system.wait_until_nothing_is_left()
    assert system.count_decisions() == len(ids)
