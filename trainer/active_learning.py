"""Which decisions a moderator should look at first, and why: where a person's word tells most. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from config.names import LABELS, Action
from config.policy import STRICTNESS, Policy, Rules
from db.reviews import Opinion, UnreviewedDecision

NEAR = 0.1
"""From how close a threshold, or a half, tells something; the closer the more."""
EVEN = 0.5
SEVERE_LABELS = ("severe_toxic", "threat", "identity_hate")
SEVERE_FROM = 0.5
CONFLICT = 1.0
"""What two versions that act differently add; a score right at a threshold adds as much, a severe one nearly."""
BY_ACTION = {
    Action.REVIEW: (0.3, "the policy asks for a review"),
    Action.HIDE: (0.3, "severe: hide"),
    Action.REMOVE: (0.4, "severe: remove"),
}
"""What an action adds where no severe label does, and why."""

IN_WORDS = {
    Action.ALLOW: "allow it",
    Action.LABEL: "label it",
    Action.REVIEW: "have it reviewed",
    Action.HIDE: "hide it",
    Action.REMOVE: "remove it",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A decision to be reviewed."""

    decision: UnreviewedDecision
    informativeness: float
    reasons: list[str]
    """In words, the weightiest first; empty where it is sure, mild and undisputed."""


def most_informative(
    decisions: Iterable[UnreviewedDecision], policies: Mapping[str, Policy], limit: int
) -> list[Candidate]:
    """The decisions that a person's word tells most of; the newest of each text, and of equals the newest first.

    Args:
        decisions: newest first.
        policies: by version; where the one that decided is absent, its thresholds play no part.
    """
    by_text: dict[str, list[UnreviewedDecision]] = {}
    for decision in decisions:
        by_text.setdefault(decision.text_sha256, []).append(decision)
    candidates = []
    for newest, *older in by_text.values():
        # Another community has other rules: what was done there contradicts nothing.
        copies = (Opinion(each.model_version, each.action, each.scores) for each in older if _is_rival(each, newest))
        opinions = [*([newest.shadow] if newest.shadow else []), *copies]
        policy = policies.get(newest.policy_version)
        rules = policy.rules(newest.community) if policy else {}
        candidates.append(Candidate(newest, *informativeness(newest.scores, newest.action, rules, opinions)))
    return sorted(candidates, key=lambda candidate: -candidate.informativeness)[:limit]


def _is_rival(copy: UnreviewedDecision, newest: UnreviewedDecision) -> bool:
    return copy.community == newest.community and copy.model_version != newest.model_version


def informativeness(
    scores: Sequence[float], action: Action, rules: Rules, opinions: Sequence[Opinion]
) -> tuple[float, list[str]]:
    """How much a person's word on a decision would tell, from 0 up, and why, the weightiest reason first.

    The sum of three: how close it was, how severe it is, and whether another version would have acted otherwise.

    Args:
        scores: six probabilities in the order of `LABELS`.
        action: what was done.
        rules: the thresholds that decided.
        opinions: what other versions make of the text, the most telling first.
    """
    reasons = [_close(scores, action, rules), _severe(scores, action), _disputed(scores, action, opinions)]
    found = sorted((reason for reason in reasons if reason[0] > 0), key=lambda reason: -reason[0])
    words = [said for _, said in found]
    # "identity_hate 0.94" adds nothing to "identity_hate 0.94, 0.04 above remove at 0.90".
    return sum(points for points, _ in found), [
        said for said in words if not any(other != said and other.startswith(f"{said},") for other in words)
    ]


def _close(scores: Sequence[float], action: Action, rules: Rules) -> tuple[float, str]:
    """The nearest score that would have changed the action, or that could as well be wrong as right."""
    near, holding = [], []
    for label, score in zip(LABELS, scores, strict=True):
        for threshold, reached in rules.get(label, ()):
            if score < threshold and STRICTNESS[reached] > STRICTNESS[action]:
                gap = threshold - score
                near.append((gap, f"{label} {score:.2f}, {gap:.2f} below {reached} at {threshold:.2f}"))
            elif score >= threshold and reached == action:
                gap = score - threshold
                holding.append((gap, f"{label} {score:.2f}, {gap:.2f} above {reached} at {threshold:.2f}"))
    # While one label holds the action, the others may fall without changing it.
    near += [max(holding)] if holding else []
    near += [(abs(score - EVEN), f"{label} {score:.2f}: unsure") for label, score in zip(LABELS, scores, strict=True)]
    gap, words = min(near, key=itemgetter(0))
    return 1 - gap / NEAR, words


def _severe(scores: Sequence[float], action: Action) -> tuple[float, str]:
    severe = [
        (score, label)
        for label, score in zip(LABELS, scores, strict=True)
        if label in SEVERE_LABELS and score >= SEVERE_FROM
    ]
    if severe:
        return max(severe)[0], ", ".join(f"{label} {score:.2f}" for score, label in sorted(severe, reverse=True))
    return BY_ACTION.get(action, (0.0, ""))


def _disputed(scores: Sequence[float], action: Action, opinions: Sequence[Opinion]) -> tuple[float, str]:
    for opinion in opinions:
        if opinion.action != action:
            _, label, score = max(
                (abs(other - own), label, other)
                for label, own, other in zip(LABELS, scores, opinion.scores, strict=True)
            )
            return CONFLICT, f"{opinion.version} would {IN_WORDS[opinion.action]}: {label} {score:.2f}"
    return 0.0, ""
