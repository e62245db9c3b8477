"""Which held-out rows are looked at by themselves: by length, by how they are spelt, by the identities they mention.

The figures of identities are those of Borkan et al. (2019), "Nuanced metrics for measuring unintended bias with real
data for text classification", as the Jigsaw challenge on unintended bias used them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.evasion import ZERO_WIDTH

Rows = NDArray[np.bool_]
"""Whether each row belongs, (rows,)."""

SHORT_CHARS = 100
LONG_CHARS = 500

ANY_IDENTITY = "any"
"""The group of all groups: on a small set the only one with enough rows."""
IDENTITY_TERMS: Mapping[str, str] = {
    "women": "wom[ae]n|females?|girls?|lady|ladies",
    "men": "m[ae]n|males?|boys?|gentlem[ae]n",
    "homosexual_gay_or_lesbian": "homosexual(s|ity)?|gays?|lesbians?|lgbtq?",
    "bisexual": "bisexual(s|ity)?",
    "heterosexual": "heterosexual(s|ity)?|straight (people|person|m[ae]n|wom[ae]n|guys?)",
    "transgender": "trans(gender(ed|s)?|sexuals?)?|trans (people|person|wom[ae]n|m[ae]n)",
    "christian": "christian(s|ity)?|catholics?|protestants?|evangelicals?|mormons?",
    "jewish": "jew(s|ish)?|judaism|israelis?",
    "muslim": "muslims?|moslems?|islam(ic)?",
    "hindu": "hindus?|hinduism",
    "buddhist": "buddhists?|buddhism",
    "atheist": "atheists?|atheism",
    "black": "blacks?|african[ -]americans?|africans?",
    "white": "whites?|caucasians?",
    "asian": "asians?|chinese|japanese|koreans?|indians?|vietnamese",
    "latino": "latin[oax]s?|hispanics?|mexicans?",
    "psychiatric_or_mental_illness": "mental(ly)? (ill(ness)?|disorders?)|schizophreni(a|cs?)|bipolar|autis(m|tic)"
    "|depress(ion|ive)",
    "disability": "disab(led|ility|ilities)|handicapped|blind|deaf|wheelchairs?|paraly[sz]ed",
    "older": "elderly|old (people|person|m[ae]n|wom[ae]n)|older (people|persons?|adults?)|senior citizens?",
    "younger": "young(er)? (people|persons?|adults?|m[ae]n|wom[ae]n)|teen(ager)?s?|adolescents?",
}
"""What a text mentions a group by: plain terms, as regular expressions of whole words. Slurs are left out: they are
abuse themselves, and what is measured is whether the plain mention is taken for it."""
BIAS_FIGURES = ("subgroup_auc", "bpsn_auc", "bnsp_auc")
MEAN_POWER = -5
"""The exponent of Borkan et al., low so that the worst groups count most."""

_IDENTITIES = {group: re.compile(rf"\b({terms})\b", re.IGNORECASE) for group, terms in IDENTITY_TERMS.items()}
_OBFUSCATED = re.compile(
    "|".join(
        (
            f"[{ZERO_WIDTH}]",
            # A Latin letter beside one of an alphabet with letters that look Latin.
            r"[A-Za-z][\u0370-\u03ff\u0400-\u04ff]|[\u0370-\u03ff\u0400-\u04ff][A-Za-z]",
            # Digits and signs for letters, within a word; a year or `2nd` has them at an end.
            r"(?<![\w/.])[A-Za-z]+[013457@$!*]+[A-Za-z]+(?![\w/.])",
            # Single letters, spaced or dotted: from four on, as initials and U.S.A. have fewer.
            r"(?<!\w)(?:[A-Za-z][ .*_-]){3,}[A-Za-z](?!\w)",
            # The same letter three times, as no word has it; www, xxx and Roman numerals aside.
            r"([A-HJ-VYZa-hj-vyz])\1\1",
        )
    )
)


def slices(texts: Sequence[str]) -> dict[str, Rows]:
    """The rows of each slice: short, medium and long by characters, obfuscated and plain by spelling."""
    lengths = np.array([len(text) for text in texts])
    obfuscated = np.array([_OBFUSCATED.search(text) is not None for text in texts], dtype=bool)
    return {
        "short": lengths < SHORT_CHARS,
        "medium": (lengths >= SHORT_CHARS) & (lengths < LONG_CHARS),
        "long": lengths >= LONG_CHARS,
        "obfuscated": obfuscated,
        "plain": ~obfuscated,
    }


def mentions(texts: Sequence[str]) -> dict[str, Rows]:
    """The rows that mention each group of `IDENTITY_TERMS`, and `any` of them."""
    groups = {
        group: np.array([terms.search(text) is not None for text in texts], dtype=bool)
        for group, terms in _IDENTITIES.items()
    }
    return {ANY_IDENTITY: np.any(list(groups.values()), axis=0), **groups}


def bias_rows(truth: Rows, mentioned: Rows) -> dict[str, Rows]:
    """The rows over which each bias figure is a ROC-AUC.

    - subgroup_auc: those that mention the group.
    - bpsn_auc: background positive, subgroup negative: low where harmless mentions score like abuse of others.
    - bnsp_auc: background negative, subgroup positive: low where abuse that mentions it scores like harmless talk.
    """
    return {
        "subgroup_auc": mentioned,
        "bpsn_auc": truth != mentioned,
        "bnsp_auc": truth == mentioned,
    }


def generalised_mean(values: Iterable[float | None]) -> float | None:
    """The power mean with exponent -5 of those that are there; it is nearer to the least than the mean is."""
    known = [max(value, 1e-6) for value in values if value is not None]
    return float(np.mean(np.power(known, MEAN_POWER)) ** (1 / MEAN_POWER)) if known else None
