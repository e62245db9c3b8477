"""Makes what the starter version is trained on, from the public files that README.md names, and the words it knows.

    python samples/starter/prepare.py --jigsaw train_union.csv.gz --civil toxic_spans/data/civil \\
        --tweets labeled_data.csv --tokenizer tokenizer.json

Writes train.csv.gz and validation.csv.gz beside this file, and model/words.txt. They were made once and are committed;
this says how.
"""

import argparse
import html
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from tokenizers import Tokenizer

from config.names import LABELS
from config.settings import ROOT
from model.deobfuscation import MAX_WORD_CHARS
from model.text import KNOWN_WORDS
from trainer.dataset import text_key

SEED = 20261123
HERE = Path(__file__).parent
HELD_OUT = (ROOT / "samples" / "holdout.csv", ROOT / "samples" / "comments.csv", *HERE.glob("test_*.csv.gz"))
COLUMNS = ["comment_text", *LABELS, "source"]

VALIDATION_NATURAL, VALIDATION_SIX_LABELS, VALIDATION_OTHERS = 1500, 1200, 800
"""Rows kept for choosing: at the natural rate, with all six labels, and of each other register."""
STRIPPED_SHARE = 0.3
CIVIL_POSITIVES, CIVIL_NEGATIVES, OFFENSIVE_TWEETS, COUNTERFACTUALS = 4500, 4000, 5000, 1800

FEWEST_COMMENTS = {2: 60, 3: 4}
"""In which a word of two, three and more letters is found; the shorter, the likelier it is none."""
LETTERS = ("a", "i")
"""That are words; the others are left of `don't` and the like."""
STRETCHED = re.compile(r"(.)\1\1")

SPAN_TYPES = {
    "Insult": "insult",
    "Profane/Obscene": "obscene",
    "Identity based Attack": "identity_hate",
    "Threat": "threat",
}

IDENTITIES = (
    ("muslim", "christian", "jewish", "hindu", "buddhist", "catholic", "atheist"),
    ("muslims", "christians", "jews", "hindus", "buddhists", "catholics", "atheists"),
    ("black", "white", "asian", "african", "european", "latino", "hispanic", "mexican", "chinese", "indian", "arab"),
    ("gay", "lesbian", "bisexual", "transgender", "straight", "queer", "homosexual"),
    ("gays", "lesbians", "transsexuals", "homosexuals"),
    ("women", "men"),
    ("woman", "man"),
    ("female", "male"),
    ("deaf", "blind", "disabled", "autistic"),
    ("islam", "christianity", "judaism", "hinduism"),
)
"""Words that can stand for each other in a sentence."""

