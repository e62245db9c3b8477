"""The drawings of a report: SVG that stands in the page itself and takes its colours from the page's style.

No figure tells anything by colour alone: lines differ in their dashes and points in their shapes, and each figure
stands beside a table of the same figures, or has a description that is read aloud in its place.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

INK, FAINT = "#000001", "#000002"
SERIES = tuple(f"#0000{n}0" for n in range(1, 7))
"""Stand for the style's variables: matplotlib knows colours only, and the page has others in the dark."""
VARIABLES = {INK: "--ink", FAINT: "--faint"} | {colour: f"--series-{n}" for n, colour in enumerate(SERIES, 1)}

DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 2)))
SHAPES = "osD^vP"

STYLE: dict[Any, Any] = {
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 8.5,
    "grid.alpha": 0.35,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "path.simplify_threshold": 0.5,  # in points: keeps curves over many rows small
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.color": INK,
    "text.parse_math": False,  # a name may hold dollars
    "xtick.labelcolor": INK,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
}

WIDTH_IN = 4.4
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Dot:
    """A figure, with its interval where one is known."""

    value: float
    interval: tuple[float, float] | None = None


def roc_curves(curves: Mapping[str, Curve]) -> Markup:
    """False and true positive rate of each label. The axis is logarithmic: what is harmless is by far the most."""
    with _drawing("ROC curve of each label", height_in=3.2) as (axes, drawn):
        for n, (label, (false_positives, true_positives)) in enumerate(curves.items()):
            axes.plot(false_positives, true_positives, color=_colour(n), linestyle=_dashes(n), label=label)
        axes.set(xscale="log", xlim=(1e-3, 1), ylim=(0, 1.02))
        axes.set(xlabel="harmless comments that are flagged (logarithmic)", ylabel="harmful comments that are found")
        axes.xaxis.set_major_formatter(lambda rate, _: f"{100 * rate:.4g}%")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(loc="lower right", handlelength=3.2)
    return drawn[0]


def precision_recall_curves(curves: Mapping[str, Curve]) -> Markup:
    """Recall and precision of each label."""
    with _drawing("Precision and recall of each label", height_in=3.2) as (axes, drawn):
        for n, (label, (recall, precision)) in enumerate(curves.items()):
            axes.plot(recall, precision, color=_colour(n), linestyle=_dashes(n), label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.set(xlabel="recall: harmful comments that are found", ylabel="precision: flagged ones that are harmful")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(loc="lower left", handlelength=3.2)
    return drawn[0]


def reliability(label: str, bins: Sequence[Mapping[str, float]]) -> Markup:
    """How often comments of a score are what it says: on the diagonal, a score is a probability."""
    with _drawing(f"Reliability of {label}", width_in=3.0, height_in=2.6) as (axes, drawn):
        axes.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1)
        scores, shares = ([bin[key] for bin in bins] for key in ("mean_score", "share_positive"))
        axes.plot(scores, shares, color=SERIES[0], marker=SHAPES[0], linewidth=1)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="mean score", ylabel="share that is positive")
    return drawn[0]


def dots(
    title: str,
    rows: Mapping[str, Mapping[str, Dot]],
    *,
    axis: str,
    reference: tuple[str, float] | None = None,
) -> Markup:
    """A line for each of `rows`, on it a dot for each of its series with its interval.

    Args:
        axis: what is measured.
        reference: name and value of a line to hold them against.
    """
    series = list(dict.fromkeys(name for row in rows.values() for name in row))
    legend = len(series) > 1 or reference is not None
    height_in = 0.75 + (0.2 + 0.09 * len(series)) * len(rows) + 0.3 * legend
    with _drawing(title, height_in=height_in) as (axes, drawn):
        for n, name in enumerate(series):
            offset = (n - (len(series) - 1) / 2) * 0.22
            at = [(line + offset, row[name]) for line, row in enumerate(rows.values()) if name in row]
            for height, dot in at:
                if dot.interval is not None:
                    axes.plot(dot.interval, (height, height), color=_colour(n), linewidth=1.2)
            values = [dot.value for _, dot in at]
            heights = [height for height, _ in at]
            axes.plot(values, heights, color=_colour(n), marker=_shape(n), linestyle="none", label=name)
        if reference is not None:
            axes.axvline(reference[1], color=INK, linestyle="--", linewidth=1, label=reference[0])
        axes.set(xlabel=axis, ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), list(rows))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", visible=False)
        if legend:
            drawn_on = axes.get_figure()
            assert isinstance(drawn_on, Figure)
            drawn_on.legend(loc="outside upper center", ncols=3, handlelength=1.6, columnspacing=1.2)
    return drawn[0]


def history(title: str, points: Sequence[Mapping[str, Any]], series: Mapping[str, str], *, axis: str) -> Markup:
    """How a training went, over its steps.

    Args:
        points: of `trainer.training.FineTuned.history`; one that lacks a figure is left out of that line.
        series: what is drawn: a point's key, and what it is called.
    """
    with _drawing(title, height_in=2.5) as (axes, drawn):
        for n, (key, name) in enumerate(series.items()):
            known = [(point["step"], point[key]) for point in points if point.get(key) is not None]
            shape = _shape(n) if len(known) < 20 else ""
            axes.plot(*zip(*known, strict=True), color=_colour(n), linestyle=_dashes(n), marker=shape, label=name)
        axes.set(xlabel="step", ylabel=axis)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if len(series) > 1:
            axes.legend(handlelength=3.2)
    return drawn[0]


def _colour(n: int) -> str:
    """Of the n-th series. Its dashes and its shape tell it from another one of the same colour."""
    return SERIES[n % len(SERIES)]


def _dashes(n: int) -> Any:
    return DASHES[(n + n // len(SERIES)) % len(DASHES)]


def _shape(n: int) -> str:
    return SHAPES[(n + n // len(SERIES)) % len(SHAPES)]


@contextmanager
def _drawing(title: str, *, width_in: float = WIDTH_IN, height_in: float) -> Iterator[tuple[Axes, list[Markup]]]:
    """Axes to draw on; the list holds the drawing afterwards."""
    drawn: list[Markup] = []
    # The salt keeps what one figure defines apart from what another on the page does.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        figure = Figure((width_in, height_in), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        yield axes, drawn
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawn.append(_for_a_page(file.getvalue(), title))


def _for_a_page(svg: str, title: str) -> Markup:
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    # Its style element would hold for the whole page.
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"#0000[0-9a-f]{2}\b", lambda found: f"var({VARIABLES[found[0]]})", svg)
    opening = Markup('<svg role="img" aria-label="{}" ').format(title)
    return Markup(svg.replace("<svg ", str(opening), 1))
