"""How good a version is on held-out rows: per label and over all, with intervals, and where it is worse."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from config.names import LABELS
from model.engine import Scorer, Scores
from trainer.dataset import Dataset
from trainer.evasion import EVASIONS
from trainer.metrics import FEW_OF_A_CLASS, FIGURES, SEED, Predictions, bootstrap, figures, intervals, mean, reliability
from trainer.robustness import choose_rows, evaded_texts, robustness
from trainer.slices import (
    ANY_IDENTITY,
    BIAS_FIGURES,
    Rows,
    bias_rows,
    generalised_mean,
    mentions,
    slices,
)

DEFAULT_THRESHOLD = 0.5
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
    """By group of `trainer.slices`: what the toxic scores do where it is mentioned."""
    identity_means: dict[str, float | None] = field(default_factory=dict)
    """Generalised means of the groups' figures."""
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
        return mean([metrics.roc_auc for metrics in self.labels.values()])

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
                "identity_means": self.identity_means,
                "robustness": self.robustness,
            }
        )


def evaluate(scorer: Scorer, holdout: Dataset, *, robustness_rows: int | None = None, seed: int = SEED) -> Evaluation:
    """Score the held-out texts as the version would in service, and measure.

    Args:
        robustness_rows: how many are scored under every evasion too; 0 takes all, None leaves that out.
    """
    thresholds = scorer.manifest.thresholds
    evaluation = measure(scorer.score_texts(holdout.texts), holdout, thresholds=thresholds, seed=seed)
    if robustness_rows is None:
        return evaluation
    return measure_robustness(evaluation, scorer.score_texts, holdout, rows=robustness_rows, seed=seed)


def measure_robustness(
    evaluation: Evaluation,
    score: Callable[[list[str]], Scores],
    holdout: Dataset,
    *,
    rows: int = 0,
    seed: int = SEED,
) -> Evaluation:
    """The evaluation with what becomes of the scores when the held-out texts are written as evaders would.

    Args:
        evaluation: of these held-out rows.
        score: scores texts with the version that was evaluated.
        rows: how many are written so, the same for the same seed; 0 takes all.
    """
    chosen = choose_rows(holdout.labels, rows, seed=seed)
    texts = [holdout.texts[row] for row in chosen]
    evaded = {evasion: score(evaded_texts(texts, evasion, seed=seed)) for evasion in EVASIONS}
    return replace(
        evaluation,
        robustness=robustness(holdout.labels[chosen], evaluation.scores[chosen], evaded),
        evaded_rows=chosen,
        evaded_scores=evaded,
    )


def measure(
    scores: Scores, holdout: Dataset, *, thresholds: Mapping[str, Any] | None = None, seed: int = SEED
) -> Evaluation:
    """Figures of given scores, (rows, 6), against the held-out labels; all but the robustness, which takes a scorer.

    Args:
        thresholds: the version's advice as its manifest keeps it; labels without any are judged at 0.5.
        seed: of the resamples, which are of whole rows and the same for every figure.
    """
    rows = len(holdout)
    cuts = {label: threshold_of(thresholds or {}, label) for label in LABELS}
    values, known, truth = scores.astype(np.float64), ~np.isnan(holdout.labels), holdout.labels >= 0.5
    positive = values >= list(cuts.values())
    parts = {
        label: Predictions(of_label, values[of_label, i], truth[of_label, i], positive[of_label, i])
        for i, label in enumerate(LABELS)
        for of_label in [np.flatnonzero(known[:, i])]
    }
    pooled = Predictions(np.nonzero(known)[0], values[known], truth[known], positive[known])
    resampled = bootstrap({**parts, "micro": pooled}, rows, seed=seed)
    labels = {label: _label_metrics(part, cuts[label], resampled.get(label, {})) for label, part in parts.items()}
    macro = {figure: mean(getattr(metrics, figure) for metrics in labels.values()) for figure in FIGURES}
    # A resample in which a label has no figure has no mean either: it would be one over other labels.
    means = {
        figure: np.mean([resampled[label][figure] for label in LABELS if label in resampled], axis=0)
        for figure in (FIGURES if resampled else ())
    }
    mentioned = mentions(holdout.texts)
    toxic = LABELS.index("toxic")
    identities = _identities(parts["toxic"], truth[:, toxic], mentioned, rows, seed)
    return Evaluation(
        rows=rows,
        dataset_sha256=holdout.sha256,
        labels=labels,
        micro={**figures(pooled), "intervals": intervals(resampled.get("micro", {}))},
        macro={**macro, "intervals": intervals(means)},
        slices=_slices(parts, slices(holdout.texts), rows, seed),
        identities=identities,
        identity_means={
            figure: generalised_mean([each[figure] for group, each in identities.items() if group != ANY_IDENTITY])
            for figure in BIAS_FIGURES
        },
        scores=scores,
        truth=holdout.labels,
        mentions=mentioned,
    )


