"""Several workers on one queue: whether they get in each other's way."""

import os

from bench.context import Context
from bench.measure import Line
from bench.system import INSTANT_BATCHES, System, distinct_texts

TITLE = "Several workers on one queue, instant engine, singles, PostgreSQL"
WORKERS = (1, 2, 4)


def measure(context: Context) -> list[Line]:
    count = context.count(40_000, 8_000)
    cores = len(os.sched_getaffinity(0))
    lines = []
    for workers in WORKERS:
        rates = []
        with System(
            context.servers, "PostgreSQL", app="bench.instant", workers=workers, settings=INSTANT_BATCHES
        ) as system:
            system.rate(distinct_texts(context.texts, 5_000), 1)
            for number in range(context.rounds):
                context.step(f"{workers} workers, round {number + 1}")
                rates.append(system.rate(distinct_texts(context.texts, count, start=number * count), 1))
        name = "1 worker" if workers == 1 else f"{workers} workers"
        lines.append(Line("workers", name, tuple(rates), "comments/s"))
    note = f"on {cores} cores, which Redis and PostgreSQL share with them"
    lines.append(
        Line(
            "workers",
            f"{WORKERS[-1]} workers ÷ 1",
            (lines[-1].median / lines[0].median,),
            "x",
            note=note,
            charted=False,
        )
    )
    return lines
