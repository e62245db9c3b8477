"""Makes synonyms.txt of WordNet's files: `python -m trainer.make_synonyms /usr/share/wordnet > trainer/synonyms.txt`.

Debian's package wordnet-base has those of WordNet 3.0. A word is taken where one sense is what it nearly always means
in the texts that WordNet's authors annotated, so that no context is needed to replace it, and its synonyms are the
words for which that sense is the first too. Left out are words that may name people, or are slang, slurs or the like in
any sense: those may be what a comment is toxic by; names; and forms of verbs, which mean other things in most texts.
"""

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

PARTS_OF_SPEECH = {"noun": "1", "verb": "2", "adj": "3", "adv": "4"}
"""Ending of the files, and number in a sense's key, where 5 is an adjective too."""
PERSON = "18"
"""Number of the lexicographers' file of nouns for people."""
USAGE = ";u"
"""Pointer of a synset to how it is used: slang, ethnic slur, obscenity, archaism."""
LEAST_USES = 2
LEAST_SHARE = 0.6
"""Of a word's annotated uses, in all parts of speech, that are of its first sense."""
MOST_SYNONYMS = 3
WORD = re.compile("[a-z]{4,}")

FUNCTION_WORDS = frozenset(
    (  # noqa: SIM905
        "about above across after against along although among around because before behind below beneath beside "
        "besides between beyond both down during each either else ever every except from have having here inside into "
        "just like many more most much near neither never none nothing only onto opposite other outside over past "
        "round same should since some someone still such than that then there though through thus till toward towards "
        "under unless until upon very well what when where whether which while will with within without would your"
    ).split(" ")
)
"""WordNet has them as adverbs at most, and texts mostly as prepositions, conjunctions, auxiliaries."""

NOTICE = """\
# Words and their synonyms, in the sense that they nearly always have. Made by trainer/make_synonyms.py of WordNet 3.0.
# WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.
# Permission to use, copy, modify and distribute this database for any purpose and without fee or royalty is granted,
# provided that this notice appears on all copies. It is provided "as is", without warranties of any kind. The name of
# Princeton University may not be used in advertising. https://wordnet.princeton.edu/license-and-commercial-use"""


def main(wordnet: Path) -> None:
    uses: Counter[tuple[str, str]] = Counter()  # of a word in a part of speech
    first_uses: Counter[tuple[str, str]] = Counter()
    all_uses: Counter[str] = Counter()
    for line in _lines(wordnet / "cntlist.rev"):
        key, sense, count = line.split()
        word, _, rest = key.partition("%")
        entry = (word, rest[0].replace("5", "3"))
        uses[entry] += int(count)
        first_uses[entry] += int(count) * (sense == "1")
        all_uses[word] += int(count)

    first_sense: dict[tuple[str, str], str] = {}
    irregular: set[str] = set()
    left_out = set(FUNCTION_WORDS)
    for ending, part in PARTS_OF_SPEECH.items():
        # synset, file, …, then its pointers, and its explanation
        facts = [line.partition(" | ")[0].split() for line in _lines(wordnet / f"data.{ending}")]
        irregular.update(line.split()[0] for line in _lines(wordnet / f"{ending}.exc"))
        telling = {fields[0] for fields in facts if (ending == "noun" and fields[1] == PERSON) or USAGE in fields}
        left_out.update(field.lower() for fields in facts for field in fields if field[0].isupper())
        for line in _lines(wordnet / f"index.{ending}"):
            # word, part of speech, senses, pointers, each pointer, senses, annotated senses, the synset of each sense
            word, *fields = line.split()
            synsets = fields[int(fields[2]) + 5 :]
            first_sense[word, part] = synsets[0]
            if telling.intersection(synsets):
                left_out.add(word)

    verbs = {word for word, part in first_sense if part == PARTS_OF_SPEECH["verb"]}
    together = defaultdict(list)
    for (word, part), synset in first_sense.items():
        is_form = word in irregular or any(stem in verbs for stem in _stems(word))
        if WORD.fullmatch(word) and word not in left_out and not is_form and uses[word, part]:
            together[part, synset].append(word)
    print(NOTICE)
    for word, part in sorted(first_sense):
        others = [other for other in together[part, first_sense[word, part]] if other != word]
        is_clear = all_uses[word] >= LEAST_USES and first_uses[word, part] >= LEAST_SHARE * all_uses[word]
        if is_clear and others and word in together[part, first_sense[word, part]]:
            others.sort(key=lambda other: (-uses[other, part], other))
            print(word, *others[:MOST_SYNONYMS])


def _stems(word: str) -> list[str]:
    """Of what verbs a word may be a regular form, such as looking of look: it may mean that in a text."""
    stem = re.sub("(ing|ed)$", "", word)
    return [stem, f"{stem}e", stem[:-1]] if stem != word else []


def _lines(path: Path) -> list[str]:
    """Without the licence, whose lines begin with a space."""
    return [line for line in path.read_text(encoding="ascii").splitlines() if not line.startswith(" ")]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
