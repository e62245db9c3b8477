"""What one could run instead, each at the best setting that a short search finds, beside ours on the same texts.

All score the same windows of the same texts with the same weights. Celery's rivals write a row for every comment to
the same PostgreSQL, as ours does; the HTTP servers write nothing, their figures are what they answer. Where a rival
batches, it is also tried with the batch sorted by length and cut.
"""

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery
from redis import Redis
from sqlalchemy import Engine

from bench.context import Context
from bench.engines import CORES
from bench.measure import Aim, Line, at_least, best_setting, ratios, spelled
from bench.rivals import http_load
from bench.rivals.rows import DATABASE_VARIABLE, Base
from bench.system import (
    PATTERN,
    STAGED,
    BenchProblem,
    Envelopes,
    Process,
    System,
    celery_process,
)
from config.settings import ROOT
from db.session import open_database, reading

TITLE = "Beside what one could run instead: ours ÷ theirs, singles"
PYTHON = ROOT / ".venv-rivals" / "bin" / "python"
"""Of an environment of their own: some need an older Celery."""
QUEUE = "rival"
TASK = "rival.moderate"
ROUND_S = 10
ANSWER_TIMEOUT_S = 600

Setting = Mapping[str, Any]
Rate = Callable[[Sequence[str]], float]
"""Comments per second over these texts."""

ONE_OF_ALL = f"1 × {CORES} threads"
ALL_OF_ONE = f"{CORES} × 1 thread"
LAYOUTS = {ONE_OF_ALL: (1, CORES), ALL_OF_ONE: (CORES, 1)}
"""Processes and the threads of each one's forward pass."""


@dataclass(frozen=True, slots=True)
class Rival:
    name: str
    axes: Mapping[str, Sequence[Any]]
    running: Callable[[Context, Setting], AbstractContextManager[Rate]]
    search_texts: int
    """With which each setting is tried."""
    aim: Aim | None = None
    needs_own_environment: bool = True


def measure(context: Context) -> list[Line]:
    lines: list[Line] = []
    with System(context.servers, "PostgreSQL") as ours:
        ours.rate(context.slice(0, 200), 1)
        for rival in RIVALS:
            if rival.needs_own_environment and not PYTHON.exists():
                context.step(f"{rival.name} is left out: `make bench` sets up {PYTHON.parent.parent.name} for it")
                continue
            lines += _against(context, rival, ours)
    return lines


