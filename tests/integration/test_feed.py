"""The order in which decisions are handed on: nobody who keeps a cursor misses one."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import Connection, Engine, text

from api_client.client import BrokerUnavailable, InvalidComment, ModerationClient, WaitTimeout
from api_client.waiting import SetAside, Verdict
from config.names import DECIDED_CHANNEL
from db import feed, queries
from db.feed import WritersDoNotEnd, decided_after, position_before, settled_position
from db.queries import record_decisions
from db.session import DatabaseProblem, open_database, reading, writing
from tests.integration.outage import outage
from tests.integration.rows import decide, letter, minutes, prepare, scored
from tests.services import wait_until


def record(engine: Engine, *ids: str, **changes: Any) -> None:
    with writing(engine) as connection:
        record_decisions(connection, [scored(each, **changes) for each in ids])


def read_on(engine: Engine, position: int) -> tuple[list[str], int]:
    """What a reader that keeps its position sees now: the ids, and the position it keeps."""
    seen: list[str] = []
    with reading(engine) as connection:
        settled = settled_position(connection)
        while position < settled:
            rows, position = decided_after(connection, position, settled=settled)
            seen += [row.submission_id for row in rows]
    return seen, position


@pytest.fixture
def prepared(engine: Engine) -> Engine:
    with writing(engine) as connection:
        prepare(connection, "v1")
    return engine


class TestOrderOnPostgresql:
    @pytest.fixture
    def engine(self, postgres_url: str) -> Iterator[Engine]:
        engine = open_database(postgres_url)
        yield engine
        engine.dispose()

    @pytest.fixture
    def two_writers(self, prepared: Engine) -> Iterator[tuple[Connection, Connection]]:
        with prepared.connect() as first, prepared.connect() as second:
            yield first, second

    def test_a_smaller_position_that_commits_last_is_not_stepped_over(
        self, prepared: Engine, two_writers: tuple[Connection, Connection]
    ) -> None:
        # Given two recordings at once: the first to draw a position is the last to commit
        slow, quick = two_writers
        record_decisions(slow, [scored("slow")])
        record_decisions(quick, [scored("quick")])
        quick.commit()
        with reading(prepared) as connection:
            assert [row.submission_id for row in queries.results(connection)] == ["quick"]
        # When somebody reads on in order
        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(read_on, prepared, 0)
            with pytest.raises(TimeoutError):
                reader.result(timeout=0.5)
            # and others go on recording, for whom it does not wait
            record(prepared, "later")
            slow.commit()
            # Then both are seen, in the order of their positions, and the later one by the next who reads
            seen, position = reader.result(timeout=60)
        assert seen == ["slow", "quick"]
        assert read_on(prepared, position)[0] == ["later"]

    def test_a_position_whose_transaction_is_rolled_back_is_a_gap(
        self, prepared: Engine, two_writers: tuple[Connection, Connection]
    ) -> None:
        slow, quick = two_writers
        record_decisions(slow, [scored("slow")])
        record_decisions(quick, [scored("quick")])
        quick.commit()
        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(read_on, prepared, 0)
            slow.rollback()
            assert reader.result(timeout=60)[0] == ["quick"]
        # And what is recorded then comes after it
        record(prepared, "slow")
        assert read_on(prepared, 0)[0] == ["quick", "slow"]

    def test_only_who_writes_decisions_is_waited_for(
        self, prepared: Engine, two_writers: tuple[Connection, Connection]
    ) -> None:
        # Given a transaction that has locked a decision for long, and one that writes a review of another
        reader, reviewer = two_writers
        record(prepared, "a", "b")
        reader.execute(text("SELECT submission_id FROM decisions WHERE submission_id = 'a' FOR UPDATE"))
        queries.add_review(
            reviewer, submission_id="b", action="hide", labels={}, reviewer="ann", note=None, now=minutes(1)
        )
        # Then nobody waits for either
        assert read_on(prepared, 0)[0] == ["a", "b"]

    def test_a_writer_that_never_ends_is_named(
        self, prepared: Engine, two_writers: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(feed, "PATIENCE_S", 0.2)
        slow, _ = two_writers
        record_decisions(slow, [scored("slow")])
        process_id = slow.scalar(text("SELECT pg_backend_pid()"))
        with pytest.raises(WritersDoNotEnd, match=f"processes {process_id}\\)"), reading(prepared) as connection:
            settled_position(connection)

    def test_a_worker_of_an_older_release_gives_positions_too(self, prepared: Engine) -> None:
        # Given decisions from before there were positions, and one that says nothing of them
        record(prepared, "old", "older", "new")
        copied = "submission_id, toxic, severe_toxic, obscene, threat, insult, identity_hate, action, fired_label, \
            fired_threshold, model_version, policy_version, windows, truncated, queue_ms, compute_ms, decided_at"
        with writing(prepared) as connection:
            connection.execute(text("UPDATE decisions SET position = NULL"))
            connection.execute(text("CREATE TEMPORARY TABLE kept AS SELECT * FROM decisions"))
            connection.execute(text("DELETE FROM decisions WHERE submission_id = 'new'"))
            insert = f"INSERT INTO decisions ({copied}) SELECT {copied} FROM kept WHERE submission_id = 'new'"
            connection.execute(text(insert))
        # Then the feed begins with it
        assert read_on(prepared, 0)[0] == ["new"]


def test_readers_see_every_decision_once_and_in_order_while_many_write(prepared: Engine) -> None:
    # Given writers that record at the same time, some of them in vain
    writers, batches = 4, 25
    start = threading.Barrier(writers + 1)
    done = threading.Event()

    def write(number: int) -> None:
        start.wait()
        for batch in range(batches):
            ids = [f"{number}-{batch}-{place}" for place in range(3)]
            try:
                with writing(prepared) as connection:
                    record_decisions(connection, [scored(each) for each in ids])
                    # Some take longer than others, so that they do not commit in their order.
                    time.sleep(0.002 * number)
                    if batch % 5 == number:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                pass

    def read() -> list[str]:
        seen: list[str] = []
        position = 0
        start.wait()
        while True:
            last = done.is_set()
            found, position = read_on(prepared, position)
            seen += found
            if last:
                return seen

    # When one reads meanwhile
    with ThreadPoolExecutor(writers + 1) as pool:
        reader = pool.submit(read)
        for written in [pool.submit(write, number) for number in range(writers)]:
            written.result()
        done.set()
        seen = reader.result()
    # Then it has seen every decision that was committed, once, as it lies there now
    with reading(prepared) as connection:
        committed = connection.scalars(text("SELECT submission_id FROM decisions ORDER BY position")).all()
    assert len(committed) == 3 * (writers * batches - writers * batches // 5)
    assert seen == committed


def test_pages_and_filters(prepared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "ROWS_PER_PAGE", 2)
    monkeypatch.setattr(feed, "POSITIONS_PER_PAGE", 3)
    # Given seven decisions, one of them overturned since
    record(prepared, "1", "2", "3", action="hide")
    record(prepared, "4", community="news")
    record(prepared, "5", "6", action="remove", community="news")
    record(prepared, "7", decided_at=minutes(60))
    with writing(prepared) as connection:
        queries.add_review(
            connection, submission_id="2", action="allow", labels={}, reviewer="ann", note=None, now=minutes(1)
        )

    def all_of(**filters: Any) -> list[str]:
        with reading(prepared) as connection:
            settled, position, seen = settled_position(connection), 0, list[str]()
            while position < settled:
                rows, position = decided_after(connection, position, settled=settled, **filters)
                seen += [row.submission_id for row in rows]
        return seen

    # Then pages leave none out, whatever is looked for
    assert all_of() == ["1", "2", "3", "4", "5", "6", "7"]
    assert all_of(actions=["hide", "remove"]) == ["1", "2", "3", "5", "6"]
    assert all_of(actions=["remove"], community="news") == ["5", "6"]
    assert all_of(community="sports") == []
    with reading(prepared) as connection:
        [_, second], _ = decided_after(connection, 0, settled=2)
        assert (second.model_action, second.action, second.cursor) == ("hide", "allow", str(second.position))
        # And a time leads to the position before what was decided since
        assert decided_after(connection, position_before(connection, minutes(30)), settled=7)[0][0].submission_id == "7"
        assert position_before(connection, minutes(90)) == 7
        assert position_before(connection, minutes(-90)) == 0
        # And a cursor beyond what there is, as of a database that was set back, finds nothing
        assert decided_after(connection, 99, settled=7) == ([], 99)


@pytest.fixture
def client(redis_url: str, database_url: str) -> Iterator[ModerationClient]:
    with ModerationClient(redis_url, database_url) as client:
        yield client


class TestFollowing:
    def test_from_now_from_a_time_and_from_a_cursor(self, client: ModerationClient, database_url: str) -> None:
        decide(database_url, scored("a"), scored("b", decided_at=minutes(5)))
        # Given somebody who follows from now, and somebody else from a time on
        with closing(client.follow()) as now, closing(client.follow(since=minutes(3))) as since:
            decide(database_url, scored("c", decided_at=minutes(10)))
            # Then each begins there
            assert next(now).submission_id == "c"
            assert [row.submission_id for row in islice(since, 2)] == ["b", "c"]
        # And who begins after a cursor goes on there, again and again
        with closing(client.follow(since=minutes(-1))) as first:
            cursor = next(first).cursor
        for _ in range(2):
            with closing(client.follow(cursor)) as resumed:
                assert [row.submission_id for row in islice(resumed, 2)] == ["b", "c"]

    def test_what_cannot_be_followed(self, client: ModerationClient) -> None:
        with pytest.raises(ValueError, match="'last tuesday' is no cursor"):
            client.follow("last tuesday")
        with pytest.raises(ValueError, match="not both"):
            client.follow("1", since=minutes(0))
        with pytest.raises(ValueError, match="unknown action 'shout'"):
            client.follow(actions=["hide", "shout"])

    def test_it_ends_when_it_is_told(self, client: ModerationClient) -> None:
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(list, client.follow(stop=stop))
            stop.set()
            assert following.result(timeout=60) == []

    def test_a_word_from_redis_wakes_it(
        self, client: ModerationClient, redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Given a follower that would look again by itself tomorrow
        monkeypatch.setattr("api_client.following.LOOK_S", 86_400)
        redis = Redis(unix_socket_path=redis_url.removeprefix("redis+socket://"))
        with ThreadPoolExecutor(1) as pool, redis, closing(client.follow()) as following:
            first = pool.submit(next, following)
            wait_until(lambda: redis.pubsub_numsub(f"/0.{DECIDED_CHANNEL}")[0][1], what="the subscription")
            decide(database_url, scored("a"))

            def heard() -> bool:
                redis.publish(f"/0.{DECIDED_CHANNEL}", b"")
                return first.done()

            # Then it looks when somebody says that something was decided
            wait_until(heard, what="the decision")
            assert first.result().submission_id == "a"

    def test_without_redis_and_through_an_outage_of_the_database(
        self, database_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("db.outage.LAST_PAUSE_S", 0.5)
        stop = threading.Event()
        seen: list[str] = []

        def follow(client: ModerationClient) -> None:
            for row in client.follow("0", stop=stop):
                seen.append(row.submission_id)

        # Given a Redis that nobody started, and a follower
        with ModerationClient("redis://127.0.0.1:1/0", database_url) as client, ThreadPoolExecutor(1) as pool:
            following = pool.submit(follow, client)
            decide(database_url, scored("before"))
            wait_until(lambda: seen == ["before"], what="the first decision")
            # When the database is away for a while
            with outage(database_url):
                if database_url.startswith("postgresql"):
                    wait_until(lambda: "following the decisions waits" in caplog.text, what="the outage")
            decide(database_url, scored("after"))
            # Then what was decided meanwhile comes
            wait_until(lambda: len(seen) > 1, what="the second decision")
            stop.set()
            following.result(timeout=60)
        assert seen == ["before", "after"]
        assert caplog.text.count("Redis cannot say when something is decided") == 1


class TestWaitingForOneDecision:
    """Nobody answers here, so that the database alone says what became of the comment."""

    @pytest.fixture
    def moderated(self, client: ModerationClient, redis_url: str) -> Iterator[Callable[..., Any]]:
        """Runs `act` when the comment is in the queue; what `moderate` returned, or raised."""
        with ThreadPoolExecutor(1) as pool, Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as redis:

            def run(key: str, act: Callable[[], object], text: str | None = None, *, timeout_s: float = 60) -> Any:
                redis.flushall()
                text = text or f"the text of {key}"
                waiting = pool.submit(client.moderate, text, idempotency_key=key, timeout_s=timeout_s)
                wait_until(lambda: redis.llen("toxicity"), what="the message")
                act()
                return waiting.exception() or waiting.result()

            yield run

    @pytest.fixture
    def lose_answers(self, redis_url: str) -> Callable[[], object]:
        def lose() -> None:
            with Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as redis:
                assert redis.client_kill_filter(_type="pubsub")

        return lose

    def test_every_end(
        self, moderated: Callable[..., Any], lose_answers: Callable[[], object], database_url: str
    ) -> None:
        # Without a decision in time
        said = moderated("a", lambda: None, timeout_s=0.3)
        assert isinstance(said, WaitTimeout)
        assert said.submission_ids == ["a"]
        # Set aside
        said = moderated("a", lambda: decide(database_url, letters=[letter("a", reason="expired", detail="too late")]))
        assert isinstance(said, SetAside)
        assert str(said) == "a was not decided (expired): too late"
        assert said.letter.dead_letter_id == "a"
        # Decided
        row = scored("b", action="hide", fired_label="toxic", fired_threshold=0.1)
        said = moderated("b", lambda: decide(database_url, row))
        assert isinstance(said, Verdict)
        assert (said.submission_id, said.action, said.fired_label, said.toxic) == ("b", "hide", "toxic", 0.1)

        # Decided while the connection is lost on which it would be answered; and the next one after that
        def decide_unheard(key: str) -> None:
            lose_answers()
            decide(database_url, scored(key))

        for key in ("c", "d"):
            assert moderated(key, partial(decide_unheard, key)).action == "allow"
        # Of another text under this key
        said = moderated("b", lambda: None, "another text")
        assert isinstance(said, InvalidComment)
        assert "was used before with another text" in str(said)

    def test_a_redis_that_stands_still_keeps_nobody_for_long(
        self, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("config.broker.SOCKET_TIMEOUT_S", 600)
        monkeypatch.setattr("api_client.listening.PROMPT_TIMEOUT_S", 0.1)
        # Given a Redis that takes connections, and says nothing
        with (
            socket.create_server(("127.0.0.1", 0)) as silent,
            ModerationClient(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", database_url) as client,
            ThreadPoolExecutor(2) as pool,
        ):
            # Then who waits is told soon, however long others would wait for it
            moderated = pool.submit(client.moderate, "hello", timeout_s=0.1)
            waited = pool.submit(client.wait, ["a"], timeout_s=0.1)
            assert isinstance(moderated.exception(60), BrokerUnavailable)
            assert isinstance(waited.exception(60), WaitTimeout)

    def test_a_database_that_cannot_be_asked_is_named(self, redis_url: str, empty_sqlite_url: str) -> None:
        with (
            ModerationClient(redis_url, empty_sqlite_url) as client,
            pytest.raises(DatabaseProblem, match="db upgrade"),
        ):
            client.moderate("hello", timeout_s=0.2)


def test_old_decisions_are_no_part_of_it(prepared: Engine) -> None:
    record(prepared, "old", decided_at=datetime.now(UTC))
    with writing(prepared) as connection:
        connection.execute(text("UPDATE decisions SET position = NULL"))
        assert settled_position(connection) == 0
        assert position_before(connection, datetime.now(UTC) - timedelta(days=1)) == 0
    record(prepared, "new")
    assert read_on(prepared, 0)[0] == ["new"]
