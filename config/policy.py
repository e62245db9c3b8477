"""Scores and policy to one action and the rule that fired. Reading the file aside, pure."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from reprlib import repr as _shown
from typing import Any

import yaml

from config.files import read_bounded, yaml_trouble
from config.names import DEFAULT_COMMUNITY, LABELS, MAX_POLICY_BYTES, Action

STRICTNESS = {action: rank for rank, action in enumerate(Action)}

Rules = dict[str, tuple[tuple[float, Action], ...]]
"""Per label: thresholds with their actions, ascending."""

INHERITS = "inherits"
"""Stands among a community's labels, before the name of the community whose rules it takes for those it leaves out."""
MAX_VALUES = 1_000_000
MERGE_TAG = "tag:yaml.org,2002:merge"
TEXT_TAG = "tag:yaml.org,2002:str"
LISTED_NAMES = 10
"""Of communities, in what is said of a policy."""


class PolicyError(Exception):
    """A policy that cannot be used; the message names the place, the value and what is allowed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is done with a comment, and the rule that says so; no rule where none led to the action."""

    action: Action
    label: str | None
    threshold: float | None


class Policy:
    """A checked policy. `version` is the sha256 of its text, so that a decision names exactly what decided it."""

    def __init__(self, text: str, communities: dict[str, Rules], bases: Collection[str]) -> None:
        self.text = text
        self.bases = frozenset(bases)
        """Communities that others inherit from."""
        self.version = hashlib.sha256(text.encode()).hexdigest()
        self._communities = communities

    @property
    def communities(self) -> list[str]:
        """Those that it names, in its order; "default" stands for all others."""
        return list(self._communities)

    def rules(self, community: str) -> Rules:
        """Every label's; those of "default" where the policy does not know the community."""
        return self._communities.get(community, self._communities[DEFAULT_COMMUNITY])

    def decide(self, community: str, scores: Sequence[float], *, truncated: bool = False) -> Verdict:
        """The strictest action that any label's rules reach.

        Where two labels reach it, the one with the higher score is named.

        Args:
            community: one that the policy does not know is judged as "default".
            scores: six probabilities in the order of `LABELS`.
            truncated: whether they are those of the text's beginning only. A person must look at the rest: where no
                rule leads to `review` or a stricter action, the comment is reviewed, and by no rule.
        """
        rules = self.rules(community)
        fired = [
            (STRICTNESS[action], score, label, threshold, action)
            for label, score in zip(LABELS, scores, strict=True)
            for threshold, action in rules[label]
            if score >= threshold
        ]
        strictest = max(fired, default=None)
        if truncated and (strictest is None or strictest[0] < STRICTNESS[Action.REVIEW]):
            return Verdict(Action.REVIEW, None, None)
        if strictest is None:
            return Verdict(Action.ALLOW, None, None)
        _, _, label, threshold, action = strictest
        return Verdict(action, label, threshold)


