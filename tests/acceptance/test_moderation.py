"""A comment becomes a row: real processes, a real Redis, SQLite and again PostgreSQL."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from config.policy import read_policy
from config.settings import load_settings
from model.engine import Scores, load_scorer
from model.version import STARTER_DIRECTORY
from tests.acceptance import plain_producer
from tests.acceptance.conftest import COMMENTS_CSV
from tests.acceptance.system import TIMEOUT_S, System

CHECKED = slice(None, None, 5)
"""The comments that are scored alone, too."""


@pytest.fixture(scope="module")
def alone(texts: list[str]) -> tuple[Scores, list[int]]:
    """The starter's scores of every fifth comment, each in a forward pass of its own, and each text's windows."""
    starter = load_scorer(STARTER_DIRECTORY, device="cpu")
    scores = np.concatenate([starter.score_texts([text]) for text in texts[CHECKED]])
    return scores, [len(windows) for windows in starter.encode(texts[CHECKED])]


def write_comments(file: Path, texts: list[str]) -> None:
    with file.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines).writerows([["comment_text"], *([text] for text in texts)])


def test_every_comment_gets_one_decision_as_if_it_were_alone(
    new_system: System, database_kind: str, texts: list[str], alone: tuple[Scores, list[int]], tmp_path: Path
) -> None:
    # Given a worker on a new database
    system = new_system
    system.start_worker()

    # When someone else's program submits 2,000 comments with nothing but Celery, or on SQLite those that are checked
    checked, file = CHECKED, COMMENTS_CSV
    if database_kind == "sqlite":
        texts, checked, file = texts[CHECKED], slice(None), tmp_path / "checked.csv"
        write_comments(file, texts)
    produced = subprocess.run(
        [sys.executable, plain_producer.__file__, system.broker_url, file],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    ids = produced.stdout.split()
    system.wait_for_decisions(ids)

    # Then there is one decision for each, with the comment's own text
    decisions = {row.submission_id: row for row in system.decisions()}
    assert len(decisions) == system.count_decisions() == len(texts)
    rows = [decisions[submission_id] for submission_id in ids]
    assert [row.text for row in rows] == texts
    # And its scores are those of the same text alone
    scores, windows = alone
    assert np.abs(np.array([list(row.scores.values()) for row in rows[checked]]) - scores).max() <= 1e-5
    assert [row.windows for row in rows[checked]] == windows
    # And the action is what the policy makes of them
    policy = read_policy(load_settings({}).policy_file)
    for row in rows:
        verdict = policy.decide(row.community, list(row.scores.values()))
        assert (row.action, row.fired_label, row.fired_threshold) == (verdict.action, verdict.label, verdict.threshold)
    # And nothing is left behind
    system.wait_until_nothing_is_left()
    assert system.client.dead_letters() == []


def test_a_threat_at_the_end_of_a_long_text_is_found(new_system: System) -> None:
    # Given a worker, and 3,000 harmless words
    system = new_system
    system.start_worker()
    sentence = "the engineers said in the town hall how the new railway bridge and both tunnels would be built "
    harmless = sentence * 170
    assert len(harmless.split()) > 3_000
    # When they are submitted alone, and with a threat behind them
    quiet, loud = system.client.submit_many([harmless, f"{harmless} I will find you and kill you."])
    system.wait_for_decisions([quiet, loud])
    # Then the threat is found, in the last of many windows
    decisions = {row.submission_id: row for row in system.decisions()}
    assert decisions[quiet].action == "allow"
    assert decisions[loud].action != "allow"
    assert decisions[loud].threat > 0.2 > 10 * decisions[quiet].threat
    assert decisions[loud].windows > 10
    # And a text of which nothing was left out says so
    assert not decisions[loud].truncated
