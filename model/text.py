"""From text to token ids: normalisation, tokenisation, windows; the same in training and in service."""

import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from config.settings import ROOT
from model.deobfuscation import Deobfuscator

TOKENIZER_FILE = "tokenizer.json"
WORDS_FILE = "words.txt"
"""Known words of a version, the most frequent first; without it, texts are only normalised."""

KNOWN_WORDS = ROOT / "model" / WORDS_FILE
"""What a version that starts from an encoder is given."""

Windows = list[list[int]]
"""A text as token ids with the encoder's special tokens: one list, or several overlapping ones where it is long."""


MAX_READ_BYTES = 32_768
"""Of a text as `normalise` returns it; what comes after is not read.

NFKC may make eleven bytes of one, so 20 KB of such signs would cost five times as much as the longest ordinary text. A
text grows with its language, too, and none may be cut for that: 20,480 bytes of Thai that is full of ำ grow by a fifth,
and of Arabic that has ﷺ in every line by half. A token stands for a byte or more, so this bounds tokens and windows as
well: 344 windows where a version reads 256 tokens at once. 20 KB of English have 42.
"""
MAX_MARKS = 30
"""Combining marks in a row, as Unicode's Stream-Safe Text Format has it; no language needs as many."""
_COMBINING_GRAPHEME_JOINER = "\u034f"
_CROWDED = re.compile(rf"(?:[^\w\s\x00-\x7f]|[\uff9e\uff9f]){{{MAX_MARKS + 1},}}")
"""Where more marks may stand in a row: every mark is one of these, and so are other signs."""


def normalise(text: str) -> str:
    """One form for what looks the same: NFKC, which undoes full-width, circled and mathematical look-alike letters.

    An invisible character divides a crowd of combining marks: NFKC sorts the marks of one letter, in quadratic time.
    https://unicode.org/reports/tr15/ (13, Stream-Safe Text Format)
    """
    return text if text.isascii() else unicodedata.normalize("NFKC", _CROWDED.sub(_stream_safe, text))


class Readable(NamedTuple):
    """What versions read of a text."""

    text: str
    """Normalised, at most MAX_READ_BYTES of UTF-8."""
    truncated: bool
    """Whether it had more, which nobody reads."""


def readable(normalised: str) -> Readable:
    """What is read of a text that `normalise` returned."""
    encoded = normalised.encode()
    if len(encoded) <= MAX_READ_BYTES:
        return Readable(normalised, False)
    return Readable(encoded[:MAX_READ_BYTES].decode(errors="ignore"), True)


def is_truncated(text: str) -> bool:
    """Whether versions read only the beginning of a text."""
    return readable(normalise(text)).truncated


def _stream_safe(crowd: re.Match[str]) -> str:
    safe, marks = [], 0
    for character in crowd[0]:
        is_mark = unicodedata.combining(unicodedata.normalize("NFKD", character)[0]) > 0
        marks = marks + 1 if is_mark else 0
        if marks > MAX_MARKS:
            safe.append(_COMBINING_GRAPHEME_JOINER)
            marks = 1
        safe.append(character)
    return "".join(safe)


class TextEncoder:
    """The tokenizer of one model version, and its way to read disguised words.

    A text longer than `max_length` tokens is cut into windows of half that length, each beginning in the last quarter
    of the one before, so that no phrase is cut in every window it is in. Half, because a short insult is drowned by the
    harmless words around it: of insults put into long comments the starter version finds several times as many, with
    no more false alarms.

    Raises:
        Exception: the tokenizer file cannot be read (the tokenizers library has no narrower class).
    """

    def __init__(self, directory: Path, max_length: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
        words = directory / WORDS_FILE
        self._undisguised = Deobfuscator(words.read_text(encoding="utf-8").split()) if words.is_file() else str
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._max_length = max_length
        self._before, self._after = _special_tokens(self._tokenizer)
        self._window_tokens = max(1, max_length // 2 - len(self._before) - len(self._after))

    def encode(self, texts: Sequence[str]) -> list[Windows]:
        """The windows of each text, each of at most the version's `max_length` tokens; uses every core."""
        return self.encode_readable([readable(normalise(text)).text for text in texts])

    def encode_readable(self, texts: Sequence[str]) -> list[Windows]:
        """The same of texts that `readable` returned."""
        return list(map(self._windows, self._token_ids(texts)))

    def locate(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """Where the windows of a text are.

        Returns:
            The text as the version reads it, disguises undone and without what is not read; and of each window that
            `encode` makes of it, where its first character is there, and where the one after its last.
        """
        read = self._undisguised(readable(normalise(text)).text)
        spans = self._tokenizer.encode(read).offsets
        if len(spans) <= self._max_length:
            return read, [(0, len(read))]
        body = spans[len(self._before) : len(spans) - len(self._after)]
        windows = (body[start : start + self._window_tokens] for start in window_starts(len(body), self._window_tokens))
        return read, [(window[0][0], window[-1][1]) for window in windows]

    def encode_beginnings(self, texts: Sequence[str]) -> list[list[int]]:
        """The first `max_length` tokens of each text, special tokens included: what a version is trained on."""
        kept = self._max_length - len(self._after)
        return [
            ids if len(ids) <= self._max_length else [*ids[:kept], *self._after]
            for ids in self._token_ids([readable(normalise(text)).text for text in texts])
        ]

    def _token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(map(self._undisguised, texts)))]

    def _windows(self, ids: list[int]) -> Windows:
        if len(ids) <= self._max_length:
            return [ids]
        body = ids[len(self._before) : len(ids) - len(self._after)]
        return [
            [*self._before, *body[start : start + self._window_tokens], *self._after]
            for start in window_starts(len(body), self._window_tokens)
        ]


def window_starts(length: int, window: int) -> list[int]:
    """Where the fewest windows begin that overlap by a quarter or more; evenly spread, the last ends with the text."""
    if length <= window:
        return [0]
    steps = math.ceil((length - window) / max(1, window - window // 4))
    return [step * (length - window) // steps for step in range(steps + 1)]


def _special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the encoder wants before and after every text."""
    encoding = tokenizer.encode("a")
    text = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
    return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]
