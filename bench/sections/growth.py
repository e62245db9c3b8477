"""Whether anything grows with the queue or with the database: speed and memory while either is long."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

import psutil

from bench.context import Context
from bench.measure import Line, at_least, at_most
from bench.system import INSTANT_BATCHES, Drained, System, distinct_texts

TITLE = "Growth: speed with long queues and large databases, instant engine, singles"
QUEUES = (1_000, 10_000, 100_000, 1_000_000)
QUICK_QUEUES = (1_000, 20_000)
LONGEST_REPEATED = 100_000
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
        lengths = _that_fit(context, QUICK_QUEUES if context.quick else QUEUES)
        passed: dict[int, list[_Passed]] = {length: [] for length in lengths}
        for number in range(context.rounds):
            for length in lengths:
                if length > LONGEST_REPEATED and number != 1:
                    continue  # once will do: it takes a minute to fill
                context.step(f"a queue of {length:,} messages, round {number + 1} of {context.rounds}")
                passed[length].append(_pass_through(system, context.texts, length, count))
    for length, rounds in passed.items():
        cpu_us, mib = (median(figure) for figure in ([r.cpu_us for r in rounds], [r.resident_mib for r in rounds]))
        note = f"worker: {cpu_us:.0f} µs CPU, {mib:,.0f} MiB"
        lines.append(Line("growth", f"queue of {length:,}", tuple(r.rate for r in rounds), "comments/s", note=note))
    shortest, longest = passed[lengths[0]], passed[lengths[-1]]
    compared = f"{lengths[-1]:,} messages ÷ {lengths[0]:,}"
    lines.append(_flat(f"{compared}: speed", [r.rate for r in longest], [r.rate for r in shortest]))
    lines.append(_flat(f"{compared}: memory", [r.resident_mib for r in longest], [r.resident_mib for r in shortest]))
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
        measured: dict[int, list[Drained]] = {0: [], rows: []}
        for number in range(context.rounds + 1):
            context.step(f"{kind}, round {number}")
            texts = distinct_texts(context.texts, count, start=number * count)
            for system, samples in ((empty, measured[0]), (full, measured[rows])):
                samples.append(system.drain(system.envelopes.comments(texts, 1), count))
    lines, rates = [], {}
    for filled, samples in measured.items():
        rounds = samples[1:]  # the first fills caches
        rates[filled] = [count / each.seconds for each in rounds]
        note = f"worker: {median(each.cpu_s / count * 1e6 for each in rounds):.0f} µs CPU"
        lines.append(Line("growth", f"{kind} with {filled:,} rows", tuple(rates[filled]), "comments/s", note=note))
    return [*lines, _flat(f"{rows:,} rows ÷ none, {kind}: speed", rates[rows], rates[0])]


@dataclass(frozen=True, slots=True)
class _Passed:
    """What it took to moderate so many comments while the queue kept its length."""

    rate: float
    """Comments per second."""
    cpu_us: float
    """Of the worker, per comment."""
    resident_mib: float


def _pass_through(system: System, texts: Sequence[str], length: int, count: int) -> _Passed:
    """Moderate `count` comments while the queue holds `length` messages all the time."""
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
    worker = system.workers[0]
    before, cpu_s, started = moved, worker.cpu_s(), time.perf_counter()
    move_until(filling + count)
    seconds, cpu_s, counted = time.perf_counter() - started, worker.cpu_s() - cpu_s, moved - before
    passed = _Passed(counted / seconds, cpu_s / counted * 1e6, worker.resident_mib())
    system.throw_away_queue()
    return passed


def _that_fit(context: Context, lengths: Sequence[int]) -> list[int]:
    fit = [length for length in lengths if length * BYTES_PER_MESSAGE * 2 < psutil.virtual_memory().available]
    if len(fit) < len(lengths):
        context.step(f"no queue of {lengths[-1]:,}: this machine has too little memory")
    return fit


def _flat(what: str, grown: Sequence[float], small: Sequence[float]) -> Line:
    """Within ten per cent: for speed not less, for memory not more."""
    ratio = median(grown) / median(small)
    return Line("growth", what, (ratio,), "x", at_most(1.1) if "memory" in what else at_least(0.9), charted=False)
