"""Reads what evaders write: look-alike letters, l33t, s p a c e d and d.o.t.t.e.d words, stretched ones. Pure.

A word is only read otherwise where it is no known word as it stands and its reading is one, so ordinary text stays as
it is. Which words are known is a file of the version, so that a text is always read as it was in training.

Strangers write the texts: every pattern and loop here takes time in proportion to the text's length.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from math import log

LOOKALIKES: Mapping[str, str] = {
    "a": "аαɑ", "b": "ЬƄ", "c": "сϲᴄ", "d": "ԁ", "e": "еєҽ", "f": "ғ", "g": "ɡց", "h": "һհ", "i": "іɩıι¡", "j": "јϳ",
    "k": "кκᴋ", "l": "ӏⅼǀ", "m": "мᴍ", "n": "ոпη", "o": "оοσօ", "p": "рρ", "q": "ԛգ", "r": "гᴦ", "s": "ѕꜱ", "t": "тτ",
    "u": "υսцᴜ", "v": "νѵᴠ", "w": "ԝшωᴡ", "x": "хχ", "y": "уγү", "z": "ᴢ",
    "A": "АΑ", "B": "ВΒ", "C": "СϹ", "E": "ЕΕ", "H": "НΗ", "I": "ІΙ", "J": "Ј", "K": "КΚ", "M": "МΜ", "N": "Ν",
    "O": "ОΟ", "P": "РΡ", "S": "Ѕ", "T": "ТΤ", "U": "Ս", "X": "ХΧ", "Y": "УΥҮ", "Z": "Ζ",
}  # fmt: skip
"""Letters of other scripts that look Latin, most of https://www.unicode.org/Public/security/latest/confusables.txt."""

LEET: Mapping[str, str] = {
    "0": "o", "1": "il", "2": "z", "3": "e", "4": "a", "5": "s", "6": "g", "7": "t", "8": "b", "9": "g",
    "@": "a", "$": "s", "!": "i", "|": "il", "+": "t",
}  # fmt: skip
"""Signs that stand for letters, and what they may stand for."""

MAX_READINGS = 64
"""Of one word; hostile ones would have millions."""
MAX_WORD_CHARS = 20
"""Of a word that is looked for in letters without spaces."""
UNKNOWN_LETTER_COST = 4.0
"""Of each letter of an unknown word, beyond the cost of the rarest known one: long ones are less probable."""
LONGEST_MEAN_WORD_CHARS = 9
HABIT, HABIT_SHARE = 3, 0.25
"""Disguised words, and their share of all, from which on short and doubtful ones are read too."""

_LATIN = str.maketrans({other: latin for latin, others in LOOKALIKES.items() for other in others})
# Words are matched from their first character only: tried from each of them, a long one costs quadratic time.
# `¡` stands for a letter and is none, so it may also begin a match.
_WORD_WITH_LOOKALIKE = re.compile(rf"(?:(?<![^\W\d_])|(?=¡))[^\W\d_]*[{''.join(LOOKALIKES.values())}][^\W\d_]*")
_ASCII_LETTER = re.compile("[a-zA-Z]")
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e01ef]"
)
_SPACED = re.compile(r"(?<!\S)\S(?:[ \t]+\S){3,}(?!\S)")
_LETTERS = re.compile(r"[^\W\d_]+|[\W\d_]+")
_BETWEEN = r"( ?[^\w\s]{1,3} ?|_)"
_DOTTED = re.compile(rf"(?<![^\W_])[^\W_]{_BETWEEN}[^\W_](?:\1[^\W_])*(?![^\W_])")
_DOTTED_LONG = re.compile(rf"(?<![^\W_])[^\W_]{_BETWEEN}[^\W_]\1[^\W_]")
_NUMBERS = re.compile(r"[\d\W_]*")
_WORD = re.compile(r"(?<![\w@$!|+])[\w@$!|+]*[\w$]")  # an exclamation mark that ends a word is one
_PAIR = re.compile(r"([a-z])\1+")
_LONG_RUN = re.compile(r"([a-z])\1{2,}")
_ANY_LONG_RUN = re.compile(r"(.)\1{2,}", re.IGNORECASE)
_NUMBER_WITH_UNIT = re.compile(r"\d+[a-z]{1,2}|[a-z]\d+")
_SIGN = re.compile(r"[0-9@$!|+]")
_SIGN_IN_WORD = re.compile(r"[0-9@$|!+](?=[a-zA-Z])|(?<=[a-zA-Z])[0-9@$]")
_STRETCHED = re.compile(r"([a-zA-Z])\1\1|([a-zA-Z])\2[a-zA-Z]*([a-zA-Z])\3")


