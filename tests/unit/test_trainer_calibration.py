"""Scores that are probabilities, and thresholds to put into a policy."""

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss
from transformers import DistilBertConfig, DistilBertModel

from config.names import LABELS, Action
from config.policy import parse_policy
from model.network import ToxicityNetwork
from trainer.calibration import advised_thresholds, fit_calibration, policy_yaml, to_logits
from trainer.metrics import reliability


def drawn(rows: int, seed: int, *, scale: float = 1.0, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, (rows, 6), and labels drawn with the probabilities of scale × logit + shift."""
    random = np.random.default_rng(seed)
    logits = random.normal(-1, 2.5, (rows, 6))
    return logits, (random.random((rows, 6)) < sigmoid(scale * logits + shift)).astype(np.float32)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


# --- Calibration ---


def test_what_was_distorted_is_found() -> None:
    # Given logits twice too large, and too high by one
    logits, labels = drawn(20_000, seed=1, scale=0.5, shift=-0.5)
    labels[::3] = math.nan
    # Then scale and shift take that back
    fitted = fit_calibration(logits, labels)
    for label in LABELS:
        assert fitted.labels[label].scale == pytest.approx(0.5, abs=0.03)
        assert fitted.labels[label].shift == pytest.approx(-0.5, abs=0.06)
        assert fitted.labels[label].positives + fitted.labels[label].negatives == 20_000 - 6_667
    assert json.loads(json.dumps(fitted.as_dict(), allow_nan=False)) == fitted.as_dict()


@given(st.integers(0, 2**31 - 1), st.floats(0.2, 3), st.floats(-2, 2))
@settings(max_examples=20)
def test_the_order_stays_and_the_log_loss_never_rises(seed: int, scale: float, shift: float) -> None:
    logits, labels = drawn(300, seed, scale=scale, shift=shift)
    fitted = fit_calibration(logits, labels)
    after = fitted.apply(logits)
    for column, label in enumerate(LABELS):
        truth, order = labels[:, column], np.argsort(logits[:, column])
        assert fitted.labels[label].scale > 0
        assert (np.diff(after[order, column]) >= 0).all()
        loss_before, loss_after = (log_loss(truth, sigmoid(each[:, column]), labels=[0, 1]) for each in (logits, after))
        assert loss_after <= loss_before + 1e-12


@pytest.mark.parametrize(
    ("logits", "positives", "note"),
    [
        (np.linspace(-3, 3, 40), 9, "fewer than 10 positives or negatives"),
        (np.linspace(3, -3, 40), 20, "no better than chance"),
    ],
    ids=["few rows", "the wrong way round"],
)
def test_what_cannot_be_fitted_stays_and_says_so(logits: np.ndarray, positives: int, note: str) -> None:
    truth = np.arange(40) >= 40 - positives
    fitted = fit_calibration(np.repeat(logits[:, None], 6, axis=1), np.repeat(truth[:, None], 6, axis=1).astype(float))
    toxic = fitted.labels["toxic"]
    assert (toxic.scale, toxic.shift) == (1, 0)
    assert note in toxic.note


def test_rows_told_apart_without_error_make_no_endless_scale() -> None:
    logits = np.repeat(np.linspace(-1, 1, 40)[:, None], 6, axis=1)
    fitted = fit_calibration(logits, (logits > 0).astype(float))
    assert 1 < fitted.labels["toxic"].scale < 50


def test_a_folded_network_gives_calibrated_logits() -> None:
    # Given a network, and what was fitted on logits like its own
    config = DistilBertConfig(vocab_size=50, dim=16, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=16)
    network = ToxicityNetwork(DistilBertModel(config)).eval()
    fitted = fit_calibration(*drawn(500, seed=2, scale=0.4, shift=0.7))
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        before = network(ids, torch.ones_like(ids))["logits"].numpy()
        # When it is folded in
        fitted.fold_into(network)
        after = network(ids, torch.ones_like(ids))["logits"].numpy()
    # Then the network gives what was promised
    assert after == pytest.approx(fitted.apply(before), abs=1e-5)


def test_logits_of_scores() -> None:
    scores = np.array([[0.0, 1e-6, 0.25, 0.5, 0.999, 1.0]], dtype=np.float32)
    logits = to_logits(scores)
    assert np.isfinite(logits).all()
    assert sigmoid(logits) == pytest.approx(scores, abs=1e-7)


def test_calibrated_scores_are_as_often_true_as_they_say() -> None:
    # Given overconfident scores, and as many rows that calibration is not fitted on
    logits, labels = drawn(4_000, seed=5, scale=0.4)
    after = fit_calibration(logits[:2_000], labels[:2_000]).apply(logits)
    for column in range(6):
        error_before, error_after = (
            reliability(sigmoid(each[2_000:, column]), labels[2_000:, column] == 1)[0] for each in (logits, after)
        )
        assert error_after < 0.05 < error_before


# --- Thresholds ---


@given(st.integers(0, 2**31 - 1), st.floats(0.3, 0.99))
@settings(max_examples=20)
def test_advised_thresholds_do_what_they_say(seed: int, target: float) -> None:
    logits, labels = drawn(120, seed)
    scores = sigmoid(logits).round(2).astype(np.float32)
    labels[:, 1:] = math.nan
    advice = advised_thresholds(scores, labels, target)["toxic"]
    truth, values = labels[:, 0] == 1, scores[:, 0].astype(np.float64)

    def hits_and_predictions(cut: float) -> tuple[int, int]:
        return int((truth & (values >= cut)).sum()), int((values >= cut).sum())

    def f1(cut: float) -> float:
        hits, predictions = hits_and_predictions(cut)
        return 2 * hits / (predictions + truth.sum())

    def precision(cut: float) -> float:
        hits, predictions = hits_and_predictions(cut)
        return hits / predictions

    # The best F1 that any threshold has
    best = advice["best_f1"]
    assert f1(best["threshold"]) == pytest.approx(max(map(f1, values)))
    assert best == pytest.approx(
        {**best, "f1": f1(best["threshold"]), "precision": precision(best["threshold"])}, abs=1e-4
    )
    assert best["positives"] == truth.sum()
    # And the lowest threshold that reaches the precision on ten rows or more, if any does
    reaching = [cut for cut in sorted(values) if hits_and_predictions(cut)[1] >= 10 and precision(cut) >= target]
    if not reaching:
        assert advice["target_precision"] is None
        return
    threshold = advice["target_precision"]["threshold"]
    assert ((values >= threshold) == (values >= reaching[0])).all()
    assert advice["target_precision"]["precision"] == pytest.approx(precision(threshold), abs=1e-4)


def test_thresholds_are_short_numbers_between_two_scores() -> None:
    scores, labels = np.full((40, 6), 0.2), np.zeros((40, 6))
    scores[20:], labels[20:] = 0.8123, 1
    advice = advised_thresholds(scores, labels, 0.9)["toxic"]
    assert advice["best_f1"] == {"threshold": 0.51, "precision": 1, "recall": 1, "f1": 1, "positives": 20}
    assert advice["target_precision"] == advice["best_f1"]


def test_too_few_rows_are_no_advice() -> None:
    logits, labels = drawn(100, seed=1)
    labels[9:, 0], labels[:9, 0] = 0, 1
    labels[:, 1] = math.nan
    advice = advised_thresholds(sigmoid(logits), labels, 0.5)
    assert advice["toxic"] == advice["severe_toxic"] == {"best_f1": None, "target_precision": None}
    assert advice["threat"]["best_f1"] is not None


def test_the_advice_is_a_policy() -> None:
    # Given advice on some labels, one of which reaches the precision below its best F1
    def cut(threshold: float) -> dict[str, float]:
        return {"threshold": threshold, "precision": 0.91, "recall": 0.5, "f1": 0.6, "positives": 40}

    advice: dict[str, dict[str, Any]] = {
        "toxic": {"best_f1": cut(0.4), "target_precision": cut(0.75)},
        "insult": {"best_f1": cut(0.6), "target_precision": cut(0.5)},
        "threat": {"best_f1": cut(0.3), "target_precision": None},
        "obscene": {"best_f1": None, "target_precision": None},
    }
    # When it is written as a policy
    text = policy_yaml(advice)
    policy = parse_policy(text)
    # Then it is one, and says which labels it leaves out
    assert "toxic: {review: 0.4, hide: 0.75}  # review: precision 0.91, recall 0.50; hide:" in text
    decided = [
        policy.decide("default", [score if label == named else 0.0 for label in LABELS]).action
        for named, score in [("toxic", 0.5), ("toxic", 0.8), ("insult", 0.55), ("threat", 1.0), ("obscene", 1.0)]
    ]
    assert decided == [Action.REVIEW, Action.HIDE, Action.REVIEW, Action.REVIEW, Action.ALLOW]
    assert "# obscene: too few validation rows to advise on" in text
    # And advice on nothing is a policy that does nothing
    assert parse_policy(policy_yaml({})).decide("default", [1.0] * 6).action is Action.ALLOW


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=20)
def test_any_advice_is_a_policy(seed: int) -> None:
    logits, labels = drawn(80, seed)
    scores = sigmoid(logits).astype(np.float32)
    policy = parse_policy(policy_yaml(advised_thresholds(scores, labels, 0.8)))
    strictness = [list(Action).index(policy.decide("default", [score] * 6).action) for score in np.linspace(0, 1, 50)]
    assert all(milder <= stricter for milder, stricter in pairwise(strictness))
