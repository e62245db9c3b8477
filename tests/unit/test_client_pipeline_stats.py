"""What two snapshots of a worker's pipeline say of the time between them."""

from dataclasses import replace
from typing import Any

import pytest

from api_client.pipeline_stats import PipelineStats, pipeline_rates
from api_client.watching import Activity

START = PipelineStats(
    uptime_s=100,
    version="v1",
    engine="an engine",
    lanes=2,
    max_batch_tokens=1_000,
    comments=5_000,
    batches=200,
    tokens=300_000,
    padded_tokens=310_000,
    dead_letters=1,
    duplicates=50,
    cache_hits=500,
    held_comments=64,
    max_held_comments=512,
    busy_s={"prepare": 10, "score": 100, "record": 5},
    waiting={"prepare": 0, "score": 60, "record": 4},
)


def later(**changes: Any) -> PipelineStats:
    return replace(START, uptime_s=110, **changes)


@pytest.mark.parametrize(
    ("queues", "without"),
    [
        ({}, ["toxicity.interactive", "toxicity"]),  # no worker at all
        ({"a": ["toxicity"]}, ["toxicity.interactive"]),
        ({"a": ["toxicity"], "b": ["toxicity.interactive", "toxicity.bulk"]}, []),
        ({"a": ["toxicity"], "b": None}, []),  # an older worker does not say, nor does one that starts
    ],
)
def test_queues_that_no_worker_takes_from(queues: dict[str, list[str] | None], without: list[str]) -> None:
    pipelines = {worker: replace(START, queues=its) for worker, its in queues.items()}
    depths = {"toxicity.interactive": 2, "toxicity": 1, "toxicity.bulk": 0}
    activity = Activity(workers=[*queues], pipelines=pipelines, queue_depths=depths)
    assert activity.queues_without_worker == without
    if None in queues.values():
        assert replace(activity, pipelines={}).queues_without_worker == []


def test_the_rates_of_an_interval() -> None:
    # Given ten seconds with 2,000 comments, in 40 batches that came to 900 of 1,000 tokens, 800 of them real
    now = later(
        comments=7_000,
        batches=240,
        tokens=332_000,
        padded_tokens=346_000,
        cache_hits=1_000,
        duplicates=70,
        busy_s={"prepare": 12, "score": 119, "record": 5.5},
    )
    # Then the rates are of these ten seconds alone
    rates = pipeline_rates(now, START)
    assert (rates.seconds, rates.comments_per_s, rates.tokens_per_s, rates.comments_per_batch) == (10, 200, 3_200, 50)
    assert (rates.batch_fill, rates.padding_waste) == (0.9, 0.125)
    assert (rates.cache_hit_share, rates.duplicate_share) == (0.25, 0.01)
    # And each stage's cost is shared by the comments, its time by its lanes
    assert {name: (stage.ms_per_comment, stage.utilisation) for name, stage in rates.stages.items()} == {
        "prepare": (1, 0.2),
        "score": (9.5, 0.95),
        "record": (0.25, 0.05),
    }
    assert rates.bottleneck == "score"


def test_one_snapshot_is_the_average_since_the_start() -> None:
    rates = pipeline_rates(START)
    assert (rates.seconds, rates.comments_per_s, rates.comments_per_batch) == (100, 50, 25)
    assert rates.stages["score"].utilisation == 0.5


def test_a_worker_that_was_started_anew_is_measured_since_then() -> None:
    anew = replace(START, uptime_s=20, comments=400)
    assert pipeline_rates(anew, START) == pipeline_rates(anew)


def test_nothing_to_do_has_no_shares_and_no_bottleneck() -> None:
    rates = pipeline_rates(later(), START)
    assert (rates.comments_per_s, rates.bottleneck) == (0, None)
    assert rates.comments_per_batch is rates.batch_fill is rates.padding_waste is rates.cache_hit_share is None
    assert [(stage.ms_per_comment, stage.utilisation) for stage in rates.stages.values()] == [(None, 0)] * 3


def test_a_batch_that_began_before_the_interval_fills_no_more_than_all_of_it() -> None:
    now = later(busy_s={"prepare": 10, "score": 150, "record": 5})
    assert pipeline_rates(now, START).stages["score"].utilisation == 1


@pytest.mark.parametrize("busiest", ["prepare", "record"])
def test_the_bottleneck_is_the_stage_that_is_busy_most_of_the_time(busiest: str) -> None:
    # Given a score stage at 45 % in its two lanes, and another at 60 %
    now = later(busy_s={"prepare": 10, "score": 109, "record": 5} | {busiest: START.busy_s[busiest] + 6})
    assert pipeline_rates(now, START).bottleneck == busiest


def test_what_an_answer_has_beyond_the_contract_is_ignored() -> None:
    answer = {name: getattr(START, name) for name in PipelineStats.__slots__}
    assert PipelineStats.from_reply(answer | {"windows": 3}) == START


@pytest.mark.parametrize("answer", [{}, {"error": "KeyError('pipeline_stats')"}])
def test_an_answer_of_another_release_tells_nothing(answer: dict[str, Any]) -> None:
    assert PipelineStats.from_reply(answer) is None
