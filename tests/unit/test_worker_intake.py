"""What the intake believes of what a producer wrote beside its comments."""

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state as worker_state

from config.identity import refused_id
from config.names import ANSWER_TO_HEADER, BULK_QUEUE, MODERATE_TASK, SUBMITTED_AT_HEADER, Reason
from worker import intake, transport
from worker.envelope import MALFORMED_BYTES_HEADER, malformed_envelope, write_envelope
from worker.intake import MAX_DELIVERIES, _answer_to, _parse, _read, _submitted_at
from worker.message import single_messages
from worker.transport import SUSPECT_RETURNS, UNREAD_RETURNS, Delivery, Message

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


def test_a_token_to_answer_to_is_letters_digits_and_hyphens() -> None:
    assert _answer_to({ANSWER_TO_HEADER: "3f-A9"}) == "3f-A9"
    others: list[object] = ["", "a.b", "a*", "a\n", "\u0660", "x" * 65, 7, True, None, ["a"], {"a": 1}]
    assert [_answer_to({ANSWER_TO_HEADER: other}) for other in others] == [None] * len(others)
    assert _answer_to({}) is None


SOUND, SECRET, BAD = {"text": "hello", "author": "ann"}, {"text": "hidden", "store_text": False}, {"text": ""}


def message(*comments: object, returns: int = 0, **headers: object) -> Any:
    headers = {"task": MODERATE_TASK, "id": "m1", **headers}
    body = json.dumps([[list(comments)], {}, {}]).encode()
    return SimpleNamespace(headers=headers, body=body, returns=returns)


def test_a_comment_that_its_workers_died_of_is_not_tried_again() -> None:
    assert len(_parse(message(SOUND, returns=MAX_DELIVERIES - 1), NOW).submitted) == 1
    parsed = _parse(message(SECRET, returns=MAX_DELIVERIES), NOW)
    assert not parsed.submitted
    assert [(one.dead_letter_id, one.reason, one.payload) for one in parsed.refused] == [
        ("m1:0", Reason.WORKER_DIED, b"")
    ]
    # But of several it is not known which: they are taken apart first, however often they came
    assert len(_parse(message(SOUND, SECRET, returns=MAX_DELIVERIES), NOW).submitted) == 2


def test_a_message_that_may_kill_who_reads_it_is_not_read() -> None:
    # Given a message that came back so often that the transport left it unread
    wrapped = malformed_envelope(b"raw", "")
    unread = SimpleNamespace(headers=wrapped["headers"], body=wrapped["body"], returns=UNREAD_RETURNS)
    [refused] = _parse(unread, NOW).refused
    assert (refused.reason, refused.payload, refused.payload_bytes) == (Reason.WORKER_DIED, b"raw", 3)
    assert refused.dead_letter_id == refused_id(refused.payload_sha256)
    assert "10 times" in refused.detail


@pytest.mark.parametrize(
    ("expires", "expired"),
    [
        ("2026-11-22T12:00:00+00:00", True),
        ("2026-11-22T11:59:59", True),  # in UTC
        ("2026-11-22T13:00:00+02:00", True),
        ("2026-11-22T12:00:00.1Z", False),
        (None, False),
        (1795348800, False),
        ("yesterday", False),
        ("1" * 10_000, False),
    ],
)
def test_a_message_expires_as_celery_says(expires: object, expired: bool) -> None:
    parsed = _parse(message(SOUND, SECRET, BAD, expires=expires), NOW)
    assert len(parsed.submitted) == (0 if expired else 2)
    assert [one.reason for one in parsed.refused].count(Reason.EXPIRED) == (2 if expired else 0)
    # And so does each of its comments where they go on alone
    [single, _] = single_messages(_parse(message(SOUND, SECRET), NOW).submitted, {"expires": expires}, "toxicity")
    assert _parse(Message(Delivery("tag", "toxicity", single, 0)), NOW).submitted == [] if expired else True


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, RecursionError])
@pytest.mark.parametrize("returns", [0, SUSPECT_RETURNS])
def test_a_message_that_nobody_can_parse_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception], returns: int
) -> None:
    # Given a fault of ours, or a want of memory, while a message is read or parsed, taken apart or not
    def fail(*_: object, **__: object) -> None:
        raise error(SECRET["text"])

    raw = write_envelope({"task": MODERATE_TASK, "id": "m1"}, message(SOUND, SECRET).body, "toxicity")
    unread = message(SOUND, SECRET, returns=returns)
    unread.queue = "toxicity"
    monkeypatch.setattr(intake, "single_messages" if returns else "parse_message", fail)
    monkeypatch.setattr(transport, "read_envelope", fail)
    # Then it is a dead letter under its id, with its length and hash only
    parsed, singles = _read(unread, NOW)
    [refused] = parsed.refused
    assert (refused.dead_letter_id, refused.reason, parsed.submitted, singles) == (
        refused_id("m1"),
        Reason.UNREADABLE_MESSAGE,
        [],
        [],
    )
    assert (refused.payload, refused.payload_bytes) == (b"", len(unread.body))
    unread = Message(Delivery("tag", "toxicity", raw, returns))
    assert (unread.headers[MALFORMED_BYTES_HEADER], unread.body) == (len(raw), b"")
    # And the log says where it failed, but nothing of the text
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "in fail" in caplog.text and "hidden" not in caplog.text


@pytest.mark.parametrize("other", ["m2", None, 7, ["m1"], {"m1": 1}])
def test_only_the_message_that_is_named_is_revoked(other: object) -> None:
    comments = SOUND, BAD, SECRET
    worker_state.revoked.add("m1")
    try:
        # Then each of its comments is refused by itself, a bad one for what is wrong with it
        parsed = _parse(message(*comments), NOW)
        assert not parsed.submitted
        assert {one.dead_letter_id: (one.reason, one.author) for one in parsed.refused} == {
            "m1:0": (Reason.REVOKED, "ann"),
            refused_id("m1:1"): (Reason.INVALID_COMMENT, None),
            "m1:2": (Reason.REVOKED, None),
        }
        assert len(_parse(message(*comments, id=other), NOW).submitted) == 2
    finally:
        worker_state.revoked.discard("m1")


@pytest.mark.parametrize("sent", [b"{", None], ids=["unreadable", "sound"])
def test_a_message_is_of_the_list_it_was_taken_from(sent: bytes | None) -> None:
    # Given a message whose envelope names another queue, one that workers do not even take from
    raw = sent or write_envelope({"task": MODERATE_TASK, "id": "m1"}, b"[[[]], {}, {}]", "retrain")
    message = Message(Delivery("tag", BULK_QUEUE, raw, 0))
    # Then where it goes, is counted and comes back to is the list that it lay in
    assert (message.queue, message.delivery_info["routing_key"]) == (BULK_QUEUE, BULK_QUEUE)