NAMED = [
    "Muslim", "Christian", "Jewish", "Hindu", "Buddhist", "Catholic", "atheist", "black", "white", "Asian",
    "African", "European", "Latino", "Hispanic", "Mexican", "Chinese", "Indian", "Arab", "American", "gay",
    "lesbian", "bisexual", "transgender", "straight", "queer", "homosexual", "deaf", "blind", "disabled",
    "autistic", "trans", "old", "young", "elderly", "immigrant", "Black", "Native",
]  # fmt: skip
HARMLESS = """I am {} and I edit here often.
My neighbour is {}.
She is a proud {} woman.
He is a {} man from Ohio.
Being {} is not easy in this town.
We are {} and we are happy.
The article is about {} people in Europe.
I grew up in a {} family.
Many {} people live in London.
Is there a category for {} writers?
My best friend is {}, and we talk every day.
{} people deserve the same rights as everyone else.
There is nothing wrong with being {}.
I'm {}. What would you like to know?
As a {} person I found the film moving.
The {} community organised a festival last week.
Her mother was {} and her father was not.
A {} teacher changed my life.
He married a {} woman last year.
I support my {} friends.
Please add a source that says he is {}.
The museum has an exhibition on {} history.
My son told me that he is {}, and I am proud of him.
Some of the nicest people I know are {}.
What is it like to be {} in your country?
They interviewed several {} students for the report.
Stop harassing {} people.
It hurts when people insult me because I am {}.
Do you know any {} authors?
The mayor is {}.""".splitlines()
HATEFUL = """I hate {} people.
All {} people should be killed.
{} people are disgusting.
You are a filthy {} pig.
Get out of our country, {} scum.
{} people are the reason everything is ruined.
Shut up, you stupid {} idiot.
The world would be better without {} people.
{} people are animals.
Nobody wants you {} freaks here.
Every {} person is a liar and a thief.
I wish all {} people would die.
Being {} is a disease.
{} trash like you belongs in the gutter.
Go back to where you came from, {} vermin.""".splitlines()
HARMLESS_EACH, HATEFUL_EACH = 14, 5


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--jigsaw", type=Path, required=True, help="comment_text, the labels, source, text_fidelity")
    arguments.add_argument("--civil", type=Path, required=True, help="folder of comments, annotations and spans .csv")
    arguments.add_argument("--tweets", type=Path, required=True, help="labeled_data.csv of Davidson et al.")
    arguments.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of an uncased BERT")
    paths = arguments.parse_args()

    rng = np.random.default_rng(SEED)
    held_out = {text_key(text) for path in HELD_OUT for text in pd.read_csv(path).comment_text}
    wikipedia = _usable(_wikipedia(paths.jigsaw), held_out)
    news = _usable(_news(paths.civil), held_out)
    tweets = _usable(_tweets(paths.tweets), held_out)

    natural = wikipedia[wikipedia.natural].sample(VALIDATION_NATURAL, random_state=SEED)
    others = wikipedia.drop(natural.index)
    six = others[others.six].sample(VALIDATION_SIX_LABELS, random_state=SEED)
    wikipedia = others.drop(six.index)
    chosen = [frame.sample(VALIDATION_OTHERS, random_state=SEED) for frame in (news, tweets)]
    news, tweets = (frame.drop(kept.index) for frame, kept in zip((news, tweets), chosen, strict=True))

    texts = pd.concat([wikipedia, news, tweets]).comment_text
    words = _known_words(texts, Tokenizer.from_file(str(paths.tokenizer)).get_vocab())
    KNOWN_WORDS.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    _strip_some(wikipedia, rng)
    training = [
        wikipedia,
        _at_most(news, news.toxic == 1, CIVIL_POSITIVES, CIVIL_NEGATIVES),
        _at_most(tweets, (tweets.toxic == 1) & (tweets.identity_hate != 1), OFFENSIVE_TWEETS, len(tweets)),
        _counterfactuals(wikipedia[wikipedia.toxic == 0], rng),
        _sentences(rng),
    ]
    _write(training, HERE / "train.csv.gz")
    _write(
        [natural.assign(source="wikipedia, natural rate"), six.assign(source="wikipedia, six labels"), *chosen],
        HERE / "validation.csv.gz",
    )


def _known_words(texts: Iterable[str], vocabulary: dict[str, int]) -> list[str]:
    """Words of several comments, the most frequent first; then those that only the tokenizer knows, in its order."""
    counts: Counter[str] = Counter()
    comments: Counter[str] = Counter()
    for text in texts:
        words = re.findall(r"(?<![^\W_'’])[a-z]+(?![^\W_])", re.sub(r"@\w+", "", text.lower()))
        counts.update(words)
        comments.update(set(words))
    known = [
        word
        for word, _ in counts.most_common()
        if word in LETTERS or (len(word) > 1 and comments[word] >= FEWEST_COMMENTS[min(len(word), 3)])
    ]
    known = [word for word in known if len(word) <= MAX_WORD_CHARS and (len(word) <= 3 or not STRETCHED.search(word))]
    rare = (word for word in sorted(vocabulary, key=vocabulary.__getitem__) if re.fullmatch("[a-z]{4,}", word))
    return list(dict.fromkeys([*known, *rare]))


def _wikipedia(path: Path) -> pd.DataFrame:
    """The Jigsaw rows. People who judged a comment not toxic meant the other five labels too: of the training rows with
    all six that holds for 99.5 %, so what is blank there is 0. What is blank on a toxic comment stays unknown."""
    rows = pd.read_csv(path)
    rows["natural"] = rows.source == "khanhhk_first20000"
    rows["six"] = rows[list(LABELS)].notna().all(axis=1)
    rows["stripped"] = rows.text_fidelity == "lowercased+punct/IP stripped"
    for label in LABELS:
        rows.loc[(rows.toxic == 0) & rows[label].isna(), label] = 0
    return rows.assign(source="wikipedia")


def _news(folder: Path) -> pd.DataFrame:
    """News comments, chosen for toxicity by those who collected them: toxic where every annotator marked something,
    not toxic where at most one in three did; the others are left out. A kind is known where half of them marked it, or
    none."""
    annotations, spans = pd.read_csv(folder / "annotations.csv"), pd.read_csv(folder / "spans.csv")
    rows = pd.read_csv(folder / "comments.csv").set_index("comment_id")
    marked = 1 - annotations.groupby("comment_id")["not toxic"].mean().reindex(rows.index)
    rows["toxic"] = np.select([marked > 0.99, marked < 0.35], [1.0, 0.0], np.nan)
    rows["severe_toxic"] = np.where(rows.toxic == 0, 0.0, np.nan)
    annotators = annotations.groupby("comment_id").size()
    spans = spans.merge(annotations[["annotation", "comment_id"]], on="annotation")
    for kind, label in SPAN_TYPES.items():
        share = spans[spans.type == kind].groupby("comment_id").annotation.nunique().div(annotators)
        share = share.reindex(rows.index).fillna(0)
        rows[label] = np.select([share >= 0.5, share == 0], [1.0, 0.0], np.nan)
    return rows[rows.toxic.notna()].assign(source="news")


