"""What has moved since yesterday: the SQL, on both databases."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from config.drift import score_histogram
from config.names import LABELS
from db import queries
from db.drift import Drift, measure_drift
from db.queries import record_decisions
from db.session import reading, writing
from tests.integration.rows import NOON, prepare, scored

HIGH: dict[str, Any] = dict.fromkeys(LABELS, 0.3)
LOW: dict[str, Any] = dict.fromkeys(LABELS, 0.0005)
ENOUGH = 500


def drift(engine: Engine, **bounds: int) -> Drift:
    with reading(engine) as connection:
        found = measure_drift(connection, now=NOON, **bounds)
    assert found is not None
    return found


def decide(engine: Engine, name: str, hours_ago: float, count: int = ENOUGH, **changes: Any) -> None:
    """So many decisions, a second after each other, the newest so many hours before noon."""
    newest = NOON - timedelta(hours=hours_ago)
    with writing(engine) as connection:
        record_decisions(
            connection,
            [
                scored(f"{name} {number}", decided_at=newest - timedelta(seconds=number), **changes)
                for number in range(count)
            ],
        )


@pytest.fixture
def active(engine: Engine) -> Engine:
    """A database where v1 is active, whose held-out rows scored high, and v2 registered."""
    with writing(engine) as connection:
        prepare(connection, "v2")
        held_out = score_histogram([[0.3] * len(LABELS)] * ENOUGH)
        manifest = {"version": "v1", "parent": None, "metrics": {"score_histogram": held_out}}
        queries.register_version(connection, manifest, NOON)
        queries.activate(
            connection, instead_of=queries.active(connection), version="v1", by="me", reason="first", now=NOON
        )
    return engine


def test_nothing_is_said_without_a_version_or_with_too_few_decisions(engine: Engine) -> None:
    # Given an empty database, then a version whose manifest has no histogram, with a decision
    with reading(engine) as connection:
        assert measure_drift(connection, now=NOON) is None
    with writing(engine) as connection:
        prepare(connection, "v1")
        queries.activate(
            connection, instead_of=queries.active(connection), version="v1", by="me", reason="first", now=NOON
        )
    decide(engine, "one", hours_ago=1, count=1)
    # Then the shares are there, and no distance
    found = drift(engine)
    assert (found.decisions, found.action_shares, found.action_shares_before) == (1, {"allow": 1.0}, {})
    assert found.psi_held_out is None and found.psi_before is None
    assert (found.reviewed, found.overturned_share) == (0, None)


def test_scores_are_compared_with_the_held_out_rows_and_with_yesterday(active: Engine) -> None:
    # Given decisions of the active version: high today, low yesterday; and others that are not its own, or older
    decide(active, "today", 1, **HIGH, action="hide")
    decide(active, "yesterday", 25, **LOW)
    decide(active, "another version's", 2, **LOW, model_version="v2", action="hide")
    decide(active, "long ago", 49, **HIGH)

    # Then today's equal the held-out rows' and differ from yesterday's, whatever the others say
    found = drift(active)
    assert found.psi_held_out is not None and found.psi_before is not None
    assert found.psi_held_out == dict.fromkeys(LABELS, 0)
    assert set(found.psi_before) == set(LABELS)
    assert min(found.psi_before.values()) > 1
    # And the shares are those of all decisions of each day
    assert (found.decisions, found.decisions_before) == (2 * ENOUGH, ENOUGH)
    assert found.action_shares == {"hide": 1.0}
    assert found.action_shares_before == {"allow": 1.0}


def test_only_the_newest_rows_are_looked_at(active: Engine) -> None:
    # Given high scores today, and then as many low ones
    decide(active, "first", 2, **HIGH)
    decide(active, "last", 1, **LOW)
    # When no more are looked at than the last ones
    found = drift(active, most=ENOUGH)
    # Then these alone are compared
    assert found.decisions == ENOUGH
    assert found.psi_held_out is not None
    assert min(found.psi_held_out.values()) > 1
    mixed = drift(active).psi_held_out
    assert mixed is not None
    assert 0 < mixed["toxic"] < found.psi_held_out["toxic"]


def test_the_newest_review_of_each_submission_says_whether_it_was_overturned(active: Engine) -> None:
    # Given reviews of today that confirm, overturn, and change their mind; and one of two days ago
    decide(active, "d", 30, count=5)
    words = [("d 0", "allow", 1), ("d 1", "hide", 1), ("d 2", "hide", 2), ("d 2", "allow", 1), ("d 3", "remove", 3)]
    with writing(active) as connection:
        for submission_id, action, hours_ago in [("d 4", "remove", 48), *words]:
            queries.add_review(
                connection,
                submission_id=submission_id,
                action=action,
                labels={},
                reviewer="ada",
                note=None,
                now=NOON - timedelta(hours=hours_ago),
            )
    found = drift(active)
    assert (found.reviewed, found.overturned, found.overturned_share) == (4, 2, 0.5)
    # And where fewer are looked at, the newest ones
    assert (drift(active, most=1).reviewed, drift(active, most=1).overturned) == (1, 1)
