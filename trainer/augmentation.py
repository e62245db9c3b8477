"""Further training rows made of those there are: rare labels repeated, and copies written as evaders or others write.

Every row made keeps its source's labels and weight. Nothing here may see a validation or held-out row.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.dataset import Dataset
from trainer.evasion import EVASIONS, evade

MOST_REPEATS = 10
LEAST_WORDS_EVADED = 0.3
"""Share of the words of a copy. Most evaders disguise some of their words only."""
SYNONYMS_FILE = Path(__file__).with_name("synonyms.txt")
REPLACED_SHARE = 0.5
"""Of the words of a copy that may be replaced by synonyms."""
MOST_RATE_RATIO = 2.0
"""Of a word's rates among positive and negative rows: one that is further from even may be what a label stands on."""
PRIOR_COUNT = 2.0
WORD = re.compile(r"[A-Za-z]+")


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


def synonym_copies(dataset: Dataset, share: float, rng: np.random.Generator) -> Dataset:
    """Copies of drawn rows with some of their words replaced by synonyms; no word that a label may stand on is touched.

    Args:
        share: how many, as a share of the rows that have a word to replace.
    """
    if not share:
        return dataset.take([])  # counting the words of many rows takes seconds
    synonyms = neutral_synonyms(dataset)
    usable = [
        row for row, text in enumerate(dataset.texts) if any(word in synonyms for word in WORD.findall(text.lower()))
    ]
    drawn = dataset.take([usable[index] for index in draw(len(usable), share, rng)])
    texts = [_with_synonyms(text, synonyms, rng) for text in drawn.texts]
    return Dataset(texts, drawn.labels, drawn.weights)


def neutral_synonyms(dataset: Dataset) -> dict[str, list[str]]:
    """The synonyms of words that are about as frequent in positive rows as in negative ones, and are so themselves."""
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())  # of rows without and with a positive label
    for text, positive in zip(dataset.texts, (dataset.labels == 1).any(axis=1), strict=True):
        counts[int(positive)].update(set(WORD.findall(text.lower())))
    sizes = [max(1, side.total()) for side in counts]

    def is_neutral(word: str) -> bool:
        # As if each word had been seen a little on both sides alike: one that never was may be taken.
        negative, positive = (
            side[word] / size + PRIOR_COUNT / sum(sizes) for side, size in zip(counts, sizes, strict=True)
        )
        return 1 / MOST_RATE_RATIO <= positive / negative <= MOST_RATE_RATIO

    neutral = ((word, list(filter(is_neutral, others))) for word, others in _synonyms().items() if is_neutral(word))
    return {word: others for word, others in neutral if others}


@cache
def _synonyms() -> dict[str, list[str]]:
    lines = SYNONYMS_FILE.read_text(encoding="ascii").splitlines()
    return {word: others for word, *others in (line.split() for line in lines if not line.startswith("#"))}


def _with_synonyms(text: str, synonyms: Mapping[str, list[str]], rng: np.random.Generator) -> str:
    """At least one word is replaced; it is written as the word was: small, Capital or ALL CAPITALS."""
    places = [place for place in WORD.finditer(text) if place[0].lower() in synonyms]
    certain = rng.integers(len(places))
    pieces, end = [], 0
    for index, place in enumerate(places):
        if index != certain and rng.random() >= REPLACED_SHARE:
            continue
        word = str(place[0])
        others = synonyms[word.lower()]
        other = others[rng.integers(len(others))]
        other = other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other
        pieces += [text[end : place.start()], other]
        end = place.end()
    return "".join([*pieces, text[end:]])


def draw(rows: int, share: float, rng: np.random.Generator) -> NDArray[np.intp]:
    """A share of so many rows, by index; none again before all were drawn."""
    rounds = [rng.permutation(rows) for _ in range(math.ceil(share))]
    return np.concatenate([np.empty(0, dtype=np.intp), *rounds])[: round(share * rows)]
