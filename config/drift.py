"""How far scores have moved: counts in fixed bins, and the population stability index of two such counts. Pure.

PSI = Σ (aᵢ − eᵢ) · ln(aᵢ / eᵢ) over the bins' shares: Kullback and Leibler's divergence, summed in both directions. Its
usual reading is that of Siddiqi, "Credit Risk Scorecards" (Wiley, 2006): below 0.1 nothing has changed, up to 0.25
something has, above that the population is another one.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from config.names import LABELS

SCORE_EDGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.95)
"""Between the bins; a score on an edge is in the bin above it. Closer near 0, where most comments' scores lie."""
BINS = len(SCORE_EDGES) + 1
MODERATE_PSI, SHIFTED_PSI = 0.1, 0.25
FEWEST_ROWS = 500
"""On either side. Of samples of one population PSI comes to (BINS − 1) · (1/n + 1/m): 0.04 with so few on both."""
SMOOTHING = 0.5
"""Added to each bin's count: an empty one would make PSI infinite."""

Counts = dict[str, list[int]]
"""Of each label's scores in each bin."""
Level = Literal["stable", "moderate", "shifted"]


def score_histogram(scores: Iterable[Sequence[float]]) -> dict[str, Any]:
    """What a manifest keeps as `metrics.score_histogram`: the distribution to hold a version's later scores against.

    Args:
        scores: (rows, 6) probabilities in the order of `LABELS`, of rows as they come in service.
    """
    counts: Counts = {label: [0] * BINS for label in LABELS}
    for row in scores:
        for label, score in zip(LABELS, row, strict=True):
            counts[label][bisect_right(SCORE_EDGES, score)] += 1
    return {"edges": list(SCORE_EDGES), "counts": counts}


def reference_counts(metrics: Mapping[str, Any]) -> Counts | None:
    """The counts in a manifest's metrics; None of a version that has none, or has them in other bins."""
    histogram = metrics.get("score_histogram") or {}
    if histogram.get("edges") != list(SCORE_EDGES):
        return None
    counts: Counts = {label: list(map(int, histogram["counts"][label])) for label in LABELS}
    return counts


def psi(expected: Sequence[int], actual: Sequence[int]) -> float | None:
    """The population stability index of two counts over the same bins; None where either is of too few rows."""
    if min(sum(expected), sum(actual)) < FEWEST_ROWS:
        return None
    shares = zip(_shares(expected), _shares(actual), strict=True)
    return sum((now - before) * math.log(now / before) for before, now in shares)


def psi_by_label(expected: Counts | None, actual: Counts) -> dict[str, float] | None:
    """The same for each label; None without enough to compare."""
    if expected is None:
        return None
    found = {label: psi(expected[label], actual[label]) for label in LABELS}
    known = {label: value for label, value in found.items() if value is not None}
    return known or None


def level(value: float) -> Level:
    """How a PSI is usually read."""
    return "stable" if value < MODERATE_PSI else "moderate" if value <= SHIFTED_PSI else "shifted"


def _shares(counts: Sequence[int]) -> list[float]:
    whole = sum(counts) + SMOOTHING * len(counts)
    return [(count + SMOOTHING) / whole for count in counts]
