"""How a window of comments is cut into batches. Pure."""

from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Batches of like lengths, each within the token budget.

    A batch costs `longest × count` tokens, since shorter texts are padded to its longest. Sorting the window by
    length first keeps the padding small.

    Args:
        lengths: tokens of each item, at least 1.
        max_batch_tokens: padded tokens a batch may hold; an item longer than that is a batch of its own.

    Returns:
        Lists of indexes into `lengths`; every index occurs exactly once. Shortest batch first.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # In ascending order the newcomer is always the longest.
        if batch and lengths[index] * (len(batch) + 1) > max_batch_tokens:
            batches.append(batch)
            batch = []
        batch.append(index)
    if batch:
        batches.append(batch)
    return batches
