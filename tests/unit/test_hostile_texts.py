"""Whatever a stranger writes within the contract costs time in proportion to its length: no comment stops a worker."""

import time
import unicodedata
from collections.abc import Callable

import pytest

from config.comment import checked_text
from config.names import MAX_TEXT_BYTES
from model.text import MAX_READ_BYTES, TextEncoder, is_truncated, window_starts
from model.version import STARTER_DIRECTORY
from trainer.slices import mentions, slices
from worker.message import _Repetitive

HOSTILE = {
    "letters": ("", "a", "é"),
    "letters before an emoji": ("", "a", "😀"),
    "Chinese": ("", "今天天气很好", ""),
    "Japanese": ("", "これはとても長い", "é"),
    "signs": ("a1b ", "!", ""),
    "signs in a word": ("a1b$", "@!|+", ""),
    "l33t": ("", "1a", ""),
    "l33t words": ("", "4b5 ", ""),
    "dots": ("", "a.", "bb"),
    "spaced letters": ("", "a ", "b"),
    "spaces": ("a b c", " \t", "d e f"),
    "underscores": ("", "_a", "1b"),
    "pairs": ("", "aab", "c"),
    "inverted exclamation marks": ("", "¡a", ""),
    "zalgo": ("a", "\u0344", "\u0323" * 4_000),
    "zalgo in half-width Japanese": ("か", "\u0301", "\uff9e" * 3_000),
    "joiners": ("", "a\u200d", "b"),
    "emoji": ("", "👩\u200d👧\ufe0f", "b"),
    "one sign that becomes 18": ("", "\ufdfa", ""),
    "one sign that becomes a word": ("", "\u3300", ""),
}
"""What the text begins with, what is repeated, what it ends with."""

ORDINARY = (
    "The water was cold and it was nice. ",
    "น้ำทำให้คนจำคำที่ทำตามคำแนะนำ",  # each ำ becomes two letters
    "ນ້ຳ ຄຳ ທຳ ການເຮັດວຽກ ",
    "পড়াশোনায় মন দেয় না ",
    "फ़िल्म ज़मीन लड़का पढ़ना बड़ा ",
    "قال رسول الله ﷺ إنما الأعمال بالنيات وإنما لكل امرئ ما نوى ",  # ﷺ becomes 18 letters
    "한국어 댓글입니다 ",
    "今天天气很好，我们去公园玩吧。",
    "これはとても長い文章です…",
    "¡No puedo más! ½ kg de café, 5 €… ",
    "😂😂👍🏽 ",
)
"""Of languages that normalisation makes longer, and of those with many tokens."""

encoder = TextEncoder(STARTER_DIRECTORY, 256)


def hostile(kind: str, size: int) -> str:
    """The text at an eighth of its full `size`, in bytes, is made of the same parts, each an eighth as long."""
    begin, unit, end = HOSTILE[kind]
    end = end[: max(1, len(end) * size // MAX_TEXT_BYTES)] if len(end) > 10 else end
    return begin + unit * ((size - len((begin + end).encode())) // len(unit.encode())) + end


def cpu_s(work: Callable[[], object]) -> float:
    """The least of several tries: what else runs on the machine can only add."""
    tries = []
    for _ in range(2):
        started = time.process_time()
        work()
        tries.append(time.process_time() - started)
    return max(min(tries), 1e-4)  # less is the clock's own noise


def grows_linearly(work: Callable[[str], object], short: str, long: str) -> bool:
    """Whether a text eight times as long costs about eight times as much, and not 64 times."""
    return cpu_s(lambda: work(long)) < 24 * cpu_s(lambda: work(short))


@pytest.mark.parametrize("kind", HOSTILE)
def test_reading_a_hostile_text_takes_linear_time(kind: str) -> None:
    long, short = hostile(kind, MAX_TEXT_BYTES), hostile(kind, MAX_TEXT_BYTES // 8)
    assert MAX_TEXT_BYTES - 32 < len(checked_text(long).encode()) <= MAX_TEXT_BYTES
    for work in (
        checked_text,
        lambda text: encoder.encode([text]),
        lambda text: (slices([text]), mentions([text])),
    ):
        assert grows_linearly(work, short, long)


@pytest.mark.parametrize("kind", HOSTILE)
def test_tokens_and_windows_of_one_text_are_bounded(kind: str) -> None:
    text = hostile(kind, MAX_TEXT_BYTES)
    [windows] = encoder.encode([text])
    most = len(window_starts(MAX_READ_BYTES, 126))
    assert len(windows) <= most
    assert max(map(len, windows)) <= 256
    # And what is left out is told
    assert is_truncated(text) is (len(unicodedata.normalize("NFKC", text).encode()) > MAX_READ_BYTES)


@pytest.mark.parametrize("sentence", ORDINARY)
def test_no_ordinary_text_of_the_longest_is_cut(sentence: str) -> None:
    text = sentence * (MAX_TEXT_BYTES // len(sentence.encode()))
    assert not is_truncated(text)


def test_finding_a_name_that_stands_twice_takes_linear_time() -> None:
    def repeated(names: int) -> str:
        return _Repetitive([*((str(name), 0) for name in range(names)), ("x", 0), ("x", 0)]).repeated

    assert repeated(10) == "x"
    assert cpu_s(lambda: repeated(8_000)) < 24 * cpu_s(lambda: repeated(1_000))
