"""The demo: apart from everything of the user's, one at a time, and with corrections that teach no mistakes."""

import os
from pathlib import Path

import pytest

from cli.demo import FOLDER, is_clear_mistake, only_demo, own_environment
from cli.terminal import Problem
from config.names import LABELS, Action
from config.settings import load_settings

NOTHING = dict.fromkeys(LABELS, False)


def test_its_settings_and_places_are_its_own() -> None:
    users = {"PATH": "/bin", "MODERATO_BROKER_URL_FILE": "/run/broker_url", "MODERATO_POLICY_FILE": "/mine.yaml"}
    environment = own_environment(users, "redis+socket:///tmp/demo/redis.sock")
    assert environment["PATH"] == "/bin"
    own, default = load_settings(environment), load_settings({})
    assert own.database_url == f"sqlite:///{FOLDER}/moderato.db"
    assert own.versions_dir.is_relative_to(FOLDER)
    assert own.broker_url != default.broker_url
    places = {"broker_url", "database_url", "versions_dir"}
    assert own.model_dump(exclude=places) == default.model_dump(exclude=places)


def test_a_second_one_is_told_who_runs(tmp_path: Path) -> None:
    lock = tmp_path / "var" / "demo.lock"
    with only_demo(lock), pytest.raises(Problem, match=f"process {os.getpid()}"), only_demo(lock):
        pass
    with only_demo(lock):
        pass


@pytest.mark.parametrize(
    ("labels", "decided", "expected"),
    [
        (NOTHING | {"toxic": True, "insult": True}, Action.ALLOW, True),
        (NOTHING | {"toxic": True, "insult": True}, Action.REMOVE, False),
        (NOTHING, Action.HIDE, True),
        (NOTHING, Action.LABEL, False),
        # People's single labels are often mistaken, and one label that is absent says nothing of the others.
        (NOTHING | {"toxic": True}, Action.ALLOW, False),
        ({"toxic": True}, Action.ALLOW, False),
        ({"toxic": False}, Action.HIDE, False),
        ({}, Action.HIDE, False),
    ],
)
def test_a_correction_is_beyond_doubt(labels: dict[str, bool], decided: Action, expected: bool) -> None:
    assert is_clear_mistake(labels, decided) == expected
