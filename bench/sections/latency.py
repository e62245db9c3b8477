"""From submission to committed row: singles that arrive as they please, at several shares of capacity."""

import random
import statistics
import time
from collections.abc import Sequence

from bench.context import Context
from bench.engines import EngineAlone
from bench.measure import Aim, Line, at_most, percentile
from bench.system import System

TITLE = "Latency: singles from submission to committed row, PostgreSQL"
SHARES = (10, 50, 90)
PERCENTILES = (50, 95, 99)
IDLE_GAP_S = 0.15
MOST_ABOVE_ONE_PASS_MS = 5.0
MOST_BATCH_TIMES = 3.0


def measure(context: Context) -> list[Line]:
    lines: list[Line] = []
    with System(context.servers, "PostgreSQL") as system:
        context.step("capacity")
        rates = [system.rate(context.slice(number, context.count(1_500, 300)), 1) for number in range(context.rounds)]
        batch_ms = statistics.median(compute_ms for _, compute_ms, _ in system.batches())
        note = f"the median batch takes {batch_ms:.0f} ms"
        lines.append(Line("latency", "capacity", tuple(rates), "comments/s", note=note, charted=False))
        lines += _idle(context, system)
        for share in SHARES:
            rate = statistics.median(rates) * share / 100
            seconds = context.count(45, 8)
            context.step(f"{share} % of capacity, {rate:.0f} comments/s for {seconds} s")
            latencies = _under_load(context, system, rate, seconds)
            for percent in PERCENTILES:
                note = f"{len(latencies):,} comments" if percent == PERCENTILES[0] else ""
                value = percentile(latencies, percent)
                lines.append(Line("latency", f"{share} % of capacity, p{percent}", (value,), "ms", note=note))
                if (share, percent) == (50, 99):
                    in_batches = value / batch_ms
                    what = "50 % of capacity, p99 ÷ the median batch time"
                    lines.append(Line("latency", what, (in_batches,), "x", at_most(MOST_BATCH_TIMES), charted=False))
                    short = percentile(system.latencies_ms(most_windows=1), percent) / batch_ms
                    what = "the same, of comments that fit one window"
                    lines.append(Line("latency", what, (short,), "x", charted=False))
    return lines


def _idle(context: Context, system: System) -> list[Line]:
    """One comment at a time, beside a forward pass of the same comment by the engine alone."""
    engine = EngineAlone()
    texts = context.slice(3, context.count(120, 30))
    context.step("idle")
    passes = []
    for text in texts:
        time.sleep(IDLE_GAP_S)  # as the worker has it: a core that was just at work is faster
        passes.append(engine.one_pass_ms(text))
    engine.close()
    one_pass = percentile(passes, 50)
    arrivals = [(number + 1) * IDLE_GAP_S for number in range(len(texts))]
    latencies = _submit(system, texts, arrivals)
    idle = percentile(latencies, 50)
    in_worker = statistics.median(compute_ms for _, compute_ms, _ in system.batches())
    aim = Aim("<=", MOST_ABOVE_ONE_PASS_MS)
    return [
        Line(
            "latency",
            "idle, p50",
            (idle,),
            "ms",
            note=f"{len(texts)} comments; in the worker a pass takes {in_worker:.1f} ms",
        ),
        Line("latency", "beside it: one forward pass", (one_pass,), "ms"),
        Line("latency", "idle, p50 - one forward pass", (idle - one_pass,), "ms", aim, charted=False),
    ]


def _under_load(context: Context, system: System, rate: float, seconds: float) -> list[float]:
    chance = random.Random(20261122)
    arrivals: list[float] = []
    now = 0.5
    while now < seconds + 0.5:
        now += chance.expovariate(rate)
        arrivals.append(now)
    return _submit(system, context.slice(0, len(arrivals)), arrivals)


def _submit(system: System, texts: Sequence[str], arrivals: Sequence[float]) -> list[float]:
    """Submit each text at its time, whether those before it are decided or not; every comment's latency in ms.

    A comment counts from when it was due, so that a late generator makes latencies longer, never shorter.
    """
    system.forget_decisions()
    started = time.time()
    for text, arrival in zip(texts, arrivals, strict=True):
        due = started + arrival
        time.sleep(max(due - time.time(), 0))
        system.push(system.envelopes.message([[{"text": text}]], submitted_at=due))
    system.wait_until_empty()
    return system.latencies_ms()
