"""What a version must show before it is published."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from bench.tiny import HOLDOUT, tiny_settings
from config.names import LABELS
from config.settings import TrainerSettings
from model.engine import Scores
from model.onnx_engine import OnnxEngine
from model.text import TextEncoder
from model.torch_engine import TorchEngine
from model.version import VersionError
from trainer.dataset import read_csv
from trainer.soundness import check_batching, check_int8, compare_int8

TOXIC, THREAT = LABELS.index("toxic"), LABELS.index("threat")


def rows(n: int = 400) -> tuple[Scores, np.ndarray]:
    """Scores and the labels that they tell apart fairly well, (n, 6); the last label has one class only."""
    random = np.random.default_rng(4)
    labels = (random.random((n, 6)) < 0.3).astype(np.float32)
    labels[:, -1] = 0
    scores = (0.5 * random.random(labels.shape) + 0.3 * labels).astype(np.float32)
    labels[::7] = np.nan
    return scores, labels


def bars(max_auc_drop: float, min_label_positives: int) -> TrainerSettings:
    return tiny_settings(max_int8_auc_drop=max_auc_drop, min_label_positives=min_label_positives)


def test_the_comparison_says_how_far_scores_and_aucs_are_apart() -> None:
    torch_scores, labels = rows()
    onnx_scores = torch_scores.copy()
    onnx_scores[3, TOXIC] += 0.25
    compared = compare_int8(torch_scores, onnx_scores, labels)
    assert compared["rows"] == 400
    assert compared["largest_difference"] == pytest.approx(0.25)
    assert compared["mean_difference"] == pytest.approx(0.25 / 2400)
    known = ~np.isnan(labels[:, TOXIC])
    assert compared["roc_auc"]["toxic"] == {
        "torch": pytest.approx(roc_auc_score(labels[known, TOXIC], torch_scores[known, TOXIC])),
        "int8": pytest.approx(roc_auc_score(labels[known, TOXIC], onnx_scores[known, TOXIC])),
    }
    assert compared["roc_auc"][LABELS[-1]] == {"torch": None, "int8": None}
    assert compared["roc_auc"]["mean"]["torch"] == pytest.approx(
        np.mean([compared["roc_auc"][label]["torch"] for label in LABELS[:-1]])
    )
    json.dumps(compared, allow_nan=False)


def test_an_int8_form_that_orders_worse_is_refused_with_the_figures() -> None:
    # Given an int8 form that lost the order of some rows in one label
    torch_scores, labels = rows()
    onnx_scores = torch_scores.copy()
    onnx_scores[:60, TOXIC] = 1 - onnx_scores[:60, TOXIC]
    compared = compare_int8(torch_scores, onnx_scores, labels)
    # Then it is refused by that label and the mean, unless that much is allowed
    with pytest.raises(VersionError, match=r"on 400 held-out rows .* lower by toxic 0\.1.*, mean 0\.02.* allows 0\.01"):
        check_int8(compared, labels, bars(0.01, 30))
    check_int8(compared, labels, bars(0.5, 30))
    # And by the mean alone where the label has few rows
    with pytest.raises(VersionError, match=r"lower by mean 0\.02"):
        check_int8(compared, labels, bars(0.01, 1_000))
    # And one that scores like its weights is let pass
    check_int8(compare_int8(torch_scores, torch_scores, labels), labels, bars(0, 1))


def test_both_engines_of_a_real_version_score_a_text_alone_as_among_others(tiny_version: Path) -> None:
    windows = TextEncoder(tiny_version, 64).encode([*read_csv(HOLDOUT).texts[:40], "a"])
    for engine in (TorchEngine(tiny_version, "cpu", 1), OnnxEngine(tiny_version, 1)):
        assert 0 <= check_batching(engine, windows) <= 1e-5


@pytest.mark.parametrize("drift", [1e-3, float("nan")])
def test_an_engine_whose_scores_depend_on_neighbours_is_refused(drift: float) -> None:
    class Leaky:
        """Scores a text by the longest in its batch, as padding without a mask would."""

        description = "a leaky engine"
        lanes, pads, max_batch_tokens = 1, True, 512

        def score(self, token_ids: Sequence[Sequence[int]]) -> Scores:
            longest = max(map(len, token_ids))
            own = np.array([[0.5 + drift * (longest - len(ids))] * 6 for ids in token_ids])
            return own.astype(np.float32)

    # When texts of the same length are tried it cannot be seen; with different ones it is
    if np.isfinite(drift):
        check_batching(Leaky(), [[[1] * 5], [[2] * 5]])
    with pytest.raises(VersionError, match="on a leaky engine a text's score among 3 of other lengths"):
        check_batching(Leaky(), [[[1] * 5], [[2] * 9, [3] * 7]])
