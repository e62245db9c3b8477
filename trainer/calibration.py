"""Scores that are probabilities, and thresholds to put into a policy. Both are fitted on the validation rows.

A scale and a shift of each label's logit (Platt 1999; with the scale alone, the temperature of Guo et al. 2017) are
folded into the heads: every engine, the int8 form too, applies them without knowing. They change no order.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, precision_recall_curve

from config.names import LABELS
from trainer.metrics import FEW_OF_A_CLASS, reliability

if TYPE_CHECKING:
    from model.network import ToxicityNetwork  # takes seconds to import, and advice needs no torch

ROUNDED = 1e-8
"""Nearer to 1 than that, fp32 has no number but 1."""
FEWEST_PREDICTIONS = 10
"""At an advised threshold, for its precision to mean something."""


@dataclass(frozen=True, slots=True)
class LabelCalibration:
    """What is done to one label's logit, and what that does on the rows it was fitted on."""

    scale: float
    shift: float
    positives: int
    negatives: int
    log_loss_before: float | None = None
    log_loss_after: float | None = None
    ece_before: float | None = None
    ece_after: float | None = None
    note: str = ""
    """Why the logit stays as it is, where it does."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """By label."""

    labels: dict[str, LabelCalibration]

    def apply(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Calibrated logits, (rows, 6)."""
        scales, shifts = (
            np.array([getattr(self.labels[label], name) for label in LABELS]) for name in ("scale", "shift")
        )
        return logits * scales + shifts

    def fold_into(self, network: "ToxicityNetwork") -> None:
        """Make the network's heads give calibrated logits. Once only: it was fitted on the heads as they are."""
        for label, head in zip(LABELS, network.heads, strict=True):
            fitted = self.labels[label]
            head.get_parameter("weight").data.mul_(fitted.scale)
            head.get_parameter("bias").data.mul_(fitted.scale).add_(fitted.shift)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {label: asdict(fitted) for label, fitted in self.labels.items()}


