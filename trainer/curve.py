"""The curve of a training as a picture: what it learnt, and what the validation rows said meanwhile."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SMOOTHED_SHARE = 0.1
"""Of the points that one point of the smoothed loss is the mean of."""
TRAINING, VALIDATION, RATE = "#4472a8", "#c05a1c", "#3f8f5f"


def draw_curve(history: Sequence[Mapping[str, float | None]], path: Path) -> None:
    """Write the losses, the validation rows' mean ROC-AUC and the learning rate, each over the steps, as PNG.

    Args:
        history: as of `trainer.training.FineTuned`.
    """
    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)  # by itself, without pyplot: nothing is shown, and nothing stays in memory
    losses, aucs, rates = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 1])

    steps, loss = _series(history, "loss")
    losses.plot(steps, loss, color=TRAINING, alpha=0.3, linewidth=1)
    losses.plot(steps, _smoothed(loss), color=TRAINING, label="training, smoothed")
    _draw(losses, history, "validation_loss", VALIDATION, label="validation")
    losses.set_ylabel("loss")
    losses.legend(frameon=False)

    _draw(aucs, history, "validation_mean_roc_auc", VALIDATION)
    aucs.set_ylabel("validation mean ROC-AUC")
    if not len(_series(history, "validation_mean_roc_auc")[0]):
        aucs.text(0.5, 0.5, "not measured", transform=aucs.transAxes, ha="center", va="center", color="gray")
        aucs.set_yticks([])

    rates.plot(*_series(history, "learning_rate"), color=RATE)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.set_xlabel("step")
    for axes in (losses, aucs, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.savefig(path, format="png", dpi=100)


def _draw(axes: Axes, history: Sequence[Mapping[str, float | None]], name: str, color: str, label: str = "") -> None:
    steps, values = _series(history, name)
    if len(steps):
        axes.plot(steps, values, color=color, marker="o", markersize=4, label=label)


def _series(history: Sequence[Mapping[str, float | None]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(point["step"], value) for point in history if (value := point[name]) is not None]
    return np.array([step for step, _ in points]), np.array([value for _, value in points])


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each point and those before it, as many as the window has: nothing of what is to come."""
    window = max(1, round(len(values) * SMOOTHED_SHARE))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)
