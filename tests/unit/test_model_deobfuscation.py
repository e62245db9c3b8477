"""Disguised words are read as the known words they stand for, and ordinary text stays as it is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.settings import ROOT
from model.deobfuscation import Deobfuscator
from model.text import KNOWN_WORDS, normalise
from trainer.dataset import read_csv
from trainer.evasion import EVASIONS, evade

deobfuscate = Deobfuscator(KNOWN_WORDS.read_text(encoding="utf-8").split())


def read(text: str) -> str:
    return deobfuscate(normalise(text))


INSULT = "you are an idiot and nobody likes you"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        pytest.param("y o u   a r e   a n   i d i o t !", "you are an idiot!", id="spaced, with wider gaps"),
        pytest.param("y o u a r e a n i d i o t", "you are an idiot", id="spaced, all alike"),
        pytest.param("an i.d.i.o.t and f-u-c-k you", "an idiot and fuck you", id="dotted"),
        pytest.param("i.d.i.o.t t.o m.e", "idiot to me", id="short dotted words beside a long one"),
        pytest.param("1d10t 455h0l3 sh1t $hit b!tch a$$", "idiot asshole shit shit bitch ass", id="l33t"),
        pytest.param("y0u 4r3 4 57up1d 1d107", "you are a stupid idiot", id="numbers where l33t is the habit"),
        pytest.param("stuuupid fuuuuck gooood", "stupid fuck good", id="stretched"),
        pytest.param("yoouu aaree aan iidiioott", "you are an idiot", id="doubled, where that is the habit"),
        pytest.param("Yоu аrе а stuріd іdіоt", "You are a stupid idiot", id="Cyrillic look-alikes"),
        pytest.param("i\u200bd\u200bi\u200bo\u200bt", "idiot", id="zero-width characters"),
        pytest.param("s\u00adh\u2060i\ufefft", "shit", id="other characters that do not show"),
        pytest.param("b¡tch¡ng", "bitching", id="inverted exclamation marks"),
    ],
)
def test_a_disguised_word_is_read(written: str, meant: str) -> None:
    assert read(written) == meant


@pytest.mark.parametrize(
    "text",
    [
        "the 1st, 2nd and 3rd of 100 mp3 files at 10 pm, $100k for 4 cats in 2019",
        "e.g. this, i.e. that; 1.2.3.4 and 2026-11-22, write to foo@bar.com",
        "a hello!!! from the secretary of the committee",
        "Это сора, русский текст, не обман",
        "Η γλώσσα",
        "I am a b",
        "see http://www.example.com/a?b=c1",
        "",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert read(text) == text


def test_nearly_all_real_comments_stay_as_they_are() -> None:
    # Given real comments, of which some are disguised by their authors
    texts = [text for text in read_csv(ROOT / "samples" / "comments.csv").texts if text.isascii()]
    changed = [text for text in texts if read(text) != text]
    assert 0 < len(changed) < 0.05 * len(texts)


@pytest.mark.parametrize("evasion", EVASIONS)
def test_every_evasion_is_undone(evasion: str) -> None:
    assert read(evade(INSULT, evasion, np.random.default_rng(0))).lower() == INSULT


@given(st.text(alphabet=st.sampled_from("ab1!$.@-_ \u200bаеe\n|"), max_size=200))
def test_any_text_is_read(text: str) -> None:
    assert isinstance(read(text), str)


def test_known_words_are_plain_and_the_most_frequent_come_first() -> None:
    words = KNOWN_WORDS.read_text(encoding="utf-8").split()
    assert len(set(words)) == len(words)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    assert words.index("the") < words.index("idiot") < words.index("committee")
