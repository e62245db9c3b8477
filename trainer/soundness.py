"""What a version must show before it is published: its int8 form agrees with its weights, and batched equals alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.names import LABELS
from config.settings import TrainerSettings
from model.engine import Engine, Scores
from model.text import Windows
from model.version import VersionError
from trainer.metrics import mean, roc_auc

BATCHED = 12
"""Windows of different lengths that are scored together and alone."""
BATCHED_TOLERANCE = 1e-5
"""What rounding may do to a score when its neighbours change; a comment's decision must not hang on them."""


def compare_int8(torch_scores: Scores, onnx_scores: Scores, labels: NDArray[np.floating]) -> dict[str, Any]:
    """How far the int8 form's scores are from its weights' own on held-out rows, JSON-ready.

    Args:
        torch_scores: (rows, 6), in fp32.
        onnx_scores: of the same rows.
        labels: (rows, 6), NaN where unknown.

    Returns:
        `rows`, `largest_difference` and `mean_difference` of a score, and `roc_auc` by label and of their `mean`: of
        the weights in `torch`, of the `int8` form; both None where a class is missing.
    """
    differences = np.abs(onnx_scores - torch_scores)
    aucs = {
        form: [roc_auc(scores[:, column], labels[:, column]) for column in range(len(LABELS))]
        for form, scores in (("torch", torch_scores), ("int8", onnx_scores))
    }
    return {
        "rows": len(labels),
        "largest_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
        "roc_auc": {
            **{label: {form: aucs[form][column] for form in aucs} for column, label in enumerate(LABELS)},
            "mean": {form: mean(aucs[form]) for form in aucs},
        },
    }


def check_int8(compared: Mapping[str, Any], labels: NDArray[np.floating], settings: TrainerSettings) -> None:
    """Refuse an int8 form that is worse than its weights on a label, or in the mean.

    A label with few rows of a class is left to the mean, as in the gate: one comment more or less would decide.

    Raises:
        VersionError: with the figures.
    """
    enough = {
        label: min((labels[:, i] >= 0.5).sum(), (labels[:, i] < 0.5).sum()) >= settings.min_label_positives
        for i, label in enumerate(LABELS)
    }
    lost = [
        f"{name} {auc['torch'] - auc['int8']:.4f}"
        for name, auc in compared["roc_auc"].items()
        if auc["torch"] is not None
        and auc["torch"] - auc["int8"] > settings.max_int8_auc_drop
        and enough.get(name, True)
    ]
    if lost:
        raise VersionError(
            f"the int8 form is worse than its own weights: on {compared['rows']} held-out rows its ROC-AUC is lower by "
            f"{', '.join(lost)}, where max_int8_auc_drop allows {settings.max_int8_auc_drop:g}; scores differ by up to "
            f"{compared['largest_difference']:.3f}. It is not published; more calibration_texts, or others, may help"
        )


def check_batching(engine: Engine, windows: Sequence[Windows]) -> float:
    """Refuse an engine on which a window's scores depend on its neighbours. The largest difference found.

    Args:
        windows: of texts of many lengths, the longest and the shortest of which are tried.

    Raises:
        VersionError: with the difference.
    """
    by_length = sorted((ids for text in windows for ids in text), key=len)
    tried = [by_length[i] for i in np.linspace(0, len(by_length) - 1, min(BATCHED, len(by_length))).astype(int)]
    together = engine.score(tried)
    alone = np.concatenate([engine.score([ids]) for ids in tried])
    difference = float(np.abs(together - alone).max())
    if not difference <= BATCHED_TOLERANCE:  # NaN too
        raise VersionError(
            f"on {engine.description} a text's score among {len(tried)} of other lengths is {difference:.2g} from its "
            f"score alone, more than {BATCHED_TOLERANCE:g}: it would depend on its neighbours. It is not published"
        )
    return difference
