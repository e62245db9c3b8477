"""What of a policy explains a decision: margins and lines."""

import pytest

from cli.explaining import margins, rule_lines
from config.names import LABELS
from config.policy import parse_policy

POLICY = """\
communities:
  default:
    toxic: {label: 0.5, hide: 0.9}
    insult:
      review: 0.6   # look at it
      hide: 0.8

  news: &news
    toxic: {hide: 0.7}
    threat: {remove: 0.5}
  sport:
    inherits: news
    threat: {}
  chat:
    <<: *news
    toxic: {hide: 0.8}
"""


def test_a_margin_is_what_is_missing_to_the_next_rule() -> None:
    # Given scores below, at, between and above the thresholds of a community
    scores = dict.fromkeys(LABELS, 0.0) | {"toxic": 0.75, "insult": 0.6, "threat": 0.4}
    found = margins(parse_policy(POLICY).rules("news"), scores)
    # Then of each label the rule that was reached and the one that was not are named
    assert list(found) == list(LABELS)
    assert [*found["toxic"].values()] == [0.7, "hide", None, None, None]
    assert [*found["insult"].values()] == [0.6, "review", 0.8, "hide", pytest.approx(0.2)]
    assert [*found["threat"].values()] == [None, None, 0.5, "remove", pytest.approx(0.1)]
    assert [*found["obscene"].values()] == [None] * 5


@pytest.mark.parametrize(
    ("community", "label", "lines"),
    [
        ("news", "toxic", [9]),
        ("news", "insult", [4, 5, 6]),
        ("unheard-of", "toxic", [3]),
        ("news", "obscene", []),
        ("sport", "toxic", [9]),
        ("sport", "threat", [13]),
        ("sport", "insult", [4, 5, 6]),
        ("chat", "threat", [10]),
        ("chat", "toxic", [16]),
    ],
)
def test_the_lines_that_mattered(community: str, label: str, lines: list[int]) -> None:
    found = rule_lines(POLICY, community, label)
    assert [number for number, _ in found] == lines
    assert [line for _, line in found] == [POLICY.splitlines()[number - 1] for number in lines]
