"""How good a version is on held-out rows, per label."""

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from config.names import LABELS
from model.engine import Scorer, Scores
from trainer.dataset import Dataset


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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of one version on one held-out set."""

    rows: int
    dataset_sha256: str
    labels: dict[str, LabelMetrics]

    @property
    def mean_roc_auc(self) -> float | None:
        """Over the labels that have one."""
        known = [metrics.roc_auc for metrics in self.labels.values() if metrics.roc_auc is not None]
        return float(np.mean(known)) if known else None

    def as_dict(self) -> dict[str, Any]:
        """For the manifest and the run's row."""
        return {**asdict(self), "mean_roc_auc": self.mean_roc_auc}


def evaluate(scorer: Scorer, holdout: Dataset) -> Evaluation:
    """Score the held-out texts as the version would in service, and measure."""
    return measure(scorer.score_texts(holdout.texts), holdout)


def measure(scores: Scores, holdout: Dataset) -> Evaluation:
    """Figures of given scores, (rows, 6), against the held-out labels."""
    labels = {label: _label_metrics(scores[:, i], holdout.labels[:, i]) for i, label in enumerate(LABELS)}
    return Evaluation(len(holdout), holdout.sha256, labels)


def _label_metrics(scores: np.ndarray, labels: np.ndarray) -> LabelMetrics:
    known = ~np.isnan(labels)
    truth, predicted = labels[known], scores[known]
    positives, negatives = int((truth == 1).sum()), int((truth == 0).sum())
    if not positives or not negatives:
        return LabelMetrics(positives, negatives, None, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an undefined figure must not pass as a number
        return LabelMetrics(
            positives,
            negatives,
            float(roc_auc_score(truth, predicted)),
            float(average_precision_score(truth, predicted)),
            float(log_loss(truth, predicted.astype(np.float64))),
        )
