"""The outbox of webhooks on real databases: filled once, claimed by one, kept until it is delivered or given up."""

import json
import os
import threading
from contextlib import closing
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from api_client.listening import Nudges
from api_client.webhooks import Poster, deliver
from cli.health import health
from cli.terminal import Problem
from config.names import Action, EventType
from config.settings import EndpointSettings, load_settings
from db import feed, webhooks
from db.durable import database_time
from db.feed import Reviewed
from db.queries import record_decisions
from db.session import open_database, reading, writing
from tests.commands import run_here
from tests.integration.rows import NOON, decide, erase, prepare, review, scored, told
from tests.services import slow_server

LEASE = timedelta(minutes=5)


@pytest.fixture
def outbox(engine: Engine) -> Engine:
    """A database with ten decisions, in turn to hide and to allow, every third of the community news."""
    with writing(engine) as connection:
        prepare(connection, "v1")
        rows = [
            scored(str(n), action=("hide", "allow")[n % 2], community="sports" if n % 3 else "news") for n in range(10)
        ]
        record_decisions(connection, rows)
    return engine


def now_of(engine: Engine) -> datetime:
    with reading(engine) as connection:
        return database_time(connection)


def fill(engine: Engine, endpoint: str = "news", **changes: Any) -> bool:
    now = now_of(engine)
    with reading(engine) as connection:
        settled = feed.settled_position(connection)
        begun = webhooks.cursor(connection, endpoint) is not None
    with writing(engine) as connection:
        if not begun:
            webhooks.begin(connection, endpoint, position=0, now=now)
        wanted = {"actions": ["hide", "remove"], "communities": [], **changes}
        return webhooks.fill(connection, endpoint, settled=settled, now=now, **wanted)


def outstanding(engine: Engine) -> webhooks.Outstanding | None:
    now = now_of(engine)
    with reading(engine) as connection:
        return webhooks.outstanding(connection, "news", now=now)


def claim(engine: Engine, *, limit: int = 10, later: timedelta = timedelta(0)) -> list[webhooks.Claim]:
    now = now_of(engine) + later
    with writing(engine) as connection:
        return webhooks.claim(connection, "news", limit=limit, lease=LEASE, now=now)


def ids(claims: list[webhooks.Claim]) -> list[str]:
    return [told(each.event) for each in claims]


