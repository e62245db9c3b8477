"""How good a version is on held-out rows: per label and over all, with intervals, and where it is worse."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from config.names import LABELS
from model.engine import Scorer, Scores
from trainer.dataset import Dataset
from trainer.metrics import FIGURES, SEED, Predictions, bootstrap, figures, intervals

DEFAULT_THRESHOLD = 0.5
RELIABILITY_BINS = 15
DECIMALS = 6
"""Of figures in the manifest; more would only be digits."""

Intervals = dict[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class LabelMetrics:
    """Figures of one label over the rows where it is known; None where only one class is there."""

    positives: int
    negatives: int
    roc_auc: float | None
    """How well the scores order the comments, whatever their values."""
    average_precision: float | None
    log_loss: float | None
    """How far the scores are from the truth as probabilities: what a policy's thresholds stand on."""
    threshold: float = DEFAULT_THRESHOLD
    """Scores at or above it count as positive in what follows."""
    accuracy: float | None = None
    precision: float | None = None
    """None also where no score reaches the threshold."""
    recall: float | None = None
    f1: float | None = None
    confusion: dict[str, int] = field(default_factory=dict)
    """Rows by truth and prediction: tn, fp, fn, tp."""
    ece: float | None = None
    """Expected calibration error over the bins of `reliability`."""
    reliability: list[dict[str, float]] = field(default_factory=list)
    """Bins of (nearly) as many rows each, by ascending score: mean_score, share_positive, rows."""
    intervals: Intervals = field(default_factory=dict)
    """Of each figure above but the ECE: the 95 % percentile interval over resamples of the rows."""
    resamples: int = 0
    """Resamples that hold both classes; the intervals are over these alone."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of one version on one held-out set, and the scores they are figures of."""

    rows: int
    dataset_sha256: str
    labels: dict[str, LabelMetrics]
    micro: dict[str, Any] = field(default_factory=dict)
    """Figures over all known labels of all rows taken together, with their intervals."""
    macro: dict[str, Any] = field(default_factory=dict)
    """Means of the labels' figures, with their intervals."""
    slices: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: figures of some of the rows."""
    identities: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By group: what the toxic scores do where it is mentioned."""
    robustness: dict[str, Any] = field(default_factory=dict)
    """By evasion: ROC-AUC of rows that are written so, beside the same rows as they were."""
    scores: Scores = field(default_factory=lambda: _no_rows(), compare=False, repr=False)
    """(rows, 6)"""
    truth: NDArray[np.float32] = field(default_factory=lambda: _no_rows(), compare=False, repr=False)
    """(rows, 6), NaN where unknown."""
    mentions: dict[str, NDArray[np.bool_]] = field(default_factory=dict, compare=False, repr=False)
    """By group of `identities`: whether each row's text mentions it, (rows,)."""
    evaded_rows: NDArray[np.int64] = field(
        default_factory=lambda: np.empty(0, dtype=np.int64), compare=False, repr=False
    )
    """The rows that `robustness` is measured on, (n,)."""
    evaded_scores: dict[str, Scores] = field(default_factory=dict, compare=False, repr=False)
    """By evasion: the scores of those rows when they are written so, (n, 6)."""

    @property
    def mean_roc_auc(self) -> float | None:
        """Over the labels that have one."""
        return _mean([metrics.roc_auc for metrics in self.labels.values()])

    def as_dict(self) -> dict[str, Any]:
        """For the manifest and the run's row: JSON-ready, without the arrays."""
        return _rounded(
            {
                "rows": self.rows,
                "dataset_sha256": self.dataset_sha256,
                "mean_roc_auc": self.mean_roc_auc,
                "mean_roc_auc_interval": self.macro.get("intervals", {}).get("roc_auc"),
                "labels": {label: asdict(metrics) for label, metrics in self.labels.items()},
                "micro": self.micro,
                "macro": self.macro,
                "slices": self.slices,
                "identities": self.identities,
                "robustness": self.robustness,
            }
        )


