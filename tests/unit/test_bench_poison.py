"""The reviews that `bench.poison` draws."""

import numpy as np
import pytest

from bench.poison import ATTACKS, HONEST_REVIEWS, HOSTILE, Attack, draw_reviews
from config.names import LABELS
from trainer.agreement import compare_reviewers
from trainer.dataset import Dataset

TOXIC = LABELS.index("toxic")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_hostile_reviewer_does_what_the_attack_says_beside_the_same_honest_ones(attack: Attack) -> None:
    # Given comments with labels, some unknown, and scores
    random = np.random.default_rng(5)
    labels = (random.random((1_200, 6)) < 0.3).astype(np.float32)
    labels[:, 1:][random.random((1_200, 5)) < 0.2] = np.nan
    comments = Dataset([str(row) for row in range(1_200)], labels)
    scores = random.random((1_200, 6)).astype(np.float32)
    # When the reviews are drawn
    drawn = draw_reviews(comments, scores, attack, seed=1)
    # Then the honest ones are those of every attack, and say what is known
    honest = {each.text: {name: said for name, said in each.said.items() if name != HOSTILE} for each in drawn}
    alone = draw_reviews(comments, scores, Attack("flipped", 0), seed=1)
    assert {text: said for text, said in honest.items() if said} == {each.text: each.said for each in alone}
    assert len(alone) == HONEST_REVIEWS
    for said in (each for by_reviewer in alone for each in by_reviewer.said.values()):
        assert set(said) == set(LABELS)
    # And the hostile one reviews as many as said, some of them on shared texts
    hostile = {int(each.text or ""): each.said[HOSTILE] for each in drawn if HOSTILE in each.said}
    assert len(hostile) == attack.reviews
    assert sum(len(each.said) > 1 for each in drawn if HOSTILE in each.said) == attack.shared
    for row, said in hostile.items():
        if attack.way == "flipped":
            assert said["toxic"] is not bool(labels[row, TOXIC])
        else:
            assert sum(value is not None for value in said.values()) == 1
    # And on shared texts he is found out
    weights = {each.name: each.weight for each in compare_reviewers(drawn)}
    if attack.shared:
        assert weights[HOSTILE] < 0.1
    elif attack.reviews:
        assert weights[HOSTILE] == pytest.approx(1)
