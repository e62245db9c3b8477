"""Figures of scores against the truth, on the rows as they are and on many resamples of them at once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FIGURES = ("roc_auc", "average_precision", "log_loss", "accuracy", "precision", "recall", "f1")
RESAMPLES = 1000
SEED = 20261122
CONFIDENCE = 0.95
COUNTS_AT_ONCE = 1 << 19
"""Bounds the memory of a bootstrap, whatever the rows."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Scores whose truth is known; each array (n,)."""

    rows: NDArray[np.int64]
    """The row of the set that each belongs to: a resample draws whole rows."""
    scores: Floats
    truth: Bools
    positive: Bools
    """Whether the score is at or above the threshold."""

    @property
    def of_both_classes(self) -> bool:
        return 0 < self.truth.sum() < len(self.truth)


def figures(predictions: Predictions) -> dict[str, Any]:
    """`FIGURES`, each a number; None where a class is missing, and for precision where nothing is predicted."""
    if not predictions.of_both_classes:
        return dict.fromkeys(FIGURES)
    scores, truth, positive = predictions.scores, predictions.truth, predictions.positive
    precision, recall, f1, _ = precision_recall_fscore_support(truth, positive, average="binary", zero_division=np.nan)
    return {
        "roc_auc": float(roc_auc_score(truth, scores)),
        "average_precision": float(average_precision_score(truth, scores)),
        "log_loss": float(log_loss(truth, scores)),
        "accuracy": float(accuracy_score(truth, positive)),
        "precision": float(precision) if positive.any() else None,
        "recall": float(recall),
        "f1": float(f1),
    }


def roc_auc(scores: NDArray[np.floating], labels: NDArray[np.floating]) -> float | None:
    """Of the rows whose label is known; None where a class is missing."""
    known = ~np.isnan(labels)
    truth = labels[known] >= 0.5
    return None if truth.all() or not truth.any() else float(roc_auc_score(truth, scores[known]))


def resample_counts(rows: int, *, resamples: int = RESAMPLES, seed: int = SEED) -> Iterator[Floats]:
    """How often each row is drawn in each resample of as many rows, (rows, some of the resamples) at a time."""
    random = np.random.default_rng(seed)
    at_once = max(1, COUNTS_AT_ONCE // max(rows, 1))
    for start in range(0, resamples, at_once):
        drawn = [
            np.bincount(random.integers(rows, size=rows), minlength=rows)
            for _ in range(min(at_once, resamples - start))
        ]
        yield np.stack(drawn, axis=1).astype(np.float64)


def bootstrap(parts: Mapping[str, Predictions], rows: int, *, seed: int = SEED) -> dict[str, dict[str, Floats]]:
    """Each part's figures on the same resamples of the set's rows, (resamples,); see `resampled_figures`."""
    chunks = [
        {name: resampled_figures(part, counts) for name, part in parts.items()}
        for counts in resample_counts(rows, seed=seed)
    ]
    return {name: {f: np.concatenate([chunk[name][f] for chunk in chunks]) for f in FIGURES} for name in parts}


def resampled_figures(predictions: Predictions, counts: Floats) -> dict[str, Floats]:
    """What `figures` gives of each resample, (resamples,), NaN where it has none.

    The scores are sorted once for all resamples; each is then sums over its counts alone.

    Args:
        counts: how often each row of the set is drawn, whole numbers, (rows, resamples).
    """
    order = np.argsort(-predictions.scores, kind="stable")
    scores, truth, positive = predictions.scores[order], predictions.truth[order], predictions.positive[order]
    counts = counts[predictions.rows[order]]
    # Rows of equal scores are taken together: no threshold lies between them.
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    true_positives = np.cumsum(counts * truth[:, None], axis=0)[ends]
    false_positives = np.cumsum(counts, axis=0)[ends] - true_positives
    positives, negatives = true_positives[-1], false_positives[-1]
    found, passed = (np.diff(sums, axis=0, prepend=0) for sums in (true_positives, false_positives))
    precisions = true_positives / np.maximum(true_positives + false_positives, 1)  # 0 / 0 where none is drawn yet
    losses = -np.log(np.clip(np.where(truth, scores, 1 - scores), np.finfo(np.float64).eps, 1))
    total, hits, alarms = positives + negatives, (positive & truth) @ counts, (positive & ~truth) @ counts
    with np.errstate(invalid="ignore", divide="ignore"):
        values = {
            "roc_auc": (found * (negatives - false_positives + passed / 2)).sum(axis=0) / (positives * negatives),
            "average_precision": (found * precisions).sum(axis=0) / positives,
            "log_loss": losses @ counts / total,
            "accuracy": (hits + negatives - alarms) / total,
            "precision": hits / (hits + alarms),
            "recall": hits / positives,
            "f1": 2 * hits / (hits + alarms + positives),
        }
    one_class = (positives == 0) | (negatives == 0)
    return {name: np.where(one_class, np.nan, of_resamples) for name, of_resamples in values.items()}


def intervals(values: Mapping[str, Floats]) -> dict[str, tuple[float, float]]:
    """The percentile interval of each figure over the resamples that have it; figures that none has are left out."""
    tail = 50 * (1 - CONFIDENCE)
    known = {name: of_resamples[~np.isnan(of_resamples)] for name, of_resamples in values.items()}
    return {
        name: (float(low), float(high))
        for name, of_resamples in known.items()
        if of_resamples.size
        for low, high in [np.percentile(of_resamples, (tail, 100 - tail))]
    }
