"""How much later than the decision itself a producer that waits for it has it: pushed, and found by asking for it."""

import time
from datetime import UTC, datetime

from bench.context import Context
from bench.measure import Aim, Line, at_most, percentile
from bench.system import System

TITLE = "Answers: from the decision to the producer that waits for it, one comment at a time"
TIMEOUT_S = 60.0
POLL_S = 0.05
PERCENTILES = (50, 95)
MOST_MEDIAN_MS = 10.0


def measure(context: Context) -> list[Line]:
    return [line for kind in ("PostgreSQL", "SQLite") for line in _answers(context, kind)]


def _answers(context: Context, kind: str) -> list[Line]:
    """Comments in turn by `moderate`, and by `submit` and asking the database for the row."""
    texts = context.slice(0, context.count(400, 40))
    pushed: list[float] = []
    asked: list[float] = []
    with System(context.servers, kind) as system:
        for warm in texts[:10]:
            system.client.moderate(warm, timeout_s=TIMEOUT_S)
        context.step(f"{kind}, {len(texts)} comments each way")
        for text in texts:
            pushed.append(_since_ms(system.client.moderate(text, timeout_s=TIMEOUT_S).decided_at))
            asked.append(_ask(system, text))
    lines = []
    for what, samples in (("pushed by `moderate`", pushed), (f"beside it: asked every {POLL_S * 1e3:.0f} ms", asked)):
        for percent in PERCENTILES:
            aim: Aim | None = at_most(MOST_MEDIAN_MS) if (samples, percent) == (pushed, 50) else None
            note = f"{len(samples)} comments" if percent == PERCENTILES[0] else ""
            name = f"{kind}, {what}, p{percent}"
            lines.append(Line("answers", name, (percentile(samples, percent),), "ms", aim, note=note))
    ratio = percentile(asked, 50) / percentile(pushed, 50)
    lines.append(Line("answers", f"{kind}, asked ÷ pushed, p50", (ratio,), "x", charted=False))
    return lines


def _ask(system: System, text: str) -> float:
    submission_id = system.client.submit(text)
    while (result := system.client.result(submission_id)) is None:
        system.workers[0].check()
        time.sleep(POLL_S)
    return _since_ms(result.decided_at)


def _since_ms(decided_at: datetime) -> float:
    return (datetime.now(UTC) - decided_at).total_seconds() * 1e3
