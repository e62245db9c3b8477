"""Which policy a worker decides by: it follows the newest activation, and nothing wrong with one stops it."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine

from config.policy import Policy, PolicyError, parse_policy
from config.settings import Settings, load_settings
from db import policies
from db.session import writing
from tests.services import wait_until
from worker.policies import PolicyFollower

OWN, MILD, STRICT = (f"communities: {{default: {{toxic: {{hide: {at}}}}}}}\n" for at in (0.9, 0.8, 0.1))
OF_A_NEWER_RELEASE = "communities: {default: {toxic: {shadow_ban: 0.5}}}\n"


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """With a policy file; looks happen when a test asks for them."""
    (tmp_path / "own.yaml").write_text(OWN, encoding="utf-8")
    return load_settings(
        {
            "MODERATO_DATABASE_URL": database_url,
            "MODERATO_POLICY_FILE": str(tmp_path / "own.yaml"),
            "MODERATO_WORKER__ACTIVATION_POLL_S": "60",
        }
    )


class Worker:
    """A worker's follower, and the policies that it hands to the pipeline."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.follower = PolicyFollower(engine, settings)
        self.policies: list[Policy] = []

    @property
    def texts(self) -> list[str]:
        return [policy.text for policy in self.policies]

    def start(self) -> "Worker":
        self.policies.append(self.follower.load_first())
        self.follower.follow(self.policies.append)
        return self

    def look_until(self, condition: Callable[[], object], what: str) -> None:
        def holds_after_a_look() -> bool:
            self.follower.look_now()
            return bool(condition())

        wait_until(holds_after_a_look, what=what)


def activate(engine: Engine, *texts: str) -> None:
    for text in texts:
        with writing(engine) as connection:
            policies.activate(
                connection, text, instead_of=policies.active(connection), by="me", reason="test", now=datetime.now(UTC)
            )


def test_without_an_activation_the_file_decides_until_there_is_one(engine: Engine, settings: Settings) -> None:
    # Given a worker on a database without any activation
    worker = Worker(engine, settings).start()
    assert worker.texts == [OWN]
    # When policies are activated, then it follows
    for policy in (MILD, STRICT, OWN):
        activate(engine, policy)
        worker.look_until(lambda wanted=policy: worker.texts[-1] == wanted, "the exchange")  # type: ignore[misc]
    assert worker.texts == [OWN, MILD, STRICT, OWN]
    assert worker.policies[-1].version == hashlib.sha256(OWN.encode()).hexdigest()
    assert worker.follower.refusal is None


def test_a_policy_that_cannot_be_read_leaves_the_old_one(
    engine: Engine, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    activate(engine, MILD)
    worker = Worker(engine, settings).start()
    # When a policy of a newer release is activated
    activate(engine, OF_A_NEWER_RELEASE)
    worker.look_until(lambda: worker.follower.refusal, "the refusal")
    # Then it is said what is wrong with it, and the old one goes on
    assert worker.follower.refusal is not None
    assert "communities.default.toxic names 'shadow_ban'" in worker.follower.refusal
    # And when one is activated that can be read, the refusal is over and was said once
    activate(engine, STRICT)
    worker.look_until(lambda: worker.follower.refusal is None, "the end of the refusal")
    assert worker.texts == [MILD, STRICT]
    assert caplog.text.count("shadow_ban") == 1
    # And a text that is not what was stored decides nothing
    with writing(engine) as connection:
        policies.activate(
            connection, OWN, instead_of=policies.active(connection), by="me", reason="test", now=datetime.now(UTC)
        )
        connection.exec_driver_sql(f"UPDATE policies SET text = '{MILD}' WHERE text = '{OWN}'")
    worker.look_until(lambda: worker.follower.refusal, "the refusal")
    assert "changed after it was stored" in str(worker.follower.refusal)
    assert worker.texts == [MILD, STRICT]


def test_a_start_takes_the_newest_that_can_be_read(engine: Engine, settings: Settings) -> None:
    # Given only activations that cannot be read, then the file decides
    activate(engine, OF_A_NEWER_RELEASE)
    worker = Worker(engine, settings)
    assert worker.follower.load_first().text == OWN
    assert "shadow_ban" in str(worker.follower.refusal)
    # And where one before the newest can be, that one
    activate(engine, STRICT, MILD, OF_A_NEWER_RELEASE)
    worker = Worker(engine, settings).start()
    assert worker.texts == [MILD]
    assert "shadow_ban" in str(worker.follower.refusal)
    activate(engine, STRICT)
    worker.look_until(lambda: worker.texts == [MILD, STRICT], "the exchange")


def test_a_start_says_that_the_file_does_not_decide(
    engine: Engine, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    # Given an active policy that the file says too, then there is nothing to warn of
    activate(engine, OWN)
    assert Worker(engine, settings).follower.load_first().version == parse_policy(OWN).version
    assert "moderato policy" not in caplog.text
    # And where the file says something else, then which decides, and what to do
    activate(engine, MILD)
    assert Worker(engine, settings).follower.load_first().text == MILD
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"policy {parse_policy(MILD).version[:12]} decides, activated by me" in warning
    assert f"`moderato policy activate {settings.policy_file}`" in warning
    # And a file that is broken stops only those that would decide by it
    settings.policy_file.write_text("communities: {}", encoding="utf-8")
    assert Worker(engine, settings).follower.load_first().text == MILD
    assert "the file that would decide without it cannot be used: policy " in caplog.text
    with writing(engine) as connection:
        connection.exec_driver_sql("DELETE FROM policy_activations")
    with pytest.raises(PolicyError, match="communities must be a mapping"):
        Worker(engine, settings).follower.load_first()
