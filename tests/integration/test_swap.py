"""Which version a worker scores with: it follows the newest activation, and nothing wrong with one stops it."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine

from bench.tiny import copy_version
from config.names import STARTER_VERSION
from config.settings import Settings, load_settings
from db import queries, trials
from db.queries import LoadRow
from db.session import open_database, reading, writing
from db.trials import TrialScoreRow
from model.engine import Scorer
from model.version import MANIFEST_FILE, WEIGHTS_FILE, Manifest, VersionError, read_manifest, version_directory
from tests.integration.outage import outage
from tests.integration.rows import prepare, scored
from tests.services import wait_until
from worker.swap import VersionFollower
from worker.trial import Judging, LiveTrial

WORKER = "w1@here"


@pytest.fixture(autouse=True)
def long_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is followed only after the pause between two attempts is not followed within a test."""
    monkeypatch.setattr("worker.swap.RETRY_REFUSED_S", 3_600.0)


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """Looks happen when a test asks for them."""
    return load_settings(
        {
            "MODERATO_DATABASE_URL": database_url,
            "MODERATO_VERSIONS_DIR": str(tmp_path / "versions"),
            "MODERATO_WORKER__DEVICE": "cpu",
            "MODERATO_WORKER__THREADS": "1",
            "MODERATO_WORKER__ACTIVATION_POLL_S": "60",
        }
    )


@pytest.fixture
def publish(tiny_version: Path, settings: Settings, engine: Engine) -> Callable[[str], Path]:
    """Writes and registers a version under this name; its directory."""

    def published(name: str) -> Path:
        directory = copy_version(tiny_version, settings.versions_dir, name)
        with writing(engine) as connection:
            queries.register_version(connection, read_manifest(directory).model_dump(), datetime.now(UTC))
        return directory

    return published


class Worker:
    """A worker's follower, and the scorers that it hands to the pipeline."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._follower = VersionFollower(engine, settings, WORKER)
        self.scorers: list[Scorer] = []
        self.trials: list[LiveTrial | None] = []

    @property
    def versions(self) -> list[str]:
        return [scorer.version for scorer in self.scorers]

    @property
    def counted(self) -> tuple[int, int, bool]:
        """Activations followed and refused, and whether the active one is refused now."""
        return self._follower.accepted, self._follower.refused, self._follower.is_behind

    def start(self) -> None:
        self.scorers.append(self._follower.load_first())
        self._follower.follow(self.scorers.append, self.trials.append)

    def look(self) -> None:
        self._follower.look_now()

    def look_until(self, condition: Callable[[], bool], what: str) -> None:
        def holds_after_a_look() -> bool:
            self.look()
            return condition()

        wait_until(holds_after_a_look, what=what)

    def word(self, activation_id: int, accepted: bool = False) -> LoadRow:
        """What it says of this activation; where `accepted`, once it says that."""

        self.look()

        def found() -> LoadRow | None:
            with reading(self._engine) as connection:
                return next(
                    (row for row in queries.loads(connection, activation_id) if row.error is None or not accepted), None
                )

        row = wait_until(found, what="the worker's word on the activation")
        assert row is not None
        assert row.worker == WORKER
        return row


def activate(engine: Engine, version: str) -> int:
    with writing(engine) as connection:
        return queries.activate(
            connection,
            instead_of=queries.active(connection),
            version=version,
            by="me",
            reason="test",
            now=datetime.now(UTC),
        )


def start_canary(engine: Engine, candidate: str) -> int:
    with writing(engine) as connection:
        return trials.start_trial(
            connection,
            kind="canary",
            candidate=candidate,
            share=0.25,
            bounds=load_settings({}).trial.model_dump(),
            by="me",
            reason="test",
            now=datetime.now(UTC),
        )


def damage(directory: Path) -> None:
    content = bytearray((directory / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (directory / WEIGHTS_FILE).write_bytes(content)


@contextmanager
def writing_is_blocked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SQLite only: another process writes meanwhile, and nobody waits for it. Reading goes on."""
    monkeypatch.setattr("db.session.BUSY_TIMEOUT_S", 0.05)
    engine.dispose()
    other = open_database(str(engine.url))
    with writing(other):
        yield
    other.dispose()


