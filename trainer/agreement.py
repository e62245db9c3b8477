"""What reviewers say of a text, made one: labels by a weighted vote, and how much the row counts in training. Pure.

A reviewer's reliability is the share of their words with which other reviewers of the same texts agree, each of whom
counts as far as they are reliable themselves, smoothed as if ten words had been compared before and eight agreed with.
A label is what the more reliable side says, and a row counts as far as its reviewers are reliable and agree.

It is the estimate of Dawid and Skene (1979) with one figure for each reviewer, in place of a table of errors, which
reviews are too few to fill.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from config.names import LABELS
from db.reviews import JudgedText, Labels

PRIOR_COMPARED, PRIOR_AGREED = 10, 8
"""What is believed of a reviewer before the first comparison."""
NEWCOMER = PRIOR_AGREED / PRIOR_COMPARED
CHANCE = 0.5
"""Reliability of one who tosses a coin."""
ROUNDS = 50
"""Of estimating each by the others: after some ten of them nothing moves that could be seen."""


@dataclass(frozen=True, slots=True)
class Reviewer:
    """How far the others agree with a reviewer."""

    name: str
    texts: int = 0
    """That they reviewed."""
    compared: int = 0
    """Their words on a label, one for each other reviewer who said something of that label too."""
    agreed: int = 0
    reliability: float = NEWCOMER

    @property
    def weight(self) -> float:
        """Of their vote: a newcomer's is 1, nobody's is more than 1.67, and none is left at chance or below it."""
        return max(0.0, (self.reliability - CHANCE) / (NEWCOMER - CHANCE))


def compare_reviewers(judged: Iterable[JudgedText]) -> list[Reviewer]:
    """Every reviewer, by name."""
    texts: Counter[str] = Counter()
    compared: defaultdict[str, Counter[str]] = defaultdict(Counter)
    agreed: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for each in judged:
        texts.update(each.said.keys())
        for (one, ones), (other, others) in combinations(each.said.items(), 2):
            for label in LABELS:
                if ones[label] is None or others[label] is None:
                    continue
                for a, b in (one, other), (other, one):
                    compared[a][b] += 1
                    agreed[a][b] += ones[label] == others[label]

    names = sorted(texts)
    reliability = dict.fromkeys(names, NEWCOMER)

    def weighted(counts: Mapping[str, int]) -> float:
        # Added up exactly, so that the order in which reviewers met makes no difference.
        return math.fsum(count * reliability[other] for other, count in counts.items())

    for _ in range(ROUNDS):
        reliability = {
            name: (PRIOR_AGREED + weighted(agreed[name])) / (PRIOR_COMPARED + weighted(compared[name]))
            for name in names
        }
    return [
        Reviewer(name, texts[name], compared[name].total(), agreed[name].total(), reliability[name]) for name in names
    ]


def agreed_labels(said: Mapping[str, Labels], weights: Mapping[str, float]) -> tuple[dict[str, bool | None], float]:
    """The labels that reviewers agree on, and the row's weight from 0 to 1.

    One newcomer alone: what they say, and 1. Two of three: their word, and a third. A tie: unknown, as a label of
    which nobody said anything. The row's weight is the mean over its known labels; 0 where none is.

    Args:
        said: by reviewer.
        weights: of every reviewer, as `Reviewer.weight`.
    """
    labels: dict[str, bool | None] = {}
    label_weights = []
    for label in LABELS:
        votes = {word: math.fsum(weights[name] for name in said if said[name][label] is word) for word in (True, False)}
        margin = abs(votes[True] - votes[False])
        if math.isclose(votes[True], votes[False]):
            labels[label] = None
            continue
        labels[label] = votes[True] > votes[False]
        label_weights.append(margin / (votes[True] + votes[False]) * min(1.0, max(votes.values())))
    return labels, math.fsum(label_weights) / len(label_weights) if label_weights else 0.0


def agreed_examples(judged: Iterable[JudgedText]) -> Iterator[tuple[str, dict[str, bool | None], float]]:
    """Each reviewed text that is still there, its labels and its weight; none where no label is agreed on."""
    judged = list(judged)
    weights = {reviewer.name: reviewer.weight for reviewer in compare_reviewers(judged)}
    for each in judged:
        labels, weight = agreed_labels(each.said, weights)
        if each.text is not None and weight:
            yield each.text, labels, weight
