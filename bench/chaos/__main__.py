"""`python -m bench.chaos`: breaks everything on purpose, and says whether a comment was lost or decided twice."""

import json
import secrets
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.table import Table

from bench.chaos.account import MOST_LISTED, Account
from bench.chaos.monkey import Strike
from bench.chaos.plan import KINDS, LOSING, draw_plan
from bench.chaos.run import as_json, run
from bench.measure import Line
from bench.report import Report, draw, new_report, table
from bench.system import BenchProblem
from cli.terminal import out, progress, say
from config.settings import ROOT

RESULTS = ROOT / "bench" / "results"
RUNS = ROOT / "var" / "chaos"
FULL_MINUTES = 10.0
RECOVERY = "recovery"
HELP = (
    "Break a whole system of its own while comments stream: Redis, a database, two workers, a trainer, four producers "
    "and a sender of mutated messages. A supervisor starts again what dies, as Docker would; nobody else helps. "
    "Then everything drains, and each comment that submit returned for must have one decision or one dead letter. "
    "Ends with status 1 where the promise broke; logs, journals and the account are in var/chaos/SEED. "
    "The same seed draws the same faults at the same times; what they hit is the machine's matter."
)


def main(
    seed: Annotated[int | None, typer.Option(help="Draws the faults; by default a new one, which is printed.")] = None,
    minutes: Annotated[
        float, typer.Option(help="For which comments stream and faults strike.", min=0.1)
    ] = FULL_MINUTES,
    faults: Annotated[
        str, typer.Option(help=f"Kinds, separated by commas; all but {LOSING} by default: {', '.join(KINDS)}.")
    ] = "",
    database: Annotated[str, typer.Option(help="postgres or sqlite.")] = "postgres",
    lose_redis: Annotated[
        bool, typer.Option(help="Redis also loses all it holds, again and again; every producer is durable then.")
    ] = False,
    keep: Annotated[bool, typer.Option(help="Keep the figures of a shorter run in bench/results too.")] = False,
) -> None:
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    kinds = _kinds(faults, database, lose_redis=lose_redis)
    plan = draw_plan(seed, minutes * 60, kinds)
    # As Ctrl-C does: everything that was started is stopped on the way out.
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    again = f"--seed {seed} --minutes {minutes:g} --database {database}"
    again += (f" --faults {faults}" if faults else "") + (" --lose-redis" if lose_redis else "")
    say(f"seed {seed}: {len(plan)} faults in {minutes:g} minutes. The same again: make chaos ARGS='{again}'")
    report = new_report(shlex.join(["python", "-m", "bench.chaos", *sys.argv[1:]]), quick=minutes < FULL_MINUTES)
    started = time.monotonic()
    folder = RUNS / str(seed)
    try:
        with tempfile.TemporaryDirectory() as scratch, progress("chaos", minutes * 60) as update:
            account, strikes = run(
                plan,
                seconds=minutes * 60,
                seed=seed,
                database=database,
                version=_small_version(Path(scratch)),
                folder=folder,
                durable=True if lose_redis else None,
                step=lambda elapsed_s, note: update(elapsed_s, note=note),
            )
    except KeyboardInterrupt:
        say("stopped; nothing is left running")
        raise typer.Exit(130) from None
    except BenchProblem as problem:
        say(str(problem))
        raise typer.Exit(2) from None
    report.seconds = time.monotonic() - started
    _fill(report, account)
    out.print(_account_table(account), "", table(report.sections[RECOVERY], report.of(RECOVERY)), "")
    say_what_broke(account, folder)
    kept = RESULTS if keep or (minutes >= FULL_MINUTES and not faults) else folder
    _store(report, account, strikes, kept / f"chaos-{date.today().isoformat()}-seed{seed}.json")
    raise typer.Exit(1 if account.broken else 0)


main.__doc__ = HELP


def _kinds(chosen: str, database: str, *, lose_redis: bool) -> list[str]:
    if database not in ("postgres", "sqlite"):
        raise typer.BadParameter(f"database {database!r}; there are postgres and sqlite")
    possible = [name for name, kind in KINDS.items() if database in kind.databases and (lose_redis or name != LOSING)]
    kinds = [name for name in chosen.split(",") if name] or possible
    if unknown := sorted(set(kinds) - set(possible)):
        raise typer.BadParameter(f"no fault {', '.join(unknown)} in this mode; there are {', '.join(possible)}")
    return kinds


def _small_version(folder: Path) -> Path:
    # Here: they load torch.
    from transformers.utils.logging import disable_progress_bar

    from bench.tiny import write_tiny_version

    disable_progress_bar()
    return write_tiny_version(folder, "small").directory


def _account_table(account: Account) -> Table:
    drawn = Table(title="Account", title_justify="left", title_style="bold", show_edge=False, show_header=False)
    drawn.add_column("")
    drawn.add_column("", justify="right")
    for what, figure in figures(account).items():
        drawn.add_row(what, f"{figure:,.0f}")
    for promise, found in account.broken.items():
        drawn.add_row(f"[red]✗ broken: {promise}[/]", f"{len(found):,}")
    if not account.broken:
        drawn.add_row("[green]✓ nothing lost, nothing twice, nothing left[/]", "")
    return drawn


def figures(account: Account) -> dict[str, float]:
    """The account's numbers, each in words."""
    return {
        "comments that submit returned for": account.submitted,
        "  decided": account.decided,
        **{f"  dead letters: {reason}": count for reason, count in sorted(account.dead.items())},
        "comments that submit raised for, or whose producer died meanwhile": account.unknown,
        "  decided all the same, once": account.unknown_decided,
        **{f"  raised {name}, times": count for name, count in sorted(account.failures.items())},
        "mutated messages": account.mutated,
        "  their comments decided": account.mutated_decided,
        **{f"  their dead letters: {reason}": count for reason, count in sorted(account.mutated_dead.items())},
        "decisions a second, outages included": account.comments_per_s,
        "versions that decided": len(account.versions),
        "versions that a worker refused, times": account.refused_loads,
        **{f"training runs {state}": count for state, count in sorted(account.training_runs.items())},
        "processes that ended though nobody killed them": len(account.deaths),
    }


def _fill(report: Report, account: Account) -> None:
    report.sections[RECOVERY] = "From the end of a fault to the next committed decision that was submitted after it"
    for kind, seconds in sorted(account.recoveries.items()):
        alone = account.undisturbed.get(kind, [])
        note = f"{len(seconds)} × {KINDS[kind].what}"
        if alone:
            note += f"; {len(alone)} × alone, at most {max(alone):.1f} s"
        report.lines.append(Line(RECOVERY, kind, tuple(seconds), "s", note=note))


def say_what_broke(account: Account, folder: Path) -> None:
    for promise, found in account.broken.items():
        say(f"BROKEN: {promise}: {len(found)}")
        for what in found[:MOST_LISTED]:
            say(f"  {what}")
    for death in account.deaths[:MOST_LISTED]:
        say(f"ended by itself: {death}")
    say(f"logs, journals and all that broke: {folder}")


def _store(report: Report, account: Account, strikes: Sequence[Strike], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report) | as_json(account, strikes), indent=1) + "\n", encoding="utf-8")
    if report.lines:
        draw(report, path.with_suffix(".png"))
    say(f"{path}")


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    typer.run(main)
