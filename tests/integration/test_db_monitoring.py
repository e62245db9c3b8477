"""What only monitoring asks: how trainings go, and how many reviews wait for one."""

from sqlalchemy import Engine

from db import queries
from db.monitoring import count_runs, count_waiting_reviews, last_run, running_run
from db.queries import record_decisions
from db.session import reading, writing
from tests.integration.rows import minutes, prepare, scored


def test_runs_by_state_the_one_under_way_and_the_last(engine: Engine) -> None:
    # Given a database without any run
    with reading(engine) as connection:
        assert (count_runs(connection), running_run(connection), last_run(connection)) == ({}, None, None)
    # When one has failed, a later one was promoted, one runs and one waits
    with writing(engine) as connection:
        for number, run_id in enumerate(("failed", "promoted", "running", "waiting")):
            queries.request_run(connection, run_id=run_id, requested_by="me", overrides={}, now=minutes(number))
        for number, run_id in enumerate(("failed", "promoted", "running"), start=1):
            queries.claim_run(connection, run_id, minutes(number))
        queries.finish_run(connection, "promoted", state="promoted", reason="better", version="v2", now=minutes(9))
        queries.finish_run(connection, "failed", state="failed", reason="broken", now=minutes(8))
        queries.report_progress(connection, "running", phase="training", step=1, total_steps=4, now=minutes(9))
    # Then each is told
    with reading(engine) as connection:
        assert count_runs(connection) == {"requested": 1, "running": 1, "promoted": 1, "failed": 1}
        running, last = running_run(connection), last_run(connection)
    assert running is not None and last is not None
    assert (running.run_id, running.phase, running.step, running.total_steps) == ("running", "training", 1, 4)
    assert (last.run_id, last.state, last.version, last.finished_at) == ("promoted", "promoted", "v2", minutes(9))


def test_reviews_wait_until_a_training_that_ended_well_began_after_them(engine: Engine) -> None:
    with writing(engine) as connection:
        prepare(connection, "v1")
        record_decisions(connection, [scored("a")])
        for number in (1, 3, 5):
            queries.add_review(
                connection,
                submission_id="a",
                action="hide",
                labels={},
                reviewer="ada",
                note=None,
                now=minutes(number),
            )
        assert count_waiting_reviews(connection) == 3
        # When one training has seen the first of them, and another, which failed, the second
        for run_id, began, state in (("seen", 2, "refused"), ("failed", 4, "failed")):
            queries.request_run(connection, run_id=run_id, requested_by="me", overrides={}, now=minutes(began))
            queries.claim_run(connection, run_id, minutes(began))
            queries.finish_run(connection, run_id, state=state, reason="", version="v2", now=minutes(9))  # type: ignore[arg-type]
        # Then the failed one does not count
        assert count_waiting_reviews(connection) == 2
