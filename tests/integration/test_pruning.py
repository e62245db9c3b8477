"""`moderato models prune`: what anything needs stays, and nobody activates a version that is just going."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner, Result

from api_client.client import ModerationClient
from cli.main import app
from config.settings import settings
from db import queries, trials
from db.session import reading, writing
from model.version import MANIFEST_FILE, STARTER_DIRECTORY, WEIGHTS_FILE
from tests.integration.rows import minutes
from tests.services import wait_until


@pytest.fixture
def versions_dir(tmp_path: Path) -> Path:
    return tmp_path / "versions"


@pytest.fixture
def moderato(
    redis_url: str, database_url: str, versions_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Result]]:
    """`moderato`, in this process."""
    monkeypatch.setenv("MODERATO_BROKER_URL", redis_url)
    monkeypatch.setenv("MODERATO_DATABASE_URL", database_url)
    monkeypatch.setenv("MODERATO_VERSIONS_DIR", str(versions_dir))
    settings.cache_clear()
    yield lambda *arguments: CliRunner().invoke(app, arguments)
    settings.cache_clear()


@pytest.fixture
def client(redis_url: str, database_url: str) -> Iterator[ModerationClient]:
    with ModerationClient(redis_url, database_url) as client:
        yield client


@pytest.fixture
def publish(client: ModerationClient, versions_dir: Path) -> Callable[[str], None]:
    """Writes what looks like a version, and registers it, a minute after the one before."""
    manifest = json.loads((STARTER_DIRECTORY / MANIFEST_FILE).read_text(encoding="utf-8"))
    count = 0

    def published(name: str) -> None:
        nonlocal count
        count += 1
        directory = versions_dir / name
        directory.mkdir(parents=True)
        (directory / MANIFEST_FILE).write_text("{}")
        (directory / WEIGHTS_FILE).write_bytes(b"x" * 2**20)
        with writing(client._engine) as connection:
            queries.register_version(connection, manifest | {"version": name}, minutes(count))

    return published


def on_disk(versions_dir: Path) -> set[str]:
    return {path.name for path in versions_dir.iterdir()}


def answer(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_what_anything_needs_stays(
    moderato: Callable[..., Result],
    client: ModerationClient,
    publish: Callable[[str], None],
    versions_dir: Path,
) -> None:
    # Given versions that were all active, but for one that is on trial and one that nobody wanted
    needed = ["learnt-from", "run", "tried", "previous", "active"]
    for name in ("old", *needed, "unwanted"):
        publish(name)
    for name in ("old", "learnt-from", "run", "previous", "active"):
        activation = client.activate(name, instead_of=client.active(), by="me", reason="test")
    with writing(client._engine) as connection:
        # And a worker that refused the active one, a training that starts from another, and a trial
        for worker, version, error in (("w1@here", "run", "damaged"), ("w2@here", "active", None)):
            queries.record_load(
                connection, activation_id=activation, worker=worker, version=version, error=error, now=minutes(9)
            )
        queries.request_run(connection, run_id="1", requested_by="me", overrides={}, now=minutes(9))
        assert queries.claim_run(connection, "1", minutes(9))
        queries.report_progress(connection, "1", parent="learnt-from", now=minutes(9))
        trials.start_trial(
            connection, kind="shadow", candidate="tried", share=1, bounds={}, by="me", reason="test", now=minutes(9)
        )
    # And a version that the database does not know, and one that is being written
    for name in ("copied", ".new.x1"):
        (versions_dir / name).mkdir()
    before = on_disk(versions_dir)

    # When it is asked what would go
    asked = answer(moderato("models", "prune", "--keep", "0", "--json"))
    # Then that is what nothing needs, and all of it is still there
    assert asked["going"] == ["old", "unwanted"]
    assert (asked["bytes"], asked["deleted"]) == (2 * (2**20 + 2), False)
    assert asked["versions"]["run"] == "w1@here runs it"
    assert asked["versions"]["copied"] == "not known to the database"
    assert on_disk(versions_dir) == before
    # And as many of the newest stay as one likes, and all that are not old enough
    assert answer(moderato("models", "prune", "--keep", "1", "--json"))["going"] == ["old"]
    assert answer(moderato("models", "prune", "--older-than-days", "36500", "--json"))["going"] == []

    # When they are deleted
    said = moderato("models", "prune", "--keep", "0", "--yes")
    # Then the others are there, and of these the manifests
    assert said.exit_code == 0
    assert "deleted 2 versions, 2.0 MiB" in said.stderr
    assert on_disk(versions_dir) == (before - {"old", "unwanted"}) | {".pruned"}
    assert {path.name for path in (versions_dir / ".pruned" / "old").iterdir()} == {MANIFEST_FILE}
    # And the history still has them, and says what became of them
    listed = {row["version"]: row["pruned"] for row in answer(moderato("models", "--json"))["versions"]}
    assert {version for version, is_pruned in listed.items() if is_pruned} == {"old", "unwanted"}
    assert set(needed) < listed.keys()
    # And to activate one is refused with the reason, before any worker is told
    refused = moderato("activate", "old")
    assert refused.exit_code == 1
    assert "version old was pruned" in refused.stderr.replace("\n", " ")
    active = client.active()
    assert active is not None
    assert active.version == "active"


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_where_no_worker_can_be_asked_nothing_goes(
    moderato: Callable[..., Result],
    publish: Callable[[str], None],
    versions_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish("v1")
    # Given a broker that is away
    monkeypatch.setenv("MODERATO_BROKER_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    said = moderato("models", "prune", "--keep", "0", "--yes")
    assert said.exit_code == 1
    assert "No worker could be asked which version it runs, so nothing was deleted" in said.stderr.replace("\n", " ")
    assert on_disk(versions_dir) == {"v1"}


@pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)
def test_an_activation_waits_until_the_choice_is_carried_out(
    client: ModerationClient, publish: Callable[[str], None], versions_dir: Path
) -> None:
    publish("v1")
    publish("v2")
    with ThreadPoolExecutor(1) as pool:
        # Given somebody who chooses what may go
        with client.holding_activations() as needed:
            assert needed == {}
            # When another makes a version the active one
            activating = pool.submit(client.activate, "v2", instead_of=client.active(), by="me", reason="test")

            def waits() -> bool:
                waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
                with reading(client._engine) as connection:
                    return bool(connection.execute(waiting).scalar())

            # Then that waits
            wait_until(waits, what="a waiting activation")
        # And comes to pass afterwards
        activating.result()
    with client.holding_activations() as needed:
        assert needed == {"v2": "the active version"}
