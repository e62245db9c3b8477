"""Measuring a version: figures, intervals, calibration of the scores, and what is kept of them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    roc_auc_score,
)

from config.names import LABELS
from trainer.dataset import Dataset
from trainer.evaluation import Evaluation, LabelMetrics, measure
from trainer.metrics import FIGURES, Predictions, bootstrap, figures, reliability, resample_counts, resampled_figures

UNKNOWN = math.nan


def holdout(labels: np.ndarray) -> Dataset:
    return Dataset([f"text {n}" for n in range(len(labels))], labels.astype(np.float32))


def some_rows(rows: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, and labels that they tell apart somewhat, (rows, 6)."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, (rows, 6)).astype(np.float32)
    return (0.5 * random.random((rows, 6)) + 0.3 * labels).round(2).astype(np.float32), labels


# --- Figures ---


def test_figures_are_those_of_the_known_rows() -> None:
    # Given scores and labels of which a third is unknown, and advice on one threshold
    scores, labels = some_rows(60)
    labels[::3] = UNKNOWN
    advice = {"toxic": {"best_f1": {"threshold": 0.3}}, "threat": {"best_f1": None}}
    # When they are measured
    measured = measure(scores, holdout(labels), thresholds=advice)
    # Then each label has its figures over the rows where it is known, at its own threshold
    known = np.arange(60) % 3 != 0
    for column, label in enumerate(LABELS):
        truth, predicted = labels[known, column], scores[known, column].astype(np.float64)
        threshold = 0.3 if label == "toxic" else 0.5
        found = predicted >= threshold
        metrics = measured.labels[label]
        assert (metrics.positives, metrics.negatives) == (int(truth.sum()), 40 - int(truth.sum()))
        assert metrics.threshold == threshold
        assert [getattr(metrics, figure) for figure in FIGURES] == [
            roc_auc_score(truth, predicted),
            average_precision_score(truth, predicted),
            log_loss(truth, predicted),
            accuracy_score(truth, found),
            precision_score(truth, found),
            recall_score(truth, found),
            f1_score(truth, found),
        ]
        confusion = metrics.confusion
        assert sum(confusion.values()) == 40
        assert confusion["tp"] / (confusion["tp"] + confusion["fn"]) == pytest.approx(metrics.recall)
        assert confusion["tp"] / (confusion["tp"] + confusion["fp"]) == pytest.approx(metrics.precision)
    assert measured.rows == 60
    # And over all: the mean of the labels, and all known labels taken together
    assert measured.mean_roc_auc == pytest.approx(np.mean([m.roc_auc for m in measured.labels.values()]))
    assert measured.macro["f1"] == pytest.approx(np.mean([m.f1 for m in measured.labels.values()]))
    assert measured.micro["roc_auc"] == roc_auc_score(labels[known].ravel(), scores[known].ravel())
    assert measured.scores is scores


def test_figures_by_hand() -> None:
    # Of the four pairs of a positive and a negative, three are in the right order
    scores = np.zeros((4, 6), dtype=np.float32)
    scores[:, 0] = [0.9, 0.4, 0.6, 0.1]
    labels = np.zeros((4, 6))
    labels[:2, 0] = 1
    toxic = measure(scores, holdout(labels)).labels["toxic"]
    assert (toxic.positives, toxic.negatives, toxic.roc_auc) == (2, 2, 0.75)
    assert toxic.average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert toxic.log_loss == pytest.approx(-(math.log(0.9) + math.log(0.4) + math.log(0.4) + math.log(0.9)) / 4)
    assert toxic.confusion == {"tn": 1, "fp": 1, "fn": 1, "tp": 1}
    assert (toxic.accuracy, toxic.precision, toxic.recall, toxic.f1) == (0.5, 0.5, 0.5, 0.5)


@pytest.mark.parametrize(("value", "positives", "negatives"), [(1, 7, 0), (0, 0, 7), (UNKNOWN, 0, 0)])
def test_a_label_of_one_class_has_no_figure(value: float, positives: int, negatives: int) -> None:
    measured = measure(np.full((7, 6), 0.5, dtype=np.float32), holdout(np.full((7, 6), value)))
    assert measured.labels["threat"] == LabelMetrics(positives, negatives, None, None, None)
    assert measured.mean_roc_auc is None
    assert measured.as_dict()["mean_roc_auc"] is None
    assert measured.as_dict()["mean_roc_auc_interval"] is None


def test_labels_without_a_figure_do_not_count_in_the_mean() -> None:
    metrics = {label: LabelMetrics(50, 50, 0.9, 0.5, 0.2) for label in LABELS[2:]}
    metrics |= {"toxic": LabelMetrics(50, 50, 0.8, 0.5, 0.2), "severe_toxic": LabelMetrics(0, 50, None, None, None)}
    assert Evaluation(100, "rows", metrics).mean_roc_auc == pytest.approx((0.8 + 4 * 0.9) / 5)


def test_a_precision_without_a_prediction_is_none() -> None:
    toxic = measure(np.full((4, 6), 0.1, dtype=np.float32), holdout(np.eye(4, 6))).labels["toxic"]
    assert (toxic.precision, toxic.recall, toxic.f1) == (None, 0, 0)
    assert "precision" not in toxic.intervals


# --- Intervals ---


def test_figures_of_resamples_are_those_of_sklearn_on_the_same_rows() -> None:
    # Given scores with ties, of rows of which some are unknown
    scores, labels = some_rows(50)
    rows = np.flatnonzero(np.arange(50) % 5)
    values = scores[rows, 0].astype(np.float64)
    part = Predictions(rows, values, labels[rows, 0] == 1, values >= 0.4)
    # When whole rows of the set are drawn again and again
    [counts] = resample_counts(50, resamples=20)
    resampled = resampled_figures(part, counts)
    # Then each resample has the figures that sklearn finds when its rows are written out
    assert (counts.sum(axis=0) == 50).all()
    for resample in range(20):
        drawn = np.repeat(np.arange(len(rows)), counts[rows, resample].astype(int))
        written_out = Predictions(rows[drawn], values[drawn], part.truth[drawn], part.positive[drawn])
        expected = figures(written_out)
        assert {name: of_all[resample] for name, of_all in resampled.items()} == pytest.approx(expected)


def test_resamples_of_one_class_are_skipped_and_counted() -> None:
    # Given a single positive: a resample lacks it with a chance of 1 / e
    part = Predictions(np.arange(30), np.linspace(0, 1, 30), np.arange(30) == 29, np.arange(30) > 20)
    of_resamples = bootstrap({"only": part}, 30)["only"]["roc_auc"]
    assert np.isnan(of_resamples).mean() == pytest.approx(math.exp(-1), abs=0.05)
    assert (of_resamples[~np.isnan(of_resamples)] == 1).all()
    # And the evaluation says how many were left
    labels = np.zeros((30, 6))
    labels[29] = 1
    scores = np.repeat(np.linspace(0.01, 0.99, 30, dtype=np.float32)[:, None], 6, axis=1)
    toxic = measure(scores, holdout(labels)).labels["toxic"]
    assert toxic.resamples == (~np.isnan(of_resamples)).sum()
    assert toxic.intervals["roc_auc"] == (1, 1)


def test_resamples_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = np.concatenate(list(resample_counts(40, resamples=9)), axis=1)
    monkeypatch.setattr("trainer.metrics.COUNTS_AT_ONCE", 100)
    in_parts = list(resample_counts(40, resamples=9))
    assert [part.shape for part in in_parts] == [(40, 2)] * 4 + [(40, 1)]
    assert (np.concatenate(in_parts, axis=1) == at_once).all()


@given(st.integers(0, 1000))
@settings(max_examples=6, derandomize=True)  # an interval need not hold its figure, though these do
def test_intervals_hold_what_they_are_of(seed: int) -> None:
    scores, labels = some_rows(80, seed)
    measured = measure(scores, holdout(labels))
    for metrics in measured.labels.values():
        for figure, (low, high) in metrics.intervals.items():
            assert low <= getattr(metrics, figure) <= high
    low, high = measured.macro["intervals"]["roc_auc"]
    assert low <= measured.macro["roc_auc"] <= high


# --- Calibration of the scores ---


def test_reliability_by_hand() -> None:
    # Sixteen rows in fifteen bins: the first holds two, one of them positive, at a mean score of 0.15
    scores = np.array([0.1, 0.2, *np.linspace(0.3, 0.95, 14)])
    truth = np.array([False, True, *[True] * 14])
    error, bins = reliability(scores, truth)
    assert [each["rows"] for each in bins] == [2] + [1] * 14
    assert bins[0] == pytest.approx({"mean_score": 0.15, "share_positive": 0.5, "rows": 2})
    assert error == pytest.approx((2 * 0.35 + (1 - np.linspace(0.3, 0.95, 14)).sum()) / 16)


# --- What is kept ---


def test_what_is_kept_is_plain_json_without_scores() -> None:
    scores, labels = some_rows(60)
    labels[:, 3] = UNKNOWN
    kept = measure(scores, holdout(labels)).as_dict()
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept
    assert set(kept) == {
        *("rows", "dataset_sha256", "mean_roc_auc", "mean_roc_auc_interval", "labels", "micro", "macro"),
        *("slices", "identities", "identity_means", "robustness"),
    }
    low, high = kept["mean_roc_auc_interval"]
    assert low < kept["mean_roc_auc"] < high