def threshold_of(thresholds: Mapping[str, Any], label: str) -> float:
    """Where a label counts as positive: the advised threshold of best F1, or 0.5 where there is no advice."""
    advice = (thresholds.get(label) or {}).get("best_f1")
    return float(advice["threshold"]) if advice else DEFAULT_THRESHOLD


def _label_metrics(part: Predictions, threshold: float, resampled: Mapping[str, NDArray[np.float64]]) -> LabelMetrics:
    positives = int(part.truth.sum())
    metrics = LabelMetrics(positives, len(part.truth) - positives, **figures(part), threshold=threshold)
    if not part.fewest_of_a_class:
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


def _slices(
    parts: Mapping[str, Predictions], chosen: Mapping[str, Rows], rows: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Figures of each slice that has rows."""
    toxic = {name: parts["toxic"].within(belongs) for name, belongs in chosen.items() if belongs.any()}
    toxic_intervals = _auc_intervals(toxic, rows, seed)
    return {
        name: {
            "rows": int(chosen[name].sum()),
            "positives": int(part.truth.sum()),
            "roc_auc": _auc(part),
            "mean_roc_auc": mean(_auc(parts[label].within(chosen[name])) for label in LABELS),
            "intervals": {"roc_auc": toxic_intervals[name]} if name in toxic_intervals else {},
        }
        for name, part in toxic.items()
    }


def _identities(
    toxic: Predictions, truth: Rows, mentioned: Mapping[str, Rows], rows: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Figures of each group that is mentioned in a row whose toxicity is known; intervals of the group of all."""
    figures_of = {}
    for group, mentioning in mentioned.items():
        parts = {figure: toxic.within(belongs) for figure, belongs in bias_rows(truth, mentioning).items()}
        subgroup = parts["subgroup_auc"]
        if len(subgroup.rows):
            figures_of[group] = {
                "rows": len(subgroup.rows),
                "positives": int(subgroup.truth.sum()),
                **{figure: _auc(part) for figure, part in parts.items()},
                "intervals": _auc_intervals(parts, rows, seed) if group == ANY_IDENTITY else {},
            }
    return figures_of


def _auc(part: Predictions) -> float | None:
    """None where a class has too few rows to say anything."""
    return figures(part)["roc_auc"] if part.fewest_of_a_class >= FEW_OF_A_CLASS else None


def _auc_intervals(parts: Mapping[str, Predictions], rows: int, seed: int) -> Intervals:
    enough = {name: part for name, part in parts.items() if part.fewest_of_a_class >= FEW_OF_A_CLASS}
    resampled = bootstrap(enough, rows, seed=seed)
    return {name: intervals(of_part)["roc_auc"] for name, of_part in resampled.items()}


def _no_rows() -> NDArray[np.float32]:
    return np.empty((0, len(LABELS)), dtype=np.float32)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DECIMALS)
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
