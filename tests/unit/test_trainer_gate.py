"""Whether a version may replace the active one."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from config.names import LABELS
from config.settings import TrainerSettings, load_settings
from trainer.evaluation import Evaluation
from trainer.gate import Comparison, judge
from trainer.metrics import Predictions, bootstrap

BARS = load_settings({}).trainer.model_copy(
    update={
        "max_label_auc_drop": 0.02,
        "max_mean_auc_drop": 0.005,
        "max_label_log_loss_rise": 0.1,
        "max_evasion_auc_drop": 0.02,
        "max_bias_auc_drop": 0.03,
        "min_label_positives": 30,
    }
)
TOXIC, THREAT = LABELS.index("toxic"), LABELS.index("threat")


def scored(rows: int = 600, *, seed: int = 1, positive: float = 0.3, known: float = 0.9) -> Evaluation:
    """A version that mostly tells the classes apart, with some ties and some labels unknown."""
    random = np.random.default_rng(seed)
    truth = (random.random((rows, 6)) < positive).astype(np.float32)
    logits = 4 * truth - 2 + random.normal(size=truth.shape)
    truth[random.random(truth.shape) > known] = np.nan
    scores = (1 / (1 + np.exp(-logits))).round(3).astype(np.float32)
    return Evaluation(rows, "the same rows", {}, scores=scores, truth=truth)


def changed(evaluation: Evaluation, change: Any, column: int | slice = slice(None)) -> Evaluation:
    """The same rows with some of the scores changed."""
    scores = evaluation.scores.copy()
    scores[:, column] = change(scores[:, column])
    return replace(evaluation, scores=scores)


def blurred(evaluation: Evaluation, by: float, column: int | slice = slice(None), seed: int = 2) -> Evaluation:
    """The same rows, told apart less well."""
    noise = np.random.default_rng(seed).normal(size=evaluation.scores.shape)[:, column] * by

    def blur(scores: np.ndarray) -> np.ndarray:
        logits = np.log(scores.clip(1e-3, 0.999) / (1 - scores.clip(1e-3, 0.999))) + noise
        return 1 / (1 + np.exp(-logits))

    return changed(evaluation, blur, column)


def comparison(candidate: Evaluation, active: Evaluation, figure: str, of: str) -> Comparison:
    [found] = [each for each in judge(candidate, active, BARS).comparisons if (each.figure, each.of) == (figure, of)]
    return found


# --- Its figures ---


def test_its_figures_are_those_of_the_known_rows() -> None:
    active = scored()
    candidate = blurred(active, 1.0)
    for column, label in enumerate(LABELS):
        known = ~np.isnan(active.truth[:, column])
        truth = active.truth[known, column]
        for figure, expected in (("ROC-AUC", roc_auc_score), ("log loss", log_loss)):
            found = comparison(candidate, active, figure, label)
            sign = 1 if figure == "ROC-AUC" else -1
            assert found.active == pytest.approx(expected(truth, active.scores[known, column].astype(np.float64)))
            assert found.candidate == pytest.approx(expected(truth, candidate.scores[known, column].astype(np.float64)))
            assert found.worse_by == pytest.approx(sign * (found.active - found.candidate))
            assert (found.positives, found.negatives) == (truth.sum(), len(truth) - truth.sum())
    labels = [comparison(candidate, active, "ROC-AUC", label).candidate for label in LABELS]
    assert comparison(candidate, active, "ROC-AUC", "mean").candidate == pytest.approx(np.mean(labels))


@pytest.mark.parametrize("of", ["toxic", "mean"])
def test_the_interval_is_that_of_resampled_rows(of: str) -> None:
    # Given a difference, and the same rows drawn again and again with both versions' scores beside each other
    active = scored(400)
    candidate = blurred(active, 1.5)
    labels = ["toxic"] if of == "toxic" else LABELS
    drops = np.zeros(1_000)
    for label in labels:
        truth = active.truth[:, LABELS.index(label)]
        rows = np.flatnonzero(~np.isnan(truth))
        parts = {
            name: Predictions(rows, each.scores[rows, LABELS.index(label)].astype(float), truth[rows] == 1, truth == 1)
            for name, each in (("active", active), ("candidate", candidate))
        }
        resampled = bootstrap(parts, 400)
        drops += (resampled["active"]["roc_auc"] - resampled["candidate"]["roc_auc"]) / len(labels)
    # Then the interval is as wide as theirs
    low, high = comparison(candidate, active, "ROC-AUC", of).interval
    assert (high - low) / 2 == pytest.approx(1.645 * drops.std(), rel=0.1)


# --- Its verdict ---


def test_a_version_that_differs_by_a_hair_is_promoted_and_the_reason_has_its_figures() -> None:
    active = scored()
    judgement = judge(blurred(active, 0.02), active, BARS)
    assert judgement.promoted, judgement.reason
    assert judgement.reason.startswith("not worse than the active version. ROC-AUC on 600 held-out rows: mean 0.99")
    assert ", toxic 0.99" in judgement.reason
    assert "alone" not in judgement.reason


@pytest.mark.parametrize(("column", "named"), [(TOXIC, "toxic ROC-AUC"), (slice(None), "mean ROC-AUC")])
def test_a_version_that_tells_them_apart_less_well_is_refused(column: int | slice, named: str) -> None:
    active = scored()
    judgement = judge(blurred(active, 3.0, column), active, BARS)
    assert not judgement.promoted
    assert judgement.reason.startswith("worse than the active version: ")
    assert named in str([each.of + " " + each.figure for each in judgement.comparisons if not each.passed])


def test_a_fall_within_the_bar_that_too_few_rows_cannot_bound_is_refused() -> None:
    # Given a label that fell by less than is allowed, on few rows that the versions order quite differently
    active = scored(120)
    candidate = next(
        candidate
        for seed in range(100)
        if 0 < comparison(candidate := blurred(active, 1.2, TOXIC, seed), active, "ROC-AUC", "toxic").worse_by < 0.02
        and comparison(candidate, active, "ROC-AUC", "toxic").interval[1] > 0.02
    )
    # Then that may be chance, and the words do not say that it is worse
    judgement = judge(candidate, active, BARS.model_copy(update={"max_mean_auc_drop": 1.0}))
    assert not judgement.promoted
    assert judgement.reason.startswith("may be worse than the active version: toxic ROC-AUC is worse by 0.01")
    assert "0.02" in judgement.reason


def test_scores_that_moved_refuse_though_their_order_stayed() -> None:
    # Given a candidate that orders comments as well, but scores them all higher
    active = scored()
    candidate = changed(active, lambda scores: scores**0.1, TOXIC)
    # Then it is refused: thresholds would hide what they did not
    judgement = judge(candidate, active, BARS)
    assert not judgement.promoted
    assert [(each.figure, each.of) for each in judgement.comparisons if not each.passed] == [("log loss", "toxic")]
    assert "toxic log loss" in judgement.reason


def test_the_worst_failures_are_named_first_and_the_others_counted() -> None:
    active = scored()
    reason = judge(changed(blurred(active, 3.0), lambda scores: 1 - scores, TOXIC), active, BARS).reason
    assert reason.startswith("worse than the active version")
    assert reason.index("toxic log loss") < reason.index("toxic ROC-AUC")
    failures = [each for each in judge(blurred(active, 3.0), active, BARS).comparisons if not each.passed]
    assert f"; and {len(failures) - 4} more. ROC-AUC on" in judge(blurred(active, 3.0), active, BARS).reason


def test_a_label_of_too_few_rows_is_judged_in_the_mean_alone() -> None:
    # Given a label with twelve positives, on which the candidate is somewhat worse
    active = scored()
    active.truth[np.flatnonzero(active.truth[:, THREAT] == 1)[12:], THREAT] = np.nan
    candidate = blurred(active, 2.0, THREAT)
    threat = comparison(candidate, active, "ROC-AUC", "threat")
    assert threat.worse_by > 0.02
    # Then the label itself says nothing and the words say so
    assert (threat.bar, threat.passed, threat.positives) == (None, True, 12)
    reason = judge(candidate, active, BARS).reason
    assert reason.endswith(f"threat (12 positives, {threat.negatives} negatives)")
    # But one that learnt the contrary is refused for its mean, and for its log loss
    contrary = judge(changed(active, lambda scores: 1 - scores, THREAT), active, BARS)
    failed = {(each.figure, each.of) for each in contrary.comparisons if not each.passed}
    assert failed == {("ROC-AUC", "mean"), ("log loss", "threat")}


def test_a_version_that_evaders_get_past_is_refused() -> None:
    # Given scores of obfuscated rows, under one of two evasions hardly better than chance
    active = replace(scored(), evaded_rows=np.arange(0, 600, 2))
    plain = active.scores[::2]
    active = replace(active, evaded_scores={"spaced": plain, "dotted": plain})
    judgement = judge(replace(active, evaded_scores={"spaced": plain, "dotted": plain[::-1]}), active, BARS)
    # Then the candidate is refused for that alone
    assert [each.figure for each in judgement.comparisons if not each.passed] == ["evaded ROC-AUC"]
    assert "mean evaded ROC-AUC" in judgement.reason


def test_a_version_that_takes_a_mention_for_an_insult_is_refused() -> None:
    # Given rows of which one in twenty mentions a group, and a candidate to whom that is toxic enough
    active = scored(2_000)
    mentioned = np.arange(2_000) % 20 == 0
    active = replace(active, mentions={"any": mentioned, "rare": np.arange(2_000) < 20})
    scores = active.scores.copy()
    scores[mentioned, TOXIC] **= 0.4
    judgement = judge(replace(active, scores=scores), active, BARS)
    # Then it is refused for that; of a group with few rows nothing is said
    assert [(each.figure, each.of) for each in judgement.comparisons if not each.passed] == [("BPSN AUC", "any")]
    assert "rare" not in {each.of for each in judgement.comparisons}
    # And the figure is over harmless rows that mention it and toxic ones that do not
    counted = mentioned == (active.truth[:, TOXIC] == 0)
    counted &= ~np.isnan(active.truth[:, TOXIC])
    bpsn = comparison(active, active, "BPSN AUC", "any")
    assert bpsn.active == pytest.approx(roc_auc_score(active.truth[counted, TOXIC], active.scores[counted, TOXIC]))


def test_a_group_that_one_comment_mentions_has_no_figure() -> None:
    # Given bars that ask for no more than one comment of each class, and a group of which one is harmless
    active = scored()
    harmless = int(np.flatnonzero(active.truth[:, LABELS.index("toxic")] == 0)[0])
    active = replace(active, mentions={"one": np.arange(active.rows) == harmless})
    # Then its figure is not a number, and is none
    judgement = judge(active, active, BARS.model_copy(update={"min_label_positives": 1}))
    assert "BPSN AUC" not in {each.figure for each in judgement.comparisons}
    assert judgement.promoted


@pytest.mark.parametrize("positive", [0.02, 0.98, 0.0, 1.0])
def test_where_nothing_can_be_compared_nothing_is_promoted(positive: float) -> None:
    judgement = judge(scored(100, positive=positive), scored(100, positive=positive), BARS)
    assert not judgement.promoted
    assert "none of the labels has 30 positives and negatives among the 100 held-out rows" in judgement.reason
    assert json.loads(json.dumps(judgement.as_dict(), allow_nan=False))["promoted"] is False


@pytest.mark.parametrize("other", [{"dataset_sha256": "others"}, {"evaded_rows": np.arange(9)}])
def test_versions_measured_on_different_rows_are_not_compared(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="different rows"):
        judge(scored(), replace(scored(), **other), BARS)


# --- Of any two versions ---

EVALUATIONS = st.builds(
    scored, st.integers(50, 300), seed=st.integers(0, 99), positive=st.floats(0.05, 0.95), known=st.floats(0.2, 1)
)
SETTINGS_OF_BARS = (
    "max_label_auc_drop",
    "max_mean_auc_drop",
    "max_label_log_loss_rise",
    "max_evasion_auc_drop",
    "max_bias_auc_drop",
)
ANY_BARS = st.fixed_dictionaries(dict.fromkeys(SETTINGS_OF_BARS, st.floats(0, 0.3))).map(
    lambda bars: BARS.model_copy(update={**bars, "min_label_positives": 5})
)


def with_more_rows(evaluation: Evaluation) -> Evaluation:
    """Obfuscated rows and mentions as well."""
    rows = np.arange(0, evaluation.rows, 2)
    return replace(
        evaluation,
        evaded_rows=rows,
        evaded_scores={"spaced": evaluation.scores[rows]},
        mentions={"any": np.arange(evaluation.rows) % 2 == 0},
    )


@given(EVALUATIONS, ANY_BARS)
def test_an_equal_version_is_promoted_wherever_anything_can_be_compared(
    evaluation: Evaluation, bars: TrainerSettings
) -> None:
    judgement = judge(with_more_rows(evaluation), with_more_rows(evaluation), bars)
    classes = [min((column == 1).sum(), (column == 0).sum()) for column in evaluation.truth.T]
    assert judgement.promoted is bool(max(classes) >= 5), judgement.reason


@given(EVALUATIONS, st.integers(0, 9))
def test_shuffled_scores_are_refused(active: Evaluation, seed: int) -> None:
    shuffled = replace(active, scores=np.random.default_rng(seed).permutation(active.scores))
    assert not judge(shuffled, active, BARS).promoted


@given(EVALUATIONS, st.floats(0, 2), ANY_BARS, st.sampled_from(SETTINGS_OF_BARS), st.floats(0, 1))
def test_a_wider_bar_refuses_nothing_that_a_narrower_one_lets_pass(
    active: Evaluation, blur: float, bars: TrainerSettings, widened: str, by: float
) -> None:
    active = with_more_rows(active)
    candidate = with_more_rows(blurred(active, blur))
    narrower = judge(candidate, active, bars)
    wider = judge(candidate, active, bars.model_copy(update={widened: getattr(bars, widened) + by}))
    assert wider.promoted or not narrower.promoted
    # And what is promoted passed every bar; what is refused did not, and is named
    for judgement in (narrower, wider):
        failures = [each for each in judgement.comparisons if not each.passed]
        assert judgement.promoted is (not failures and not judgement.reason.startswith("none of"))
        assert all(each.interval[1] > (each.bar or 0) for each in failures)
        json.dumps(judgement.as_dict(), allow_nan=False)
