"""Whether a candidate may replace the active version. Pure: two evaluations of the same rows, and the bars.

The question is non-inferiority: a candidate is promoted where each figure is shown, with 95 % confidence, to be worse
by no more than its bar. What cannot be shown is refused as well. As every figure must pass, their number gives chance
no further attempts, and nothing is to be corrected for it.

Both versions scored the same rows, so what counts is each row's part in the difference: a row that is hard for both
widens nothing. For ROC-AUC that is the interval of DeLong, DeLong and Clarke-Pearson (1988), computed as by Sun and Xu
(2014); means over labels and log losses follow from the same parts.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config.names import LABELS
from config.settings import TrainerSettings
from model.engine import Scores
from trainer.evaluation import Evaluation
from trainer.slices import bias_rows

STANDARD_ERRORS = 1.645
"""Which a normal variable stays below with 95 % probability."""
FEWEST_IN_MEAN = 2
"""Rows of each class for a label to count in a mean; one alone says nothing of how much chance there is in it."""
MOST_NAMED = 4
"""Failures that the reason spells out; the others are among the comparisons."""
ROC_AUC, LOG_LOSS = "ROC-AUC", "log loss"

Floats = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of both versions, and by how much the candidate's is worse on the same rows."""

    figure: str
    """`ROC-AUC`, `log loss`, `evaded ROC-AUC` or `BPSN AUC`."""
    of: str
    """A label, `mean` over the labels, or an identity group."""
    active: float
    candidate: float
    worse_by: float
    """How far a ROC-AUC fell or a log loss rose; negative where the candidate is better."""
    interval: tuple[float, float]
    """Of `worse_by`: with 95 % confidence it is at least the first, and with 95 % at most the second."""
    bar: float | None
    """What the interval's upper end must not pass; None where there are too few rows to judge the figure by itself."""
    passed: bool
    positives: int
    negatives: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """The gate's verdict, its reason in words, and every number it used."""

    promoted: bool
    reason: str
    comparisons: list[Comparison]

    def as_dict(self) -> dict[str, Any]:
        """For the run's row."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Figure:
    """A figure and each row's part in its error, (rows,): the root of their squares' sum is its standard error."""

    value: float
    parts: Floats
    positives: int
    negatives: int

    @property
    def fewest(self) -> int:
        return min(self.positives, self.negatives)


def judge(candidate: Evaluation, active: Evaluation, bars: TrainerSettings) -> Judgement:
    """Promote a candidate that is shown not to be worse than the active version on the same held-out rows.

    Ordering the comments as well is not enough: a version that scores all of them higher has the same ROC-AUC, and
    would hide twice as many. So the log loss is held as well.

    A label's ROC-AUC is judged by itself from `min_label_positives` of each class on. Below that its interval is too
    wide for an honest candidate to pass, and less sure than it claims. The label still counts in the mean, and its log
    loss is judged all the same: that is an average over all rows.

    Raises:
        ValueError: the two were measured on different rows.
    """
    if candidate.dataset_sha256 != active.dataset_sha256 or not np.array_equal(
        candidate.evaded_rows, active.evaded_rows
    ):
        raise ValueError("candidate and active version were measured on different rows; this is a bug")
    comparisons = list(_comparisons(candidate, active, bars))
    if all(each.bar is None for each in comparisons if each.figure == ROC_AUC and each.of in LABELS):
        reason = (
            f"none of the labels has {bars.min_label_positives} positives and negatives among the {candidate.rows} "
            "held-out rows, so nothing can be compared"
        )
        return Judgement(False, reason, comparisons)
    promoted = all(each.passed for each in comparisons)
    return Judgement(promoted, _in_words(comparisons, candidate.rows, bars), comparisons)


def _comparisons(candidate: Evaluation, active: Evaluation, bars: TrainerSettings) -> Iterator[Comparison]:
    truth = candidate.truth
    new, old = _roc_aucs(truth, candidate.scores), _roc_aucs(truth, active.scores)
    if new:
        yield _compare(ROC_AUC, "mean", _mean(new.values()), _mean(old.values()), bars.max_mean_auc_drop)
    for label in new:
        bar = bars.max_label_auc_drop if new[label].fewest >= bars.min_label_positives else None
        yield _compare(ROC_AUC, label, new[label], old[label], bar)
    for column, label in enumerate(LABELS):
        if label in new:
            loss, old_loss = (_log_loss(truth[:, column], each.scores[:, column]) for each in (candidate, active))
            yield _compare(LOG_LOSS, label, loss, old_loss, bars.max_label_log_loss_rise)
    evaded_new, evaded_old = _evaded(candidate), _evaded(active)
    if evaded_new and evaded_old:
        yield _compare("evaded ROC-AUC", "mean", _mean(evaded_new), _mean(evaded_old), bars.max_evasion_auc_drop)
    toxic = LABELS.index("toxic")
    for group, mentioned in candidate.mentions.items():
        counted = np.where(bias_rows(truth[:, toxic] >= 0.5, mentioned)["bpsn_auc"], truth[:, toxic], np.nan)
        auc, old_auc = (_roc_auc(counted, each.scores[:, toxic]) for each in (candidate, active))
        if auc.fewest >= max(bars.min_label_positives, FEWEST_IN_MEAN):
            yield _compare("BPSN AUC", group, auc, old_auc, bars.max_bias_auc_drop)


def _compare(figure: str, of: str, new: _Figure, old: _Figure, bar: float | None) -> Comparison:
    worse_by = new.value - old.value if figure == LOG_LOSS else old.value - new.value
    error = STANDARD_ERRORS * float(np.sqrt(np.square(new.parts - old.parts).sum()))
    return Comparison(
        figure=figure,
        of=of,
        active=old.value,
        candidate=new.value,
        worse_by=worse_by,
        interval=(worse_by - error, worse_by + error),
        bar=bar,
        passed=bar is None or worse_by + error <= bar,
        positives=new.positives,
        negatives=new.negatives,
    )


def _roc_aucs(truth: Floats, scores: Scores) -> dict[str, _Figure]:
    """Of the labels that have rows enough to count in a mean."""
    figures = {label: _roc_auc(truth[:, column], scores[:, column]) for column, label in enumerate(LABELS)}
    return {label: figure for label, figure in figures.items() if figure.fewest >= FEWEST_IN_MEAN}


def _evaded(evaluation: Evaluation) -> list[_Figure]:
    """Of each evasion: the mean ROC-AUC of the rows that are written so."""
    truth = evaluation.truth[evaluation.evaded_rows]
    every = [_roc_aucs(truth, scores) for scores in evaluation.evaded_scores.values()]
    return [_mean(figures.values()) for figures in every if figures]


def _roc_auc(truth: Floats, scores: Floats) -> _Figure:
    """Of the rows whose truth is known; NaN where a class has too few rows to count in a mean."""
    positive, negative = np.flatnonzero(truth >= 0.5), np.flatnonzero(truth < 0.5)
    above, below = len(positive), len(negative)
    parts = np.zeros(len(truth))
    if min(above, below) < FEWEST_IN_MEAN:
        return _Figure(np.nan, parts, above, below)
    outscored = _share_below(scores[positive], scores[negative])
    outscoring = 1 - _share_below(scores[negative], scores[positive])
    value = float(outscored.mean())
    parts[positive] = (outscored - value) / np.sqrt(above * (above - 1))
    parts[negative] = (outscoring - value) / np.sqrt(below * (below - 1))
    return _Figure(value, parts, above, below)


def _share_below(scores: Floats, others: Floats) -> Floats:
    """Of each score: the share of the others that are lower; an equal one counts half."""
    ordered = np.sort(others)
    lower, not_higher = (np.searchsorted(ordered, scores, side) for side in ("left", "right"))
    share: Floats = (lower + not_higher) / (2 * len(others))
    return share


def _log_loss(truth: Floats, scores: Floats) -> _Figure:
    """Of the rows whose truth is known, of which there must be two."""
    known = ~np.isnan(truth)
    positive = truth[known] >= 0.5
    right = np.where(positive, scores[known].astype(np.float64), 1 - scores[known].astype(np.float64))
    losses = -np.log(right.clip(min=np.finfo(np.float64).eps))
    parts = np.zeros(len(truth))
    parts[known] = (losses - losses.mean()) / np.sqrt(len(losses) * (len(losses) - 1))
    return _Figure(float(losses.mean()), parts, int(positive.sum()), int((~positive).sum()))


def _mean(figures: Collection[_Figure]) -> _Figure:
    """Of figures over the same rows. Their parts are averaged row by row: a row's chance is one for all labels."""
    return _Figure(
        float(np.mean([each.value for each in figures])),
        np.mean([each.parts for each in figures], axis=0),
        sum(each.positives for each in figures),
        sum(each.negatives for each in figures),
    )