def read_policy(path: Path) -> Policy:
    """The policy in a YAML file; see docs/policies.md for its form.

    Raises:
        PolicyError: the file cannot be read or breaks the form.
    """
    try:
        text = read_bounded(path, MAX_POLICY_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise PolicyError(f"policy {path} cannot be read: {said}") from None
    try:
        return parse_policy(text)
    except PolicyError as error:
        raise PolicyError(f"policy {path}: {error}") from None


def parse_policy(text: str) -> Policy:
    """The policy that this YAML text states.

    Raises:
        PolicyError: it breaks the form.
    """
    if (size := len(text.encode())) > MAX_POLICY_BYTES:
        raise PolicyError(f"it has {size:,} bytes; a policy has at most {MAX_POLICY_BYTES:,}")
    stated = _mapping(_document(text), "the file", ("communities",)).get("communities")
    if not isinstance(stated, dict) or DEFAULT_COMMUNITY not in stated:
        raise PolicyError(f"communities must be a mapping that names at least {DEFAULT_COMMUNITY!r}")
    own: dict[str, Rules] = {}
    above: dict[str, str] = {}
    for name, value in stated.items():
        where = _place("communities", name)
        labels = _mapping(value, where, (*LABELS, INHERITS))
        own[name] = {label: _thresholds(labels[label], f"{where}.{label}") for label in LABELS if label in labels}
        if INHERITS in labels:
            above[name] = str(labels[INHERITS])
    _check_above(above, own)
    return Policy(text, _complete(own, above), above.values())


def _check_above(above: Mapping[str, str], names: Collection[str]) -> None:
    for name, other in above.items():
        where = f"{_place('communities', name)}.{INHERITS} = {_shown(other)}"
        if name == DEFAULT_COMMUNITY:
            raise PolicyError(f"{where}: {DEFAULT_COMMUNITY!r} inherits from no other, as all others do from it")
        if other not in names:
            raise PolicyError(f"{where} is no community of this policy; it names {_listed(names)}")


def _complete(own: Mapping[str, Rules], above: Mapping[str, str]) -> dict[str, Rules]:
    """Each community's rules for every label: its own, or those of the community above it, and so on up to default."""
    nothing: Rules = dict.fromkeys(LABELS, ())
    complete = {DEFAULT_COMMUNITY: nothing | own[DEFAULT_COMMUNITY]}
    for name in own:
        line: dict[str, None] = {}
        while name not in complete:
            if name in line:
                circle = [*line][[*line].index(name) :]
                where = _place("communities", name)
                raise PolicyError(f"{where}.{INHERITS} goes in a circle: {_listed(circle)}, and {name} again")
            line[name] = None
            name = above.get(name, DEFAULT_COMMUNITY)
        for each in reversed(line):
            complete[each] = complete[above.get(each, DEFAULT_COMMUNITY)] | own[each]
    return {name: complete[name] for name in own}


def _thresholds(value: object, where: str) -> tuple[tuple[float, Action], ...]:
    # Allowing is what happens when nothing fires; it takes no threshold.
    rules = _mapping(value, where, [action.value for action in Action if action is not Action.ALLOW])
    for action, threshold in rules.items():
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            # YAML reads 5e-1 as text.
            hint = "; write a plain number, like 0.5" if isinstance(threshold, str) else ""
            raise PolicyError(f"{where}.{action} = {_shown(threshold)} is not a threshold from 0 to 1{hint}")
    ordered = sorted((Action(name) for name in rules), key=STRICTNESS.__getitem__)
    for milder, stricter in pairwise(ordered):
        if rules[milder] >= rules[stricter]:
            raise PolicyError(
                f"{where}: {stricter} at {rules[stricter]} must stand higher than {milder} at {rules[milder]}"
            )
    return tuple((float(rules[action]), action) for action in ordered)


def _mapping(value: object, where: str, allowed: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        said = "and is empty" if value is None else f"not {type(value).__name__} {_shown(value)}"
        raise PolicyError(f"{where} must be a mapping, {said}")
    for key in value:
        if key not in allowed:
            # YAML reads {hide: 0,5} as hide: 0 and a second key, 5.
            comma = "a decimal number has a point, not a comma; " if str(key).isdigit() else ""
            raise PolicyError(f"{where} names {_shown(key)}; {comma}allowed here: {', '.join(allowed)}")
    return value


def _document(text: str) -> Any:
    """What the YAML text states, by the loader in Python: the one in C recurses into deep nesting until it dies of it.

    Raises:
        PolicyError: it is no YAML, names something twice, or stands for more than it says.
    """
    try:
        loader = yaml.SafeLoader(text)
        document = loader.get_single_node()
        if document is None:
            return None
        if (values := _read_names(document, "", {})) > MAX_VALUES:
            raise PolicyError(f"its aliases make {values:,} values of it; at most {MAX_VALUES:,} are allowed")
        return loader.construct_document(document)
    except PolicyError:
        raise
    except RecursionError:
        raise PolicyError("nested more deeply than any policy") from None
    except Exception as error:  # a ValueError for the date 2026-13-45, an IndexError for !!int '', and so on
        raise PolicyError(f"not YAML: {yaml_trouble(error)}") from None


def _read_names(node: yaml.Node, where: str, counts: dict[int, int]) -> int:
    """Take every name as it is written, and tell how many values stand there, as a few lines of aliases can billions.

    Args:
        where: its place, for what is said of it; of an alias the first one's.
        counts: of nodes counted before, by their ids; of one that is being counted 0.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if (known := counts.get(id(node))) is not None:
        if not known:
            raise PolicyError(f"{where or 'the file'} holds an alias of itself")
        return known
    counts[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        _take_as_written(node, where or "the file")
        children = [(value, _place(where, str(key.value))) for key, value in node.value]
    else:
        children = [(value, where) for value in node.value]
    counts[id(node)] = 1 + sum(_read_names(*child, counts) for child in children)
    return counts[id(node)]


def _take_as_written(mapping: yaml.MappingNode, where: str) -> None:
    """Names are texts: YAML would have `no` be false, and 1 and 0x1 one community, the last of which counts."""
    lines: dict[str, int] = {}
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise PolicyError(f"{where} has in line {line} a list or mapping where a name belongs")
        if key.tag == MERGE_TAG:  # several are taken together
            continue
        if key.value in lines:
            raise PolicyError(f"{where} names {_shown(key.value)} twice: in lines {lines[key.value]} and {line}")
        lines[key.value] = line
        key.tag = TEXT_TAG
        if key.value == INHERITS and isinstance(value, yaml.ScalarNode):
            value.tag = TEXT_TAG


def _place(where: str, name: str) -> str:
    return f"{where}.{name if name.isprintable() else _shown(name)}" if where else name


def _listed(names: Collection[str]) -> str:
    more = len(names) - LISTED_NAMES
    return ", ".join(islice(names, LISTED_NAMES)) + (f" and {more} more" if more > 0 else "")
