"""Whom to believe how far, and what reviewers agree on."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.names import LABELS
from db.reviews import JudgedText, Labels
from trainer.agreement import Reviewer, agreed_examples, agreed_labels, compare_reviewers

NAMES = ["ann", "bob", "  Carol\n", ""]


def words(**labels: bool | None) -> Labels:
    return dict.fromkeys(LABELS) | labels


def judged(**toxic: bool) -> JudgedText:
    """A text of which each of these says whether it is toxic."""
    return JudgedText("a text", {name: words(toxic=word) for name, word in toxic.items()})


def weights(texts: list[JudgedText]) -> dict[str, float]:
    return {reviewer.name: reviewer.weight for reviewer in compare_reviewers(texts)}


any_judged = st.lists(
    st.builds(
        JudgedText,
        st.none() | st.text(min_size=1),
        st.dictionaries(
            st.sampled_from(NAMES), st.fixed_dictionaries(dict.fromkeys(LABELS, st.sampled_from([True, False, None])))
        ),
    ),
    max_size=8,
)


class TestReliability:
    def test_one_whom_nobody_can_be_compared_with_is_a_newcomer(self) -> None:
        # Given reviewers of different texts, and two who spoke of different labels of one
        texts = [judged(ann=True), JudgedText("another", {"bob": words(toxic=True), "eve": words(insult=False)})]
        assert compare_reviewers(texts) == [Reviewer("ann", 1), Reviewer("bob", 1), Reviewer("eve", 1)]
        assert Reviewer("ann").weight == pytest.approx(1)

    def test_one_who_flips_labels_loses_their_vote_and_the_others_keep_theirs(self) -> None:
        # Given three reviewers of forty texts, of whom one says the opposite of what is so
        texts = [judged(ann=n % 3 == 0, bob=n % 3 == 0, eve=n % 3 != 0) for n in range(40)]
        # Then who is contradicted by one that nobody else believes stays believed
        ann, bob, eve = compare_reviewers(texts)
        assert (ann.compared, ann.agreed, eve.compared, eve.agreed) == (80, 40, 80, 0)
        assert eve.weight == 0
        assert ann.weight == bob.weight > 1
        # And what only the flipping one said is not learnt
        rows = list(agreed_examples([*texts, JudgedText("alone", {"eve": words(threat=True)})]))
        assert len(rows) == 40
        assert [labels["toxic"] for _, labels, _ in rows[:4]] == [True, False, False, True]
        assert {weight for _, _, weight in rows} == {1.0}

    @given(any_judged)
    def test_it_is_a_matter_of_the_words_alone(self, texts: list[JudgedText]) -> None:
        found = compare_reviewers(texts)
        # The order of texts and of reviewers makes no difference
        assert compare_reviewers(JudgedText(t.text, dict(list(t.said.items())[::-1])) for t in reversed(texts)) == found
        # Nor which word of the two was said
        turned = [JudgedText(each.text, {name: _turned(said) for name, said in each.said.items()}) for each in texts]
        assert compare_reviewers(turned) == found
        assert all(0 < each.reliability < 1 and 0 <= each.agreed <= each.compared for each in found)
        # And every row can be trained on
        for text, labels, weight in agreed_examples(texts):
            assert text and 0 < weight <= 1 and any(value is not None for value in labels.values())


def _turned(said: Labels) -> Labels:
    return {label: None if word is None else not word for label, word in said.items()}


class TestLabels:
    @pytest.mark.parametrize(
        ("said", "toxic", "weight"),
        [
            ({"ann": True}, True, 1),
            ({"ann": True, "bob": True}, True, 1),
            ({"ann": True, "bob": True, "eve": False}, True, 1 / 3),
            ({"ann": True, "bob": False}, None, 0),
            ({}, None, 0),
        ],
        ids=["alone", "two", "two of three", "a tie", "nobody"],
    )
    def test_newcomers(self, said: Mapping[str, bool], toxic: bool | None, weight: float) -> None:
        text = judged(**said)
        assert agreed_labels(text.said, dict.fromkeys(said, 1.0)) == (words(toxic=toxic), pytest.approx(weight))

    def test_the_more_reliable_side_is_believed(self) -> None:
        text = judged(ann=False, bob=True, eve=True)
        labels, weight = agreed_labels(text.said, {"ann": 1.5, "bob": 0.2, "eve": 0.3})
        assert (labels["toxic"], weight) == (False, pytest.approx(0.5))
        # And one who is hardly believed, alone, counts little
        labels, weight = agreed_labels(judged(bob=True).said, {"bob": 0.2})
        assert (labels["toxic"], weight) == (True, pytest.approx(0.2))

    def test_a_label_in_dispute_leaves_the_others(self) -> None:
        said = {"ann": words(toxic=True, insult=True, threat=False), "bob": words(toxic=True, insult=False)}
        labels, weight = agreed_labels(said, {"ann": 1.0, "bob": 1.0})
        assert (labels, weight) == (words(toxic=True, threat=False), pytest.approx(1))

    def test_an_erased_text_tells_of_its_reviewers_and_is_no_row(self) -> None:
        erased = JudgedText(None, judged(ann=True, bob=False).said)
        assert list(agreed_examples([erased])) == []
        assert weights([erased])["ann"] < 1
