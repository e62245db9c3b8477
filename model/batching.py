"""How a window of texts is cut into batches. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class BatchCost:
    """Time of a forward pass, in the time that one more token takes: only ratios matter to a plan.

    A batch of n texts padded to length L takes `fixed_tokens + n·L + quadratic·n·L²`: launching it, the linear
    layers, and attention, in which every token looks at every other.
    """

    fixed_tokens: float = 8.0
    quadratic: float = 0.0015

    def time(self, longest: int, count: int) -> float:
        """Of one batch."""
        return self.fixed_tokens + count * (longest + self.quadratic * longest**2)


@dataclass(frozen=True, slots=True)
class Batching:
    """How an engine likes its work cut."""

    max_batch_tokens: int
    """Most tokens in one forward pass, padding included; a text longer than that is a batch of its own."""
    window_tokens: int
    """Texts that are sorted by length together, in tokens. More wastes less padding, and keeps each waiting longer."""
    cost: BatchCost | None
    """Of a padded batch; None where the engine needs no padding, and a batch costs the sum of its lengths."""


def plan_batches(lengths: Sequence[int] | NDArray[np.int64], batching: Batching) -> list[list[int]]:
    """Cut a window into batches so that all of it takes the least time.

    With padding every text of a batch costs as much as its longest, so like lengths go together; many small batches
    pad little but each has its fixed cost. Of all ways to cut the texts, sorted by length, the cheapest is found by
    dynamic programming over the place of the last cut. Without padding there is nothing to gain by sorting, and texts
    keep their order.

    Args:
        lengths: tokens of each text, at least 1.

    Returns:
        Lists of indexes into `lengths`; every index occurs exactly once. With padding, shortest texts first.
    """
    if batching.cost is None:
        return _fill(lengths, batching.max_batch_tokens)
    order = np.argsort(lengths, kind="stable")
    ascending = np.asarray(lengths, dtype=np.float64)[order]
    text_costs = ascending + batching.cost.quadratic * ascending**2
    most_texts = np.maximum(batching.max_batch_tokens // np.maximum(ascending, 1), 1).astype(int)
    count = len(order)
    # least[i] is the least time for the i shortest texts, and cuts[i] where their last batch begins.
    least = np.zeros(count + 1)
    cuts = np.zeros(count + 1, dtype=int)
    for end in range(1, count + 1):
        first = max(0, end - most_texts[end - 1])
        sizes = np.arange(end - first, 0, -1)
        times = least[first:end] + sizes * text_costs[end - 1]
        best = int(times.argmin())
        cuts[end] = first + best
        least[end] = times[best] + batching.cost.fixed_tokens
    batches = []
    end = count
    while end:
        batches.append(order[cuts[end] : end].tolist())
        end = int(cuts[end])
    return batches[::-1]


def _fill(lengths: Sequence[int] | NDArray[np.int64], max_batch_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if length > room or not batches:
            batches.append([])
            room = max_batch_tokens
        batches[-1].append(index)
        room -= length
    return batches


def padded_tokens(lengths: Sequence[int], batching: Batching) -> int:
    """Tokens that a batch of these lengths computes."""
    return sum(lengths) if batching.cost is None else max(lengths) * len(lengths)
