"""Whether a candidate may replace the active version. Pure: two evaluations and the bars."""

from dataclasses import dataclass

from config.names import LABELS
from config.settings import TrainerSettings
from trainer.evaluation import Evaluation


@dataclass(frozen=True, slots=True)
class Judgement:
    """The gate's verdict with its reason in words, every number it used included."""

    promoted: bool
    reason: str


def judge(candidate: Evaluation, active: Evaluation, bars: TrainerSettings) -> Judgement:
    """Promote a candidate that is not worse than the active version on the same held-out rows.

    Ordering the comments as well is not enough: a version that scores all of them higher has the same ROC-AUC, and
    would hide twice as many. So the log loss is held as well.

    A label counts by itself only where the rows hold at least `min_label_positives` of each class: below that
    its figure is noise.

    Raises:
        ValueError: the two were measured on different rows.
    """
    if candidate.dataset_sha256 != active.dataset_sha256:
        raise ValueError("candidate and active version were measured on different rows; this is a bug")
    failures: list[str] = []
    figures: list[str] = []
    for label in LABELS:
        new, old = candidate.labels[label], active.labels[label]
        if new.roc_auc is None or old.roc_auc is None or min(new.positives, new.negatives) < bars.min_label_positives:
            continue
        figures.append(f"{label} {new.roc_auc:.4f} (active {old.roc_auc:.4f})")
        if old.roc_auc - new.roc_auc > bars.max_label_auc_drop:
            failures.append(
                f"{label} fell by {old.roc_auc - new.roc_auc:.4f}, more than the {bars.max_label_auc_drop:g} allowed"
            )
        if old.log_loss is not None and new.log_loss is not None:
            rise = new.log_loss - old.log_loss
            if rise > bars.max_label_log_loss_rise:
                failures.append(
                    f"{label}'s log loss rose by {rise:.4f} to {new.log_loss:.4f}, more than the "
                    f"{bars.max_label_log_loss_rise:g} allowed: its scores no longer mean what the thresholds expect"
                )
    if not figures:
        return Judgement(
            False,
            f"none of the labels has {bars.min_label_positives} positives and negatives among the {candidate.rows} "
            "held-out rows, so nothing can be compared",
        )
    new_mean, old_mean = candidate.mean_roc_auc, active.mean_roc_auc
    assert new_mean is not None and old_mean is not None  # a label had one
    if old_mean - new_mean > bars.max_mean_auc_drop:
        failures.append(f"the mean fell by {old_mean - new_mean:.4f}, more than the {bars.max_mean_auc_drop:g} allowed")
    measured = (
        f"ROC-AUC on {candidate.rows} held-out rows: mean {new_mean:.4f} (active {old_mean:.4f}), {', '.join(figures)}"
    )
    if failures:
        return Judgement(False, f"worse than the active version: {'; '.join(failures)}. {measured}")
    return Judgement(True, f"not worse than the active version. {measured}")