def test_each_decision_is_delivered_once_to_each_endpoint(outbox: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given one endpoint for what is hidden, another one for what is hidden in one community
    monkeypatch.setattr(webhooks, "POSITIONS_PER_PAGE", 4)
    assert outstanding(outbox) is None
    steps = [fill(outbox)]
    # where what is still to be looked at has waited since it was decided
    seen = outstanding(outbox)
    assert seen is not None
    assert seen.pending == 2
    assert seen.oldest_age_s > (now_of(outbox) - NOON).total_seconds() - 60
    steps += [fill(outbox), fill(outbox), fill(outbox)]
    while fill(outbox, "other", communities=["news"]):
        pass
    # Then each gets those, in steps, and none again
    assert steps == [True, True, False, False]
    assert ids(claim(outbox)) == ["0", "2", "4", "6", "8"]
    with reading(outbox) as connection:
        assert {name: backlog.pending for name, backlog in webhooks.backlogs(connection).items()} == {
            "news": 5,
            "other": 2,
        }
        # where the cursor stands behind what was only looked at, too
        assert webhooks.cursor(connection, "news") == feed.settled_position(connection)
    # And a cursor that was set back makes none of them twice
    with writing(outbox) as connection:
        connection.exec_driver_sql("UPDATE webhook_cursors SET position = 0")
    fill(outbox)
    assert claim(outbox) == []


def test_reviews_and_erasures_follow_the_decision_that_an_endpoint_heard_of(outbox: Engine) -> None:
    fill(outbox)
    # Given what people made of what is hidden, and of what was allowed; and a sender of the release before, which
    # moves the cursor of the decisions on
    with writing(outbox) as connection:
        for submission_id, action in ("0", "allow"), ("1", "hide"), ("3", "label"), ("0", "label"):
            review(connection, submission_id, action)
        for submission_id in "2", "5":
            erase(connection, submission_id)
        record_decisions(connection, [scored("new", action="allow")])
        connection.exec_driver_sql("UPDATE webhook_cursors SET position = (SELECT MAX(position) FROM decisions)")
    while fill(outbox):
        pass
    seen = outstanding(outbox)
    assert seen is not None and seen.pending == 5 + 4
    # Then a review of what is to be hidden is due at once, and others when their decision is delivered or given up
    decisions = {each.submission_id: each for each in claim(outbox, limit=20)}
    assert list(decisions) == ["0", "2", "4", "6", "8", "1"]
    assert decisions["1"].event.type == EventType.REVIEWED
    assert claim(outbox) == []
    now = now_of(outbox)
    with writing(outbox) as connection:
        webhooks.delivered(connection, [each for key, each in decisions.items() if key != "2"], now=now)
        webhooks.failed(connection, decisions["2"], error="answered 400", next_attempt_at=None, now=now)
    first, erasure = claim(outbox)
    assert ids([first, erasure]) == ["0 reviewed", "2 erased"]
    # and of two reviews the second after the first
    with writing(outbox) as connection:
        webhooks.failed(connection, first, error="answered 500", next_attempt_at=now + LEASE, now=now)
        webhooks.failed(connection, erasure, error="answered 400", next_attempt_at=None, now=now)
    assert claim(outbox) == []
    [first] = claim(outbox, later=LEASE)
    assert (first.attempts, ids([first])) == (2, ["0 reviewed"])
    with writing(outbox) as connection:
        webhooks.delivered(connection, [first], now=now)
    [second] = claim(outbox)
    assert isinstance(second.event, Reviewed) and second.event.action == "label"
    # And they are listed, tried again and deleted as decisions are
    with writing(outbox) as connection:
        backlog = webhooks.backlogs(connection)["news"]
        assert (backlog.pending, backlog.delivered, backlog.dead) == (1, 6, 2)
        assert {(each.submission_id, each.event) for each in webhooks.dead(connection, limit=2)} == {
            ("2", "comment.decided"),
            ("2", "comment.erased"),
        }
        assert webhooks.retry(connection, submission_ids=["2"], now=now) == 2
        assert webhooks.purge(connection, finished_before=now + LEASE) == 6
        backlog = webhooks.backlogs(connection)["news"]
        assert (backlog.pending, backlog.delivered, backlog.dead) == (3, 0, 0)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_an_endpoint_for_all_hears_of_all(outbox: Engine) -> None:
    with writing(outbox) as connection:
        review(connection, "1", "label")
        erase(connection, "5")
    while fill(outbox, actions=None, communities=["sports"]):
        pass
    seen = outstanding(outbox)
    assert seen is not None and seen.pending == 6 + 2


def test_a_claim_is_nobody_elses_until_its_lease_has_run_out(outbox: Engine) -> None:
    fill(outbox)
    # Given two that are claimed, of which one was delivered
    first, second = claim(outbox, limit=2)
    now = now_of(outbox)
    with writing(outbox) as connection:
        webhooks.delivered(connection, [first], now=now)
    # Then others are claimed meanwhile
    assert ids(claim(outbox)) == ["4", "6", "8"]
    # And after it the one of whom nothing was heard, with an attempt more
    [again, *_] = claim(outbox, later=2 * LEASE)
    assert (again.submission_id, second.attempts, again.attempts) == (second.submission_id, 1, 2)
    # When the one who had it comes back, a failure of his changes nothing, and a success counts
    with writing(outbox) as connection:
        webhooks.failed(connection, second, error="late", next_attempt_at=None, now=now)
        assert webhooks.backlogs(connection)["news"].dead == 0
        webhooks.delivered(connection, [second], now=now)
    assert second.submission_id not in ids(claim(outbox, later=4 * LEASE))


@pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)  # SQLite has one writer at a time
def test_processes_side_by_side_do_not_wait_for_each_other(outbox: Engine) -> None:
    now = now_of(outbox)
    filled: dict[str, Any] = {"settled": 10, "actions": ["hide"], "communities": [], "now": now}
    with writing(outbox) as connection:
        webhooks.begin(connection, "news", position=0, now=now)
    # Given one that fills the outbox, another finds nothing to do meanwhile
    with writing(outbox) as connection:
        assert not webhooks.fill(connection, "news", **filled)
        assert not fill(outbox)
    # And of what is due each claims its own
    with writing(outbox) as connection:
        taken = ids(webhooks.claim(connection, "news", limit=3, lease=LEASE, now=now))
        others = ids(claim(outbox))
    assert (len(taken), sorted([*taken, *others])) == (3, ["0", "2", "4", "6", "8"])


