"""What the intake believes of what a producer wrote beside its comments."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state as worker_state
from hypothesis import given
from hypothesis import strategies as st

from config.names import MODERATE_QUEUE, SUBMITTED_AT_HEADER, Reason
from worker.intake import MAX_DELIVERIES, _queue_name, _set_aside, _submitted_at

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize("age_s", [0, 0.5, 3_600, 365 * 86_400])
def test_a_plausible_time_of_submission_is_believed(age_s: float) -> None:
    then = NOW - timedelta(seconds=age_s)
    assert _submitted_at({SUBMITTED_AT_HEADER: then.timestamp()}, NOW) == then


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(NOW.timestamp() + 1, id="the future"),
        pytest.param((NOW - timedelta(days=367)).timestamp(), id="long ago"),
        pytest.param(NOW.timestamp() * 1_000, id="milliseconds"),
        pytest.param(0, id="zero"),
        pytest.param(-1, id="negative"),
        pytest.param(float("nan"), id="NaN"),
        pytest.param(float("inf"), id="infinite"),
        pytest.param(10**400, id="huge"),
        pytest.param(True, id="true"),
        pytest.param("1795348800", id="text"),
        pytest.param([1], id="list"),
        pytest.param(None, id="null"),
    ],
)
def test_any_other_time_of_submission_is_now(seconds: object) -> None:
    assert _submitted_at({SUBMITTED_AT_HEADER: seconds}, NOW) == NOW
    assert _submitted_at({}, NOW) == NOW


def message(returns: int = 0, **headers: object) -> Any:
    body = b'[[[{"text": "secret", "store_text": false}]], {}, {}]'
    return SimpleNamespace(headers={"id": "m1", **headers}, body=body, returns=returns)


def test_a_message_that_its_workers_died_of_is_not_tried_again() -> None:
    assert _set_aside(message(returns=MAX_DELIVERIES - 1)) is None
    parsed = _set_aside(message(returns=MAX_DELIVERIES))
    assert parsed is not None
    [refused] = parsed.refused
    assert (refused.dead_letter_id, refused.reason, refused.payload) == ("m1", Reason.WORKER_DIED, b"")


@pytest.mark.parametrize("other", ["m2", None, 7, ["m1"], {"m1": 1}])
def test_only_the_message_that_is_named_is_revoked(other: object) -> None:
    worker_state.revoked.add("m1")
    try:
        parsed = _set_aside(message())
        assert parsed is not None
        assert [(r.dead_letter_id, r.reason, r.payload) for r in parsed.refused] == [("m1", Reason.REVOKED, b"")]
        assert _set_aside(message(id=other)) is None
    finally:
        worker_state.revoked.discard("m1")


@given(
    st.dictionaries(
        st.just("routing_key"), st.none() | st.integers() | st.text(st.characters(), max_size=300) | st.lists(st.none())
    )
)
def test_any_queue_name_can_be_stored_and_shown(delivery_info: dict[str, Any]) -> None:
    name = _queue_name(delivery_info)
    assert 0 < len(name) <= 200
    assert name.isprintable()
    name.encode()


def test_a_queue_is_known_by_its_name() -> None:
    assert _queue_name({"routing_key": "toxicity.news"}) == "toxicity.news"
    assert _queue_name({"routing_key": "a\nb"}) == MODERATE_QUEUE
    assert _queue_name({}) == MODERATE_QUEUE
