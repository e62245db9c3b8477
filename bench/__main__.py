"""`python -m bench`: measures, prints tables, writes bench/results/DATE.json and DATE.png."""

import importlib
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from types import FrameType, ModuleType
from typing import Annotated

import typer

from bench.context import Context, read_texts
from bench.report import Report, draw, new_report, table
from bench.system import BenchProblem, servers
from cli.terminal import out, progress, say
from config.settings import ROOT

RESULTS = ROOT / "bench" / "results"
PARTS = ROOT / "var" / "bench"
"""Where a quick run, or one of some sections only, leaves its files."""
SECTIONS = {
    "efficiency": "efficiency",
    "rivals": "rivals",
    "host": "host_cost",
    "latency": "latency",
    "answers": "answers",
    "growth": "growth",
    "workers": "several_workers",
    "swap": "swap",
}
"""Name on the command line: module in bench.sections."""


def main(
    only: Annotated[str, typer.Option(help=f"Sections, separated by commas: {', '.join(SECTIONS)}.")] = "",
    quick: Annotated[bool, typer.Option(help="Small: whether all of it works, and roughly how fast.")] = False,
    to: Annotated[
        Path | None,
        typer.Option(help="The JSON; the PNG beside it. By default bench/results/DATE, or var/bench for a part."),
    ] = None,
    redraw: Annotated[
        Path | None, typer.Option(help="Print and draw a stored JSON once more, measuring nothing.", exists=True)
    ] = None,
) -> None:
    """Measure moderato on this machine; about half an hour on two cores that do nothing else, with --quick a fifth."""
    if redraw is not None:
        report = Report.read(redraw)
        for section in report.sections:
            _print(report, section)
        draw(report, redraw.with_suffix(".png"))
        return
    chosen = [section for section in only.split(",") if section] or list(SECTIONS)
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        raise typer.BadParameter(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    # As Ctrl-C does: everything that was started is stopped on the way out.
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job would ignore
    try:
        report = run(chosen, quick=quick)
    except KeyboardInterrupt:
        say("stopped; nothing is left running, and nothing was written")
        raise typer.Exit(130) from None
    folder = PARTS if quick or only else RESULTS
    stored = to or folder / f"{only.replace(',', '-') or date.today().isoformat()}.json"
    report.write(stored)
    draw(report, stored.with_suffix(".png"))
    say(f"{stored} and .png, after {report.seconds / 60:.0f} minutes")


def run(chosen: Sequence[str], *, quick: bool) -> Report:
    """Measure these sections, each of which prints its table; one that cannot be measured says why, and is left out."""
    report = new_report(shlex.join([Path(sys.executable).name, "-m", "bench", *sys.argv[1:]]), quick=quick)
    started = time.monotonic()
    texts = read_texts()
    with servers() as running:
        for section in chosen:
            module: ModuleType = importlib.import_module(f"bench.sections.{SECTIONS[section]}")
            with progress(section) as update:
                steps = iter(range(1, 1_000_000))

                def step(what: str) -> None:
                    update(next(steps), note=what)  # noqa: B023  called only within this turn of the loop

                try:
                    lines = module.measure(Context(texts, running, quick, step))
                except BenchProblem as problem:
                    say(f"{section}: {problem}")
                    continue
            report.sections[section] = module.TITLE
            report.lines.extend(lines)
            _print(report, section)
            running.tidy_up()
    report.seconds = time.monotonic() - started
    return report


def _print(report: Report, section: str) -> None:
    out.print(table(report.sections[section], report.of(section)), "")


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    typer.run(main)
