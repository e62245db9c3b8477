"""Workers on several hosts: each with a versions directory of its own, one database, one queue."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.tiny import copy_version
from cli.checks import check_processes
from cli.pruning import versions_on_workers
from config.settings import ROOT, load_settings
from tests.acceptance.system import TIMEOUT_S, System
from tests.services import wait_until


def moderato(system: System, *arguments: str) -> str:
    """What a command says, on the host that has every version."""
    variables = os.environ | system.environment | {"MODERATO_VERSIONS_DIR": str(system.versions_dir)}
    command = [sys.executable, "-m", "cli.main", *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True).stdout


def words(system: System, activation_id: int) -> dict[str, tuple[str, str | None]]:
    """What each worker says of an activation: the version it runs and why not another, once both have said it."""
    loads = wait_until(
        lambda: loads if len(loads := system.client.loads(activation_id)) == 2 else None,
        TIMEOUT_S,
        "two workers' words",
    )
    return {load.worker.partition("@")[0]: (load.version, load.error) for load in loads}


def wait_for_another_decision(system: System, version: str) -> None:
    def decided() -> int:
        return len(list(system.client.results(model_version=version)))

    before = decided()
    wait_until(lambda: decided() > before, TIMEOUT_S, f"a decision by {version}")


@pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)
def test_a_host_that_lacks_a_version_goes_on_with_its_own_which_stays(
    system: System, tiny_version: Path, texts: list[str], tmp_path: Path
) -> None:
    # Given two hosts with v1, of which one gets no later version
    here, there = system.versions_dir, tmp_path / "versions-there"
    shutil.copytree(here, there)
    w1 = system.start_worker(node="w1")
    system.environment["MODERATO_VERSIONS_DIR"] = str(there)
    w2 = system.start_worker(node="w2")
    for name in ("v2", "v3"):
        system.add_version(tiny_version, name)

    # When those are activated while comments come
    with system.stream(texts) as ids:
        for name in ("v2", "v3"):
            said = words(
                system, system.client.activate(name, instead_of=system.client.active(), by="the test", reason="better")
            )
            # Then the one host follows, and the other says what it lacks, and where
            assert said["w1"] == (name, None)
            version, error = said["w2"]
            assert version == "v1"
            assert error == (f"version {name}: there is no directory {there / name}; is MODERATO_VERSIONS_DIR shared?")
        # And both decide
        for version in ("v1", "v3"):
            wait_for_another_decision(system, version)
    system.wait_for_decisions(ids)
    # And that can be seen
    assert f"{w2.node} refused it, continues with v1: version v3: there is no directory" in moderato(system, "models")

    # And each worker can be asked what it runs, whatever it has written
    running = versions_on_workers(system.client)
    assert running == {"v1": f"{w2.node} runs it", "v3": f"{w1.node} runs it"}

    # When old versions are deleted on the host that has them all
    pruned = json.loads(moderato(system, "models", "prune", "--keep", "0", "--yes", "--json"))
    # Then what the other host runs stays, though it is neither the active version nor the one before
    assert pruned["versions"] == {
        "v1": f"{w2.node} runs it",
        "v2": "active before: a rollback goes back to it",
        "v3": "the active version",
    }
    # And when that host has got the active version, it goes
    copy_version(here / "v3", there, "v3")
    assert words(
        system, system.client.activate("v3", instead_of=system.client.active(), by="the test", reason="again")
    )["w2"] == ("v3", None)
    assert json.loads(moderato(system, "models", "prune", "--keep", "0", "--yes", "--json"))["going"] == ["v1"]
    assert {path.name for path in here.iterdir()} == {"v2", "v3", ".pruned"}

    # And a worker that is given another's name says so
    w3 = system.start_worker(node="w1")
    w3.wait_for_log(f"another worker answers as {w1.node} too")
    assert "another worker answers" not in w1.log() + w2.log()
    # As do those who look from outside
    assert system.client.activity().workers.count(w1.node) == 2
    findings = [finding.said for finding in check_processes(load_settings(system.environment))]
    assert any(line.startswith(f"more than one worker answers as {w1.node}: ") for line in findings)
