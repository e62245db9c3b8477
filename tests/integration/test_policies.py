"""Policies in the database: texts by their hash, which one is active, and the scores that one is tried on."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, text

from config.names import LABELS
from db import policies
from db.activations import ActiveChanged
from db.policies import NoSuchPolicy
from db.queries import record_decisions
from db.session import reading, writing
from tests.integration.rows import NOON, POLICY, POLICY_VERSION, minutes, prepare, scored
from tests.services import wait_until


def activate(engine: Engine, policy: str, number: int = 0) -> int:
    with writing(engine) as connection:
        return policies.activate(
            connection,
            policy,
            instead_of=policies.active(connection),
            by="me",
            reason=f"reason {number}",
            now=minutes(number),
        )


def version(policy: str) -> str:
    return hashlib.sha256(policy.encode()).hexdigest()


def test_a_policy_is_kept_once_under_its_hash_and_found_by_its_beginning(engine: Engine) -> None:
    # Given a policy that was stored twice, and thirty others
    others = [f"# {number}\n" for number in range(30)]
    with writing(engine) as connection:
        for each in (POLICY, POLICY, *others):
            assert policies.store(connection, each, now=NOON) == version(each)
    with reading(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM policies")).scalar_one() == 31
        # Then it is found by its hash, by enough of it, and in capitals too
        for prefix in (POLICY_VERSION, POLICY_VERSION[:12], POLICY_VERSION[:10].upper()):
            assert policies.find(connection, prefix) == (POLICY_VERSION, POLICY)
        assert policies.texts(connection, {POLICY_VERSION, "?"}) == {POLICY_VERSION: POLICY}
        # And nothing by what is no hash, is too short, or begins none
        for prefix, said in (("policy.yaml", "no hash"), ("abc", "4 or more"), ("%%%%", "no hash"), ("0000", "ever")):
            with pytest.raises(NoSuchPolicy, match=said):
                policies.find(connection, prefix)


def test_a_beginning_that_two_policies_share_names_neither(engine: Engine) -> None:
    # Given two policies whose hashes begin alike, as the first of many do
    seen: dict[str, str] = {}
    number = 0
    while (twin := seen.setdefault(version(f"# {number}\n")[:4], f"# {number}\n")) == f"# {number}\n":
        number += 1
    with writing(engine) as connection:
        for each in (twin, f"# {number}\n"):
            policies.store(connection, each, now=NOON)
        with pytest.raises(NoSuchPolicy, match="more than one"):
            policies.find(connection, version(twin)[:4])
        assert policies.find(connection, version(twin)) == (version(twin), twin)


def test_the_newest_activation_is_the_truth(engine: Engine) -> None:
    # Given a database without any activation
    with reading(engine) as connection:
        assert policies.active(connection) is None
    # When one policy is activated, then another, then that one again
    for number, policy in enumerate(["one", "two", "two"]):
        activate(engine, policy, number)
    # Then the newest is the active one, and the one before it the other
    with reading(engine) as connection:
        newest, *older = policies.activations(connection, limit=10)
        assert policies.active(connection) == newest
        assert (newest.policy_version, newest.activated_at) == (version("two"), minutes(2))
        assert (newest.activated_by, newest.reason) == ("me", "reason 2")
        assert [each.policy_version for each in older] == [version("two"), version("one")]
        assert policies.rollback_target(connection, to=None, now=NOON) == (newest, version("one"))


@pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)
def test_of_two_activations_at_the_same_time_the_second_is_refused(engine: Engine) -> None:
    waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    with ThreadPoolExecutor(1) as pool:
        # Given an activation that is not committed yet
        with writing(engine) as connection:
            first = policies.activate(
                connection, "one", instead_of=policies.active(connection), by="me", reason="first", now=NOON
            )
            # When somebody else activates another policy
            second = pool.submit(activate, engine, "two")
            # Then that one waits: else it might be seen before this one, whose number is lower
            wait_until(lambda: connection.execute(waiting).scalar_one() == 1, what="a wait for the lock")
        # And is refused, as what it saw was replaced
        with pytest.raises(ActiveChanged):
            second.result()
        with reading(engine) as connection:
            assert [row.policy_activation_id for row in policies.activations(connection, limit=5)] == [first]


def record(engine: Engine, *rows: Any) -> None:
    with writing(engine) as connection:
        prepare(connection, "v1")
        record_decisions(connection, rows)


def test_stored_scores_are_streamed_newest_first(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "SCORED_ROWS", 4)
    # Given decisions of two communities
    kept = [scored(f"s{n}", toxic=n / 10, decided_at=minutes(n)) for n in range(9)]
    rows = [replace(row, community="news") if n % 2 else row for n, row in enumerate(kept)]
    record(engine, *rows, scored("hidden", action="hide", fired_label="toxic", fired_threshold=0.05))
    with reading(engine) as connection:
        # When all are asked for, then they come in chunks, each with all that a policy looks at
        chunks = [list(chunk) for chunk in policies.scored(connection)]
        assert max(map(len, chunks)) == 4
        found = [tuple(row) for chunk in chunks for row in chunk]
        assert [row[0] for row in found[:8]] == [f"s{number}" for number in range(8, 0, -1)]
        other_scores = tuple(getattr(rows[8], label) for label in LABELS[1:])
        assert found[0] == ("s8", "default", "allow", None, None, POLICY_VERSION, False, 0.8, *other_scores)
        assert ("hidden", "default", "hide", "toxic", 0.05) in [row[:5] for row in found]
        assert policies.count_scored(connection) == len(found) == 10
        # And fewer where fewer are asked for
        wanted: dict[str, Any] = {"since": minutes(5), "community": "news"}
        [few] = policies.scored(connection, **wanted)
        assert [row[0] for row in few] == ["s7", "s5"]
        assert policies.count_scored(connection, **wanted) == 2
        assert policies.count_scored(connection, since=minutes(5)) == 4
        # And it is known who ever submitted a comment
        assert policies.known_communities(connection, ["news", "default", "kids"]) == {"news", "default"}
