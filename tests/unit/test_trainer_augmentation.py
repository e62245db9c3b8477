"""Rows made of rows: how many, with which labels, and from which."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.augmentation import MOST_REPEATS, draw, evasive_copies, repeats
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