def _against(context: Context, rival: Rival, ours: System) -> list[Line]:
    tried = context.slice(1, context.count(rival.search_texts, rival.search_texts // 3))

    def rate_of(setting: Setting) -> float:
        context.step(f"{rival.name}: {spelled(setting)}")
        with rival.running(context, setting) as rate:
            rate(tried[:40])
            return rate(tried)

    # Quick: two values of two settings.
    axes = {
        name: values[: context.count(len(values), 2 if number < 2 else 1)]
        for number, (name, values) in enumerate(rival.axes.items())
    }
    search = best_setting(axes, rate_of)
    count = int(min(max(search.rate * context.count(ROUND_S, 2), 120), 1_500))
    theirs, our_rates = [], []
    with rival.running(context, search.best) as rate:
        rate(tried[:40])
        for number in range(context.rounds):
            texts = context.slice(number, count)
            context.step(f"{rival.name}: {count} comments, round {number + 1} of {context.rounds}")
            theirs.append(rate(texts))
            our_rates.append(ours.rate(texts, 1))
    note = f"theirs {sorted(theirs)[len(theirs) // 2]:.0f} comments/s: {spelled(search.best)}"
    return [
        Line("rivals", rival.name, ratios(our_rates, theirs), "x", rival.aim, note),
        Line("rivals", f"{rival.name}: theirs", tuple(theirs), "comments/s", charted=False, printed=False),
        Line("rivals", f"{rival.name}: ours beside it", tuple(our_rates), "comments/s", charted=False, printed=False),
    ]


# --- Rivals on Celery ------------------------------------------------------------------------------------------------


@contextmanager
def _one_per_task(context: Context, setting: Setting, *, engine: str) -> Iterator[Rate]:
    pool, concurrency, threads = {
        f"solo, {CORES} threads": ("solo", 1, CORES),
        f"prefork {ALL_OF_ONE}": ("prefork", CORES, 1),
        f"threads {ALL_OF_ONE}": ("threads", CORES, 1),
    }[setting["pool"]]
    variables = {"RIVAL_ENGINE": engine, "RIVAL_THREADS": threads, "RIVAL_PREFETCH": setting["prefetch"]}
    options = ("-P", pool, "-c", str(concurrency))
    with _celery(context, "bench.rivals.one_per_task", options, variables, None) as rate:
        yield rate


@contextmanager
def _batches(context: Context, setting: Setting) -> Iterator[Rate]:
    processes, threads = LAYOUTS[setting["processes"]]
    variables = {
        "RIVAL_THREADS": threads,
        "RIVAL_SORT": setting["sorted"],
        "RIVAL_FLUSH_EVERY": setting["flush_every"],
        "RIVAL_FLUSH_INTERVAL": setting["flush_interval"],
    }
    options = ("-P", "prefork", "-c", str(processes))
    with _celery(context, "bench.rivals.batches", options, variables, PYTHON) as rate:
        yield rate


@contextmanager
def _celery(
    context: Context, app: str, options: Sequence[str], variables: Mapping[str, Any], python: Path | None
) -> Iterator[Rate]:
    """A stock worker on a Redis database and a PostgreSQL database of its own."""
    name = f"rival-{context.servers.next_number()}"
    log = context.servers.folder / f"{name}.log"
    with (
        context.servers.redis_database() as (broker_url, redis),
        context.servers.empty_database("PostgreSQL") as database_url,
    ):
        engine = open_database(database_url)
        Base.metadata.create_all(engine)
        environment = {variable: str(value) for variable, value in variables.items()}
        environment |= {"RIVAL_BROKER_URL": broker_url, DATABASE_VARIABLE: database_url}
        arguments: dict[str, Any] = {} if python is None else {"python": python}
        try:
            with celery_process(app, QUEUE, name, log, *options, **arguments, **environment) as process:
                envelopes = _stock_envelopes(broker_url, redis)

                def rate(texts: Sequence[str]) -> float:
                    return _drain(process, redis, engine, envelopes, texts)

                yield rate
        finally:
            engine.dispose()


def _stock_envelopes(broker_url: str, redis: Redis) -> Envelopes:
    with Celery("producer", broker=broker_url, set_as_current=False) as app:
        app.send_task(TASK, ["id", "text"], queue=PATTERN, ignore_result=True)
    pattern = redis.rpop(PATTERN)
    assert isinstance(pattern, bytes)
    return Envelopes(pattern.replace(PATTERN.encode(), QUEUE.encode()))


def _drain(process: Process, redis: Redis, engine: Engine, envelopes: Envelopes, texts: Sequence[str]) -> float:
    """Comments per second, from a preloaded queue to committed rows.

    A stock worker acknowledges before it works, so the rows themselves are counted.
    """
    before = _count(engine)
    for text in texts:
        redis.lpush(STAGED, envelopes.message([str(uuid4()), text]))
    started = time.perf_counter()
    redis.rename(STAGED, QUEUE)
    process.wait_for(lambda: _count(engine) - before >= len(texts), "moderating the queue", ANSWER_TIMEOUT_S)
    return len(texts) / (time.perf_counter() - started)


def _count(engine: Engine) -> int:
    with reading(engine) as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM moderated").scalar_one())


# --- HTTP servers ----------------------------------------------------------------------------------------------------


@contextmanager
def _http(context: Context, setting: Setting, *, module: str) -> Iterator[Rate]:
    processes, threads = LAYOUTS[setting["processes"]]
    name = f"rival-{context.servers.next_number()}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "RIVAL_THREADS": threads,
        "RIVAL_PROCESSES": processes,
        "RIVAL_SORT": setting["sorted"],
        "RIVAL_MAX_BATCH_SIZE": setting["max_batch_size"],
        "RIVAL_MAX_WAIT_MS": setting["max_wait_ms"],
        "RIVAL_PORT": port,
        "MOSEC_PORT": port,
        "MOSEC_ADDRESS": "127.0.0.1",
        "MOSEC_TIMEOUT": ANSWER_TIMEOUT_S * 1000,
        "MOSEC_PATH": context.servers.folder / f"{name}.mosec",
    }

    def rate(texts: Sequence[str]) -> float:
        try:
            return http_load.rate(port, texts, setting["connections"])
        except (OSError, EOFError) as error:
            raise BenchProblem(f"{module}: {error}\n{process.said()[-2_000:]}") from None

    def answers() -> bool:
        try:
            return http_load.rate(port, ["hello"], 1) > 0
        except (OSError, EOFError):
            return False

    variables = {variable: str(value) for variable, value in environment.items()}
    with Process([PYTHON, "-m", module], context.servers.folder / f"{name}.log", **variables) as process:
        process.wait_for(answers, f"the start of {module}")
        yield rate


# --- Their settings --------------------------------------------------------------------------------------------------

_POOLS: Mapping[str, Sequence[Any]] = {
    "pool": [f"prefork {ALL_OF_ONE}", f"solo, {CORES} threads", f"threads {ALL_OF_ONE}"],
    "prefetch": [4, 64],
}
_HTTP_AXES: Mapping[str, Sequence[Any]] = {
    "processes": [ALL_OF_ONE, ONE_OF_ALL],
    "sorted": [True, False],
    "max_batch_size": [64, 16, 4],
    "max_wait_ms": [10, 50],
    "connections": [256, 64],
}

RIVALS = (
    Rival(
        "one comment per Celery task, torch fp32",
        _POOLS,
        lambda context, setting: _one_per_task(context, setting, engine="fp32"),
        search_texts=150,
        aim=at_least(4.0),
        needs_own_environment=False,
    ),
    Rival(
        "one comment per Celery task, same int8 engine",
        _POOLS,
        lambda context, setting: _one_per_task(context, setting, engine="int8"),
        search_texts=400,
        needs_own_environment=False,
    ),
    Rival(
        "celery-batches, same int8 engine",
        {
            "processes": [ALL_OF_ONE, ONE_OF_ALL],
            "sorted": [True, False],
            "flush_every": [64, 16, 256],
            "flush_interval": [0.1, 1],
        },
        _batches,
        search_texts=400,
    ),
    Rival(
        "mosec, same int8 engine",
        _HTTP_AXES,
        lambda context, setting: _http(context, setting, module="bench.rivals.mosec_server"),
        search_texts=400,
        aim=at_least(1.0),
    ),
    Rival(
        "LitServe, same int8 engine",
        _HTTP_AXES,
        lambda context, setting: _http(context, setting, module="bench.rivals.litserve_server"),
        search_texts=400,
        aim=at_least(1.0),
    ),
)
