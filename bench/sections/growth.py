"""Whether anything grows with the queue or with the database: speed and memory while either is long."""

import time
from collections.abc import Sequence
from contextlib import ExitStack

import psutil

from bench.context import Context
from bench.measure import Line, at_least, at_most
from bench.system import INSTANT_BATCHES, System, distinct_texts

TITLE = "Growth: speed with long queues and large databases, instant engine, singles"
QUEUES = (1_000, 10_000, 100_000, 1_000_000)
QUICK_QUEUES = (1_000, 20_000)
FILLED = "bench.filled"
TOP_UP_S = 0.001
BYTES_PER_MESSAGE = 2_500
"""In Redis, with its append-only file's share of memory."""


def measure(context: Context) -> list[Line]:
    """Each queue is kept at its length while so many comments are moderated, then thrown away."""
    count = context.count(30_000, 5_000)
    lines: list[Line] = []
    with System(context.servers, "PostgreSQL", app="bench.instant", settings=INSTANT_BATCHES) as system:
        system.rate(distinct_texts(context.texts, 5_000), 1)
        rates, resident = [], []
        lengths = _that_fit(context, QUICK_QUEUES if context.quick else QUEUES)
        for length in lengths:
            samples = []
            for number in range(1 if length > 100_000 else context.rounds):
                context.step(f"a queue of {length:,} messages, round {number + 1}")
                samples.append(_rate_at(system, context.texts, length, count))
            rates.append(samples)
            resident.append(system.workers[0].resident_mib())
    lines += [
        Line("growth", f"queue of {length:,}", tuple(samples), "comments/s", note=f"worker {mib:,.0f} MiB")
        for length, samples, mib in zip(lengths, rates, resident, strict=True)
    ]
    lines.append(_flat("longest queue ÷ that of 1,000: speed", rates[-1], rates[0]))
    lines.append(_flat("longest queue ÷ that of 1,000: memory", resident[-1:], resident[:1]))
    return lines + [line for kind in ("PostgreSQL", "SQLite") for line in _databases(context, kind, count)]


def _databases(context: Context, kind: str, count: int) -> list[Line]:
    """A worker on an empty database and one on a full database, in turn."""
    rows = context.count(1_000_000, 50_000)
    with ExitStack() as stack:
        empty, full = (
            stack.enter_context(System(context.servers, kind, app="bench.instant", settings=INSTANT_BATCHES))
            for _ in range(2)
        )
        context.step(f"{rows:,} rows into {kind}")
        full.fill_database(rows)
        measured: dict[int, list[float]] = {0: [], rows: []}
        for number in range(context.rounds + 1):
            context.step(f"{kind}, round {number}")
            texts = distinct_texts(context.texts, count, start=number * count)
            for system, samples in ((empty, measured[0]), (full, measured[rows])):
                samples.append(system.rate(texts, 1))
    lines = [
        # Without the first round, which fills caches.
        Line("growth", f"{kind} with {filled:,} rows", tuple(samples[1:]), "comments/s")
        for filled, samples in measured.items()
    ]
    return [*lines, _flat(f"{rows:,} rows ÷ none, {kind}: speed", measured[rows][1:], measured[0][1:])]


def _rate_at(system: System, texts: Sequence[str], length: int, count: int) -> float:
    """Comments per second while the queue holds `length` messages all the time."""
    system.stage(system.envelopes.comments(distinct_texts(texts, length), 1), FILLED)
    # The first of them fill the worker rather than pass through it.
    filling = count
    system.stage(system.envelopes.comments(distinct_texts(texts, filling + count, start=length), 1))
    system.release(FILLED)
    moved = 0

    def move_until(total: int) -> None:
        nonlocal moved
        while moved < total:
            moved += system.top_up(length)
            system.workers[0].check()
            time.sleep(TOP_UP_S)

    move_until(filling)
    before, started = moved, time.perf_counter()
    move_until(filling + count)
    rate = (moved - before) / (time.perf_counter() - started)
    system.throw_away_queue()
    return rate


def _that_fit(context: Context, lengths: Sequence[int]) -> list[int]:
    fit = [length for length in lengths if length * BYTES_PER_MESSAGE * 2 < psutil.virtual_memory().available]
    if len(fit) < len(lengths):
        context.step(f"no queue of {lengths[-1]:,}: this machine has too little memory")
    return fit


def _flat(what: str, grown: Sequence[float], small: Sequence[float]) -> Line:
    """Within ten per cent: for speed not less, for memory not more."""
    ratio = sorted(grown)[len(grown) // 2] / sorted(small)[len(small) // 2]
    return Line("growth", what, (ratio,), "x", at_most(1.1) if "memory" in what else at_least(0.9), charted=False)