class Deobfuscator:
    """Reads disguised words as the known words they stand for."""

    def __init__(self, words: Sequence[str]) -> None:
        """`words`: known ones in lower case, the most frequent first."""
        self._rank = {word: rank for rank, word in enumerate(words)}
        # A word's frequency falls with its rank (Zipf's law); its cost is the negative logarithm of that.
        scale = log(max(len(words), 2))
        self._cost = {word: log((rank + 1) * scale) for word, rank in self._rank.items()}
        self._unknown_cost = log((len(words) + 1) * scale)

    def __call__(self, text: str) -> str:
        """The text with its disguises undone as far as they are certain.

        Args:
            text: as `model.text.normalise` returns it.
        """
        if not text.isascii():
            text = _latin(_INVISIBLE.sub("", text))
        text = _SPACED.sub(self._joined, text)
        if separators := {match[1] for match in _DOTTED_LONG.finditer(text) if not _NUMBERS.fullmatch(match[0])}:
            # Two letters alone may be `e.g.`; beside a longer word with the same between its letters they are a word.
            text = _DOTTED.sub(lambda dotted: _undotted(dotted, separators), text)
        if (_SIGN.search(text) and _SIGN_IN_WORD.search(text)) or _STRETCHED.search(text):
            text = self._undisguised(text)
        return text

    def _joined(self, spaced: re.Match[str]) -> str:
        """The words of a stretch of single letters: between wider gaps, or else where known words end."""
        parts = [re.sub(r"\s", "", part) for part in re.split(r"\s{2,}", spaced[0])]
        # Where the wider gaps are between sentences only, the parts are longer than words are.
        if len(parts) > 1 and sum(map(len, parts)) <= LONGEST_MEAN_WORD_CHARS * len(parts):
            return " ".join(parts)
        return " ".join(word for part in parts for run in _LETTERS.findall(part) for word in self._segmented(run))

    def _segmented(self, letters: str) -> list[str]:
        """Letters without spaces as the most probable words (Viterbi); anything but letters stays as it is."""
        if not letters[0].isalpha():
            return [letters]
        lower = letters.lower()
        costs, starts = [0.0], [0]
        for end in range(1, len(lower) + 1):
            cost, start = min(
                (costs[begin] + self._word_cost(lower[begin:end]), begin)
                for begin in range(max(0, end - MAX_WORD_CHARS), end)
            )
            costs.append(cost)
            starts.append(start)
        words: list[str] = []
        end = len(letters)
        while end:
            words.append(letters[starts[end] : end])
            end = starts[end]
        return words[::-1]

    def _word_cost(self, word: str) -> float:
        known = self._cost.get(word)
        return self._unknown_cost + UNKNOWN_LETTER_COST * len(word) if known is None else known

    def _undisguised(self, text: str) -> str:
        """The text with signs in words read as letters, and stretched words in their ordinary form."""
        words = _WORD.findall(text)
        readings = [self._reading(word) for word in words]
        changed = [word for word, reading in zip(words, readings, strict=True) if word != reading]
        stretched = sum(map(str.isalpha, changed))
        enough = max(HABIT, HABIT_SHARE * len(words))
        signs, pairs = len(changed) - stretched >= enough, stretched >= enough
        if signs or pairs:
            readings = [self._reading(word, numbers=signs, pairs=pairs) for word in words]
        following = iter(readings)
        return _WORD.sub(lambda _: next(following), text)

    def _reading(self, word: str, *, numbers: bool = False, pairs: bool = False) -> str:
        """The most frequent known word that this one may stand for; itself where it is known, or stands for none.

        Args:
            numbers: whether they may be words too.
            pairs: whether a single pair of a letter may be one letter.
        """
        lower = word.lower()
        if lower in self._rank:
            return word
        plain = lower.isalpha()
        if not plain and not numbers and (not _SIGN_IN_WORD.search(word) or _NUMBER_WITH_UNIT.fullmatch(lower)):
            return word
        for run in (_LONG_RUN, _PAIR) if pairs or not plain or len(_PAIR.findall(lower)) > 1 else (_LONG_RUN,):
            known = [each for each in islice(_readings(lower, run), MAX_READINGS) if each in self._rank]
            if known:
                return min(known, key=self._rank.__getitem__)
        return _ANY_LONG_RUN.sub(r"\1", word) if plain else word


def _latin(text: str) -> str:
    """Words of look-alikes in Latin letters. In a text with true words of another script, mixed words only."""
    readings = {word: word.translate(_LATIN) for word in _WORD_WITH_LOOKALIKE.findall(text)}
    foreign = any(not reading.isascii() and not _ASCII_LETTER.search(word) for word, reading in readings.items())
    return _WORD_WITH_LOOKALIKE.sub(
        lambda word: word[0] if foreign and not _ASCII_LETTER.search(word[0]) else readings[word[0]], text
    )


def _undotted(dotted: re.Match[str], separators: set[str]) -> str:
    letters = dotted[0].replace(dotted[1], "")
    return letters if dotted[1] in separators and not letters.isdigit() else dotted[0]


def _readings(word: str, run: re.Pattern[str]) -> Iterator[str]:
    """What a word may stand for: every sign as each of its letters, every `run` of a letter as one or two of it."""
    for letters in product(*(LEET.get(letter, letter) for letter in word)):
        parts = run.split("".join(letters))  # between the runs what stands alone, then each run's letter
        choices = [(part,) if index % 2 == 0 else (part, 2 * part) for index, part in enumerate(parts)]
        yield from map("".join, product(*choices))
