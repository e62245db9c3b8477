"""Which queues a comment may be submitted to. Pure."""

import difflib

from config.names import MODERATE_QUEUE, MODERATE_QUEUES

PRIORITIES = range(10)
"""That a Celery producer may give, the first of them first. kombu keeps a Redis list for each, and a producer's
`priority_steps` say which of them it uses: 0, 3, 6 and 9 unless it sets others."""
PRIORITY_SEPARATOR = "\x06\x16"
"""Between a queue's name and a priority in the name of a list: kombu's own. Lists with another are not looked into."""
LEAST_LIKENESS = 0.45
"""Of a name to the one that was meant: `bulk` is so much like `toxicity.bulk`."""


class UnknownQueue(ValueError):
    """A queue that no worker takes comments from: what is submitted to it would never be decided."""

    def __init__(self, queue: str) -> None:
        near = difflib.get_close_matches(queue, MODERATE_QUEUES, n=1, cutoff=LEAST_LIKENESS)
        self.queue = queue
        self.meant = near[0] if near else None
        """The queue whose name is like it, if one is."""
        hint = f"; did you mean {self.meant!r}?" if near else ""
        super().__init__(f"unknown queue {queue!r}: use one of {', '.join(MODERATE_QUEUES)}{hint}")


def check_queue(queue: str) -> None:
    """Refuse a misspelt queue before anything is submitted.

    Raises:
        UnknownQueue: it is none of `config.names.MODERATE_QUEUES`.
    """
    if queue not in MODERATE_QUEUES:
        raise UnknownQueue(queue)


def priority_list(queue: str, priority: int) -> str:
    """The Redis list in which a queue's messages of this priority wait, without the prefix of all keys."""
    return f"{queue}{PRIORITY_SEPARATOR}{priority}" if priority else queue


def priority_lists(queue: str) -> list[str]:
    """Every list of a queue."""
    return [priority_list(queue, priority) for priority in PRIORITIES]


def known_queue(queue: str) -> str:
    """Where to send what a row says is of this queue: there, or to the ordinary queue.

    Earlier releases wrote any name that a producer gave. Redis may refuse such a list, or nobody take from it.
    """
    return queue if queue in MODERATE_QUEUES else MODERATE_QUEUE