def read_too_far(directory: Path) -> None:
    """Say that the version reads longer texts than its encoder does."""
    manifest = directory / MANIFEST_FILE
    facts = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps(facts | {"max_length": 4 * facts["max_length"]}), encoding="utf-8")


def count_attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The versions that a worker tries to load from now on; grows."""
    attempts: list[str] = []

    def find(name: str, versions_dir: Path) -> Path:
        attempts.append(name)
        return version_directory(name, versions_dir)

    monkeypatch.setattr("worker.swap.version_directory", find)
    return attempts


def count_loads(engine: Engine) -> int:
    with reading(engine) as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM version_loads").scalar_one())


class TestStarting:
    @pytest.fixture(autouse=True)
    def starter(self, tiny_version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A repository whose starter loads fast."""
        directory = copy_version(tiny_version, tmp_path / "repository", STARTER_VERSION)
        monkeypatch.setattr("model.version.STARTER_DIRECTORY", directory)
        monkeypatch.setattr("worker.swap.STARTER_DIRECTORY", directory)
        return directory

    def test_the_first_start_activates_the_starter(self, engine: Engine, settings: Settings) -> None:
        # Given a database without any activation, and no versions directory
        assert VersionFollower(engine, settings, WORKER).load_first().version == STARTER_VERSION
        # Then the starter is the active version, by this worker
        with reading(engine) as connection:
            newest = queries.active(connection)
            assert newest is not None
            assert (newest.version, newest.activated_by) == (STARTER_VERSION, WORKER)
            (load,) = queries.loads(connection, newest.activation_id)
        assert (load.worker, load.version, load.error) == (WORKER, STARTER_VERSION, None)
        # And another worker's start adds nothing but its own word
        assert VersionFollower(engine, settings, "w2@there").load_first().version == STARTER_VERSION
        with reading(engine) as connection:
            assert len(queries.activations(connection, limit=10)) == 1
            assert [row.worker for row in queries.loads(connection, newest.activation_id)] == [WORKER, "w2@there"]

    def test_of_two_workers_that_start_first_one_activates_the_starter(
        self, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Given a worker that has seen no activation, and another that starts at that moment
        def read_while_another_starts(directory: Path) -> Manifest:
            monkeypatch.setattr("worker.swap.read_manifest", read_manifest)
            VersionFollower(engine, settings, "w2@there").load_first()
            return read_manifest(directory)

        monkeypatch.setattr("worker.swap.read_manifest", read_while_another_starts)
        VersionFollower(engine, settings, WORKER).load_first()
        # Then there is one activation, which both follow
        with reading(engine) as connection:
            (only,) = queries.activations(connection, limit=10)
            assert only.activated_by == "w2@there"
            assert len(queries.loads(connection, only.activation_id)) == 2

    def test_a_starter_of_an_earlier_release_is_succeeded_unless_its_files_were_kept(
        self, engine: Engine, settings: Settings, publish: Callable[[str], Path]
    ) -> None:
        # Given the starter of an earlier release, active, whose files were kept
        former = publish("starter-1")
        activate(engine, "starter-1")
        assert VersionFollower(engine, settings, WORKER).load_first().version == "starter-1"
        # When they are gone, and workers of this release start
        shutil.rmtree(former)
        for worker in (WORKER, "w2@there"):
            assert VersionFollower(engine, settings, worker).load_first().version == STARTER_VERSION
        # Then one of them made its own starter the active version, and said why
        with reading(engine) as connection:
            newest, before = queries.activations(connection, limit=10)
        assert (newest.version, newest.activated_by, before.version) == (STARTER_VERSION, WORKER, "starter-1")
        assert newest.reason.startswith("starter-1 came with an earlier release and is not in ")

    def test_a_start_takes_the_active_version(
        self, engine: Engine, settings: Settings, publish: Callable[[str], Path]
    ) -> None:
        publish("v1")
        publish("v2")
        activate(engine, "v2")
        activation = activate(engine, "v1")
        worker = Worker(engine, settings)
        worker.start()
        assert worker.versions == ["v1"]
        assert worker.word(activation).error is None

    @pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
    def test_a_start_takes_the_version_before_a_refused_one(
        self, engine: Engine, settings: Settings, publish: Callable[[str], Path]
    ) -> None:
        # Given an active version that is damaged, two before it that cannot be measured or are gone, and a sound one
        publish("v1")
        gone, overlong, damaged = publish("v2"), publish("v2b"), publish("v3")
        for version in ("v1", "v2", "v2b", "v3"):
            activation = activate(engine, version)
        shutil.rmtree(gone)
        read_too_far(overlong)
        damage(damaged)
        # When a worker starts
        assert VersionFollower(engine, settings, WORKER).load_first().version == "v1"
        # Then it scores with the sound one, and says so
        with reading(engine) as connection:
            (word,) = queries.loads(connection, activation)
        assert (word.worker, word.version) == (WORKER, "v1")
        assert word.error is not None
        assert "version v3: model.safetensors is damaged" in word.error

    def test_a_start_with_another_version_follows_the_next_activation_at_once(
        self, engine: Engine, settings: Settings, publish: Callable[[str], Path]
    ) -> None:
        publish("v1")
        damage(publish("v2"))
        for version in ("v1", "v2"):
            activate(engine, version)
        worker = Worker(engine, settings)
        worker.start()
        publish("v3")
        assert worker.word(activate(engine, "v3")).version == "v3"
        assert worker.versions == ["v1", "v3"]

    def test_where_no_version_loads_each_refusal_is_named(
        self, engine: Engine, settings: Settings, publish: Callable[[str], Path]
    ) -> None:
        for version in ("v1", "v2"):
            damage(publish(version))
            activate(engine, version)
        with pytest.raises(VersionError, match=r"no version .* can be loaded: version v2: .* version v1: "):
            VersionFollower(engine, settings, WORKER).load_first()

    def test_a_starter_that_is_missing_is_named(self, engine: Engine, settings: Settings, starter: Path) -> None:
        shutil.rmtree(starter)
        with pytest.raises(VersionError, match=r"manifest\.json cannot be read"):
            VersionFollower(engine, settings, WORKER).load_first()


class TestFollowing:
    @pytest.fixture
    def worker(self, engine: Engine, settings: Settings, publish: Callable[[str], Path]) -> Worker:
        """Running v1."""
        publish("v1")
        activate(engine, "v1")
        worker = Worker(engine, settings)
        worker.start()
        return worker

    def test_an_activation_is_followed(self, worker: Worker, engine: Engine, publish: Callable[[str], Path]) -> None:
        publish("v2")
        word = worker.word(activate(engine, "v2"))
        assert (word.version, word.error) == ("v2", None)
        assert worker.versions == ["v1", "v2"]
        # A rollback too
        assert worker.word(activate(engine, "v1")).version == "v1"
        assert worker.versions == ["v1", "v2", "v1"]

    def test_activating_the_running_version_again_loads_nothing(self, worker: Worker, engine: Engine) -> None:
        word = worker.word(activate(engine, "v1"))
        assert (word.version, word.error) == ("v1", None)
        assert worker.versions == ["v1"]

    def test_a_damaged_version_is_refused_and_the_old_one_goes_on(
        self, worker: Worker, engine: Engine, publish: Callable[[str], Path]
    ) -> None:
        # When a damaged version is activated
        damage(publish("v2"))
        word = worker.word(activate(engine, "v2"))
        # Then the worker says why it refuses it, and what it scores with
        assert word.version == "v1"
        assert word.error is not None
        assert "version v2: model.safetensors is damaged" in word.error
        assert worker.versions == ["v1"]
        assert worker.counted == (0, 1, True)
        # And a rollback is followed at once rather than after the pause between two attempts
        word = worker.word(activate(engine, "v1"))
        assert (word.version, word.error) == ("v1", None)
        # And so is the next version
        publish("v3")
        assert worker.word(activate(engine, "v3")).error is None
        assert worker.versions == ["v1", "v3"]
        assert worker.counted == (1, 1, False)

    @pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
    def test_a_version_that_cannot_be_measured_is_refused_once(
        self, worker: Worker, engine: Engine, publish: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Given a version that loads and scores its probes, and fails in the longer passes of the measurement
        read_too_far(publish("v2"))
        attempts = count_attempts(monkeypatch)
        # When it is activated while nothing can be written
        activation = activate(engine, "v2")
        with writing_is_blocked(engine, monkeypatch):
            worker.look_until(lambda: worker.counted == (0, 1, True), "the refusal")
            for _ in range(3):
                worker.look()
        # Then the word is given as soon as it can be, and the version is not loaded again until the pause is over
        word = worker.word(activation)
        assert word.version == "v1"
        assert word.error is not None
        assert "version v2" in word.error
        assert (attempts, worker.versions) == (["v2"], ["v1"])

    @pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
    def test_an_activation_with_the_number_of_a_lost_one_is_followed(
        self, worker: Worker, engine: Engine, publish: Callable[[str], Path]
    ) -> None:
        # When the database is restored, and another version is activated, before the worker looks again
        publish("v2")
        with writing(engine) as connection:
            connection.exec_driver_sql("DELETE FROM version_loads")
            connection.exec_driver_sql("DELETE FROM activations")
            now = datetime.now(UTC)
            again = queries.activate(connection, version="v2", instead_of=None, by="me", reason="test", now=now)
        assert worker.word(again).version == "v2"
        assert worker.versions == ["v1", "v2"]

    def test_a_version_that_comes_late_is_loaded_when_it_is_there(
        self, worker: Worker, engine: Engine, publish: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Given a worker that tries again at every look
        monkeypatch.setattr("worker.swap.RETRY_REFUSED_S", 0.0)
        # When a version is activated whose files are not there yet
        files = publish("v2")
        shutil.move(files, files.with_name("elsewhere"))
        activation = activate(engine, "v2")
        word = worker.word(activation)
        assert word.error is not None
        assert "version v2: there is no directory" in word.error
        # Then the attempts that follow say nothing new
        before = count_loads(engine)
        attempts = count_attempts(monkeypatch)
        worker.look_until(lambda: len(attempts) > 2, "several attempts")
        assert count_loads(engine) == before
        # Until it is there
        shutil.move(files.with_name("elsewhere"), files)
        worker.look_until(lambda: worker.versions == ["v1", "v2"], "the exchange")
        assert worker.word(activation, accepted=True).version == "v2"
        assert count_loads(engine) == before + 1

    def test_a_trial_is_followed_to_its_promotion(
        self, worker: Worker, engine: Engine, publish: Callable[[str], Path]
    ) -> None:
        # Given a canary
        publish("v2")
        trial_id = start_canary(engine, "v2")
        # Then its candidate is loaded beside the running version
        worker.look_until(lambda: len(worker.trials) == 1, "the trial")
        live = worker.trials[0]
        assert live is not None
        assert (live.trial_id, live.share, live.is_shadow, live.scorer.version) == (trial_id, 0.25, False, "v2")
        # And when it is promoted, what is loaded takes over
        with writing(engine) as connection:
            trial = trials.newest_trial(connection, "canary")
            activation = trials.promote_trial(connection, trial, by="me", reason="good", now=datetime.now(UTC))
        assert worker.word(activation).version == "v2"
        assert worker.trials == [live, None]
        assert worker.scorers[-1] is live.scorer
        # And another activation ends a trial here too
        start_canary(engine, "v1")
        worker.look_until(lambda: len(worker.trials) == 3, "the next trial")
        publish("v3")
        assert worker.word(activate(engine, "v3")).version == "v3"
        assert worker.trials[3:] == [None]

    def test_a_canary_out_of_bounds_is_rolled_back(
        self, worker: Worker, engine: Engine, publish: Callable[[str], Path]
    ) -> None:
        publish("v2")
        trial_id = start_canary(engine, "v2")
        worker.look_until(lambda: len(worker.trials) == 1, "the trial")
        # When its candidate fails at five comments, which the active version decides
        failures = [
            TrialScoreRow(trial_id=trial_id, submission_id=str(n), error="RuntimeError", scored_at=datetime.now(UTC))
            for n in range(5)
        ]
        with writing(engine) as connection:
            prepare(connection)
            queries.record_decisions(connection, [scored(str(n)) for n in range(5)])
            trials.record_trial_scores(connection, failures)
        # Then whoever sweeps ends it, and the worker follows
        Judging(engine, WORKER)()
        worker.look_until(lambda: worker.trials[1:] == [None], "the end of the trial")
        with reading(engine) as connection:
            trial = trials.newest_trial(connection, "canary")
        assert (trial.outcome, trial.ended_by) == ("rolled_back", WORKER)
        assert trial.verdict is not None
        assert "it failed to score 5 of 5 comments (100.0%)" in trial.verdict

    @pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
    @pytest.mark.parametrize("spoil", [lambda files: damage(files), lambda files: read_too_far(files)])
    def test_a_candidate_that_cannot_be_loaded_ends_its_trial(
        self,
        worker: Worker,
        engine: Engine,
        publish: Callable[[str], Path],
        spoil: Callable[[Path], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        spoil(publish("v2"))
        attempts = count_attempts(monkeypatch)
        start_canary(engine, "v2")
        # Also where its end cannot be written for a while, in which it is not loaded again and again
        with writing_is_blocked(engine, monkeypatch):
            worker.look_until(lambda: bool(attempts), "an attempt")
            for _ in range(3):
                worker.look()

        def ended() -> bool:
            with reading(engine) as connection:
                return trials.newest_trial(connection, "canary").outcome is not None

        worker.look_until(ended, "the end of the trial")
        with reading(engine) as connection:
            trial = trials.newest_trial(connection, "canary")
        assert (trial.outcome, trial.ended_by) == ("rolled_back", WORKER)
        assert trial.verdict is not None
        assert f"worker {WORKER} cannot load it: version v2" in trial.verdict
        assert (worker.trials, worker.versions, attempts) == ([], ["v1"], ["v2"])


def test_an_absent_database_stops_nothing(
    postgres_url: str,
    tiny_version: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    """On PostgreSQL, because nobody can keep others from reading SQLite."""
    engine = open_database(postgres_url)
    request.addfinalizer(engine.dispose)
    settings = load_settings(
        {
            "MODERATO_DATABASE_URL": postgres_url,
            "MODERATO_VERSIONS_DIR": str(tmp_path),
            "MODERATO_WORKER__DEVICE": "cpu",
            "MODERATO_WORKER__THREADS": "1",
            "MODERATO_WORKER__ACTIVATION_POLL_S": "60",
        }
    )
    for version in ("v1", "v2"):
        manifest = read_manifest(copy_version(tiny_version, tmp_path, version)).model_dump()
        with writing(engine) as connection:
            queries.register_version(connection, manifest, datetime.now(UTC))
    activate(engine, "v1")
    # Given a worker whose database goes away
    worker = Worker(engine, settings)
    worker.start()
    with outage(postgres_url):
        worker.look_until(lambda: "cannot see which version is active" in caplog.text, "the outage being noticed")
    # Then it says so, goes on, and follows again when the database is back
    activation = activate(engine, "v2")
    assert worker.word(activation).version == "v2"
    assert worker.versions == ["v1", "v2"]
    assert caplog.text.count("cannot see which version is active") == 1
