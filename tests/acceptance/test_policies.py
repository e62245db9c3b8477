"""The policy changes while comments stream through two workers, and each decision names the one that made it."""

from datetime import UTC, datetime

import pytest

from config.policy import parse_policy, read_policy
from config.settings import ROOT
from db import policies
from db.session import writing
from tests.acceptance.system import TIMEOUT_S, System
from tests.services import wait_until

ALLOW, LABEL, REMOVE = (
    f"communities: {{default: {{toxic: {rules}}}}}\n" for rules in ("{}", "{label: 0.0}", "{remove: 0.0}")
)
OF_A_NEWER_RELEASE = "communities: {default: {toxic: {shadow_ban: 0.5}}}\n"


def version(text: str) -> str:
    return parse_policy(text).version


def deciding(system: System) -> dict[str, tuple[str | None, bool]]:
    """By which policy each worker decides, and whether it refused the active one."""
    pipelines = system.client.activity().pipelines
    return {node[:2]: (stats.policy_version, stats.policy_refusal is not None) for node, stats in pipelines.items()}


def wait_for_decision_by(system: System, text: str) -> None:
    newest = system.client.results(limit=50)
    wait_until(lambda: any(row.policy_version == version(text) for row in newest), TIMEOUT_S, f"a decision by {text}")


def wait_until_both(system: System, text: str, refused: bool = False) -> None:
    wanted = dict.fromkeys(("w1", "w2"), (version(text), refused))
    wait_until(lambda: deciding(system) == wanted, TIMEOUT_S, f"both workers on {text}")


@pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)
def test_a_policy_takes_over_in_the_middle_of_a_stream(system: System, texts: list[str]) -> None:
    # Given a worker that only hears of activations, one that looks every second, and comments that keep coming
    for process in [
        system.begin_worker(node="w1", app="tests.acceptance.hearing_worker"),
        system.begin_worker(node="w2", activation_poll_s="1"),
    ]:
        process.wait_until_ready()
    with system.stream(texts) as ids:
        own = read_policy(ROOT / "config" / "policy.yaml")
        wait_for_decision_by(system, own.text)
        # When a policy is activated, then both follow
        system.client.activate_policy(ALLOW, instead_of=system.client.active_policy(), by="the test", reason="first")
        wait_until_both(system, ALLOW)
        wait_for_decision_by(system, ALLOW)
        # And when one is whose broadcast is lost, then the one follows that looks
        with writing(system.database) as connection:
            policies.activate(
                connection,
                LABEL,
                instead_of=policies.active(connection),
                by="the test",
                reason="not told",
                now=datetime.now(UTC),
            )
        wait_until(lambda: deciding(system)["w2"] == (version(LABEL), False), TIMEOUT_S, "the look of w2")
        # And where one cannot be read, then both go on with what they have, and say so
        system.client.activate_policy(REMOVE, instead_of=system.client.active_policy(), by="the test", reason="third")
        wait_until_both(system, REMOVE)
        with writing(system.database) as connection:
            active = policies.active(connection)
            policies.activate(
                connection, OF_A_NEWER_RELEASE, instead_of=active, by="newer", reason="better", now=datetime.now(UTC)
            )
        system.client._tell_workers()
        wait_until_both(system, REMOVE, refused=True)
        # And after a rollback nothing is refused any more
        system.client.rollback_policy(instead_of=system.client.active_policy(), by="the test")
        wait_until_both(system, REMOVE)
        last = len(ids)
        wait_until(lambda: len(ids) > last, TIMEOUT_S, "more comments")

    # Then nothing was lost, and each decision is what the policy that it names says of it, in that one's time
    system.wait_for_decisions(ids)
    rows = system.decisions()
    assert sorted(row.submission_id for row in rows) == sorted(ids)
    known = {policy.version: policy for policy in (own, *map(parse_policy, (ALLOW, LABEL, REMOVE)))}
    # Of each the first time, which comes last.
    since = {row.policy_version: row.activated_at for row in system.client.policy_activations()}
    for row in rows:
        assert row.action == known[row.policy_version].decide(row.community, list(row.scores.values())).action
        assert row.policy_version == own.version or row.decided_at >= since[row.policy_version]
    assert {row.policy_version for row in rows} >= {own.version, version(ALLOW), version(REMOVE)}
    late = set(ids[last:])
    assert {row.policy_version for row in rows if row.submission_id in late} == {version(REMOVE)}
    system.wait_until_nothing_is_left()
