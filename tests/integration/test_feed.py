"""The order in which events are handed on: nobody who keeps a cursor misses one."""

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
from sqlalchemy import Connection, Engine, select, text, union_all

from api_client.client import BrokerUnavailable, InvalidComment, ModerationClient, WaitTimeout
from api_client.waiting import SetAside, Verdict
from config.names import DECIDED_CHANNEL, EventType
from db import feed, queries
from db.durable import record_pending
from db.feed import DecidedResult, Erased, Reviewed, WritersDoNotEnd, events_after, position_before, settled_position
from db.privacy import Subject
from db.queries import record_decisions
from db.session import DatabaseProblem, open_database, reading, writing
from db.tables import Decision, ErasedSubmission, Review
from tests.integration.outage import outage
from tests.integration.rows import decide, erase, minutes, pending, prepare, review, scored, set_aside, told
from tests.services import locks_waited_for, wait_until


def record(engine: Engine, *ids: str, **changes: Any) -> None:
    with writing(engine) as connection:
        record_decisions(connection, [scored(each, **changes) for each in ids])


def read_on(engine: Engine, position: int) -> tuple[list[str], int]:
    """What a reader that keeps its position sees now, and the position it keeps."""
    seen: list[str] = []
    with reading(engine) as connection:
        settled = settled_position(connection)
        while position < settled:
            rows, position = events_after(connection, position, settled=settled)
            seen += [told(row) for row in rows]
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

    @pytest.mark.parametrize(
        ("write", "expected"),
        [
            (lambda slow: record_decisions(slow, [scored("slow")]), "slow"),
            (lambda slow: review(slow, "known"), "known reviewed"),
            (lambda slow: erase(slow, "known"), "known erased"),
        ],
        ids=[*EventType],
    )
    def test_a_smaller_position_that_commits_last_is_not_stepped_over(
        self,
        prepared: Engine,
        two_writers: tuple[Connection, Connection],
        write: Callable[[Connection], object],
        expected: str,
    ) -> None:
        # Given two writers at once: the first to draw a position is the last to commit
        record(prepared, "known")
        _, before = read_on(prepared, 0)
        slow, quick = two_writers
        write(slow)
        record_decisions(quick, [scored("quick")])
        quick.commit()
        with reading(prepared) as connection:
            assert {row.submission_id for row in queries.results(connection)} == {"known", "quick"}
        # When somebody reads on in order
        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(read_on, prepared, before)
            with pytest.raises(TimeoutError):
                reader.result(timeout=0.5)
            # and others go on recording, for whom it does not wait
            record(prepared, "later")
            slow.commit()
            # Then both are seen, in the order of their positions, and the later one by the next who reads
            seen, position = reader.result(timeout=60)
        assert seen == [expected, "quick"]
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

    def test_only_who_writes_events_is_waited_for(
        self, prepared: Engine, two_writers: tuple[Connection, Connection]
    ) -> None:
        # Given a transaction that has locked a decision for long, and one that changes another table
        reader, other = two_writers
        record(prepared, "a")
        reader.execute(text("SELECT submission_id FROM decisions WHERE submission_id = 'a' FOR UPDATE"))
        other.execute(text("UPDATE submissions SET language = 'en'"))
        # Then nobody waits for either
        assert read_on(prepared, 0)[0] == ["a"]

    def test_of_two_reviews_the_later_one_has_the_higher_position(
        self, prepared: Engine, two_writers: tuple[Connection, Connection]
    ) -> None:
        # Given somebody who reviews a decision while somebody else is about to
        first, second = two_writers
        record(prepared, "a")
        review(first, "a", "hide")
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(review, second, "a", "allow")
            with prepared.connect() as look:
                wait_until(lambda: locks_waited_for(look), what="the second to wait for the first")
            first.commit()
            waits.result(timeout=60)
            second.commit()
        # Then what holds in the end is the last that is handed on
        with reading(prepared) as connection:
            *_, last = events_after(connection, 0, settled=settled_position(connection))[0]
            assert isinstance(last, Reviewed)
            assert last.action == connection.scalar(text("SELECT action FROM current_actions")) == "allow"

    def test_a_writer_that_never_ends_is_named(
        self, prepared: Engine, two_writers: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(feed, "PATIENCE_S", 0.2)
        slow, _ = two_writers
        record_decisions(slow, [scored("slow")])
        process_id = slow.scalar(text("SELECT pg_backend_pid()"))
        with pytest.raises(WritersDoNotEnd, match=f"processes {process_id}\\)"), reading(prepared) as connection:
            settled_position(connection)


DECISION_BEFORE = """toxic, severe_toxic, obscene, threat, insult, identity_hate, action, fired_label, fired_threshold,
    model_version, policy_version, windows, truncated, queue_ms, compute_ms, decided_at"""
"""The columns that workers of the release before write, beside the id, and on SQLite the position."""
COUNTED_BEFORE = "(SELECT COALESCE(MAX(position), 0) + 1 FROM decisions WHERE position IS NOT NULL)"


def test_processes_of_the_release_before_give_positions_too(prepared: Engine) -> None:
    # Given a decision and a review from before there were positions
    record(prepared, "old", "a", "b")
    with writing(prepared) as connection:
        review(connection, "old")
        connection.execute(text("DELETE FROM decisions WHERE submission_id IN ('a', 'b')"))
        for table in "decisions", "reviews":
            connection.execute(text(f"UPDATE {table} SET position = NULL"))

    def decide_as_before(submission_id: str) -> None:
        columns, values = f"submission_id, {DECISION_BEFORE}", f":id, {DECISION_BEFORE}"
        if prepared.dialect.name == "sqlite":
            columns, values = f"{columns}, position", f"{values}, {COUNTED_BEFORE}"
        statement = f"INSERT INTO decisions ({columns}) SELECT {values} FROM decisions WHERE submission_id = 'old'"
        with writing(prepared) as connection:
            connection.execute(text(statement), {"id": submission_id})

    def review_as_before(submission_id: str) -> None:
        columns, values = "submission_id, action, reviewer, reviewed_at", ":id, 'hide', 'mod', CURRENT_TIMESTAMP"
        with writing(prepared) as connection:
            connection.execute(text(f"INSERT INTO reviews ({columns}) VALUES ({values})"), {"id": submission_id})

    # When workers and clients of both releases write in turn, and somebody reads after each
    position, seen = 0, list[str]()
    for step in (
        partial(decide_as_before, "a"),
        partial(review_as_before, "old"),
        partial(decide_as_before, "b"),
        partial(record, prepared, "c", "d"),
        partial(review_as_before, "b"),
        partial(record, prepared, "e"),
    ):
        step()
        found, position = read_on(prepared, position)
        seen += found
    # Then each is seen once, whoever gave its position, and nothing of before
    assert seen == ["a", "old reviewed", "b", "c", "d", "b reviewed", "e"]
    assert read_on(prepared, 0)[0] == seen


def test_readers_see_every_event_once_and_in_order_while_many_write(prepared: Engine) -> None:
    # Given writers that record, review and erase at the same time, some of them in vain
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
                continue
            with writing(prepared) as connection:
                review(connection, ids[0])
                time.sleep(0.002 * number)
            with writing(prepared) as connection:
                erase(connection, ids[1])

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
    # Then it has seen every event that was committed, once, as it lies there now
    events = union_all(
        select(Decision.position, Decision.submission_id),
        select(Review.position, Review.submission_id + " reviewed"),
        select(ErasedSubmission.position, ErasedSubmission.submission_id + " erased"),
    )
    with reading(prepared) as connection:
        committed = [what for _, what in sorted(connection.execute(events).all())]
    assert len(committed) == 5 * (writers * batches - writers * batches // 5)
    assert seen == committed


def test_pages_and_filters(prepared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "ROWS_PER_PAGE", 2)
    monkeypatch.setattr(feed, "POSITIONS_PER_PAGE", 3)
    # Given seven decisions, what people made of some of them, and a comment that was erased before it was decided
    record(prepared, "1", "2", "3", action="hide")
    record(prepared, "4", community="news")
    record(prepared, "5", "6", action="remove", community="news")
    record(prepared, "7", decided_at=minutes(60))
    with writing(prepared) as connection:
        review(connection, "2", "allow")
        review(connection, "7", "label", minute=61)
        erase(connection, "7", minute=62)
        review(connection, "4", "hide")
        review(connection, "4", "allow")
        erase(connection, "4")
        record_pending(connection, [pending("8")])
        erase(connection, "8")

    def all_of(**filters: Any) -> list[str]:
        with reading(prepared) as connection:
            settled, position, seen = settled_position(connection), 0, list[str]()
            while position < settled:
                rows, position = events_after(connection, position, settled=settled, **filters)
                seen += [told(row) for row in rows]
        return seen

    # Then pages leave none out, whatever is looked for
    decided = ["1", "2", "3", "4", "5", "6", "7"]
    in_news = ["4 reviewed", "4 reviewed", "4 erased"]
    assert all_of() == [*decided, "2 reviewed", "7 reviewed", "7 erased", *in_news, "8 erased"]
    assert all_of(types=[EventType.DECIDED]) == decided
    assert all_of(types=[EventType.ERASED]) == ["7 erased", "4 erased", "8 erased"]
    # and who looks for an action hears what came after it, also of one that a reviewer led to
    assert all_of(actions=["hide", "remove"]) == ["1", "2", "3", "5", "6", "2 reviewed", *in_news]
    assert all_of(actions=["remove"], community="news") == ["5", "6"]
    assert all_of(actions=["hide"], community="news") == in_news
    assert all_of(community="sports") == []
    with reading(prepared) as connection:
        settled = settled_position(connection)
        [_, second], _ = events_after(connection, 0, settled=2)
        assert isinstance(second, DecidedResult)
        assert (second.model_action, second.action, second.cursor) == ("hide", "allow", str(second.position))
        # And a time leads to the position before what happened since
        assert told(events_after(connection, position_before(connection, minutes(30)), settled=settled)[0][0]) == "7"
        after = position_before(connection, minutes(61.5))
        assert told(events_after(connection, after, settled=settled)[0][0]) == "7 erased"
        assert position_before(connection, minutes(90)) == settled
        assert position_before(connection, minutes(-90)) == 0
        # And a cursor beyond what there is, as of a database that was set back, finds nothing
        assert events_after(connection, 99, settled=settled) == ([], 99)


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
        # And hears what people made of them, unless it asks for decisions alone
        client.review("a", action="hide", labels={"insult": 1}, reviewer="ann", note="rude")
        client.erase(Subject("comment", "comment of b"), by="ann")
        with closing(client.follow(cursor)) as resumed:
            *_, reviewed, erased = islice(resumed, 4)
        assert isinstance(reviewed, Reviewed) and isinstance(erased, Erased)
        assert (reviewed.submission_id, reviewed.action, reviewed.model_action) == ("a", "hide", "allow")
        assert (reviewed.labels, reviewed.note) == ({"insult": True}, "rude")
        assert (erased.submission_id, erased.cursor > reviewed.cursor) == ("b", True)
        decide(database_url, scored("d"))
        with closing(client.follow(cursor, events=["comment.decided"])) as decisions:
            assert [row.submission_id for row in islice(decisions, 3)] == ["b", "c", "d"]

    def test_what_cannot_be_followed(self, client: ModerationClient) -> None:
        with pytest.raises(ValueError, match="'last tuesday' is no cursor"):
            client.follow("last tuesday")
        with pytest.raises(ValueError, match="not both"):
            client.follow("1", since=minutes(0))
        with pytest.raises(ValueError, match="unknown action 'shout'"):
            client.follow(actions=["hide", "shout"])
        with pytest.raises(ValueError, match="unknown event 'decided'"):
            client.follow(events=["decided"])

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
        said = moderated("a", lambda: decide(database_url, letters=[set_aside("a", detail="too late")]))
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
