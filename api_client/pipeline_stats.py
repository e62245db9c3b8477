"""What a worker says of its pipeline, and what two such snapshots say of the time between them. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

BOTTLENECK_UTILISATION = 0.5
"""A pipeline whose busiest stage works less than this waits for comments, and has no bottleneck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStats:
    """A worker's answer to `config.names.PIPELINE_STATS`: what it counted since its pipeline began."""

    uptime_s: float
    version: str
    """Of the model that scores."""
    engine: str
    lanes: int
    """Batches that are scored at the same time."""
    max_batch_tokens: int
    comments: int
    batches: int
    tokens: int
    padded_tokens: int
    """What the engine computed: the tokens and their padding."""
    dead_letters: int
    duplicates: int
    """Comments scored together with an identical text."""
    cache_hits: int
    held_comments: int
    max_held_comments: int
    busy_s: Mapping[str, float]
    """By stage; that of `score` is the sum over all lanes."""
    waiting: Mapping[str, int]
    """Comments before each stage, or in it."""
    policy_version: str | None = None
    """The policy that decides there; None where a worker of an older release does not say."""
    policy_refusal: str | None = None
    """Why it does not decide by the active policy; None where it does, or there is none."""
    queues: Sequence[str] | None = None
    """That it takes from; None where a worker of an older release does not say."""

    @classmethod
    def from_reply(cls, reply: Mapping[str, Any]) -> Self | None:
        """None where a worker of another release answered something else."""
        known = {field.name: reply[field.name] for field in fields(cls) if field.name in reply}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        return cls(**known) if known.keys() >= needed else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRates:
    ms_per_comment: float | None
    utilisation: float
    """The share of the time in which it worked, from 0 to 1; for `score` of all lanes' time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineRates:
    """How a pipeline did over some time. Shares are None where there was nothing to have a share of."""

    seconds: float
    comments_per_s: float
    tokens_per_s: float
    """Without padding. Steadier than comments/s, since a window's short texts are scored one after the other."""
    comments_per_batch: float | None
    batch_fill: float | None
    """Of `max_batch_tokens`, padding included."""
    padding_waste: float | None
    """Padding for each real token."""
    cache_hit_share: float | None
    duplicate_share: float | None
    stages: dict[str, StageRates]
    bottleneck: str | None
    """The busiest stage, where it is busy more than half of the time."""


def pipeline_rates(now: PipelineStats, before: PipelineStats | None = None) -> PipelineRates:
    """What happened between two snapshots of one worker; since its start where there is one only."""
    if before is not None and before.uptime_s >= now.uptime_s:
        before = None  # it was started anew since

    def rise(name: str) -> float:
        return float(getattr(now, name) - (getattr(before, name) if before else 0))

    seconds, comments, batches = rise("uptime_s"), rise("comments"), rise("batches")
    stages = {}
    for stage, busy_s in now.busy_s.items():
        worked_s = busy_s - (before.busy_s.get(stage, 0) if before else 0)
        share = _ratio(worked_s, seconds * (now.lanes if stage == "score" else 1))
        # A batch counts when it ends, and so may bring more seconds than have passed since the last look.
        stages[stage] = StageRates(ms_per_comment=_ratio(worked_s * 1000, comments), utilisation=min(share or 0, 1))
    busiest = max(stages, key=lambda stage: stages[stage].utilisation)
    tokens = rise("tokens")
    padding = _ratio(rise("padded_tokens"), tokens)
    return PipelineRates(
        seconds=seconds,
        comments_per_s=_ratio(comments, seconds) or 0,
        tokens_per_s=_ratio(tokens, seconds) or 0,
        comments_per_batch=_ratio(comments, batches),
        batch_fill=_ratio(rise("padded_tokens"), batches * now.max_batch_tokens),
        padding_waste=None if padding is None else padding - 1,
        cache_hit_share=_ratio(rise("cache_hits"), comments),
        duplicate_share=_ratio(rise("duplicates"), comments),
        stages=stages,
        bottleneck=busiest if stages[busiest].utilisation >= BOTTLENECK_UTILISATION else None,
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
