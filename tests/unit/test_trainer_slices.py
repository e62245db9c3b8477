"""Which rows are looked at by themselves: by length, spelling, and the identities they mention."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.settings import ROOT
from trainer.dataset import Dataset, read_csv
from trainer.evaluation import measure
from trainer.evasion import EVASIONS, evade
from trainer.slices import ANY_IDENTITY, bias_rows, generalised_mean, mentions, slices

HOLDOUT = ROOT / "samples" / "holdout.csv"


OBFUSCATED = ("you f*cking fool", "an id10t", "a st4lker", "s h u t up", "d.u.m.b", "stu\u200bpid", "sооn", "sooo")
PLAIN = (
    *("In 2026 the U.S.A. met on the 2nd floor.", "J. R. R. Tolkien", "www.example.org", "Henry VIII and XXX"),
    *("Москва is Moscow", "I am a b", "it cost $10!", "covid19", "good committee"),
)


@pytest.mark.parametrize(("texts", "obfuscated"), [(OBFUSCATED, True), (PLAIN, False)])
def test_texts_that_look_obfuscated(texts: tuple[str, ...], obfuscated: bool) -> None:
    found = slices(texts)["obfuscated"]
    assert [text for text, is_obfuscated in zip(texts, found, strict=True) if is_obfuscated != obfuscated] == []


@pytest.mark.parametrize("evasion", EVASIONS)
def test_every_evasion_looks_obfuscated_and_comments_as_they_are_do_not(evasion: str) -> None:
    texts, random = read_csv(HOLDOUT).texts[:200], np.random.default_rng(1)
    assert slices([evade(text, evasion, random) for text in texts])["obfuscated"].mean() > 0.9
    assert slices(texts)["plain"].mean() > 0.9


@given(st.lists(st.text(max_size=600), max_size=20))
def test_every_row_is_in_one_slice_of_each_kind(texts: list[str]) -> None:
    rows = slices(texts)
    assert (np.sum([rows[name] for name in ("short", "medium", "long")], axis=0) == 1).all()
    assert (rows["obfuscated"] != rows["plain"]).all()


def test_mentions_are_whole_words_in_any_case() -> None:
    rows = mentions(["Two WOMEN met", "a Muslim man", "the manual of Manchester", "jewellery", "Gay rights", "old men"])
    found = {group: np.flatnonzero(belongs).tolist() for group, belongs in rows.items() if belongs.any()}
    assert found == {
        ANY_IDENTITY: [0, 1, 4, 5],
        "women": [0],
        "men": [1, 5],
        "muslim": [1],
        "homosexual_gay_or_lesbian": [4],
        "older": [5],
    }


def test_bias_figures_by_hand() -> None:
    # Given twelve rows of each kind, where harmless rows that mention the group score as high as abuse of others
    kinds = [(False, False, 0.1), (True, False, 0.6), (False, True, 0.6), (True, True, 0.9)]
    rows = [kind for kind in kinds for _ in range(12)]
    texts = ["the women there" if mentioned else "nobody here" for _, mentioned, _ in rows]
    labels = np.full((48, 6), np.nan, dtype=np.float32)
    labels[:, 0] = [toxic for toxic, _, _ in rows]
    scores = np.full((48, 6), 0.5, dtype=np.float32)
    scores[:, 0] = [score for _, _, score in rows]
    # When they are measured
    measured = measure(scores, Dataset(texts, labels))
    # Then BPSN shows it: all its pairs are ties
    women = measured.identities["women"]
    assert (women["rows"], women["positives"]) == (24, 12)
    assert (women["subgroup_auc"], women["bpsn_auc"], women["bnsp_auc"]) == (1, 0.5, 1)
    everyone = measured.identities[ANY_IDENTITY]
    assert everyone["intervals"] == {"subgroup_auc": (1, 1), "bpsn_auc": (0.5, 0.5), "bnsp_auc": (1, 1)}
    assert measured.identity_means == {"subgroup_auc": 1, "bpsn_auc": 0.5, "bnsp_auc": 1}
    assert measured.mentions["women"].tolist() == [mentioned for _, mentioned, _ in rows]
    # And with two rows fewer to mention it, there is too little to say
    few = measure(scores[:-3], Dataset(texts[:-3], labels[:-3])).identities["women"]
    assert (few["subgroup_auc"], few["bpsn_auc"], few["bnsp_auc"]) == (None, 0.5, None)


def test_rows_of_the_bias_figures() -> None:
    truth, mentioned = np.array([1, 1, 0, 0], dtype=bool), np.array([1, 0, 1, 0], dtype=bool)
    found = {figure: np.flatnonzero(rows).tolist() for figure, rows in bias_rows(truth, mentioned).items()}
    assert found == {"subgroup_auc": [0, 2], "bpsn_auc": [1, 2], "bnsp_auc": [0, 3]}


@given(st.lists(st.floats(0.1, 1), min_size=1, max_size=10))
def test_the_generalised_mean_lies_between_the_least_and_the_mean(values: list[float]) -> None:
    found = generalised_mean([None, *values])
    assert found is not None
    assert min(values) - 1e-9 <= found <= np.mean(values) + 1e-9


def test_the_generalised_mean_of_nothing() -> None:
    assert generalised_mean([None]) is None


def test_slices_have_figures_of_their_own_rows() -> None:
    # Given short rows whose scores are right, and long ones whose scores are wrong
    toxic = np.tile([1, 0], 20)
    scores = np.full((40, 6), 0.5, dtype=np.float32)
    scores[:, 0] = np.where((toxic == 1) == (np.arange(40) < 20), 0.9, 0.1)
    labels = np.full((40, 6), np.nan, dtype=np.float32)
    labels[:, 0] = toxic
    measured = measure(scores, Dataset(["word"] * 20 + ["word " * 120] * 20, labels)).slices
    # Then each slice says so, and those without rows are left out
    assert {name: (each["rows"], each["positives"], each["roc_auc"]) for name, each in measured.items()} == {
        "short": (20, 10, 1),
        "long": (20, 10, 0),
        "plain": (40, 20, 0.5),
    }
    assert measured["short"]["mean_roc_auc"] == 1
    assert measured["long"]["intervals"] == {"roc_auc": (0, 0)}