def _in_words(comparisons: Sequence[Comparison], rows: int, bars: TrainerSettings) -> str:
    """The failures first, the worst ahead; then what was measured, and what was not judged by itself."""
    failures = sorted((each for each in comparisons if not each.passed), key=_beyond_bar, reverse=True)
    verdict = "not worse than the active version"
    if failures:
        is_worse = _beyond_bar(failures[0]) > 0
        verdict = "worse than the active version" if is_worse else "may be worse than the active version"
        verdict += f": {'; '.join(map(_failure, failures[:MOST_NAMED]))}"
        verdict += f"; and {len(failures) - MOST_NAMED} more" if len(failures) > MOST_NAMED else ""
    aucs = [each for each in comparisons if each.figure == ROC_AUC]
    figures = ", ".join(f"{each.of} {each.candidate:.4f} (active {each.active:.4f})" for each in aucs)
    few = [f"{each.of} ({each.positives} positives, {each.negatives} negatives)" for each in aucs if each.bar is None]
    unjudged = (
        f". Fewer than {bars.min_label_positives} positives or negatives, so not judged by its own ROC-AUC: "
        f"{', '.join(few)}"
        if few
        else ""
    )
    return f"{verdict}. ROC-AUC on {rows} held-out rows: {figures}{unjudged}"


def _beyond_bar(failed: Comparison) -> float:
    """How far the figure itself, not its interval, is past the bar."""
    return failed.worse_by - (failed.bar or 0)


def _failure(failed: Comparison) -> str:
    return (
        f"{failed.of} {failed.figure} is worse by {failed.worse_by:.4f} (with 95 % confidence by up to "
        f"{failed.interval[1]:.4f}; {failed.bar:g} is allowed)"
    )
