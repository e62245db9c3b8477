"""What is posted to an endpoint, how it is signed, and when it is tried again."""

import base64
import json

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
from db.webhooks import Claim
from tests.integration.rows import NOON

CLAIM = Claim(
    endpoint="news",
    attempts=1,
    submission_id="s1",
    comment_id="42",
    community="news",
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


def test_the_signature_is_that_of_standard_webhooks() -> None:
    # Given the example in the documentation of the libraries that verify it
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    # Then ours is the same, and two keys make two of them
    assert signature([key], *signed) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    first, second = signature([b"another key", key], *signed).split()
    assert (first != second, second) == (True, signature([key], *signed))


def test_what_is_posted() -> None:
    posted = json.loads(body_of(CLAIM, include_text=False))
    assert posted == {
        "type": "comment.decided",
        "timestamp": "2026-11-22T12:00:00+00:00",
        "data": {
            "submission_id": "s1",
            "comment_id": "42",
            "community": "news",
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
    }
    # And the text only where the settings ask for it
    assert json.loads(body_of(CLAIM, include_text=True))["data"]["text"] == "you idiot"


def test_each_delivery_has_an_id_of_its_own() -> None:
    ids = {webhook_id(endpoint, submission) for endpoint in ("news", "sports") for submission in ("a", "b")}
    assert len(ids) == 4
    assert webhook_id("news", "a") in ids


def test_pauses_grow_to_an_hour_and_last_for_about_a_day() -> None:
    pauses = [retry_pause_s(attempts) for attempts in range(1, load_settings({}).webhooks.max_attempts)]
    assert 5 * 2 / 3 <= pauses[0] <= 5
    assert all(later > earlier for earlier, later in zip(pauses[:4:2], pauses[2:6:2], strict=True))
    assert retry_pause_s(10_000) <= LONGEST_PAUSE_S
    assert 18 < sum(pauses) / 3_600 < 28


def test_the_mildest_action_and_those_above_it() -> None:
    assert delivered_actions(Action.HIDE) == ["hide", "remove"]
    assert delivered_actions(Action.ALLOW) == list(Action)


def test_an_endpoint_without_a_secret_is_told_what_to_set() -> None:
    endpoints = load_settings({"MODERATO_WEBHOOKS__ENDPOINTS": "{news: {url: 'https://a.b', min_action: hide}}"})
    with pytest.raises(NoSecret, match="set MODERATO_WEBHOOKS__ENDPOINTS__NEWS__SECRET"):
        Poster("news", endpoints.webhooks.endpoints["news"])
