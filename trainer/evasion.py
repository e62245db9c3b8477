"""How evaders write: ways to spell a text that people still read, and that a classifier may not.

Training rows are copied in these ways, and versions are measured under them.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np

LEET = str.maketrans("aeiostAEIOST", "431057431057")
"""The substitutions that people know best."""
LOOKALIKES = str.maketrans("aceiopxyABCEHKMOPTX", "асеіорхуАВСЕНКМОРТХ")
"""Cyrillic letters that look Latin: https://www.unicode.org/reports/tr39/#Confusable_Detection"""
ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"

Evasion = Callable[[str, np.random.Generator], str]
"""One word in another spelling."""


def _leetspeak(word: str, rng: np.random.Generator) -> str:
    return word.translate(LEET)


def _homoglyphs(word: str, rng: np.random.Generator) -> str:
    return word.translate(LOOKALIKES)


def _repeated_letters(word: str, rng: np.random.Generator) -> str:
    times = int(rng.integers(3, 6))
    return re.sub(r"[aeiouAEIOU]", lambda vowel: vowel[0] * times, word)


def _spaced(word: str, rng: np.random.Generator) -> str:
    return " ".join(word)


def _dotted(word: str, rng: np.random.Generator) -> str:
    return ".".join(word)


def _zero_width(word: str, rng: np.random.Generator) -> str:
    return ZERO_WIDTH[rng.integers(len(ZERO_WIDTH))].join(word)


EVASIONS: Mapping[str, Evasion] = {
    "leetspeak": _leetspeak,
    "homoglyphs": _homoglyphs,
    "repeated_letters": _repeated_letters,
    "spaced": _spaced,
    "dotted": _dotted,
    "zero_width": _zero_width,
}


def evade(text: str, evasion: str, rng: np.random.Generator, *, share: float = 1.0) -> str:
    """The text as an evader would write it.

    Args:
        evasion: a key of `EVASIONS`.
        share: of the words that are written so, each drawn by itself; most evaders disguise only some.
    """
    write = EVASIONS[evasion]
    return re.sub(r"\S+", lambda word: write(word[0], rng) if share >= 1 or rng.random() < share else word[0], text)
