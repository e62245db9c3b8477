"""Which texts go into the next window."""

from collections import deque
from types import SimpleNamespace
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from model.batching import BatchCost, Batching
from worker.job import Job, Piece
from worker.line import Line, take_window

LENGTHS = st.lists(st.integers(1, 256), max_size=60)
BATCHING = Batching(max_batch_tokens=512, window_tokens=2_048, cost=BatchCost())


def pieces(lengths: list[int]) -> deque[Piece]:
    job: Job = None  # type: ignore[assignment]  # not looked at
    return deque(Piece(job, [0] * length) for length in lengths)


def tokens(window: list[Piece]) -> int:
    return sum(len(piece.ids) for piece in window)


@given(LENGTHS, LENGTHS)
def test_a_window_takes_from_the_front_and_loses_nothing(short: list[int], long: list[int]) -> None:
    waiting, waiting_long = pieces(short), pieces(long)
    everything = [*waiting], [*waiting_long]
    window = take_window(waiting, waiting_long, BATCHING)
    taken = len(short) - len(waiting)
    assert window == [*everything[0][:taken], *everything[1][: len(window) - taken]]
    assert [*everything[0][taken:]] == [*waiting]
    assert [*everything[1][len(window) - taken :]] == [*waiting_long]
    assert bool(window) is bool(short or long)


@example([1] * 6 + [220] + [243] * 8, [1] * 3 + [222] + [243] * 9)
@given(LENGTHS, LENGTHS)
def test_a_window_is_bounded(short: list[int], long: list[int]) -> None:
    window = take_window(pieces(short), pieces(long), BATCHING)
    longest = max([*short, *long], default=0)
    # The short ones may pass the window by less than one of them; the long ones those by less than one of theirs.
    assert tokens(window) < 2 * (BATCHING.window_tokens + longest) + longest


def test_long_texts_alone_come_a_batch_at_a_time() -> None:
    assert [len(piece.ids) for piece in take_window(pieces([]), pieces([256] * 9), BATCHING)] == [256, 256]


def test_long_texts_get_as_much_as_the_short_ones_that_wait() -> None:
    short, long = pieces([64] * 100), pieces([256] * 100)
    window = take_window(short, long, BATCHING)
    assert [len(piece.ids) for piece in window] == [64] * 32 + [256] * 8


class _Scorer:
    """As much of one as a line looks at."""

    batching = BATCHING

    def __init__(self) -> None:
        self.engine = object()


@given(st.lists(st.tuples(st.integers(0, 1), LENGTHS.filter(bool)), max_size=20))
def test_a_line_says_whose_the_next_batch_is(texts: list[tuple[int, list[int]]]) -> None:
    # Given texts of one window and of several, of two versions
    scorers = [_Scorer(), _Scorer()]
    line = Line()
    for version, windows in texts:
        job: Any = SimpleNamespace(scorer=scorers[version])
        line.add(job, [[0] * length for length in windows])
    taken = 0
    while line:
        engine = line.engine
        batch = line.next_batch()
        taken += len(batch)
        assert all(piece.job.scorer.engine is engine for piece in batch)
    assert taken == sum(len(windows) for _, windows in texts)
