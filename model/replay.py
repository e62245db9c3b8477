"""What would change if one policy decided in place of another: rule by rule, and on scores that are stored.

Pure, and without a model: a decision's scores stay what they are whichever policy decides.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.names import DEFAULT_COMMUNITY, LABELS, Action
from config.policy import STRICTNESS, Policy, Rules, Verdict

ACTIONS = tuple(Action)
"""By their strictness."""
RANK = {action.value: rank for action, rank in STRICTNESS.items()}
PAIRS = len(ACTIONS) ** 2

Matrix = dict[Action, dict[Action, int]]
"""How many decisions: action taken → action that would be; only what occurs, the mildest first."""


@dataclass(frozen=True, slots=True)
class RuleChange:
    """A label whose rules differ between two policies, for the communities to which that happens."""

    communities: list[str]
    """Those that either policy names; "default" stands for all that neither does."""
    label: str
    before: dict[Action, float]
    """Thresholds by action, the mildest first; empty where nothing follows from the label."""
    after: dict[Action, float]


def rule_changes(before: Policy, after: Policy) -> list[RuleChange]:
    """What differs, inheritance and default taken into account, in the order of the policies and of `LABELS`."""
    named = dict.fromkeys([DEFAULT_COMMUNITY, *before.communities, *after.communities])
    found: dict[tuple[str, Any, Any], list[str]] = defaultdict(list)
    for community in named:
        old, new = before.rules(community), after.rules(community)
        for label in LABELS:
            if old[label] != new[label]:
                found[label, old[label], new[label]].append(community)
    return [
        RuleChange(communities, label, *({action: at for at, action in rules} for rules in both))
        for (label, *both), communities in found.items()
    ]


@dataclass(frozen=True, slots=True)
class Example:
    """A decision that would be another."""

    submission_id: str
    community: str
    before: Verdict
    """What was done, and by which rule."""
    after: Verdict
    scores: dict[str, float]


class Replay:
    """Lets a policy decide stored scores, chunk by chunk, and counts what would be done instead.

    What it keeps grows with communities and examples, never with decisions.
    """

    def __init__(self, policy: Policy, examples: int) -> None:
        """Prepare.

        Args:
            examples: kept of each change from one action to another: the first ones given.
        """
        self._policy = policy
        self._most = examples
        self._communities: dict[str, int] = {}
        self._rules_of: list[int] = []
        """Of each community, by its number, the number of its rules among `_rules`."""
        self._rules: list[Rules] = []
        self._numbers: dict[int, int] = {}
        """Of rules, by their ids, the number in `_rules`."""
        self._counts: Counter[int] = Counter()
        """Decisions, by community, action before and action after in one number."""
        self.decided_by: Counter[str] = Counter()
        """Decisions, by the policy that made them."""
        self._examples: dict[int, list[Example]] = defaultdict(list)
        """By the number of the change."""

    def add(self, rows: Sequence[Sequence[Any]]) -> None:
        """Take in decisions as `db.policies.scored` streams them."""
        _, communities, actions, _, _, policy_versions, truncated, *scores = zip(*rows, strict=True)
        self.decided_by.update(policy_versions)
        community = np.array([self._number(name) for name in communities])
        by_label = np.array(scores, dtype=np.float64)
        before = np.array([RANK[action] for action in actions])
        # As `Policy.decide` has it: a text of which only the beginning was read is never allowed on that alone.
        after = np.where(truncated, STRICTNESS[Action.REVIEW], 0)
        rules = np.array(self._rules_of)[community]
        for number in np.unique(rules):
            of_these = rules == number
            after[of_these] = np.maximum(after[of_these], _strictest(self._rules[number], by_label[:, of_these]))
        pairs = before * len(ACTIONS) + after
        for code, count in zip(*np.unique(community * PAIRS + pairs, return_counts=True), strict=True):
            self._counts[int(code)] += int(count)
        for pair in np.unique(pairs[before != after]):
            kept = self._examples[int(pair)]
            places = np.nonzero(pairs == pair)[0][: self._most - len(kept)]
            kept += [self._example(rows[place]) for place in places.tolist()]

    @property
    def examples(self) -> dict[tuple[Action, Action], list[Example]]:
        """By the action taken and the one that would be, in the order of strictness."""
        return {_change(pair): self._examples[pair] for pair in sorted(self._examples)}

    @property
    def matrix(self) -> Matrix:
        """Of all communities together."""
        return _matrix(self._counts.items())

    @property
    def by_community(self) -> dict[str, Matrix]:
        """Of each community that has decisions, the one with most changes first."""
        found: dict[int, dict[int, int]] = defaultdict(dict)
        for code, count in self._counts.items():
            found[code // PAIRS][code % PAIRS] = count
        names = list(self._communities)
        matrices = {names[number]: _matrix(counts.items()) for number, counts in found.items()}
        return dict(sorted(matrices.items(), key=lambda each: -changed(each[1])))

    def _example(self, row: Sequence[Any]) -> Example:
        submission_id, community, action, label, threshold, _, truncated, *scores = row
        was = Verdict(Action(action), label, threshold)
        would_be = self._policy.decide(community, scores, truncated=truncated)
        return Example(submission_id, community, was, would_be, dict(zip(LABELS, scores, strict=True)))

    def _number(self, community: str) -> int:
        number = self._communities.get(community)
        if number is None:
            number = self._communities[community] = len(self._communities)
            rules = self._policy.rules(community)
            # One for all that default judges: they share its rules.
            self._rules_of.append(self._numbers.setdefault(id(rules), len(self._rules)))
            if self._rules_of[-1] == len(self._rules):
                self._rules.append(rules)
        return number


def total(matrix: Matrix) -> int:
    """Decisions in it."""
    return sum(count for row in matrix.values() for count in row.values())


def changed(matrix: Matrix) -> int:
    """Those of them whose action would be another."""
    return sum(count for before, row in matrix.items() for after, count in row.items() if before != after)


def _change(pair: int) -> tuple[Action, Action]:
    before, after = divmod(int(pair), len(ACTIONS))
    return ACTIONS[before], ACTIONS[after]


def _strictest(rules: Rules, scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """What `Policy.decide` says of many, as ranks of strictness; scores are (6, decisions)."""
    ranks = np.zeros(scores.shape[1], dtype=np.int64)
    for column, label in zip(scores, LABELS, strict=True):
        for threshold, action in rules[label]:
            np.maximum(ranks, np.where(column >= threshold, STRICTNESS[action], 0), out=ranks)
    return ranks


def _matrix(counts: Iterable[tuple[int, int]]) -> Matrix:
    """Of counts by code, whatever community the code is of."""
    pairs: Counter[int] = Counter()
    for code, count in counts:
        pairs[code % PAIRS] += count
    matrix: Matrix = {}
    for pair in sorted(pairs):
        before, after = _change(pair)
        matrix.setdefault(before, {})[after] = pairs[pair]
    return matrix