def evaluate(scorer: Scorer, holdout: Dataset, *, seed: int = SEED) -> Evaluation:
    """Score the held-out texts as the version would in service, and measure."""
    return measure(scorer.score_texts(holdout.texts), holdout, thresholds=scorer.manifest.thresholds, seed=seed)


def measure(
    scores: Scores, holdout: Dataset, *, thresholds: Mapping[str, Any] | None = None, seed: int = SEED
) -> Evaluation:
    """Figures of given scores, (rows, 6), against the held-out labels.

    Args:
        thresholds: the version's advice as its manifest keeps it; labels without any are judged at 0.5.
        seed: of the resamples, which are of whole rows and the same for every label.
    """
    thresholds = {label: threshold_of(thresholds or {}, label) for label in LABELS}
    values, known, truth = scores.astype(np.float64), ~np.isnan(holdout.labels), holdout.labels >= 0.5
    positive = values >= list(thresholds.values())
    parts = {
        label: Predictions(rows, values[rows, i], truth[rows, i], positive[rows, i])
        for i, label in enumerate(LABELS)
        for rows in [np.flatnonzero(known[:, i])]
    }
    pooled = Predictions(np.nonzero(known)[0], values[known], truth[known], positive[known])
    both = {name: part for name, part in (parts | {"micro": pooled}).items() if part.of_both_classes}
    resampled = bootstrap(both, len(holdout), seed=seed) if both else {}
    labels = {label: _label_metrics(part, thresholds[label], resampled.get(label, {})) for label, part in parts.items()}
    judged = [label for label in LABELS if label in resampled]
    macro = {figure: _mean([getattr(labels[label], figure) for label in judged]) for figure in FIGURES}
    # A resample in which a label has no figure has no mean either: it would be one over other labels.
    means = {figure: np.mean([resampled[label][figure] for label in judged], axis=0) for figure in FIGURES if judged}
    return Evaluation(
        rows=len(holdout),
        dataset_sha256=holdout.sha256,
        labels=labels,
        micro={**figures(pooled), "intervals": intervals(resampled.get("micro", {}))},
        macro={**macro, "intervals": intervals(means)},
        scores=scores,
        truth=holdout.labels,
    )


def threshold_of(thresholds: Mapping[str, Any], label: str) -> float:
    """Where a label counts as positive: the advised threshold of best F1, or 0.5 where there is no advice."""
    advice = (thresholds.get(label) or {}).get("best_f1")
    return float(advice["threshold"]) if advice else DEFAULT_THRESHOLD


def reliability(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> tuple[float, list[dict[str, float]]]:
    """The expected calibration error, and the bins of equally many rows that it is taken over."""
    order = np.argsort(scores, kind="stable")
    bins = [
        {"mean_score": float(scores[rows].mean()), "share_positive": float(truth[rows].mean()), "rows": len(rows)}
        for rows in np.array_split(order, min(RELIABILITY_BINS, len(order)))
    ]
    error = sum(each["rows"] * abs(each["mean_score"] - each["share_positive"]) for each in bins) / len(order)
    return error, bins


def _label_metrics(part: Predictions, threshold: float, resampled: Mapping[str, NDArray[np.float64]]) -> LabelMetrics:
    positives = int(part.truth.sum())
    metrics = LabelMetrics(positives, len(part.truth) - positives, **figures(part), threshold=threshold)
    if not part.of_both_classes:
        return metrics
    ece, bins = reliability(part.scores, part.truth)
    confusion = confusion_matrix(part.truth, part.positive, labels=[False, True]).ravel().tolist()
    return replace(
        metrics,
        confusion=dict(zip(("tn", "fp", "fn", "tp"), confusion, strict=True)),
        ece=ece,
        reliability=bins,
        intervals=intervals(resampled),
        resamples=int((~np.isnan(resampled["roc_auc"])).sum()),
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _no_rows() -> NDArray[np.float32]:
    return np.empty((0, len(LABELS)), dtype=np.float32)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DECIMALS)
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
