"""Whether a version may replace the active one."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.names import LABELS
from config.settings import TrainerSettings, load_settings
from trainer.evaluation import Evaluation, LabelMetrics
from trainer.gate import judge

BARS = load_settings({}).trainer
"""A label may fall by 0.02, the mean by 0.005, and five of each class must be there."""


def evaluation(**roc_auc: float | None) -> Evaluation:
    """These figures, 0.9 for every other label, on fifty rows of each class."""
    metrics = {label: LabelMetrics(50, 50, roc_auc.get(label, 0.9), 0.5, 0.2) for label in LABELS}
    return Evaluation(100, "the same rows", metrics)


def test_a_better_version_is_promoted_and_the_reason_has_its_figures() -> None:
    judgement = judge(evaluation(toxic=0.95), evaluation(toxic=0.91), BARS)
    assert judgement.promoted
    assert "toxic 0.9500 (active 0.9100)" in judgement.reason
    assert "mean 0.9083 (active 0.9017)" in judgement.reason
    assert "100 held-out rows" in judgement.reason


def test_a_label_that_falls_too_far_refuses_whatever_the_others_gain() -> None:
    judgement = judge(evaluation(threat=0.87, toxic=0.99), evaluation(), BARS)
    assert not judgement.promoted
    assert "threat fell by 0.0300, more than the 0.02 allowed" in judgement.reason
    assert "the mean fell" not in judgement.reason


def test_a_mean_that_falls_too_far_refuses_though_no_label_does() -> None:
    judgement = judge(evaluation(**dict.fromkeys(LABELS, 0.89)), evaluation(), BARS)
    assert not judgement.promoted
    assert "the mean fell by 0.0100, more than the 0.005 allowed" in judgement.reason
    assert "toxic fell" not in judgement.reason


def test_scores_that_moved_refuse_though_their_order_stayed() -> None:
    # Given a candidate that orders comments as well, but scores them all higher
    active, candidate = evaluation(), evaluation()
    candidate.labels["toxic"] = replace(active.labels["toxic"], log_loss=0.65)
    # Then it is refused: thresholds would hide what they did not
    judgement = judge(candidate, active, BARS)
    assert not judgement.promoted
    assert "toxic's log loss rose by 0.4500 to 0.6500, more than the 0.05 allowed" in judgement.reason


def test_every_failure_is_named() -> None:
    reason = judge(evaluation(threat=0.5, insult=0.5), evaluation(), BARS).reason
    assert all(words in reason for words in ("threat fell by 0.4000", "insult fell by 0.4000", "the mean fell by"))


def test_a_fall_within_the_bars_is_promoted() -> None:
    assert judge(evaluation(threat=0.885), evaluation(), BARS).promoted


def test_a_label_with_too_few_rows_of_a_class_is_not_judged_by_itself() -> None:
    # Given a threat that fell far, on four positives
    few = LabelMetrics(4, 96, 0.80, 0.5, 0.2)
    active, candidate = evaluation(), evaluation()
    active.labels["threat"], candidate.labels["threat"] = replace(few, roc_auc=0.83), few
    # Then it is noise; with one more it is not
    lenient = BARS.model_copy(update={"max_mean_auc_drop": 1.0})
    judgement = judge(candidate, active, lenient)
    assert judgement.promoted
    assert "threat" not in judgement.reason
    assert not judge(candidate, active, lenient.model_copy(update={"min_label_positives": 4})).promoted


@pytest.mark.parametrize(
    "nothing_to_compare",
    [
        Evaluation(100, "rows", dict.fromkeys(LABELS, LabelMetrics(4, 96, 0.9, 0.5, 0.2))),
        Evaluation(100, "rows", dict.fromkeys(LABELS, LabelMetrics(96, 4, 0.9, 0.5, 0.2))),
        evaluation(**dict.fromkeys(LABELS)),
    ],
    ids=["too few positives", "too few negatives", "one class"],
)
def test_where_nothing_can_be_compared_nothing_is_promoted(nothing_to_compare: Evaluation) -> None:
    judgement = judge(nothing_to_compare, nothing_to_compare, BARS)
    assert not judgement.promoted
    assert "none of the labels has 5 positives and negatives among the 100 held-out rows" in judgement.reason


def test_versions_measured_on_different_rows_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different rows"):
        judge(evaluation(), replace(evaluation(), dataset_sha256="others"), BARS)


AUC = st.none() | st.floats(0, 1)
METRICS = st.builds(LabelMetrics, st.integers(0, 20), st.integers(0, 20), AUC, AUC, st.none() | st.floats(0, 10))
EVALUATIONS = st.builds(
    Evaluation, st.integers(0, 100), st.just("rows"), st.fixed_dictionaries(dict.fromkeys(LABELS, METRICS))
)
ANY_BARS = st.builds(
    lambda label, mean, positives: BARS.model_copy(
        update={"max_label_auc_drop": label, "max_mean_auc_drop": mean, "min_label_positives": positives}
    ),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 20),
)


def comparable(measured: Evaluation, bars: TrainerSettings) -> bool:
    return any(
        metrics.roc_auc is not None and min(metrics.positives, metrics.negatives) >= bars.min_label_positives
        for metrics in measured.labels.values()
    )


@given(EVALUATIONS, ANY_BARS)
def test_an_equal_version_is_promoted_wherever_anything_can_be_compared(
    measured: Evaluation, bars: TrainerSettings
) -> None:
    assert judge(measured, measured, bars).promoted is comparable(measured, bars)


@given(EVALUATIONS, EVALUATIONS, ANY_BARS)
def test_there_is_a_reason_for_every_verdict(candidate: Evaluation, active: Evaluation, bars: TrainerSettings) -> None:
    judgement = judge(candidate, active, bars)
    assert judgement.reason
    if judgement.promoted:
        # No label that may be judged fell further than allowed
        for label in LABELS:
            new, old = candidate.labels[label], active.labels[label]
            if comparable(replace(candidate, labels={label: new}), bars) and None not in (new.roc_auc, old.roc_auc):
                assert old.roc_auc - new.roc_auc <= bars.max_label_auc_drop  # type: ignore[operator]