def test_what_was_given_up_is_dead_until_it_is_retried_or_old(outbox: Engine) -> None:
    fill(outbox)
    first, second, *rest = claim(outbox)
    now = now_of(outbox)
    with writing(outbox) as connection:
        webhooks.delivered(connection, rest, now=now)
        webhooks.failed(connection, first, error="answered 500", next_attempt_at=now + LEASE, now=now)
        webhooks.failed(connection, second, error="answered 400", next_attempt_at=None, now=now)
    with reading(outbox) as connection:
        backlog = webhooks.backlogs(connection)["news"]
        assert (backlog.pending, backlog.delivered, backlog.dead, backlog.error) == (1, 3, 1, "answered 500")
        assert not webhooks.is_due(connection, "news", now)
        [dead] = webhooks.dead(connection)
        assert (dead.submission_id, dead.error, dead.attempts) == (second.submission_id, "answered 400", 1)
        assert webhooks.dead(connection, endpoint="other") == []
    # When it is retried it is as new
    with writing(outbox) as connection:
        assert webhooks.retry(connection, submission_ids=["nobody"], now=now) == 0
        assert webhooks.retry(connection, endpoint="news", now=now) == 1
    [again] = claim(outbox)
    assert (again.submission_id, again.attempts) == (second.submission_id, 1)
    # And what is done with is deleted after a while, what is pending is not
    with writing(outbox) as connection:
        assert webhooks.purge(connection, finished_before=now) == 0
        assert webhooks.purge(connection, finished_before=now + LEASE) == 3
        assert webhooks.backlogs(connection)["news"].pending == 2


def test_the_list_shows_the_state_of_every_endpoint(sqlite_url: str) -> None:
    environment = os.environ | {"MODERATO_DATABASE_URL": sqlite_url}

    def listed() -> dict[str, tuple[str, str | None]]:
        done = run_here(environment, "webhooks", "list", "--json")
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        return {row["endpoint"]: (row["state"], row.get("error")) for row in rows}

    # Given no endpoints, the table is not empty but says what to do
    done = run_here(environment, "webhooks")
    assert done.stdout == "" and "docs/feed.md" in done.stderr
    # Given two in the settings of which one has started and fails, and one that is no longer in the settings
    endpoint = "{url: 'https://a.example', min_action: hide}"
    environment["MODERATO_WEBHOOKS__ENDPOINTS"] = f"{{news: {endpoint}, sports: {endpoint}}}"
    decide(sqlite_url, scored("a", action="hide"))
    engine = open_database(sqlite_url)
    for name in "news", "gone":
        fill(engine, name)
    with writing(engine) as connection:
        now = database_time(connection)
        [posted] = webhooks.claim(connection, "news", limit=1, lease=LEASE, now=now)
        webhooks.failed(connection, posted, error="answered 500", next_attempt_at=now + LEASE, now=now)
    engine.dispose()
    # Then each has its state, and only a failed attempt is an error
    assert listed() == {
        "gone": ("not in the settings", None),
        "news": ("failing", "answered 500"),
        "sports": ("not started", None),
    }
    assert run_here(environment, "webhooks").stdout


def test_to_end_when_told_to_is_no_failure(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def told_to_while_it_waits(*_: Any) -> bool:
        stop.set()
        for thread in threading.enumerate():
            if thread.name == "webhook-news":
                thread.join()
        return False

    # Given endpoints whose threads have ended by the time that they are looked after
    monkeypatch.setattr(Nudges, "wait", told_to_while_it_waits)
    endpoint = "MODERATO_WEBHOOKS__ENDPOINTS__NEWS__"
    settings = load_settings(
        {
            "MODERATO_DATABASE_URL": database_url,
            f"{endpoint}URL": "https://news.example",
            f"{endpoint}MIN_ACTION": "hide",
            f"{endpoint}SECRET": "whsec_" + "bmV3cyBzZWNyZXQgbmV3cyBzZWNyZXQgbmV3cyBzZWM=",
        }
    )
    # Then that is what was asked for, and nothing broke
    deliver(settings, stop)


@pytest.mark.parametrize(
    ("at_once", "slowly", "failure"),
    [
        (b"HTTP/1.1 204 No Content\r\n", b"x: y\r\n" * 50 + b"\r\n", "no answer within 1 s"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 10 + b"HTTP/1.1 204 No Content\r\n\r\n", "no answer within 1 s"),
        # It has answered, and the body is not waited for.
        (b"HTTP/1.1 200 OK\r\n\r\n", b"b" * 200, None),
    ],
)
def test_a_receiver_that_sends_slowly_is_given_up_by_one_deadline(
    at_once: bytes, slowly: bytes, failure: str | None
) -> None:
    with slow_server(at_once, slowly) as url:
        secret = "whsec_bmV3cyBzZWNyZXQgbmV3cyBzZWNyZXQgbmV3cyBzZWM="
        settings = EndpointSettings.model_validate(
            {"url": url, "min_action": Action.HIDE, "timeout_s": 1, "secret": secret}
        )
        with closing(Poster("news", settings)) as poster:
            said = poster.ping()
    assert (said and said.reason) == failure


def test_a_process_that_answers_slowly_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.health.TIMEOUT_S", 1)
    with slow_server(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 50 + b"\r\n") as url, pytest.raises(Problem):
        health(url=url)
