"""Scores and policy to one action and the rule that fired. Reading the file aside, pure."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from config.names import DEFAULT_COMMUNITY, LABELS, Action

STRICTNESS = {action: rank for rank, action in enumerate(Action)}

Rules = dict[str, tuple[tuple[float, Action], ...]]
"""Per label: thresholds with their actions, ascending."""


class PolicyError(Exception):
    """A policy that cannot be used; the message names the place, the value and what is allowed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is done with a comment, and the rule that says so; no rule where nothing fired."""

    action: Action
    label: str | None
    threshold: float | None


class Policy:
    """A checked policy. `version` is the sha256 of its text, so that a decision names exactly what decided it."""

    def __init__(self, text: str, communities: dict[str, Rules]) -> None:
        self.text = text
        self.version = hashlib.sha256(text.encode()).hexdigest()
        self._communities = communities

    def rules(self, community: str) -> Rules:
        """Every label's; those of "default" where the policy does not know the community."""
        return self._communities.get(community, self._communities[DEFAULT_COMMUNITY])

    def decide(self, community: str, scores: Sequence[float]) -> Verdict:
        """The strictest action that any label's rules reach.

        Where two labels reach it, the one with the higher score is named.

        Args:
            community: one that the policy does not know is judged as "default".
            scores: six probabilities in the order of `LABELS`.
        """
        rules = self.rules(community)
        fired = [
            (STRICTNESS[action], score, label, threshold, action)
            for label, score in zip(LABELS, scores, strict=True)
            for threshold, action in rules[label]
            if score >= threshold
        ]
        if not fired:
            return Verdict(Action.ALLOW, None, None)
        _, _, label, threshold, action = max(fired)
        return Verdict(action, label, threshold)


def read_policy(path: Path) -> Policy:
    """The policy in a YAML file; see config/policy.yaml for its form.

    Raises:
        PolicyError: the file cannot be read or breaks the form.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"policy {path} cannot be read: {error}") from None
    try:
        return parse_policy(text)
    except PolicyError as error:
        raise PolicyError(f"policy {path}: {error}") from None


def parse_policy(text: str) -> Policy:
    """The policy that this YAML text states.

    Raises:
        PolicyError: it breaks the form.
    """
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-45
        raise PolicyError(f"not YAML: {error}") from None
    communities = _mapping(document, "the file", ("communities",)).get("communities")
    if not isinstance(communities, dict) or DEFAULT_COMMUNITY not in communities:
        raise PolicyError(f"communities must be a mapping that names at least {DEFAULT_COMMUNITY!r}")
    default = _rules(communities[DEFAULT_COMMUNITY], DEFAULT_COMMUNITY)
    complete = {label: default.get(label, ()) for label in LABELS}
    return Policy(text, {str(name): complete | _rules(rules, str(name)) for name, rules in communities.items()})


def _rules(value: object, community: str) -> Rules:
    labels = _mapping(value, f"communities.{community}", LABELS)
    return {label: _thresholds(rule, f"communities.{community}.{label}") for label, rule in labels.items()}


def _thresholds(value: object, where: str) -> tuple[tuple[float, Action], ...]:
    # Allowing is what happens when nothing fires; it takes no threshold.
    rules = _mapping(value, where, [action.value for action in Action if action is not Action.ALLOW])
    for action, threshold in rules.items():
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise PolicyError(f"{where}.{action} = {threshold!r} is not a threshold from 0 to 1")
    ordered = sorted((Action(name) for name in rules), key=STRICTNESS.__getitem__)
    for milder, stricter in pairwise(ordered):
        if rules[milder] >= rules[stricter]:
            raise PolicyError(
                f"{where}: {stricter} at {rules[stricter]} must stand higher than {milder} at {rules[milder]}"
            )
    return tuple((float(rules[action]), action) for action in ordered)


def _mapping(value: object, where: str, allowed: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PolicyError(f"{where} must be a mapping, not {type(value).__name__}")
    for key in value:
        if key not in allowed:
            raise PolicyError(f"{where} names {key!r}; allowed here: {', '.join(allowed)}")
    return value
