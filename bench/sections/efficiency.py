"""Comments per second from a preloaded queue to committed rows ÷ the engine alone on the same texts."""

from contextlib import ExitStack

from bench.context import Context
from bench.engines import EngineAlone
from bench.measure import Line, at_least, ratios
from bench.system import System

TITLE = "Efficiency: queue to committed rows ÷ the engine alone, ideally planned"
AIMS = {64: 0.95, 1: 0.90}
BUDGETS = (256, 512, 1024, 2048, 4096)
QUICK_BUDGETS = (512, 1024)


def measure(context: Context) -> list[Line]:
    """The engine's turn comes before and after each of ours; the mean of the two is what ours is held against."""
    # Many short turns: a shared machine's speed drifts from one half minute to the next.
    count, rounds = context.count(700, 400), context.count(7, 2)
    alone_rates: list[float] = []
    rates: dict[tuple[str, int], list[float]] = {}
    against: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        engine = EngineAlone()
        stack.callback(engine.close)
        context.step(f"the best plan for {engine.description} alone")
        sample = engine.encode(context.texts[:: len(context.texts) // context.count(500, 150)])
        plan = engine.best_plan(sample, QUICK_BUDGETS if context.quick else BUDGETS)
        systems = {kind: stack.enter_context(System(context.servers, kind)) for kind in ("SQLite", "PostgreSQL")}
        for system in systems.values():
            system.rate(context.slice(0, 100), 64)  # the first batches pay for allocations
        for number in range(rounds):
            texts = context.slice(number, count)
            windows = engine.encode(texts)

            now = f"round {number + 1} of {rounds}"
            context.step(f"{now}: the engine alone")
            before = count / engine.seconds(windows, plan)
            alone_rates.append(before)
            for size in AIMS:
                for kind, system in systems.items():
                    context.step(f"{now}: {_name(size)}, {kind}")
                    rates.setdefault((kind, size), []).append(system.rate(texts, size))
                    context.step(f"{now}: the engine alone")
                    after = count / engine.seconds(windows, plan)
                    alone_rates.append(after)
                    against.setdefault((kind, size), []).append((before + after) / 2)
                    before = after
    lines = [
        Line(
            "efficiency",
            f"{_name(size)}, {kind}",
            ratios(rates[kind, size], against[kind, size]),
            "x",
            at_least(AIMS[size]),
        )
        for kind, size in rates
    ]
    note = f"{engine.description}; {plan}"
    lines.append(Line("efficiency", "the engine alone", tuple(alone_rates), "comments/s", note=note, charted=False))
    for (kind, size), measured in rates.items():
        lines.append(Line("efficiency", f"{_name(size)}, {kind}", tuple(measured), "comments/s", charted=False))
    return lines


def _name(size: int) -> str:
    return "singles" if size == 1 else f"lists of {size}"
