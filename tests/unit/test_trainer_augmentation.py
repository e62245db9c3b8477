"""Rows made of rows: how many, with which labels, and from which."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.augmentation import (
    MOST_REPEATS,
    SYNONYMS_FILE,
    draw,
    evasive_copies,
    neutral_synonyms,
    repeats,
    synonym_copies,
)
from trainer.dataset import Dataset


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([0.0, 0.1, 0.3, 0.5]))
def test_a_rare_label_is_repeated_to_its_share_and_ten_times_at_most(
    positives: int, negatives: int, share: float
) -> None:
    labels = np.full((positives + negatives + 5, 6), np.nan, dtype=np.float32)
    labels[:positives, 3] = 1
    labels[positives : positives + negatives, 3] = 0
    times = repeats(labels, share)
    assert (times[positives:] == 1).all()
    assert len(set(times[:positives])) == 1
    shares = [positives * n / (positives * n + negatives) for n in range(1, MOST_REPEATS + 1)]
    assert times[0] == next((n for n, reached in enumerate(shares, 1) if reached >= share), MOST_REPEATS)


def test_a_row_with_several_rare_labels_is_repeated_for_the_rarest() -> None:
    labels = np.zeros((100, 6), dtype=np.float32)
    labels[:20, 0] = 1
    labels[:5, 1] = 1
    labels[:, 2:] = np.nan
    times = repeats(labels, 0.25)
    assert times[:5].tolist() == [7] * 5
    assert times[5:20].tolist() == [2] * 15


@given(st.integers(0, 50), st.floats(0, 10))
def test_rows_are_drawn_evenly(rows: int, share: float) -> None:
    drawn = draw(rows, share, np.random.default_rng(1))
    counts = np.bincount(drawn, minlength=rows)
    assert len(drawn) == round(share * rows)
    assert not rows or counts.max() - counts.min() <= 1


def test_an_evasive_copy_keeps_labels_and_weight_and_is_written_otherwise() -> None:
    weights = np.arange(1, 11, dtype=np.float32)
    labels = np.tile(weights[:, None] / np.float32(10), (1, 6))
    rows = Dataset([f"you are a complete idiot number {n}" for n in range(10)], labels, weights)
    copies = evasive_copies(rows, 2.0, np.random.default_rng(1))
    assert len(copies) == 20
    assert sorted(copies.weights.tolist()) == sorted(rows.weights.tolist() * 2)
    assert copies.labels[:, 0] * 10 == pytest.approx(copies.weights)
    assert not set(copies.texts) & set(rows.texts)
    # And each evasion comes, on some of the words only
    assert len(set(copies.texts)) == 20
    assert sum("idiot" in text for text in copies.texts) > 2
    assert evasive_copies(rows, 2.0, np.random.default_rng(1)).sha256 == copies.sha256


# --- Synonyms ---


def rows_with_huge() -> Dataset:
    """40 rows, half of them toxic; "hate", "detest" and "theme" are in those alone."""
    texts = [
        f"A HUGE topic {n}, {'I hate and detest the theme' if toxic else 'I like it'}: huge, Vast or immense"
        for n in range(20)
        for toxic in (False, True)
    ]
    labels = np.full((40, 6), np.nan, dtype=np.float32)
    labels[:, 0] = [0, 1] * 20
    return Dataset(texts, labels, np.arange(40, dtype=np.float32))


def test_only_words_that_tell_nothing_are_replaced_and_only_by_such() -> None:
    synonyms = neutral_synonyms(rows_with_huge())
    assert {word: synonyms.get(word) for word in ("huge", "immense", "hate", "detest")} == {
        "huge": ["vast", "immense"],
        "immense": ["vast", "huge"],
        "hate": None,
        "detest": None,
    }
    # Nor is a word replaced by one that tells something
    assert neutral_synonyms(rows_with_huge().take([]))["topic"] == ["theme"]
    assert "topic" not in synonyms


def test_a_copy_with_synonyms_keeps_everything_else() -> None:
    rows = rows_with_huge()
    copies = synonym_copies(rows, 1.0, np.random.default_rng(1))
    assert sorted(copies.weights.tolist()) == rows.weights.tolist()
    for text, labels, weight in zip(copies.texts, copies.labels, copies.weights, strict=True):
        source = rows.texts[int(weight)]
        np.testing.assert_array_equal(labels, rows.labels[int(weight)])
        assert text != source
        pattern = re.sub("huge|vast|immense", "(huge|vast|immense)", source, flags=re.IGNORECASE)
        assert re.fullmatch(pattern, text, re.IGNORECASE)
        # And it is written as the word was
        assert re.match("A (HUGE|VAST|IMMENSE) topic", text)
        assert re.search(", (Huge|Vast|Immense) or ", text)
    assert len(synonym_copies(rows.take([]), 1.0, np.random.default_rng(1))) == 0


def test_the_shipped_words_have_others_and_name_nobody() -> None:
    lines = [line.split() for line in SYNONYMS_FILE.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 1000
    assert all(2 <= len(words) <= 4 and words[0] not in words[1:] for words in lines)
    assert not {word for words in lines for word in words} & {"idiot", "bastard", "black", "queer", "woman", "jews"}
