"""The loss: what is not known must not teach, and what weighs more must teach as much more."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from config.names import LABELS
from trainer.losses import UNKNOWN, label_loss, positive_weights

EVEN = torch.ones(6)


def loss_of(logits: Tensor, labels: Tensor, rows: Tensor | None = None, positives: Tensor = EVEN, **how: Any) -> Tensor:
    return label_loss(logits, labels, torch.ones(len(logits)) if rows is None else rows, positives, **how)


def gradients(labels: Tensor, rows: Tensor | None = None, positives: Tensor = EVEN, **how: Any) -> Tensor:
    """By which each logit of a network that says 0.5 of everything would move."""
    logits = torch.zeros(labels.shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_of(logits, labels, rows, positives, **how), logits)
    return gradient


def test_an_unknown_label_teaches_its_head_nothing() -> None:
    # Given two texts of which nobody knows whether they are threats, and one whose insult is unknown
    labels = torch.tensor([[1, 0, 1, UNKNOWN, UNKNOWN, 0], [0, 0, 1, UNKNOWN, 1, 0]])
    # Then those logits have no gradient at all, and every other one has
    assert ((gradients(labels) == 0) == (labels == UNKNOWN)).all()


def test_a_batch_of_which_nothing_is_known_changes_nothing() -> None:
    unknown = torch.full((2, 6), UNKNOWN)
    assert loss_of(torch.randn(2, 6), unknown) == 0
    assert not gradients(unknown).any()


def test_the_loss_is_the_mean_over_what_is_known() -> None:
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.0, 5.0, -5.0]])
    labels = torch.tensor([[1, UNKNOWN, 0, UNKNOWN, 0.25, UNKNOWN]])
    known = [(0.3, 1), (2.0, 0), (5.0, 0.25)]
    by_hand = [-y * math.log(1 / (1 + math.exp(-x))) - (1 - y) * math.log(1 / (1 + math.exp(x))) for x, y in known]
    assert loss_of(logits, labels).item() == pytest.approx(sum(by_hand) / 3, rel=1e-5)
    # And it is divided by the labels of a whole step where the batch is a part of one
    assert loss_of(logits, labels, known=6).item() == pytest.approx(sum(by_hand) / 6, rel=1e-5)


def test_a_row_of_weight_two_teaches_as_if_it_were_there_twice() -> None:
    labels = torch.tensor([[1.0] * 6, [0.0] * 6])
    weighted = gradients(labels, rows=torch.tensor([2.0, 1.0]))
    repeated = gradients(labels[[0, 0, 1]], known=12)
    assert torch.allclose(weighted[0], repeated[0] + repeated[1])
    assert torch.allclose(weighted[1], repeated[2])


def test_weights_of_positives_count_for_positives_of_their_label_only() -> None:
    labels = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    ratio = gradients(labels, positives=torch.tensor([1.0, 1, 1, 9, 1, 1])) / gradients(labels)
    assert torch.allclose(ratio, torch.tensor([[1.0, 1, 1, 9, 1, 1], [1.0] * 6]))


def test_focal_loss_is_as_in_its_paper() -> None:
    # Given labels scored at 0.9 and 0.2, one positive and one not
    logits = torch.logit(torch.tensor([[0.9, 0.2, 0.9, 0.2, 0.5, 0.5]]))
    labels = torch.tensor([[1.0, 0.0, 0.0, 1.0, UNKNOWN, UNKNOWN]])
    right = [0.9, 0.8, 0.1, 0.2]
    by_hand = [-((1 - p) ** 2) * math.log(p) for p in right]
    assert loss_of(logits, labels, focal_gamma=2.0).item() == pytest.approx(sum(by_hand) / 4, rel=1e-5)


@pytest.mark.parametrize("focal_gamma", [0.0, 2.0])
def test_logits_of_any_size_give_numbers(focal_gamma: float) -> None:
    logits = torch.tensor([[1e4, -1e4, 88.0, -88.0, 0.0, 300.0]], requires_grad=True)
    loss = loss_of(logits, torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.5, UNKNOWN]]), focal_gamma=focal_gamma)
    loss.backward()
    assert loss.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize(("rule", "weight"), [("none", 1), ("sqrt", 2), ("balanced", 4)])
def test_positive_weights_come_from_the_rows_where_a_label_is_known(rule: str, weight: float) -> None:
    # Given one toxic row in five where that is known, no threat at all, and nothing known of the rest
    labels = np.full((8, 6), np.nan, dtype=np.float32)
    labels[:5, 0] = [1, 0, 0, 0, 0]
    labels[:, LABELS.index("threat")] = 0
    assert positive_weights(labels, rule).tolist() == [weight, 1, 1, 1, 1, 1]  # type: ignore[arg-type]