def to_logits(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """The logits of scores as a `Scorer` gives them; those that fp32 rounded to 0 or 1 are taken for nearly that."""
    inside = scores.astype(np.float64).clip(ROUNDED, 1 - ROUNDED)
    return np.log(inside / (1 - inside))


def fit_calibration(logits: NDArray[np.floating], labels: NDArray[np.floating]) -> Calibration:
    """Fit each label by itself.

    Args:
        logits: of the validation rows, (rows, 6).
        labels: (rows, 6), NaN where unknown.
    """
    return Calibration({label: _fit(logits[:, i], labels[:, i]) for i, label in enumerate(LABELS)})


def _fit(logits: NDArray[np.floating], labels: NDArray[np.floating]) -> LabelCalibration:
    known = ~np.isnan(labels)
    values, truth = logits[known].astype(np.float64), labels[known] >= 0.5
    positives, negatives = int(truth.sum()), int((~truth).sum())
    unchanged = LabelCalibration(1.0, 0.0, positives, negatives)
    if min(positives, negatives) < FEW_OF_A_CLASS:
        note = f"fewer than {FEW_OF_A_CLASS} positives or negatives among the validation rows"
        return replace(unchanged, note=note)
    # Platt's targets, a little inside 0 and 1: rows that are told apart without error would make the scale endless.
    # A row with a target between is one of each class, with these weights.
    targets = np.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    regression = LogisticRegression(C=np.inf, solver="newton-cholesky").fit(
        np.concatenate([values, values])[:, None],
        np.repeat([1, 0], len(values)),
        sample_weight=np.concatenate([targets, 1 - targets]),
    )
    scale, shift = float(regression.coef_[0, 0]), float(regression.intercept_[0])
    before, after = _sigmoid(values), _sigmoid(scale * values + shift)
    loss_before, loss_after = float(log_loss(truth, before)), float(log_loss(truth, after))
    unchanged = replace(unchanged, log_loss_before=loss_before, ece_before=reliability(before, truth)[0])
    if scale <= 0:
        return replace(unchanged, note="the scores rank the validation rows no better than chance")
    if loss_after >= loss_before:
        return replace(unchanged, note="no scale and shift makes the log loss less")
    return replace(
        unchanged, scale=scale, shift=shift, log_loss_after=loss_after, ece_after=reliability(after, truth)[0]
    )


def advised_thresholds(
    scores: NDArray[np.floating], labels: NDArray[np.floating], target_precision: float
) -> dict[str, dict[str, Any]]:
    """Per label where its scores are best cut: `best_f1`, and `target_precision`, the lowest threshold that reaches it.

    Each is a threshold with precision, recall, f1 and positives; None where too few rows tell, or none reaches it.

    Args:
        scores: of the validation rows, (rows, 6).
        labels: (rows, 6), NaN where unknown.
    """
    return {label: _advice(scores[:, i], labels[:, i], target_precision) for i, label in enumerate(LABELS)}


def _advice(scores: NDArray[np.floating], labels: NDArray[np.floating], target_precision: float) -> dict[str, Any]:
    known = ~np.isnan(labels)
    values, truth = scores[known].astype(np.float64), labels[known] >= 0.5
    positives = int(truth.sum())
    if min(positives, len(truth) - positives) < FEW_OF_A_CLASS:
        return {"best_f1": None, "target_precision": None}
    precision, recall, cuts = precision_recall_curve(truth, values, drop_intermediate=False)
    precision, recall = precision[:-1], recall[:-1]  # the last stands for no prediction at all
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    predictions = len(values) - np.searchsorted(np.sort(values), cuts)
    # Precision rises and falls along the scores: the lowest cut that reaches the target rests on the most predictions.
    reaching = np.flatnonzero((precision >= target_precision) & (predictions >= FEWEST_PREDICTIONS))

    def at(cut: int) -> dict[str, Any]:
        return {
            "threshold": _between(cuts[cut - 1] if cut else 0.0, cuts[cut]),
            "precision": round(float(precision[cut]), 4),
            "recall": round(float(recall[cut]), 4),
            "f1": round(float(f1[cut]), 4),
            "positives": positives,
        }

    return {
        "best_f1": at(int(f1.argmax())),
        "target_precision": at(int(reaching[0])) if len(reaching) else None,
    }


def policy_yaml(thresholds: Mapping[str, Mapping[str, Any]]) -> str:
    """The advice in the form of config/policy.yaml: review at the best F1, hide at the target precision.

    Where the precision is reached below the best F1, as on rows that a version has learnt, the two change places:
    nothing is hidden below the best F1.
    """
    lines = []
    for label in LABELS:
        advice = thresholds.get(label) or {}
        rules = {
            action: advice[kind]
            for action, kind in (("review", "best_f1"), ("hide", "target_precision"))
            if advice.get(kind)
        }
        if len(rules) == 2:
            milder, stricter = sorted(rules.values(), key=lambda rule: rule["threshold"])
            rules = {"review": milder, "hide": stricter}
            if milder["threshold"] == stricter["threshold"]:
                del rules["review"]
        if rules:
            shown = ", ".join(f"{action}: {rule['threshold']}" for action, rule in rules.items())
            reached = "; ".join(
                f"{action}: precision {rule['precision']:.2f}, recall {rule['recall']:.2f}"
                for action, rule in rules.items()
            )
            lines.append(f"    {label}: {{{shown}}}  # {reached}\n")
        else:
            lines.append(f"    # {label}: too few validation rows to advise on\n")
    empty = " {}" if all(line.lstrip().startswith("#") for line in lines) else ""
    return f"communities:\n  default:{empty}\n{''.join(lines)}"


def _between(below: float, at: float) -> float:
    """The number of fewest decimals near the middle that a score of `at` reaches and one of `below` does not."""
    middle = float((below + at) / 2)
    return next((cut for decimals in range(2, 17) if below < (cut := round(middle, decimals)) <= at), float(at))


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-logits))
