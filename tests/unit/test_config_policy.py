"""From scores to an action: against an independent reading of the rules, and every policy that must be refused."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from config.names import LABELS, Action
from config.policy import PolicyError, Verdict, parse_policy, read_policy
from config.settings import ROOT

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
# "kids" inherits from "news", which the file may name after it.
POLICIES = st.fixed_dictionaries(
    {"default": RULES},
    optional={"kids": RULES.map(lambda rules: {"inherits": "news", **rules}), "news": RULES},
).filter(lambda policy: "news" in policy or "kids" not in policy)
COMMUNITIES = st.sampled_from(["default", "news", "kids", "never heard of"])


def stated(policy: dict[str, Any], community: str, label: str) -> dict[str, float]:
    """Whatever is said of a label first on the way up."""
    rules = policy.get(community, policy["default"])
    if label in rules or rules is policy["default"]:
        return dict(rules.get(label, {}))
    return stated(policy, rules.get("inherits", "default"), label)


def expected(policy: dict[str, Any], community: str, scores: list[float]) -> tuple[str, set[str]]:
    """The action, and the labels that may be named for it, the slow and obvious way."""
    for action in reversed(MILDEST_FIRST):
        reached = {}
        for label, score in zip(LABELS, scores, strict=True):
            thresholds = stated(policy, community, label)
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
    assert verdict.label is not None
    assert verdict.threshold == stated(policy, community, verdict.label)[action]


def test_a_rule_fires_at_its_threshold() -> None:
    policy = parse_policy("communities: {default: {toxic: {hide: 0.5}}}")
    assert policy.decide("default", [0.5, 0, 0, 0, 0, 0]) == Verdict(Action.HIDE, "toxic", 0.5)
    assert policy.decide("default", [0.499, 1, 1, 1, 1, 1]) == Verdict(Action.ALLOW, None, None)


@given(POLICIES, COMMUNITIES, SCORES)
def test_a_text_whose_end_was_not_read_is_reviewed_at_least(
    policy: dict[str, Any], community: str, scores: list[float]
) -> None:
    parsed = parse_policy(yaml.safe_dump({"communities": policy}))
    whole, cut = parsed.decide(community, scores), parsed.decide(community, scores, truncated=True)
    mild = whole.action in (Action.ALLOW, Action.LABEL)
    assert cut == (Verdict(Action.REVIEW, None, None) if mild else whole)


def test_a_label_with_no_rules_of_its_own_is_not_the_same_as_a_label_left_out() -> None:
    # Given a community that says nothing of `toxic`, and that `insult` has no consequences
    policy = parse_policy("communities: {default: {toxic: {hide: 0.5}, insult: {hide: 0.5}}, news: {insult: {}}}")
    # Then the first is inherited and the second is not
    assert policy.decide("news", [0.9, 0, 0, 0, 0, 0]).action is Action.HIDE
    assert policy.decide("news", [0, 0, 0, 0, 0.9, 0]).action is Action.ALLOW


def test_a_long_line_of_inheritance_is_followed_to_its_end() -> None:
    # Given ten thousand communities, each of which inherits from the next one
    lines = [f"  c{n}: {{inherits: c{n + 1}}}" for n in range(10_000)]
    policy = parse_policy("\n".join(["communities:", "  default: {}", *lines, "  c10000: {toxic: {hide: 0.5}}"]))
    # Then the first has the rules of the last
    assert policy.decide("c0", [0.6, 0, 0, 0, 0, 0]) == Verdict(Action.HIDE, "toxic", 0.5)
    assert policy.communities[:2] == ["default", "c0"]


def test_aliases_and_merges_mean_what_they_did() -> None:
    policy = parse_policy(
        "communities:\n"
        "  default: &usual {toxic: &mild {hide: 0.9}, insult: {hide: 0.8}}\n"
        "  news: *usual\n"
        "  kids: {<<: *usual, toxic: {hide: 0.5}, obscene: *mild}\n"
        "  news2: {}\n"
    )
    assert policy.rules("news") == policy.rules("default") == policy.rules("news2")
    assert policy.rules("kids")["toxic"] == ((0.5, Action.HIDE),)
    assert policy.rules("kids")["insult"] == ((0.8, Action.HIDE),)
    assert policy.rules("kids")["obscene"] == ((0.9, Action.HIDE),)


def test_a_name_is_what_is_written() -> None:
    # Given communities that YAML itself would take for false, a date, nothing, and one number of three spellings
    policy = parse_policy(
        "communities:\n"
        "  default: {}\n"
        "  no: {toxic: {hide: 0.1}}\n"
        "  2026-11-23: {toxic: {hide: 0.2}}\n"
        "  ~: {toxic: {hide: 0.3}}\n"
        "  1: {toxic: {hide: 0.4}}\n"
        "  0x1: {toxic: {hide: 0.5}}\n"
        "  1.0: {inherits: no}\n"
        "  012: {inherits: 0x1}\n"
    )
    # Then each is there by its name, and inherits from whom it says
    names = ["no", "2026-11-23", "~", "1", "0x1", "1.0", "012"]
    assert policy.communities == ["default", *names]
    assert [policy.rules(name)["toxic"][0][0] for name in names] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.1, 0.5]


def bomb(merge: str) -> str:
    """Thirty lines, each of which takes the one before ten times."""
    lines = [
        f"a0: &a0 {{{merge}x: 1}}",
        *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 30)),
    ]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(bomb(""), "its aliases make", id="merges"),
        pytest.param(bomb("").replace("{<<: [", "[").replace("]}", "]"), "its aliases make", id="aliases"),
        pytest.param("communities: &a {default: *a}", "communities.default holds an alias of itself", id="itself"),
        pytest.param("[" * 100_000, "nested more deeply", id="depth"),
        pytest.param("#" * 1_048_577, "it has 1,048,577 bytes", id="length"),
        pytest.param("ä" * 524_289, "it has 1,048,578 bytes", id="length-in-bytes"),
    ],
)
def test_a_text_that_would_take_all_memory_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        parse_policy(text)
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(PolicyError, match=rf"policy .*policy\.yaml.*{said}"):
        read_policy(tmp_path / "policy.yaml")


@given(st.text(st.sampled_from("communites: default\n{}[]&*<!'\"0.5-,?|#\u2028\x00"), max_size=60))
def test_whatever_a_text_holds_it_is_a_policy_or_refused(text: str) -> None:
    for each in (text, f"communities: {{default: {{toxic: {text}}}}}"):
        with suppress(PolicyError):
            parse_policy(each)


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
        pytest.param("communities: {default: {toxic: {hide: '0.5'}}}", ["'0.5'", "a plain number"]),
        pytest.param("communities: {default: {toxic: {hide: 5e-1}}}", ["'5e-1'", "a plain number"]),
        pytest.param("communities: {default: {toxic: {hide: 0,5}}}", ["communities.default.toxic", "'5'", "comma"]),
        pytest.param("communities: {default: {toxic: {hide: null}}}", ["None"]),
        pytest.param("communities: {default: {}, news: }", ["communities.news", "mapping", "is empty"]),
        pytest.param(
            "communities: {default: {}, news: {inherits: kid}, kids: {}}",
            ["communities.news.inherits = 'kid'", "default, news, kids"],
        ),
        pytest.param(
            "communities: {default: {inherits: news}, news: {}}", ["communities.default.inherits = 'news'", "no other"]
        ),
        pytest.param("communities: {default: {}, a: {inherits: a}}", ["communities.a.inherits", "circle: a, and a"]),
        pytest.param(
            "communities: {default: {}, a: {inherits: b}, b: {inherits: c}, c: {inherits: b}}",
            ["communities.b.inherits", "circle: b, c, and b again"],
        ),
        pytest.param("communities: {default: {}, a: {inherits: [b]}}", ["communities.a.inherits", "no community"]),
        pytest.param("communities: {default: {}, a: {Inherits: b}}", ["communities.a", "'Inherits'", "inherits"]),
        pytest.param(
            "communities:\n  default:\n    toxic: {}\n    toxic: {hide: 1}\n",
            ["communities.default names 'toxic' twice: in lines 3 and 4"],
        ),
        pytest.param("communities: {default: {toxic: {hide: 1, hide: 1}}}", ["default.toxic names 'hide' twice"]),
        pytest.param("communities: {default: {}, 1: {}, '1': {}}", ["communities names '1' twice"]),
        pytest.param("communities: {default: {}}\ncommunities: {default: {}}", ["the file names 'communities' twice"]),
        pytest.param("communities: {default: {toxic: {hide: !!int ''}}}", ["not YAML"], id="empty-int"),
        pytest.param('communities: {default: {}, "a\\e[31m": 1}', ["'a\\x1b[31m'"], id="control-characters"),
        pytest.param("communities: {default: {toxic: 0.5}}", ["communities.default.toxic", "mapping", "float"]),
        pytest.param("communities: {default: [toxic]}", ["communities.default", "mapping", "list"]),
        pytest.param("communities: {news: {}}", ["'default'"]),
        pytest.param("communities: [default]", ["communities", "mapping"]),
        pytest.param("community: {default: {}}", ["'community'", "communities"]),
        pytest.param("{}", ["'default'"]),
        pytest.param("", ["the file", "mapping, and is empty"]),
        pytest.param("just words", ["the file", "str"]),
        pytest.param("communities: {default: {}, [a]: {}}", ["communities has in line 1 a list or mapping"]),
        pytest.param("communities: {default: {toxic: {hide: 0.5}", ["not YAML", "in line 1, column 43"], id="unclosed"),
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
