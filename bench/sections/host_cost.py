"""What the host's work costs: the worker's CPU time per comment where tokenizer and engine take none."""

import time

from bench.context import Context
from bench.engines import EngineAlone
from bench.measure import Line, at_most
from bench.system import INSTANT_BATCHES, Drained, System, distinct_texts

TITLE = "Host cost: CPU per comment of a worker whose tokenizer and engine take no time"
AIMS = {1: 90.0, 64: 40.0}
FEWEST_SHOWN_US = 0.5


def measure(context: Context) -> list[Line]:
    lines = []
    count = context.count(30_000, 8_000)
    for kind in ("PostgreSQL", "SQLite"):
        drained: dict[int, list[Drained]] = {size: [] for size in AIMS}
        with System(context.servers, kind, app="bench.instant", settings=INSTANT_BATCHES) as system:
            system.rate(distinct_texts(context.texts, 2_000), 64)
            for number in range(context.rounds):
                texts = distinct_texts(context.texts, count, start=number * count)
                for size in AIMS:
                    context.step(f"round {number + 1} of {context.rounds}: messages of {size}, {kind}")
                    drained[size].append(system.drain(system.envelopes.comments(texts, size), count))
        for size, rounds in drained.items():
            name = f"{'singles' if size == 1 else f'lists of {size}'}, {kind}"
            cost = tuple(each.cpu_s / count * 1e6 for each in rounds)
            aim = at_most(AIMS[size]) if kind == "PostgreSQL" else None
            rate = sum(count / each.seconds for each in rounds) / len(rounds)
            lines.append(Line("host", name, cost, "µs", aim, note=f"{rate:,.0f} comments/s; {_stages(rounds, count)}"))
    engine = EngineAlone()
    texts = context.slice(0, context.count(3_000, 600))
    context.step("the tokenizer")
    tokenizer = []
    for _ in range(context.rounds):
        started = time.process_time()
        engine.encode(texts)
        tokenizer.append((time.process_time() - started) / len(texts) * 1e6)
    engine.close()
    lines.append(Line("host", "beside it: the tokenizer", tuple(tokenizer), "µs", note="CPU on all cores"))
    return lines


def _stages(rounds: list[Drained], count: int) -> str:
    """Where the time goes, by the name of the thread."""
    total: dict[str, float] = {}
    for each in rounds:
        for name, seconds in each.thread_cpu_s.items():
            total[name] = total.get(name, 0.0) + seconds
    costs = {name: seconds / count / len(rounds) * 1e6 for name, seconds in total.items()}
    by_cost = sorted(costs.items(), key=lambda item: -item[1])
    return ", ".join(f"{_stage(name)} {cost:.0f}" for name, cost in by_cost if cost > FEWEST_SHOWN_US)


def _stage(thread: str) -> str:
    # The main thread carries the command's name.
    return "intake" if thread.startswith(("celery", "python", "[celeryd")) else thread
