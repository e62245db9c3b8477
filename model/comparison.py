"""What would change if one version decided in place of another: the same comments, scored by both, under one policy.

Pure; whoever calls scores them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from config.names import LABELS, Action
from config.policy import STRICTNESS, Policy
from model.engine import Scores


@dataclass(frozen=True, slots=True)
class Growth:
    """How often an action is taken by either version."""

    action: Action
    before: int
    after: int

    @property
    def relative(self) -> float | None:
        """Of the growth, as a share of `before`; None where that is 0."""
        return (self.after - self.before) / self.before if self.before else None


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one comment."""

    index: int
    """Of the comment, as it was given."""
    before: Action
    after: Action
    label: str
    """Whose score moves furthest."""
    score_before: float
    score_after: float


@dataclass(frozen=True, slots=True)
class DecisionChanges:
    """The decisions of two versions, side by side."""

    compared: int
    actions: dict[Action, dict[Action, int]]
    """How many: the first version's action → the second's; only what occurs."""
    growth: list[Growth]
    """Of each action, the mildest first."""
    mean_differences: dict[str, float]
    """Mean absolute difference of each label's scores; empty where nothing was compared, as the next."""
    largest: dict[str, Change]
    """Of each label: the comment whose score moves furthest."""
    most_changed: list[Change]
    """Comments whose action changes, the largest step first, and then those whose scores do."""

    @property
    def changed(self) -> int:
        """How many actions would be others."""
        return sum(count for before, row in self.actions.items() for after, count in row.items() if before != after)


def compare_decisions(
    communities: Sequence[str],
    before: Scores,
    after: Scores,
    policy: Policy,
    *,
    truncated: Sequence[bool],
    most: int,
) -> DecisionChanges:
    """Let a policy decide both versions' scores, (comments, 6), of the same comments.

    Args:
        communities: of each comment.
        truncated: whether only the beginning of each was read.
        most: comments in `most_changed`.
    """
    apart = abs(after - before)

    def decide(scores: Scores) -> list[Action]:
        return [
            policy.decide(community, row, truncated=cut).action
            for community, cut, row in zip(communities, truncated, scores.tolist(), strict=True)
        ]

    old, new = decide(before), decide(after)

    def change(index: int, column: int) -> Change:
        scores = float(before[index, column]), float(after[index, column])
        return Change(index, old[index], new[index], LABELS[column], *scores)

    def step(index: int) -> tuple[int, float]:
        return abs(STRICTNESS[new[index]] - STRICTNESS[old[index]]), float(apart[index].max())

    pairs = Counter(zip(old, new, strict=True))
    moved = [index for index in range(len(old)) if apart[index].any()]
    moved.sort(key=step, reverse=True)
    furthest = enumerate(apart.argmax(axis=0).tolist()) if len(old) else ()
    return DecisionChanges(
        compared=len(old),
        actions={a: {b: pairs[a, b] for b in Action if (a, b) in pairs} for a in Action if a in old},
        growth=[Growth(action, old.count(action), new.count(action)) for action in Action],
        mean_differences=dict(zip(LABELS, apart.mean(axis=0).tolist(), strict=True)) if len(old) else {},
        largest={LABELS[column]: change(index, column) for column, index in furthest},
        most_changed=[change(index, int(apart[index].argmax())) for index in moved[:most]],
    )
