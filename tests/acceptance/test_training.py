"""Trainings that die: the row says so, nothing else has changed, and the next one works."""

import os
import signal

import pytest

from db import queries
from db.durable import database_time
from db.session import writing
from tests.acceptance.system import System

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)

LONG = {"epochs": 100}
"""A training that does not end while the test looks at it."""


def test_a_killed_training_fails_and_the_next_one_works(system: System) -> None:
    # Given a training under way
    trainer = system.start_trainer()
    run_id = system.client.retrain(requested_by="the test", **LONG)
    system.wait_until_training(run_id)

    # When its process is killed, as the system does for want of memory
    [training_process] = system.training_processes()
    os.kill(training_process, signal.SIGKILL)

    # Then the run has failed and says why
    run = system.wait_until_finished(run_id)
    assert run.state == "failed"
    assert "the training process died" in (run.reason or "")
    assert "signal 9" in (run.reason or "")
    # And nothing else has changed
    assert [activation.version for activation in system.client.activations()] == ["v1"]
    assert [version.version for version in system.client.versions()] == ["v1"]
    assert [path.name for path in system.versions_dir.iterdir()] == ["v1"]
    # And the same trainer carries out the next one
    assert trainer.is_running
    following = system.wait_until_finished(system.client.retrain(requested_by="the test"))
    assert following.state == "promoted", following.reason
    active = system.client.active()
    assert active is not None
    assert active.version == following.version


def test_a_trainer_killed_with_its_training_fails_the_run_when_it_is_back(system: System) -> None:
    # Given a training under way
    trainer = system.start_trainer()
    run_id = system.client.retrain(requested_by="the test", **LONG)
    system.wait_until_training(run_id)

    # When the trainer and its training are killed
    trainer.kill()
    system.start_trainer("tests.acceptance.impatient_trainer")

    # Then the new trainer gives up the run, which changed nothing
    run = system.wait_until_finished(run_id)
    assert (run.state, run.reason) == ("failed", "the training process stopped without a word")
    # And it carries out a run whose client died before it had sent the message
    with writing(system.database) as connection:
        now = database_time(connection)
        queries.request_run(connection, run_id="untold", requested_by="the test", overrides={}, now=now)
    following = system.wait_until_finished("untold")
    assert following.state == "promoted", following.reason
    assert [activation.version for activation in system.client.activations()] == [following.version, "v1"]


def test_a_trainer_outlives_a_redis_that_is_full_when_it_connects_anew(system: System) -> None:
    # Given a trainer that loses its connection to a Redis at its maxmemory
    trainer = system.start_trainer()
    system.redis.config_set("maxmemory", 1)
    try:
        system.redis.execute_command("CLIENT", "KILL", "TYPE", "normal")
        trainer.wait_for_log("memory > 'maxmemory'")
    finally:
        # When there is room again
        system.redis.config_set("maxmemory", 0)
    # Then the same process trains
    run = system.wait_until_finished(system.client.retrain(requested_by="the test"))
    assert run.state == "promoted"
    assert trainer.is_running
