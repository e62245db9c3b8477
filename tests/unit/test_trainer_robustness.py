"""The same rows under every evasion."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.names import LABELS
from config.settings import ROOT
from trainer.dataset import Dataset, read_csv
from trainer.evaluation import evaluate, measure, measure_robustness
from trainer.evasion import EVASIONS
from trainer.robustness import choose_rows, evaded_texts

HOLDOUT = ROOT / "samples" / "holdout.csv"


@given(st.integers(0, 60), st.integers(0, 2**31 - 1))
def test_rows_are_chosen_once_each(rows: int, seed: int) -> None:
    labels = np.zeros((50, 6))
    labels[::7] = 1
    chosen = choose_rows(labels, rows, seed=seed)
    assert len(chosen) == (min(rows, 50) or 50)
    assert (np.diff(chosen) > 0).all()
    assert chosen.tolist() == choose_rows(labels, rows, seed=seed).tolist()


def test_positives_of_every_label_are_among_few_rows() -> None:
    # Given the shipped held-out rows, of which 16 of 1,200 are threats
    labels = read_csv(HOLDOUT).labels
    assert (labels[:, LABELS.index("threat")] == 1).sum() == 16
    # Then 200 rows hold a sixth of a half of them for each label, and harmless ones
    chosen = labels[choose_rows(labels, 200, seed=1)]
    assert ((chosen == 1).sum(axis=0) >= 16).all()
    assert (chosen[:, 0] == 0).sum() > 50


def test_evaded_texts_are_the_same_for_the_same_seed() -> None:
    texts = ["you are a fool"] * 3
    for evasion in EVASIONS:
        written = evaded_texts(texts, evasion, seed=1)
        assert written == evaded_texts(texts, evasion, seed=1)
        assert all(text != "you are a fool" for text in written)
    assert evaded_texts(texts, "zero_width", seed=1) != evaded_texts(texts, "zero_width", seed=2)


def test_robustness_is_measured_on_the_same_rows() -> None:
    # Given a scorer that knows one word, in its plain spelling, or with other vowels
    def score(texts: list[str]) -> np.ndarray:
        return np.array([[0.9 if "fool" in text or "f00l" in text else 0.1] * 6 for text in texts], dtype=np.float32)

    holdout = Dataset(["a fool", "a friend"] * 10, np.tile([[1], [0]], (10, 6)).astype(np.float32))
    # When its robustness is measured
    plain = measure(score(holdout.texts), holdout)
    measured = measure_robustness(plain, score, holdout)
    # Then only that spelling leaves its figures as they were
    figures = measured.robustness
    assert figures["rows"] == 20
    assert figures["plain"] == dict.fromkeys([*LABELS, "mean"], 1)
    assert {evasion: figures[evasion]["mean"] for evasion in EVASIONS} == {
        evasion: 1.0 if evasion == "leetspeak" else 0.5 for evasion in EVASIONS
    }
    # And what the figures are of is kept beside them, the rest as it was
    assert measured.evaded_rows.tolist() == list(range(20))
    assert set(measured.evaded_scores) == set(EVASIONS)
    assert (measured.evaded_scores["spaced"] == np.float32(0.1)).all()
    assert measured.labels == plain.labels


@pytest.mark.parametrize(("rows", "expected"), [(None, None), (0, 20), (8, 8)])
def test_evaluating_a_version(rows: int | None, expected: int | None) -> None:
    class Shouting:
        """Scores by the share of capitals."""

        class manifest:  # noqa: N801
            thresholds = {"toxic": {"best_f1": {"threshold": 0.25}}}

        def score_texts(self, texts: list[str]) -> np.ndarray:
            return np.array([[sum(map(str.isupper, t)) / len(t)] * 6 for t in texts], dtype=np.float32)

    holdout = Dataset(["GO AWAY", "welcome"] * 10, np.tile([[1], [0]], (10, 6)).astype(np.float32))
    scorer: Any = Shouting()
    evaluation = evaluate(scorer, holdout, robustness_rows=rows)
    assert evaluation.mean_roc_auc == 1
    assert (evaluation.labels["toxic"].threshold, evaluation.labels["threat"].threshold) == (0.25, 0.5)
    assert evaluation.robustness.get("rows") == expected