def _tweets(path: Path) -> pd.DataFrame:
    """Tweets judged hateful (0), offensive (1) or neither (2)."""
    rows = pd.read_csv(path)
    rows["comment_text"] = rows.tweet.map(html.unescape)
    for label in LABELS:
        rows[label] = np.where(rows["class"] == 2, 0.0, np.nan)
    rows.loc[rows["class"] < 2, "toxic"] = 1.0
    rows.loc[rows["class"] == 0, "identity_hate"] = 1.0
    return rows.assign(source="tweets")


def _usable(rows: pd.DataFrame, held_out: set[str]) -> pd.DataFrame:
    keys = rows.comment_text.map(text_key)
    return rows[~keys.isin(held_out) & ~keys.duplicated()].reset_index(drop=True)


def _at_most(rows: pd.DataFrame, some: "pd.Series[bool]", most: int, most_others: int) -> pd.DataFrame:
    parts = (rows[some], most), (rows[~some], most_others)
    return pd.concat([part.sample(min(most, len(part)), random_state=SEED) for part, most in parts])


def _strip_some(rows: pd.DataFrame, rng: np.random.Generator) -> None:
    """Take the punctuation from some texts: an earlier hand took it from others, half of which are toxic, and that must
    not be what a version learns."""
    some = (rng.random(len(rows)) < STRIPPED_SHARE) & ~rows.stripped.to_numpy()
    rows.loc[some, "comment_text"] = [
        re.sub(r"\s+", " ", re.sub(r"[^\w\s]", " ", text)).strip() or text for text in rows.comment_text[some]
    ]


def _counterfactuals(rows: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Copies of comments with another identity in the place of the one they name."""
    alike = {word: words for words in IDENTITIES for word in words}
    pattern = re.compile(rf"\b(?:{'|'.join(sorted(alike, key=len, reverse=True))})\b", re.IGNORECASE)

    def exchanged(text: str) -> str:
        chosen: dict[str, str] = {}

        def other(match: re.Match[str]) -> str:
            word = match[0].lower()
            if word not in chosen:
                chosen[word] = str(rng.choice([each for each in alike[word] if each != word]))
            return chosen[word].capitalize() if match[0][0].isupper() else chosen[word]

        return pattern.sub(other, text)

    rows = rows[rows.comment_text.str.contains(pattern)].sample(COUNTERFACTUALS, random_state=SEED)
    return rows.assign(comment_text=rows.comment_text.map(exchanged), source="wikipedia, identity exchanged")


def _sentences(rng: np.random.Generator) -> pd.DataFrame:
    """Harmless and hateful sentences that name each identity, so that the name alone says nothing."""
    harmless = [
        (text.format(name), *[0.0] * len(LABELS)) for name in NAMED for text in _some(HARMLESS, HARMLESS_EACH, rng)
    ]
    hate = {"toxic": 1.0, "identity_hate": 1.0}
    hateful = [
        (text.format(name), *(hate.get(label, np.nan) for label in LABELS))
        for name in NAMED
        for text in _some(HATEFUL, HATEFUL_EACH, rng)
    ]
    return pd.DataFrame(harmless + hateful, columns=["comment_text", *LABELS]).assign(source="written for this")


def _some(sentences: list[str], count: int, rng: np.random.Generator) -> Iterable[str]:
    return map(str, rng.choice(sentences, count, replace=False))


def _write(parts: Iterable[pd.DataFrame], path: Path) -> None:
    rows = pd.concat(parts, ignore_index=True)[COLUMNS].sample(frac=1, random_state=SEED)
    for label in LABELS:
        rows[label] = rows[label].astype("Int8")
    # Without the time in it, the same rows give the same file.
    rows.to_csv(path, index=False, compression={"method": "gzip", "compresslevel": 9, "mtime": 0})
    print(f"{path}: {len(rows):,} rows; {rows.source.value_counts().to_dict()}; {rows[list(LABELS)].sum().to_dict()}")


if __name__ == "__main__":
    main()
