"""One run: comments stream, the faults of a plan strike, everything drains, and the account is taken."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from bench.chaos.account import Account, leftovers, take_account
from bench.chaos.monkey import Monkey, Strike
from bench.chaos.plan import Fault
from bench.chaos.system import ChaosSystem

TICK_S = 0.05
SETTLE_S = 5.0
"""Without faults at the end, so that the last ones have a comment to recover with."""
NO_PROGRESS_S = 240
"""Of the draining: longer than any lease, any pause between retries, and a slow machine's way through a batch."""
LOOK_PAUSE_S = 0.5


def run(
    plan: Sequence[Fault],
    *,
    seconds: float,
    seed: int,
    database: str,
    version: Path,
    folder: Path,
    durable: bool | None = None,
    retrain_every_s: float = 60,
    step: Callable[[float, str], object] = lambda elapsed_s, note: None,
) -> tuple[Account, list[Strike]]:
    """Let the plan's faults strike a system of its own, and account for every comment.

    Args:
        seconds: for which comments are submitted; the faults strike in that time.
        database: `postgres` or `sqlite`.
        version: directory of the version to begin with.
        folder: for logs and journals; what an earlier run left there is removed.
        durable: whether every producer is durable; None for half of them.
        step: is told the seconds since the faults began, and what happens.

    Raises:
        BenchProblem: the system did not start.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with ChaosSystem(database, version, folder, seed, durable=durable) as system:
        step(0, "starting")
        system.start_workers()
        monkey = Monkey(system)
        system.start_producers()
        started = time.monotonic()
        try:
            _strike_all(system, monkey, plan, seconds, retrain_every_s, step)
        finally:
            monkey.close()
        _look_for(system, SETTLE_S)
        system.stop_producers()
        step(seconds, "draining")
        _drain(system)
        account = take_account(system, monkey.strikes, time.monotonic() - started)
    (folder / "account.json").write_text(json.dumps(as_json(account, monkey.strikes), indent=1), encoding="utf-8")
    return account, monkey.strikes


def as_json(account: Account, strikes: Sequence[Strike]) -> dict[str, Any]:
    return {"account": asdict(account), "strikes": [asdict(strike) for strike in strikes]}


def _strike_all(
    system: ChaosSystem,
    monkey: Monkey,
    plan: Sequence[Fault],
    seconds: float,
    retrain_every_s: float,
    step: Callable[[float, str], object],
) -> None:
    started = time.monotonic()
    waiting = sorted(plan, key=lambda fault: fault.at_s)
    retrain_at_s = retrain_every_s / 3
    while (elapsed_s := time.monotonic() - started) < seconds:
        while waiting and waiting[0].at_s <= elapsed_s:
            fault = waiting.pop(0)
            step(elapsed_s, f"{fault.kind} {fault.lasts_s:.0f} s" if fault.lasts_s else fault.kind)
            monkey.strike(fault)
        if elapsed_s >= retrain_at_s:
            retrain_at_s += retrain_every_s
            monkey.retrain()
        monkey.end_what_is_over()
        system.look()
        time.sleep(TICK_S)


def _look_for(system: ChaosSystem, seconds: float) -> None:
    """Only the supervisor is at work."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        system.look()
        time.sleep(TICK_S)


def _drain(system: ChaosSystem) -> None:
    """Until nothing is on its way, or nothing has moved for long."""
    last, moved_at = None, time.monotonic()
    while time.monotonic() - moved_at < NO_PROGRESS_S:
        _look_for(system, LOOK_PAUSE_S)
        try:
            left = leftovers(system)
        except (SQLAlchemyError, OSError):
            continue  # the database is being started again
        if not left:
            return
        if left != last:
            last, moved_at = left, time.monotonic()
