"""From scores to an action: against an independent reading of the rules, and every policy that must be refused."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from config.names import LABELS, Action
from config.settings import ROOT
from model.policy import PolicyError, Verdict, parse_policy, read_policy

MILDEST_FIRST = ["label", "review", "hide", "remove"]
# A coarse grid, so that scores often meet a threshold exactly and each other.
GRID = st.integers(0, 20).map(lambda step: step / 20)
SCORES = st.lists(GRID, min_size=6, max_size=6)


@st.composite
def _thresholds(draw: st.DrawFn) -> dict[str, float]:
    values = sorted(draw(st.lists(GRID, unique=True, max_size=4)))
    actions = draw(st.permutations(MILDEST_FIRST))[: len(values)]
    return dict(zip(sorted(actions, key=MILDEST_FIRST.index), values, strict=True))


RULES = st.dictionaries(st.sampled_from(LABELS), _thresholds())
POLICIES = st.fixed_dictionaries({"default": RULES}, optional={"news": RULES, "kids": RULES})
COMMUNITIES = st.sampled_from(["default", "news", "kids", "never heard of"])


def expected(policy: dict[str, Any], community: str, scores: list[float]) -> tuple[str, set[str]]:
    """The action, and the labels that may be named for it, the slow and obvious way."""
    default = policy["default"]
    rules = policy.get(community, default)
    for action in reversed(MILDEST_FIRST):
        reached = {}
        for label, score in zip(LABELS, scores, strict=True):
            thresholds = rules[label] if label in rules else default.get(label, {})
            if action in thresholds and score >= thresholds[action]:
                reached[label] = score
        if reached:
            return action, {label for label, score in reached.items() if score == max(reached.values())}
    return "allow", set()


@given(POLICIES, COMMUNITIES, SCORES)
def test_the_strictest_rule_decides(policy: dict[str, Any], community: str, scores: list[float]) -> None:
    # Given any policy
    parsed = parse_policy(yaml.safe_dump({"communities": policy}))
    # When it decides
    verdict = parsed.decide(community, scores)
    # Then the strictest action that any label reaches is taken, by the label with the highest score
    action, labels = expected(policy, community, scores)
    assert verdict.action == action
    if action == "allow":
        assert verdict == Verdict(Action.ALLOW, None, None)
        return
    assert verdict.label in labels
    # And the threshold is that label's own for that action
    rules = policy.get(community, policy["default"])
    thresholds = rules[verdict.label] if verdict.label in rules else policy["default"][verdict.label]
    assert verdict.threshold == thresholds[action]


def test_a_rule_fires_at_its_threshold() -> None:
    policy = parse_policy("communities: {default: {toxic: {hide: 0.5}}}")
    assert policy.decide("default", [0.5, 0, 0, 0, 0, 0]) == Verdict(Action.HIDE, "toxic", 0.5)
    assert policy.decide("default", [0.499, 1, 1, 1, 1, 1]) == Verdict(Action.ALLOW, None, None)


def test_a_label_with_no_rules_of_its_own_is_not_the_same_as_a_label_left_out() -> None:
    # Given a community that says nothing of `toxic`, and that `insult` has no consequences
    policy = parse_policy("communities: {default: {toxic: {hide: 0.5}, insult: {hide: 0.5}}, news: {insult: {}}}")
    # Then the first is inherited and the second is not
    assert policy.decide("news", [0.9, 0, 0, 0, 0, 0]).action is Action.HIDE
    assert policy.decide("news", [0, 0, 0, 0, 0.9, 0]).action is Action.ALLOW


def test_the_version_is_the_hash_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes("# ä comment counts too\ncommunities: {default: {}}\n".encode())
    assert read_policy(path).version == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_policy_that_ships_is_sound() -> None:
    policy = read_policy(ROOT / "config" / "policy.yaml")
    assert policy.decide("default", [0.0] * 6).action is Action.ALLOW
    assert policy.decide("default", [1.0] * 6).action is Action.REMOVE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("communities: {default: {toxic: {ban: 0.5}}}", ["communities.default.toxic", "'ban'", "review"]),
        pytest.param("communities: {default: {rude: {hide: 0.5}}}", ["communities.default", "'rude'", "severe_toxic"]),
        pytest.param("communities: {default: {toxic: {allow: 0.5}}}", ["communities.default.toxic", "'allow'"]),
        pytest.param("communities: {default: {}, news: {rude: {}}}", ["communities.news", "'rude'"]),
        pytest.param(
            "communities: {default: {toxic: {label: 0.8, hide: 0.7}}}",
            ["communities.default.toxic", "hide at 0.7", "label at 0.8"],
        ),
        pytest.param("communities: {default: {toxic: {label: 0.5, hide: 0.5}}}", ["hide at 0.5", "label at 0.5"]),
        pytest.param("communities: {default: {toxic: {hide: true}}}", ["communities.default.toxic.hide", "True"]),
        pytest.param("communities: {default: {toxic: {hide: 1.01}}}", ["communities.default.toxic.hide", "1.01"]),
        pytest.param("communities: {default: {toxic: {hide: -0.1}}}", ["-0.1"]),
        pytest.param("communities: {default: {toxic: {hide: .nan}}}", ["nan"]),
        pytest.param("communities: {default: {toxic: {hide: '0.5'}}}", ["'0.5'"]),
        pytest.param("communities: {default: {toxic: {hide: null}}}", ["None"]),
        pytest.param("communities: {default: {toxic: 0.5}}", ["communities.default.toxic", "mapping", "float"]),
        pytest.param("communities: {default: [toxic]}", ["communities.default", "mapping", "list"]),
        pytest.param("communities: {news: {}}", ["'default'"]),
        pytest.param("communities: [default]", ["communities", "mapping"]),
        pytest.param("community: {default: {}}", ["'community'", "communities"]),
        pytest.param("{}", ["'default'"]),
        pytest.param("", ["the file", "NoneType"]),
        pytest.param("just words", ["the file", "str"]),
        pytest.param("communities: {default: {toxic: {hide: 0.5}", ["not YAML"], id="unclosed"),
        pytest.param("communities: {default: {toxic: {hide: 2026-13-45}}}", ["not YAML"], id="no-such-date"),
        pytest.param("communities: !!python/object/apply:os.getpid []", ["not YAML"], id="python-object"),
    ],
)
def test_a_malformed_policy_is_refused_by_place_and_value(tmp_path: Path, text: str, said: list[str]) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PolicyError) as refusal:
        read_policy(path)
    assert all(words in str(refusal.value) for words in [str(path), *said]), refusal.value


def test_a_policy_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"missing\.yaml cannot be read"):
        read_policy(tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes("# gesch\xe4tzt\n".encode("latin-1"))
    with pytest.raises(PolicyError, match=r"latin\.yaml cannot be read"):
        read_policy(tmp_path / "latin.yaml")
