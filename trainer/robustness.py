"""The same rows as evaders would write them, and what that does to a version's figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.names import LABELS
from trainer.evasion import EVASIONS, evade
from trainer.metrics import mean, roc_auc

POSITIVES_SHARE = 0.5
"""Of the chosen rows that are picked for their labels, an equal part for each."""


def choose_rows(labels: NDArray[np.floating], rows: int, *, seed: int) -> NDArray[np.int64]:
    """Rows to measure robustness on, ascending: positives of each label first, the rest by chance.

    Args:
        labels: (rows of the set, 6), NaN where unknown.
        rows: how many; 0, or more than there are, takes all.
    """
    if not rows or rows >= len(labels):
        return np.arange(len(labels))
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    of_each = int(rows * POSITIVES_SHARE) // len(LABELS)
    picked = [shuffled[labels[shuffled, column] >= 0.5][:of_each] for column in range(len(LABELS))]
    # In this order, without repeats: what was picked for a label, then the others.
    _, first = np.unique(ordered := np.concatenate([*picked, shuffled]), return_index=True)
    return np.sort(ordered[np.sort(first)][:rows])


def evaded_texts(texts: Sequence[str], evasion: str, *, seed: int) -> list[str]:
    """Every word of every text in the evasion's spelling; the same for the same seed."""
    random = np.random.default_rng([seed, list(EVASIONS).index(evasion)])
    return [evade(text, evasion, random) for text in texts]


def robustness(
    labels: NDArray[np.floating], scores: NDArray[np.floating], evaded: Mapping[str, NDArray[np.floating]]
) -> dict[str, Any]:
    """ROC-AUC per label and their mean, of the rows as they are (`plain`) and under each evasion.

    Args:
        labels: of the chosen rows, (rows, 6), NaN where unknown.
        scores: of these rows as they are, (rows, 6).
        evaded: by evasion, their scores when written so.
    """
    return {
        "rows": len(labels),
        **{name: _roc_aucs(labels, each) for name, each in {"plain": scores, **evaded}.items()},
    }


def _roc_aucs(labels: NDArray[np.floating], scores: NDArray[np.floating]) -> dict[str, float | None]:
    of_labels = {label: roc_auc(scores[:, i], labels[:, i]) for i, label in enumerate(LABELS)}
    return {**of_labels, "mean": mean(of_labels.values())}
