"""The model changes while comments stream through: retrained, refused, rolled back."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from db.queries import Result
from model.version import ONNX_FILE
from tests.acceptance.system import TIMEOUT_S, System
from tests.services import wait_until


@dataclass(frozen=True)
class Reign:
    """A version's time: from its activation until the worker said that it follows a later one."""

    version: str
    since: datetime
    until: datetime

    def includes(self, row: Result) -> bool:
        # What the worker had prepared before the exchange is still scored by the version that prepared it.
        return self.version == row.model_version and self.since <= row.decided_at and row.submitted_at <= self.until


def reigns(system: System) -> list[Reign]:
    """Of every version that the worker followed, oldest first."""
    reigns: list[Reign] = []
    until = datetime.max.replace(tzinfo=UTC)
    for activation in system.client.activations(limit=100):  # newest first
        [load] = system.client.loads(activation.activation_id)
        if load.error is None:
            reigns.insert(0, Reign(activation.version, activation.activated_at, until))
            until = load.loaded_at
    return reigns


def assert_decided_once_each_by_an_active_version(system: System, ids: list[str]) -> None:
    rows = system.decisions()
    assert sorted(row.submission_id for row in rows) == sorted(ids)
    followed = reigns(system)
    assert [row for row in rows if not any(reign.includes(row) for reign in followed)] == []


def wait_for_decision_by(system: System, version: str) -> None:
    """Wait for a comment that is yet to come."""
    since = datetime.now(UTC)
    wait_until(
        lambda: list(system.client.results(model_version=version, since=since, limit=1)),
        TIMEOUT_S,
        f"a decision by {version}",
    )


@pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)
def test_a_retrained_version_takes_over_in_the_middle_of_a_stream(system: System, texts: list[str]) -> None:
    # Given a worker, a trainer, and comments that keep coming
    worker = system.start_worker()
    trainer = system.start_trainer()
    with system.stream(texts) as ids:
        wait_for_decision_by(system, "v1")

        # When someone asks for a retrain
        run_id = system.client.retrain(requested_by="the test", epochs=15)
        # Then its row shows how it goes, for long enough that a look cannot miss it
        states, steps = ["requested"], [0]
        answered = False

        def finished() -> bool:
            nonlocal answered
            row = system.run(run_id)
            if row.state != states[-1]:
                states.append(row.state)
            if row.step is not None and row.step != steps[-1]:
                steps.append(row.step)
            # And the trainer answers meanwhile
            if row.step is not None and not answered:
                workers, trainers = system.client.nodes()
                assert (workers, trainers) == ([worker.node], [trainer.node])
                answered = system.run(run_id).state == "running"
            return row.finished_at is not None

        wait_until(finished, TIMEOUT_S, "the end of the run")
        run = system.run(run_id)
        assert states == ["requested", "running", "promoted"], run.reason
        assert answered, "the trainer only answered when it was done"
        assert len(steps) > 2
        assert steps == sorted(steps)
        assert steps[-1] == run.total_steps

        # And the worker follows, and follows again when someone rolls back
        assert run.version is not None
        wait_for_decision_by(system, run.version)
        system.wait_for_load(system.client.rollback(instead_of=system.client.active(), by="the test"))
        wait_for_decision_by(system, "v1")

    # Then every comment was decided once, by a version that was active in its time, and each version had some
    system.wait_for_decisions(ids)
    assert [reign.version for reign in reigns(system)] == ["v1", run.version, "v1"]
    assert_decided_once_each_by_an_active_version(system, ids)
    system.wait_until_nothing_is_left()


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_damaged_version_is_refused_and_the_old_one_goes_on(
    system: System, tiny_version: Path, texts: list[str]
) -> None:
    # Given a version with one wrong bit
    damaged_file = system.add_version(tiny_version, "damaged") / ONNX_FILE
    damaged = bytearray(damaged_file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    damaged_file.write_bytes(damaged)
    # And a worker with comments that keep coming
    worker = system.start_worker()
    with system.stream(texts) as ids:
        wait_for_decision_by(system, "v1")

        # When it is activated
        refusal = system.wait_for_load(
            system.client.activate("damaged", instead_of=system.client.active(), by="the test", reason="a mistake")
        )

        # Then the worker refuses it, says which file is damaged, and goes on
        assert refusal.version == "v1"
        assert refusal.error is not None
        assert "version damaged" in refusal.error
        assert f"{ONNX_FILE} is damaged" in refusal.error
        wait_for_decision_by(system, "v1")
        # And a rollback is followed
        load = system.wait_for_load(system.client.rollback(instead_of=system.client.active(), by="the test"))
        assert (load.version, load.error) == ("v1", None)
        # And so is a sound version after it
        system.add_version(tiny_version, "v2")
        load = system.wait_for_load(
            system.client.activate("v2", instead_of=system.client.active(), by="the test", reason="better")
        )
        assert (load.version, load.error) == ("v2", None)
        wait_for_decision_by(system, "v2")

    # Then nothing was lost or decided by the damaged version
    assert worker.is_running
    system.wait_for_decisions(ids)
    assert_decided_once_each_by_an_active_version(system, ids)
    system.wait_until_nothing_is_left()
