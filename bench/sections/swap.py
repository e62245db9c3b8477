"""The exchange of a version under load: how long no batch ends."""

import statistics
import time
from functools import partial
from itertools import pairwise

from bench.context import Context
from bench.measure import Line
from bench.system import System

TITLE = "Swap: a version is exchanged under load"


def measure(context: Context) -> list[Line]:
    """The longest time between two batches' ends while the other version is loaded and exchanged."""
    gaps, usual, took = [], [], []
    with System(context.servers, "PostgreSQL") as system:
        for name in ("bench-a", "bench-b"):
            system.add_version(name)
        system.rate(context.slice(0, 200), 1)
        for number in range(context.rounds):
            version = ("bench-a", "bench-b")[number % 2]
            context.step(f"to {version}, round {number + 1}")
            system.forget_decisions()
            with system.kept_busy(context.texts):
                time.sleep(context.count(4, 2))
                activated_at = time.time()
                system.activate(version)
                system.workers[0].wait_for(partial(system.has_decided_with, version), f"the exchange for {version}")
                time.sleep(context.count(4, 2))
            batches = system.batches()
            ends = [end.timestamp() for end, _, _ in batches]
            between = [(later - end) * 1000 for end, later in pairwise(ends)]
            first = next(end for end, (_, _, of) in zip(ends, batches, strict=True) if of == version)
            took.append(first - activated_at)
            batch_ms = statistics.median(compute_ms for _, compute_ms, _ in batches)
            during = [gap for gap, end in zip(between, ends, strict=False) if activated_at - 0.5 < end < first + 0.5]
            gaps.append(max(during) / batch_ms)
            before = [gap for gap, end in zip(between, ends, strict=False) if end < activated_at - 0.5]
            usual.append(max(before) / batch_ms)
    return [
        Line("swap", "longest gap between two batches ÷ the median batch time", tuple(gaps), "x"),
        Line("swap", "the same before the activation", tuple(usual), "x"),
        Line("swap", "from the activation to the new version's first batch", tuple(took), "s", charted=False),
    ]
