"""What changes where one version decides in place of another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from config.names import LABELS, Action
from config.policy import parse_policy
from model.comparison import Growth, compare_decisions
from model.engine import Scores

POLICY = parse_policy("communities: {default: {toxic: {label: 0.5, hide: 0.9}}, strict: {toxic: {remove: 0.5}}}")

any_scores = st.integers(0, 12).flatmap(
    lambda rows: st.tuples(*2 * [arrays(np.float32, (rows, 6), elements=st.floats(0, 1, width=32))])
)


def toxic(*scores: float) -> Scores:
    """Scores of comments that differ in one label."""
    rows = np.zeros((len(scores), 6), dtype=np.float32)
    rows[:, 0] = scores
    return rows


def test_two_versions_side_by_side() -> None:
    # Given four comments, the last in a stricter community
    before, after = toxic(0.1, 0.6, 0.6, 0.4), toxic(0.2, 0.6, 0.95, 0.5)
    after[1, 4] = 0.3
    communities = ["default", "default", "elsewhere", "strict"]
    found = compare_decisions(communities, before, after, POLICY, truncated=[False] * 4, most=3)
    # Then the actions of both are counted against each other
    assert (found.compared, found.changed) == (4, 2)
    assert found.actions == {
        Action.ALLOW: {Action.ALLOW: 1, Action.REMOVE: 1},
        Action.LABEL: {Action.LABEL: 1, Action.HIDE: 1},
    }
    growth = {each.action: (each.before, each.after, each.relative) for each in found.growth}
    assert growth == {
        Action.ALLOW: (2, 1, -0.5),
        Action.LABEL: (2, 1, -0.5),
        Action.REVIEW: (0, 0, None),
        Action.HIDE: (0, 1, None),
        Action.REMOVE: (0, 1, None),
    }
    # And the comments are told that change most: by steps of the action, then by how far a score moves
    assert [(each.index, each.before, each.after, each.label) for each in found.most_changed] == [
        (3, Action.ALLOW, Action.REMOVE, "toxic"),
        (2, Action.LABEL, Action.HIDE, "toxic"),
        (1, Action.LABEL, Action.LABEL, "insult"),
    ]
    furthest = found.largest["toxic"]
    assert (furthest.index, furthest.score_before, furthest.score_after) == (2, before[2, 0], after[2, 0])
    assert found.mean_differences["toxic"] == pytest.approx((0.1 + 0.35 + 0.1) / 4)
    assert found.mean_differences["insult"] == pytest.approx(0.3 / 4)


@given(any_scores)
def test_every_comment_is_counted_once_and_the_other_way_round_alike(scores: tuple[Scores, Scores]) -> None:
    before, after = scores
    communities, truncated = ["default"] * len(before), [False] * len(before)
    found = compare_decisions(communities, before, after, POLICY, truncated=truncated, most=100)
    back = compare_decisions(communities, after, before, POLICY, truncated=truncated, most=100)
    assert sum(sum(row.values()) for row in found.actions.values()) == found.compared == len(before)
    assert back.growth == [Growth(each.action, each.after, each.before) for each in found.growth]
    assert back.changed == found.changed <= len(found.most_changed)
    assert back.mean_differences == found.mean_differences
    assert [each.index for each in back.most_changed] == [each.index for each in found.most_changed]
    assert list(found.largest) == (list(LABELS) if len(before) else [])


def test_a_version_beside_itself_changes_nothing() -> None:
    found = compare_decisions(["default"], toxic(0.7), toxic(0.7), POLICY, truncated=[False], most=5)
    assert (found.changed, found.most_changed) == (0, [])
    # And of which only the beginning was read, that is reviewed at least
    [cut] = compare_decisions(["default"], toxic(0.1), toxic(0.99), POLICY, truncated=[True], most=1).most_changed
    assert (cut.before, cut.after) == (Action.REVIEW, Action.HIDE)
