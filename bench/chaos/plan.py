"""Which fault strikes when: drawn from a seed, the same plan each time. Pure."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

LEASE_S = 8
"""Of the workers' messages in a chaos run: short, so that many freezes outlast it."""
FIRST_FAULT_S = 2.0
MEAN_PAUSE_S = 2.5
OVERLAPPING = 0.5
"""Share of the faults that may begin while the one before them lasts."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to break something."""

    what: str
    lasts_s: tuple[float, float] | None = None
    """The shortest and the longest; None where it is over in an instant."""
    databases: tuple[str, ...] = ("postgres", "sqlite")


SHORT_TO_LONG = (0.3 * LEASE_S, 2.0 * LEASE_S)
"""Shorter and longer than the lease."""
POSTGRES = ("postgres",)

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "kill-worker": Kind("kill -9 of one worker"),
        "kill-workers": Kind("kill -9 of all workers at once"),
        "freeze-worker": Kind("one worker stands still (SIGSTOP)", SHORT_TO_LONG),
        "freeze-workers": Kind("all workers stand still", SHORT_TO_LONG),
        "kill-trainer": Kind("kill -9 of the trainer, while it trains where it does"),
        "freeze-trainer": Kind("the trainer stands still", SHORT_TO_LONG),
        "kill-producer": Kind("kill -9 of one producer"),
        "kill-redis": Kind("kill -9 of Redis"),
        "freeze-redis": Kind("Redis stands still", SHORT_TO_LONG),
        "full-redis": Kind("Redis at maxmemory", (1, 8)),
        "cut-redis": Kind("every connection to Redis is cut"),
        "kill-postgres": Kind("kill -9 of PostgreSQL, the postmaster and all its children", None, POSTGRES),
        "freeze-postgres": Kind("PostgreSQL stands still", SHORT_TO_LONG, POSTGRES),
        "cut-postgres": Kind("every connection to PostgreSQL is cut", None, POSTGRES),
        "full-database": Kind("no file of the database may grow (prlimit --fsize)", (2, 12)),
        "locked-database": Kind("somebody else locks the table of submissions", (1, 12)),
        "swap": Kind("another version is activated, sound or damaged"),
        "lose-redis": Kind("Redis loses everything: FLUSHALL, or kill -9 and its files are gone"),
    }
)
"""Every fault by its name. `lose-redis` strikes only where every producer is durable."""
LOSING = "lose-redis"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of the plan."""

    kind: str
    at_s: float
    """After the start of the faults."""
    lasts_s: float
    pick: int
    """Which of several processes, versions or ways, modulo their number."""


def draw_plan(seed: int, seconds: float, kinds: Sequence[str]) -> list[Fault]:
    """Faults of these kinds, each kind about as often as any other, all of them over within `seconds`."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    begins_s = over_s = FIRST_FAULT_S
    for kind in _shuffled_again_and_again(kinds, chance):
        lasts_s = _draw_duration(KINDS[kind], chance)
        fault = Fault(kind, round(begins_s, 2), round(lasts_s, 2), chance.randrange(1_000))
        if fault.at_s + fault.lasts_s > seconds:
            return faults
        faults.append(fault)
        over_s = max(over_s, fault.at_s + fault.lasts_s)
        pause_s = 0.5 + chance.expovariate(1 / MEAN_PAUSE_S)
        begins_s = (fault.at_s if chance.random() < OVERLAPPING else over_s) + pause_s
    return faults


def _shuffled_again_and_again(kinds: Sequence[str], chance: random.Random) -> Iterator[str]:
    while True:
        yield from chance.sample(kinds, len(kinds))


def _draw_duration(kind: Kind, chance: random.Random) -> float:
    return chance.uniform(*kind.lasts_s) if kind.lasts_s else 0.0
