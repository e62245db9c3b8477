"""What is posted to an endpoint, how it is signed, and when it is tried again."""

import base64
import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from api_client.webhooks import (
    LONGEST_PAUSE_S,
    NoSecret,
    Poster,
    body_of,
    delivered_actions,
    retry_pause_s,
    signature,
    webhook_id,
)
from config.names import Action
from config.settings import load_settings
from db.feed import Erased, Reviewed
from db.webhooks import Claim, DecisionToPost, EventToPost
from tests.integration.rows import NOON, minutes

COMMENT: dict[str, Any] = {"submission_id": "s1", "comment_id": "42", "community": "news", "submitted_at": NOON}
DECIDED = DecisionToPost(
    **COMMENT,
    text="you idiot",
    toxic=0.9,
    severe_toxic=0.1,
    obscene=0.2,
    threat=0.0,
    insult=0.8,
    identity_hate=0.0,
    action="hide",
    fired_label="toxic",
    fired_threshold=0.8,
    model_version="v1",
    policy_version="p1",
    decided_at=NOON,
    position=7,
)
REVIEWED = Reviewed(
    **COMMENT,
    action="allow",
    model_action="hide",
    labels={"toxic": False},
    reviewer="ann",
    note="a quotation: you idiot",
    reviewed_at=NOON,
    position=8,
)
ERASED = Erased(**COMMENT, erased_at=NOON, position=9)


def test_the_signature_is_that_of_standard_webhooks() -> None:
    # Given the example in the documentation of the libraries that verify it
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    # Then ours is the same, and two keys make two of them
    assert signature([key], *signed) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    first, second = signature([b"another key", key], *signed).split()
    assert (first != second, second) == (True, signature([key], *signed))


POSTED = {
    "submission_id": "s1",
    "comment_id": "42",
    "community": "news",
    "submitted_at": "2026-11-22T12:00:00+00:00",
}


@pytest.mark.parametrize(
    ("event", "data", "with_text"),
    [
        (
            DECIDED,
            {
                "action": "hide",
                "scores": {
                    "toxic": 0.9,
                    "severe_toxic": 0.1,
                    "obscene": 0.2,
                    "threat": 0.0,
                    "insult": 0.8,
                    "identity_hate": 0.0,
                },
                "fired_label": "toxic",
                "fired_threshold": 0.8,
                "model_version": "v1",
                "policy_version": "p1",
                "decided_at": "2026-11-22T12:00:00+00:00",
                "cursor": "7",
            },
            {"text": "you idiot"},
        ),
        (
            REVIEWED,
            {
                "action": "allow",
                "model_action": "hide",
                "labels": {"toxic": False},
                "reviewer": "ann",
                "reviewed_at": "2026-11-22T12:00:00+00:00",
                "cursor": "8",
            },
            {"note": "a quotation: you idiot"},
        ),
        (ERASED, {"erased_at": "2026-11-22T12:00:00+00:00", "cursor": "9"}, {}),
    ],
)
def test_what_is_posted(event: EventToPost, data: dict[str, Any], with_text: dict[str, Any]) -> None:
    timestamp = "2026-11-22T12:00:00+00:00"
    posted = {"type": event.type.value, "timestamp": timestamp, "data": POSTED | data}
    assert json.loads(body_of(event, include_text=False)) == posted
    # And what people wrote only where the settings ask for it
    posted["data"] = POSTED | data | with_text
    assert json.loads(body_of(event, include_text=True)) == posted


def test_each_delivery_has_an_id_of_its_own() -> None:
    # Given events of two submissions, one of which is named like a position, and one given again after a backup
    later = replace(REVIEWED, reviewed_at=minutes(1))
    events = (
        DECIDED,
        replace(DECIDED, submission_id="8"),
        REVIEWED,
        later,
        replace(ERASED, position=8, erased_at=minutes(2)),
    )
    claims = [
        Claim(endpoint=name, attempts=n, event=event) for name in ("news", "sports") for n in (1, 2) for event in events
    ]
    # Then ids differ by endpoint and event, and not by attempt
    assert len({webhook_id(claim) for claim in claims}) == 2 * len(events)
    # And that of a decision is the one under which older releases posted it
    assert webhook_id(claims[0]) == "msg_" + hashlib.sha256(b"news/s1").hexdigest()[:32]


def test_pauses_grow_to_an_hour_and_last_for_about_a_day() -> None:
    pauses = [retry_pause_s(attempts) for attempts in range(1, load_settings({}).webhooks.max_attempts)]
    assert 5 * 2 / 3 <= pauses[0] <= 5
    assert all(later > earlier for earlier, later in zip(pauses[:4:2], pauses[2:6:2], strict=True))
    assert retry_pause_s(10_000) <= LONGEST_PAUSE_S
    assert 18 < sum(pauses) / 3_600 < 28


def test_the_mildest_action_and_those_above_it() -> None:
    assert delivered_actions(Action.HIDE) == ["hide", "remove"]
    assert delivered_actions(Action.ALLOW) is None


def test_an_endpoint_without_a_secret_is_told_what_to_set() -> None:
    endpoints = load_settings({"MODERATO_WEBHOOKS__ENDPOINTS": "{news: {url: 'https://a.b', min_action: hide}}"})
    with pytest.raises(NoSecret, match="set MODERATO_WEBHOOKS__ENDPOINTS__NEWS__SECRET"):
        Poster("news", endpoints.webhooks.endpoints["news"])
