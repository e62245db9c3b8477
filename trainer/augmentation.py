"""Further training rows made of those there are: rare labels repeated, and copies written as evaders write.

Every row made keeps its source's labels and weight. Nothing here may see a validation or held-out row.
"""

import math

import numpy as np
from numpy.typing import NDArray

from trainer.dataset import Dataset
from trainer.evasion import EVASIONS, evade

MOST_REPEATS = 10
LEAST_WORDS_EVADED = 0.3
"""Share of the words of a copy. Most evaders disguise some of their words only."""


def repeats(labels: NDArray[np.float32], share: float) -> NDArray[np.intp]:
    """How often each row is to be shown, so that every label's positives reach this share of its known rows.

    A row with several rare labels is repeated for the rarest; none more than ten times, or it is learnt by heart.
    """
    times = np.ones(len(labels), dtype=np.intp)
    for column in labels.T:
        is_positive = column == 1
        positives, negatives = int(is_positive.sum()), int((column == 0).sum())
        if positives and share:
            needed = math.ceil(share * negatives / (positives * (1 - share)))
            times[is_positive] = np.maximum(times[is_positive], min(needed, MOST_REPEATS))
    return times


def evasive_copies(dataset: Dataset, share: float, rng: np.random.Generator) -> Dataset:
    """Copies of drawn rows, each under one evasion that is drawn too, with some or all of its words written so.

    Args:
        share: how many, as a share of the rows.
    """
    drawn = dataset.take(draw(len(dataset), share, rng))
    evasions = list(EVASIONS)
    texts = [
        evade(text, evasions[rng.integers(len(evasions))], rng, share=rng.uniform(LEAST_WORDS_EVADED, 1))
        for text in drawn.texts
    ]
    return Dataset(texts, drawn.labels, drawn.weights)


def draw(rows: int, share: float, rng: np.random.Generator) -> NDArray[np.intp]:
    """A share of so many rows, by index; none again before all were drawn."""
    rounds = [rng.permutation(rows) for _ in range(math.ceil(share))]
    return np.concatenate([np.empty(0, dtype=np.intp), *rounds])[: round(share * rows)]
