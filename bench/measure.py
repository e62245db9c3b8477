"""What a measurement is: samples, their median and spread, an aim; and the search for a best setting. Pure."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Aim:
    """What a figure should reach."""

    sense: Literal[">=", "<="]
    value: float

    def reached(self, figure: float) -> bool:
        return figure >= self.value if self.sense == ">=" else figure <= self.value


def at_least(value: float) -> Aim:
    return Aim(">=", value)


def at_most(value: float) -> Aim:
    return Aim("<=", value)


@dataclass(frozen=True, slots=True)
class Line:
    """One measured figure: a row of the table."""

    section: str
    what: str
    samples: tuple[float, ...]
    """One per round, or the only one."""
    unit: str
    """`x` for a ratio."""
    aim: Aim | None = None
    note: str = ""
    charted: bool = True
    """Whether the section's chart shows it: one unit to a chart."""
    printed: bool = True
    """Whether the table does; the JSON always."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        return min(self.samples)

    @property
    def high(self) -> float:
        return max(self.samples)

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the aim; None where there is none."""
        return None if self.aim is None else self.aim.reached(self.median)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least `percent` of them do not exceed.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("a percentile needs at least one sample")
    rank = max(math.ceil(percent / 100 * len(samples)), 1)
    return sorted(samples)[rank - 1]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    """Ours ÷ theirs, round by round: what slows the machine in one round slows both."""
    return tuple(mine / other for mine, other in zip(ours, theirs, strict=True))


@dataclass(slots=True)
class Search:
    """What a search for the best setting tried."""

    best: dict[str, Any]
    rate: float
    tried: list[tuple[dict[str, Any], float]] = field(default_factory=list)


def best_setting(axes: Mapping[str, Sequence[Any]], rate: Callable[[dict[str, Any]], float]) -> Search:
    """The setting with the highest rate, found along one axis after the other, in their order.

    Args:
        axes: the values to try of each setting; the search begins at the first of each.
        rate: measures one setting.
    """
    setting = {name: values[0] for name, values in axes.items()}
    search = Search(setting, rate(setting))
    search.tried.append((setting, search.rate))
    for name, values in axes.items():
        for value in values[1:]:
            setting = search.best | {name: value}
            measured = rate(setting)
            search.tried.append((setting, measured))
            if measured > search.rate:
                search.best, search.rate = setting, measured
    return search


def spelled(setting: Mapping[str, Any]) -> str:
    """A setting in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items())
