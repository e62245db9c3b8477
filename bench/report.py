"""What a run leaves behind: the JSON, which holds all of it, and the table and the chart that are drawn from it."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from bench.measure import Aim, Line
from config.settings import ROOT

PACKAGES = ("celery", "kombu", "redis", "sqlalchemy", "psycopg", "onnxruntime", "torch", "tokenizers", "numpy")


@dataclass(slots=True)
class Report:
    """One run, with what is needed to repeat it."""

    command: str
    commit: str
    started_at: str
    seconds: float
    quick: bool
    machine: dict[str, Any]
    versions: dict[str, str]
    sections: dict[str, str]
    """Each section's title by its name."""
    lines: list[Line] = field(default_factory=list)

    def of(self, section: str) -> list[Line]:
        return [line for line in self.lines if line.section == section]

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Report":
        facts = json.loads(path.read_text(encoding="utf-8"))
        lines = [
            Line(**line | {"samples": tuple(line["samples"]), "aim": line["aim"] and Aim(**line["aim"])})
            for line in facts.pop("lines")
        ]
        return cls(**facts, lines=lines)


def new_report(command: str, *, quick: bool) -> Report:
    """An empty report of this machine, this commit and these versions."""
    return Report(
        command=command,
        commit=_commit(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=0.0,
        quick=quick,
        machine={
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "system": platform.platform(),
            "load_before": os.getloadavg()[0],
        },
        versions={"python": platform.python_version()} | dict(_installed(PACKAGES)),
        sections={},
    )


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit + " with changes" if git("status", "--porcelain", "--untracked-files=no") else commit
    except OSError:
        return "unknown"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _installed(packages: Iterable[str]) -> Iterable[tuple[str, str]]:
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


# --- The table -------------------------------------------------------------------------------------------------------


def table(title: str, lines: Sequence[Line]) -> Table:
    """Medians, what they ranged over, and whether they reach what is aimed at."""
    drawn = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    drawn.add_column("")
    for name in ("median", "lowest to highest", "aim"):
        drawn.add_column(name, justify="right")
    drawn.add_column("")
    for line in lines:
        if not line.printed:
            continue
        unit = "×" if line.unit == "x" else line.unit
        spread = f"{shown(line.low)} to {shown(line.high)}" if len(line.samples) > 1 else ""
        aim = "" if line.aim is None else f"{'≥' if line.aim.sense == '>=' else '≤'} {shown(line.aim.value)}"
        if line.reached is not None:
            aim += " [green]✓[/]" if line.reached else " [red]✗[/]"
        drawn.add_row(line.what, f"{shown(line.median)} {unit}", spread, aim, line.note)
    return drawn


def shown(value: float) -> str:
    """Three digits that mean something, without an exponent."""
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


# --- The chart -------------------------------------------------------------------------------------------------------


def draw(report: Report, path: Path) -> None:
    """One panel for each section: medians as bars, their spread as whiskers, aims as marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(title, [line for line in report.of(name) if line.charted]) for name, title in report.sections.items()]
    panels = [(title, lines) for title, lines in panels if lines]
    heights = [len(lines) + 2 for _, lines in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(11, 0.34 * sum(heights) + 1),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for (title, lines), axis in zip(panels, axes[:, 0], strict=True):
        medians = [line.median for line in lines]
        whiskers = [
            [median - line.low for median, line in zip(medians, lines, strict=True)],
            [line.high - median for median, line in zip(medians, lines, strict=True)],
        ]
        colours = ["#c44e52" if line.reached is False else "#4c72b0" for line in lines]
        places = range(len(lines))
        axis.barh(places, medians, color=colours, height=0.6, xerr=whiskers, error_kw={"ecolor": "#888888"})
        for place, line in zip(places, lines, strict=True):
            beyond = max(line.high, line.aim.value if line.aim and line.aim.value < 1.2 * line.high else 0)
            axis.text(beyond, place, f"  {shown(line.median)}", va="center", fontsize=8)
            if line.aim is not None:
                axis.plot([line.aim.value] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
        axis.set_yticks(places, [line.what for line in lines], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        unit = lines[0].unit
        axis.set_title(f"{title}, {'ratio' if unit == 'x' else unit}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    machine = f"{report.machine['cores']} cores of {report.machine['cpu']}"
    figure.suptitle(
        f"{machine} · {report.commit} · {report.started_at[:10]}{', quick' if report.quick else ''}   (black: the aim)",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
