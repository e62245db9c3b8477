"""What a training minimises: cross-entropy over the labels that are known, with weights of rows and of positives."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from config.names import LABELS
from config.settings import PositiveWeights

UNKNOWN = -100.0
"""In place of a label that nobody knows: transformers' sign for it, by which its Trainer counts those that are."""


def label_loss(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    positive_weights: Tensor,
    *,
    focal_gamma: float = 0.0,
    known: Tensor | int | None = None,
) -> Tensor:
    """The mean loss of the known labels; zero where none is.

    With `focal_gamma` above 0 a label counts the less, the surer it is scored right (Lin et al. 2017,
    https://arxiv.org/abs/1708.02002); at 0 this is binary cross-entropy.

    Args:
        logits: (batch, 6).
        labels: 0 to 1, `UNKNOWN` where unknown, (batch, 6).
        row_weights: (batch,); a row of weight 2 teaches as if it were there twice.
        positive_weights: (6,), what a label's positives count beside its negatives.
        known: labels to divide by, where the batch is a part of one step only; by default those of this batch.

    Returns:
        A scalar, fp32.
    """
    logits = logits.float()
    is_known = labels != UNKNOWN
    # Masked before anything is computed: what comes of an unknown label must not reach the gradient, not even as NaN.
    truth = labels.where(is_known, 0.0)
    # softplus(-x) is -log of the score, and softplus(x) -log of what it is short of 1.
    surprise_if_positive, surprise_if_negative = softplus(-logits), softplus(logits)
    losses = positive_weights * truth * surprise_if_positive * torch.exp(-focal_gamma * surprise_if_negative)
    losses = losses + (1 - truth) * surprise_if_negative * torch.exp(-focal_gamma * surprise_if_positive)
    total = (losses * is_known * row_weights.unsqueeze(1)).sum()
    return total / (is_known.sum() if known is None else torch.as_tensor(known)).clamp(min=1)


def positive_weights(labels: NDArray[np.float32], rule: PositiveWeights) -> Tensor:
    """What each label's positives count, from how many rows are known to be positive and negative.

    Args:
        labels: of the training rows, 0 to 1, NaN where unknown, (rows, 6).
        rule: `balanced` lets positives and negatives count the same in sum, `sqrt` goes half the way there.

    Returns:
        (6,); 1 for a label of one class only, which has nothing to be balanced with.
    """
    positives, negatives = np.nansum(labels, axis=0), np.nansum(1 - labels, axis=0)
    ratio = np.ones(len(LABELS))
    np.divide(negatives, positives, out=ratio, where=(positives > 0) & (negatives > 0))
    power = {"none": 0.0, "sqrt": 0.5, "balanced": 1.0}[rule]
    return torch.tensor(ratio**power, dtype=torch.float32)
