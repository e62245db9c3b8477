"""Figures of scores against the truth, on the rows as they are and on many resamples of them at once."""

from collections.abc import Iterable, Iterator, Mapping
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
FEW_OF_A_CLASS = 10
"""Below as many positives, or negatives, a part of a set shows chance more than the version."""
RELIABILITY_BINS = 15
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
    def fewest_of_a_class(self) -> int:
        return int(min(self.truth.sum(), (~self.truth).sum()))

    def within(self, belongs: Bools) -> "Predictions":
        """Those of some of the set's rows; `belongs` says of each row whether it is one, (rows of the set,)."""
        kept = belongs[self.rows]
        return Predictions(self.rows[kept], self.scores[kept], self.truth[kept], self.positive[kept])


def figures(predictions: Predictions) -> dict[str, Any]:
    """`FIGURES`, each a number; None where a class is missing, and for precision where nothing is predicted."""
    if not predictions.fewest_of_a_class:
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


def roc_auc(scores: NDArray[np.floating], labels: NDArray[np.floating], *, fewest_of_a_class: int = 1) -> float | None:
    """Of the rows whose label is known; None where there are fewer positives, or negatives."""
    known = ~np.isnan(labels)
    truth = labels[known] >= 0.5
    enough = min(truth.sum(), (~truth).sum()) >= fewest_of_a_class
    return float(roc_auc_score(truth, scores[known])) if enough else None


def reliability(scores: Floats, truth: Bools) -> tuple[float, list[dict[str, float]]]:
    """The expected calibration error, and the bins of equally many rows that it is taken over."""
    order = np.argsort(scores, kind="stable")
    bins = [
        {"mean_score": float(scores[rows].mean()), "share_positive": float(truth[rows].mean()), "rows": len(rows)}
        for rows in np.array_split(order, min(RELIABILITY_BINS, len(order)))
    ]
    error = sum(each["rows"] * abs(each["mean_score"] - each["share_positive"]) for each in bins) / len(order)
    return error, bins


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


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
    """Each part's figures on the same resamples of the set's rows, (resamples,); see `resampled_figures`.

    Parts that lack a class are left out.
    """
    parts = {name: part for name, part in parts.items() if part.fewest_of_a_class}
    if not parts:
        return {}
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
    is_true = predictions.truth[order]
    true_rows, false_rows = order[is_true], order[~is_true]
    true, false = counts[predictions.rows[true_rows]], counts[predictions.rows[false_rows]]
    true_scores, false_scores = predictions.scores[true_rows], predictions.scores[false_rows]
    true_up_to, false_up_to = (np.cumsum(np.vstack((np.zeros(each.shape[1]), each)), axis=0) for each in (true, false))
    positives, negatives = true_up_to[-1], false_up_to[-1]
    # At each true row's score: the rows above it, and those not below it. No threshold parts equal scores.
    false_above = false_up_to[np.searchsorted(-false_scores, -true_scores, "left")]
    false_found = false_up_to[np.searchsorted(-false_scores, -true_scores, "right")]
    true_found = true_up_to[np.searchsorted(-true_scores, -true_scores, "right")]
    outscored = (true * (negatives - (false_above + false_found) / 2)).sum(axis=0)
    precisions = (true * true_found / np.maximum(true_found + false_found, 1)).sum(axis=0)
    eps = np.finfo(np.float64).eps  # as sklearn keeps a certain error finite
    losses = -np.log(true_scores.clip(min=eps)) @ true - np.log((1 - false_scores).clip(min=eps)) @ false
    hits, alarms = predictions.positive[true_rows] @ true, predictions.positive[false_rows] @ false
    with np.errstate(invalid="ignore", divide="ignore"):
        values = {
            "roc_auc": outscored / (positives * negatives),
            "average_precision": precisions / positives,
            "log_loss": losses / (positives + negatives),
            "accuracy": (hits + negatives - alarms) / (positives + negatives),
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
