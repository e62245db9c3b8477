"""What would change under another policy: rule by rule, and on stored scores, against the policy's own word on each."""

from collections import Counter
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from config.names import LABELS, Action
from config.policy import Verdict, parse_policy
from model.replay import Replay, RuleChange, changed, rule_changes, total
from tests.unit.test_config_policy import COMMUNITIES, POLICIES, SCORES

Rows = list[tuple[Any, ...]]

OLD = parse_policy("communities: {default: {toxic: {hide: 0.5}}, news: {toxic: {}}, kids: {threat: {remove: 0.1}}}")


@st.composite
def _rows(draw: st.DrawFn) -> Rows:
    """Decisions as the database gives them."""
    actions = st.sampled_from(list(Action))
    row = st.tuples(COMMUNITIES, actions, st.sampled_from(["p1", "p2"]), st.booleans(), SCORES)
    decided = draw(st.lists(row, max_size=40))
    return [
        (f"s{n}", community, action.value, None, None, version, truncated, *scores)
        for n, (community, action, version, truncated, scores) in enumerate(decided)
    ]


@given(POLICIES, _rows(), st.integers(1, 7), st.integers(0, 3))
def test_a_replay_counts_what_the_policy_says_of_each(
    policy: dict[str, Any], rows: Rows, chunk: int, most: int
) -> None:
    # Given any policy, and decisions that come in chunks
    parsed = parse_policy(yaml.safe_dump({"communities": policy}))

    def verdict(row: tuple[Any, ...]) -> Verdict:
        return parsed.decide(row[1], row[7:], truncated=row[6])

    found = Replay(parsed, most)
    for start in range(0, len(rows), chunk):
        found.add(rows[start : start + chunk])
    # Then each is counted as the policy would have decided it, by community
    expected = Counter((row[1], Action(row[2]), verdict(row).action) for row in rows)
    counted = {
        (community, before, after): count
        for community, matrix in found.by_community.items()
        for before, row in matrix.items()
        for after, count in row.items()
    }
    assert counted == dict(expected)
    assert total(found.matrix) == len(rows)
    assert changed(found.matrix) == sum(count for (_, a, b), count in expected.items() if a != b)
    assert found.decided_by == Counter(row[5] for row in rows)
    shares = [changed(matrix) for matrix in found.by_community.values()]
    assert shares == sorted(shares, reverse=True)
    # And of each change the first ones are kept, with the policy's verdict
    for (before, after), kept in found.examples.items():
        wanted = [row for row in rows if row[2] == before and verdict(row).action == after]
        assert [each.submission_id for each in kept] == [row[0] for row in wanted[:most]]
        assert [each.after for each in kept] == [verdict(row) for row in wanted[:most]]


def test_an_example_names_both_rules_and_the_scores() -> None:
    found = Replay(OLD, 1)
    found.add([("a", "kids", "hide", "toxic", 0.2, "p", False, 0.3, 0, 0, 0.1, 0, 0)])
    [[example]] = found.examples.values()
    assert example.before == Verdict(Action.HIDE, "toxic", 0.2)
    assert example.after == Verdict(Action.REMOVE, "threat", 0.1)
    assert example.scores == dict(zip(LABELS, [0.3, 0, 0, 0.1, 0, 0], strict=True))


def test_what_differs_is_named_once_for_all_that_share_it() -> None:
    # Given a stricter default, a community that is no longer named, and one that is new
    new = parse_policy(
        "communities: {default: {toxic: {hide: 0.4}}, news: {toxic: {}}, blog: {inherits: news, insult: {review: 0.5}}}"
    )
    changes = rule_changes(OLD, new)
    # Then the default's change holds for whom it reaches, also those that only one of both names
    assert changes == [
        RuleChange(["default", "kids"], "toxic", {Action.HIDE: 0.5}, {Action.HIDE: 0.4}),
        RuleChange(["kids"], "threat", {Action.REMOVE: 0.1}, {}),
        RuleChange(["blog"], "toxic", {Action.HIDE: 0.5}, {}),
        RuleChange(["blog"], "insult", {}, {Action.REVIEW: 0.5}),
    ]
    # And nothing where only the words differ
    assert rule_changes(OLD, parse_policy(f"# the same\n{OLD.text}")) == []
