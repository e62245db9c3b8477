"""The population stability index, and the bins it is taken over."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.drift import BINS, FEWEST_ROWS, SCORE_EDGES, level, psi, psi_by_label, reference_counts, score_histogram
from config.names import LABELS

COUNTS = st.lists(st.integers(FEWEST_ROWS, 10_000), min_size=BINS, max_size=BINS)


def test_a_score_on_an_edge_is_in_the_bin_above() -> None:
    # Given rows with a score on each edge, beside it, and at both ends
    scores = [0.0, 0.0009, *SCORE_EDGES, 0.9499, 1.0]
    counts = score_histogram([[score] * len(LABELS) for score in scores])["counts"]
    # Then every label has counted all of them, in their bins
    assert counts == {label: [2, *[1] * 9, 2, 2] for label in LABELS}


def test_a_histogram_is_read_back_and_one_in_other_bins_is_none() -> None:
    histogram = score_histogram([[0.3] * len(LABELS)])
    assert reference_counts({"score_histogram": histogram}) == histogram["counts"]
    assert reference_counts({"score_histogram": histogram | {"edges": [0.5]}}) is None
    assert reference_counts({}) is None


def test_psi_is_the_sum_over_the_bins() -> None:
    # Given shares of 0.5 and 0.5 that became 0.6 and 0.4, of so many rows that smoothing does not matter
    expected = 0.1 * math.log(0.6 / 0.5) - 0.1 * math.log(0.4 / 0.5)
    assert psi([500_000, 500_000], [600_000, 400_000]) == pytest.approx(expected, rel=1e-4)


@given(COUNTS, COUNTS)
def test_psi_is_a_distance(one: list[int], other: list[int]) -> None:
    there, back = psi(one, other), psi(other, one)
    assert there is not None and back is not None
    assert psi(one, one) == 0
    assert there >= 0
    assert there == pytest.approx(back)


def test_an_empty_bin_is_no_infinity_and_few_rows_say_nothing() -> None:
    assert psi([FEWEST_ROWS, 0], [0, FEWEST_ROWS]) == pytest.approx(2 * math.log(1_001), rel=1e-2)
    assert psi([FEWEST_ROWS, 0], [FEWEST_ROWS - 1, 0]) is None
    assert psi([FEWEST_ROWS - 1, 0], [FEWEST_ROWS, 0]) is None


def test_samples_of_one_population_are_stable_and_of_another_are_not() -> None:
    # Given the fewest rows that are compared, of one distribution like that of real scores and of one that is higher
    draw = random.Random(1)
    one, same, other = (
        score_histogram([[draw.betavariate(alpha, 6)] * len(LABELS) for _ in range(FEWEST_ROWS)])["counts"]
        for alpha in (0.3, 0.3, 0.6)
    )
    unmoved, moved = psi_by_label(one, same), psi_by_label(one, other)
    assert unmoved is not None and moved is not None
    assert {level(value) for value in unmoved.values()} == {"stable"}
    assert {level(value) for value in moved.values()} == {"shifted"}


def test_the_usual_reading() -> None:
    assert [level(value) for value in (0, 0.099, 0.1, 0.25, 0.251)] == [
        "stable",
        "stable",
        "moderate",
        "moderate",
        "shifted",
    ]
