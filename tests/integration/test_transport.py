"""The transport on a real Redis: what it takes, what it keeps, and what comes back."""

import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import celery
import kombu
import pytest
from kombu.asynchronous import Hub
from kombu.transport import TRANSPORT_ALIASES, _transport_cache
from redis import Redis

from api_client.embedded import EmbeddedRedis
from api_client.listening import AnswerLine
from config.names import ANSWER_CHANNEL, BULK_QUEUE, INTERACTIVE_QUEUE, MODERATE_QUEUE, MODERATE_TASK
from tests.services import wait_until
from worker import transport
from worker.envelope import MALFORMED_BYTES_HEADER, MALFORMED_HEADER, write_envelope
from worker.transport import RETURNS_KEPT_S, SUSPECT_RETURNS, TAGS_PER_SCRIPT, UNREAD_RETURNS, transport_options

UNACKED = transport_options(1)["unacked_key"]
UNACKED_INDEX = transport_options(1)["unacked_index_key"]
RETURNS = f"{UNACKED}_returns"


class HubConsumer:
    """A consumer on kombu's event loop, as Celery's worker has it; holds its messages until told otherwise."""

    def __init__(
        self,
        broker_url: str,
        queues: tuple[str, ...] = (MODERATE_QUEUE,),
        transport: str = "Transport",
        **options: Any,
    ) -> None:
        self.messages: list[Any] = []
        self.on_message: Callable[[Any], None] = self.messages.append
        self.connection = kombu.Connection(broker_url, transport_options=transport_options(30) | options)
        self.connection.transport_cls = f"worker.transport:{transport}"
        self.channel = self.connection.channel()
        self.consumer = kombu.Consumer(
            self.channel,
            [kombu.Queue(queue) for queue in queues],
            on_message=lambda message: self.on_message(message),
            auto_declare=False,
        )
        self.consumer.consume()
        self.hub = Hub()
        self.connection.transport.register_with_event_loop(self.connection.connection, self.hub)
        self._loop = self.hub.create_loop()

    @property
    def waits(self) -> bool:
        """Whether it has found its lists empty and asks nothing."""
        return not self.channel._in_poll and self.channel._next_fetch_at > time.monotonic()

    def wait_for_an_hour(self) -> None:
        """Until it has found its lists empty; only a message, or a lost connection, ends the hour."""
        self.channel.longest_wait_s = 3600
        self.channel._next_fetch_at = 0
        self.run_until(lambda: self.waits, "waiting")

    def tick(self) -> None:
        next(self._loop)

    def run_until(self, condition: Callable[[], Any], what: str) -> None:
        def after_a_tick() -> Any:
            self.tick()
            return condition()

        wait_until(after_a_tick, what=what)

    def receive(self, count: int) -> list[Any]:
        self.run_until(lambda: len(self.messages) >= count, f"the arrival of {count} messages")
        return self.messages

    def close(self) -> None:
        self.connection.close()
        self.hub.close()


@pytest.fixture
def consume(redis_url: str) -> Iterator[Callable[..., HubConsumer]]:
    """Opens consumers on `redis_url`, and closes them."""
    with ExitStack() as stack:

        def open_consumer(**options: Any) -> HubConsumer:
            consumer = HubConsumer(redis_url, **options)
            stack.callback(consumer.close)
            return consumer

        yield open_consumer


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as client:
        yield client


@pytest.fixture
def producer(redis_url: str) -> Iterator[celery.Celery]:
    """Someone else's Celery app, which knows nothing of ours."""
    with celery.Celery(broker=redis_url, set_as_current=False) as app:
        yield app


def send(producer: celery.Celery, *texts: str, queue: str = MODERATE_QUEUE, **options: Any) -> list[str]:
    """Submits one message for each text; returns their ids."""
    return [producer.send_task(MODERATE_TASK, [[{"text": text}]], queue=queue, **options).id for text in texts]


def ids(messages: list[Any]) -> list[str]:
    return [message.headers["id"] for message in messages]


def held(redis: Redis) -> int:
    count = redis.hlen(UNACKED)
    assert redis.zcard(UNACKED_INDEX) == count
    return int(count)


def scripts_run(redis: Redis) -> int:
    return int(redis.info("commandstats").get("cmdstat_eval", {"calls": 0})["calls"])


@contextmanager
def setting(redis: Redis, name: str, value: str) -> Iterator[None]:
    before = redis.config_get(name)[name]
    assert before is not None
    redis.config_set(name, value)
    try:
        yield
    finally:
        redis.config_set(name, before)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://localhost:6379/0", transport.Channel),
        ("rediss://localhost:6379/0", transport.Channel),
        ("redis+socket:///tmp/redis.sock", transport.Channel),
        ("sentinel://one:26379;sentinel://two:26379", transport.SentinelChannel),
    ],
)
def test_every_form_of_url_gets_our_channel(
    url: str, expected: type, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # Given a process that has already looked up kombu's own transport
    monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", TRANSPORT_ALIASES)
    for alias in ("redis", "rediss", "sentinel"):
        monkeypatch.setitem(TRANSPORT_ALIASES, alias, TRANSPORT_ALIASES[alias])
    request.addfinalizer(_transport_cache.clear)
    assert kombu.Connection(url).get_transport_cls().Channel is not expected
    # When ours is installed
    transport.install()
    # Then both kombu and Celery find ours
    assert kombu.Connection(url).get_transport_cls().Channel is expected
    with celery.Celery(broker=url, set_as_current=False) as app:
        assert app.connection_for_read().get_transport_cls().Channel is expected


def test_messages_of_a_stock_producer_arrive_whatever_their_priority(
    producer: celery.Celery, consume: Callable[..., HubConsumer]
) -> None:
    # Given messages in the queue's main list and in those of kombu's priorities
    sent = [*send(producer, "plain"), *(send(producer, "p", priority=n)[0] for n in (0, 3, 5, 6, 9))]
    # And in those of a producer that sets other steps than kombu's own
    with celery.Celery(broker=producer.conf.broker_url, set_as_current=False) as other:
        other.conf.broker_transport_options = {"priority_steps": list(range(10))}
        sent += [send(other, "p", priority=n)[0] for n in range(10)]
    # When we consume
    messages = consume().receive(len(sent))
    # Then each arrived once, as Celery wrote it
    assert sorted(ids(messages)) == sorted(sent)
    assert {message.headers["task"] for message in messages} == {MODERATE_TASK}
    assert json.loads(next(m for m in messages if m.headers["id"] == sent[0]).body)[0] == [[{"text": "plain"}]]


@pytest.mark.parametrize("queue", ["first", "second", "third"])
@pytest.mark.parametrize("priority", [None, 0, 5, 9])
def test_message_ends_the_wait_whatever_its_queue_and_priority(
    queue: str, priority: int | None, producer: celery.Celery, consume: Callable[..., HubConsumer]
) -> None:
    # Given a consumer that waits at three empty queues, and would for an hour
    consumer = consume(queues=("first", "second", "third"))
    consumer.wait_for_an_hour()
    # When something arrives in one of them, then it is delivered
    sent = send(producer, "a", queue=queue, priority=priority)
    assert ids(consumer.receive(1)) == sent
    # And the next wait ends as well
    consumer.wait_for_an_hour()
    sent += send(producer, "b", queue=queue, priority=priority)
    assert ids(consumer.receive(2)) == sent


def test_message_that_arrives_behind_an_empty_fetch_is_delivered(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a fetch that found nothing, and whose reply we have not read
    consumer = consume()
    consumer.channel.longest_wait_s = 3600
    before = scripts_run(redis)
    consumer.channel.connection.cycle.on_poll_start()
    wait_until(lambda: scripts_run(redis) > before, what="the empty fetch")
    # When a message arrives, so that its word is read together with the reply
    sent = send(producer, "a")
    # Then it is delivered
    assert ids(consumer.receive(1)) == sent


def test_a_queue_added_while_waiting_is_waited_for_at_once(
    producer: celery.Celery, consume: Callable[..., HubConsumer]
) -> None:
    # Given a consumer that waits, as a worker waits for its neighbours' answers before it takes its queues
    consumer = consume(queues=("first",))
    consumer.wait_for_an_hour()
    # When it is given another queue, with and without a message in it
    sent = send(producer, "a", queue="second")
    consumer.consumer.add_queue(kombu.Queue("second"))
    consumer.consumer.consume()
    assert ids(consumer.receive(1)) == sent
    consumer.run_until(lambda: consumer.waits, "waiting for both")
    # Then messages in either are delivered
    sent += send(producer, "b", queue="second")
    consumer.receive(2)
    consumer.run_until(lambda: consumer.waits, "waiting for both")
    sent += send(producer, "c", queue="first")
    assert ids(consumer.receive(3)) == sent


def test_waiting_takes_nothing_and_asks_nothing(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a consumer that waits
    consumer = consume()
    consumer.wait_for_an_hour()
    # When its loop turns because of other things, then it does not ask Redis
    before = scripts_run(redis)
    for _ in range(50):
        consumer.channel.connection.cycle.on_poll_start()
    assert scripts_run(redis) == before
    # And a message that ends the wait is still in the queue when nobody reads the word of it
    send(producer, "a")
    assert redis.llen(MODERATE_QUEUE) == 1
    assert held(redis) == 0


def test_acknowledgements_do_not_end_the_wait(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a consumer that holds messages, and waits for more
    send(producer, "a", "b")
    consumer = consume()
    messages = consumer.receive(2)
    consumer.wait_for_an_hour()
    # When it acknowledges them and renews its leases
    messages[0].ack()
    consumer.channel.qos.renew_leases()
    consumer.channel.qos.flush_acks()
    # Then Redis has pushed no word to it
    assert not consumer.channel.client.connection.can_read()


@pytest.mark.parametrize("disturb", [Redis.flushall, lambda redis: redis.client_kill_filter(_type="normal")])
def test_wait_goes_on_after_a_disturbance(
    disturb: Callable[[Redis], Any], producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a consumer that waits
    consumer = consume()
    consumer.wait_for_an_hour()
    # When Redis is emptied, or closes its connection, and a message arrives
    disturb(redis)
    consumer.run_until(lambda: consumer.waits, "waiting again")
    sent = send(producer, "a", priority=5)
    # Then it is delivered
    assert ids(consumer.receive(1)) == sent


def test_redis_that_refuses_to_push_is_asked(
    producer: celery.Celery,
    consume: Callable[..., HubConsumer],
    redis: Redis,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    # Given a Redis whose administrator forbids CLIENT
    request.addfinalizer(lambda: redis.execute_command("ACL", "SETUSER", "default", "+client"))
    redis.execute_command("ACL", "SETUSER", "default", "-client")
    consumer = consume(queues=("first", "second"))
    consumer.channel.longest_wait_s = 3600
    # When messages arrive while we wait, in the first list and in the last
    consumer.run_until(lambda: redis.info("clients")["blocked_clients"] == 1, "waiting")
    sent = send(producer, "a", queue="first")
    consumer.receive(1)
    consumer.run_until(lambda: redis.info("clients")["blocked_clients"] == 1, "waiting again")
    sent += send(producer, "b", queue="second", priority=9)
    # Then they are delivered, and the log says why it may take a second
    assert ids(consumer.receive(2)) == sent
    assert caplog.text.count("Redis cannot say when messages arrive") == 1


def test_fetch_moves_messages_to_the_unacknowledged_before_we_read_them(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given messages in the queue
    send(producer, "a", "b", "c")
    consumer = consume()
    # When a fetch was sent whose reply nobody has read, as when the process is killed just then
    consumer.channel.connection.cycle.on_poll_start()
    # Then Redis holds the messages as unacknowledged, and no longer in the queue
    wait_until(lambda: redis.llen(MODERATE_QUEUE) == 0, what="the move")
    assert held(redis) == 3
    assert not consumer.messages


def test_acknowledged_message_leaves_nothing_behind(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given messages that we hold
    send(producer, "a", "b")
    consumer = consume()
    first, _ = consumer.receive(2)
    # When one is acknowledged
    first.ack()
    consumer.tick()
    # Then Redis holds the other only
    assert held(redis) == 1


def test_rejected_message_goes_back_as_it_was_sent(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a message that we hold, and another that waits
    send(producer, "a", priority=3)
    key = f"{MODERATE_QUEUE}\x06\x163"
    raw = redis.lindex(key, 0)
    consumer = consume()
    [message] = consumer.receive(1)
    consumer.channel.fetch_limit = lambda: 0
    send(producer, "b", priority=3)
    # When it is requeued
    message.requeue()
    # Then it waits behind the other, in the list it came from, byte for byte
    assert redis.lindex(key, 0) == raw
    assert redis.llen(key) == 2
    assert held(redis) == 0


def test_dropped_message_is_gone(producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis) -> None:
    send(producer, "a")
    consumer = consume()
    consumer.receive(1)[0].reject()
    consumer.tick()
    assert held(redis) == redis.llen(MODERATE_QUEUE) == 0


def test_fetch_stops_after_the_message_that_reaches_its_bytes(
    producer: celery.Celery, consume: Callable[..., HubConsumer]
) -> None:
    # Given a bound that one message passes, and two that it does not
    send(producer, *("x" * 10_000 for _ in range(4)))
    consumer = consume()
    consumer.channel.max_fetch_bytes = 20_000
    # When one fetch is answered
    consumer.run_until(lambda: consumer.messages, "the first fetch")
    # Then it brought the one below the bound and the one that reached it
    assert len(consumer.messages) == 2
    assert len(consumer.receive(4)) == 4


@pytest.mark.parametrize(("max_bytes", "deliver_s", "at_once"), [(30_000, 60.0, 2), (1 << 20, -1.0, 1)])
def test_the_rest_of_a_fetch_goes_back_where_reading_it_takes_too_much(
    producer: celery.Celery,
    consume: Callable[..., HubConsumer],
    redis: Redis,
    monkeypatch: pytest.MonkeyPatch,
    max_bytes: int,
    deliver_s: float,
    at_once: int,
) -> None:
    # Given small messages that are large once decompressed, or take too long to read
    monkeypatch.setattr(transport, "DELIVER_S", deliver_s)
    sent = send(producer, *("x" * 20_000 for _ in range(5)), compression="zlib")
    consumer = consume()
    consumer.channel.max_fetch_bytes = max_bytes
    # When one fetch is answered, which took all of them
    consumer.run_until(lambda: consumer.messages, "the first fetch")
    # Then some are delivered, and the event loop has its turn before the others, which nobody counts as returned
    assert (len(consumer.messages), redis.llen(MODERATE_QUEUE)) == (at_once, 5 - at_once)
    assert ids(consumer.receive(5)) == sent
    assert {message.returns for message in consumer.messages} == {0}
    assert not redis.exists(RETURNS)


def test_nothing_is_taken_without_room_and_all_of_it_afterwards(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a consumer with room for two
    send(producer, "a", "b", "c", "d", "e")
    consumer = consume()
    room = 2
    consumer.channel.fetch_limit = lambda: room - len(consumer.messages)
    # When it runs on for a few ticks after those
    consumer.receive(2)
    for _ in range(3):
        consumer.tick()
    # Then the others wait in Redis
    assert len(consumer.messages) == held(redis) == 2
    assert redis.llen(MODERATE_QUEUE) == 3
    # And when there is room again they come
    room = 10
    assert len(consumer.receive(5)) == 5


def test_fetch_under_way_when_room_ends_is_delivered(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a fetch that Redis has answered
    sent = send(producer, "a")
    consumer = consume()
    consumer.channel.connection.cycle.on_poll_start()
    wait_until(lambda: held(redis) == 1, what="the move")
    # When there is no room any more
    consumer.channel.fetch_limit = lambda: 0
    # Then its messages arrive, because nobody else would look after them
    assert ids(consumer.receive(1)) == sent


def test_prefetch_count_bounds_what_is_held(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a prefetch count of two
    send(producer, "a", "b", "c")
    consumer = consume()
    consumer.consumer.qos(prefetch_count=2)
    consumer.receive(2)
    consumer.tick()
    assert redis.llen(MODERATE_QUEUE) == 1
    # When one is acknowledged
    consumer.messages[0].ack()
    # Then another arrives
    assert len(consumer.receive(3)) == 3


def test_only_messages_whose_lease_is_not_renewed_come_back(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a living consumer, and a later one that holds a message and stands still
    short = {"visibility_timeout": 3, "unacked_restore_interval": 0.5}
    living, dead, next_one = (consume(**short) for _ in range(3))
    [kept] = send(producer, "kept")
    living.receive(1)
    [abandoned] = send(producer, "abandoned")
    dead.receive(1)
    # When the living renews its leases for as long as it takes the other's to end
    next_one.run_until(
        lambda: (living.channel.qos.renew_leases(), next_one.messages)[1], "the return of the abandoned message"
    )
    # Then only the other's message was delivered again
    assert ids(next_one.messages) == [abandoned]
    assert ids(living.messages) == [kept]
    assert held(redis) == 2
    # And when its first consumer, which was only slow, acknowledges it after all, the delivery that counts stays
    dead.messages[0].ack()
    dead.channel.qos.flush_acks()
    assert held(redis) == 2


def test_more_expired_messages_than_one_script_returns_come_back(
    consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given what a dead worker held, and one entry whose message is gone
    messages = [b"%d" % n for n in range(TAGS_PER_SCRIPT + 1)]
    redis.hset(UNACKED, mapping={message: MODERATE_QUEUE.encode() + b"\n" + message for message in messages})
    redis.zadd(UNACKED_INDEX, dict.fromkeys(messages, 1) | {b"gone": 1})
    # When it is swept
    consume().channel.qos.restore_visible()
    # Then all are in the queue, as they were sent
    assert held(redis) == 0
    assert sorted(redis.lrange(MODERATE_QUEUE, 0, -1)) == sorted(messages)


def let_leases_end(redis: Redis, sweeper: HubConsumer, prefix: str = "") -> None:
    """As if whoever holds messages had died a while ago."""
    for tag in cast(list[bytes], redis.zrange(prefix + UNACKED_INDEX, 0, -1)):
        redis.zadd(prefix + UNACKED_INDEX, {tag: 1})
    sweeper.channel.qos.restore_visible()


def test_returns_of_dead_workers_are_counted_and_others_are_not(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a message that a closed consumer gave back, and one that requeued it
    send(producer, "a")
    closed = consume()
    closed.receive(1)
    closed.close()
    dead, sweeper = consume(), consume()
    dead.receive(1)[0].requeue()
    # When one consumer dies with it, and the next takes it
    [again] = dead.receive(2)[1:]
    let_leases_end(redis, sweeper)
    [message] = sweeper.receive(1)
    # Then that death alone is counted, and the message is as it was
    assert again.returns == 0
    assert message.returns == 1
    assert message.body == again.body
    # And its acknowledgement leaves nothing behind, of whatever came back
    message.ack()
    sweeper.tick()
    assert not redis.exists(UNACKED, UNACKED_INDEX, RETURNS)


@pytest.mark.parametrize("alive", [True, False])
def test_what_a_lost_connection_held_is_adopted_and_is_no_death(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis, alive: bool
) -> None:
    # Given a lost connection: an acknowledgement was not sent, one message is in hand, another consumer got one
    done, kept, taken = send(producer, "done", "kept", "taken")
    lost, other, again, once_more = (consume(unacked_restore_interval=3600) for _ in range(4))
    tags = {message.headers["id"]: message.delivery_tag for message in lost.receive(3)}
    redis.zadd(UNACKED_INDEX, {tags[taken]: 1})
    other.channel.qos.restore_visible()
    [counted] = redis.hkeys(RETURNS)
    lost.messages[0].ack()
    held_before = lost.channel.qos.hand_over()
    # When its channel closes, nothing goes back
    lost.close()
    assert (held(redis), redis.llen(MODERATE_QUEUE)) == (2, 1)
    # And when another connection of the worker adopts them, their leases begin anew
    redis.zadd(UNACKED_INDEX, dict.fromkeys((tags[done], tags[kept]), 1))
    again.channel.qos.adopt(held_before, alive=alive)
    other.channel.qos.restore_visible()
    again.channel.qos.flush_acks()
    assert redis.hkeys(UNACKED) == [tags[kept].encode()]
    # Then the message that went to another counts as a death only where the worker may have stood still
    assert redis.hgetall(RETURNS) == ({} if alive else {counted: b"1"})
    # And the next adoption, after somebody has died of it, takes nothing back
    redis.hset(RETURNS, counted, "2")
    once_more.channel.qos.adopt(again.channel.qos.hand_over(), alive=True)
    assert redis.hgetall(RETURNS) == {counted: b"2"}
    # And what was adopted can be acknowledged
    once_more.channel.qos.ack(tags[kept])
    once_more.channel.qos.flush_acks()
    assert held(redis) == 0


def test_messages_of_a_fetch_that_was_not_heard_go_back_at_once(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a connection that is lost between a fetch and its answer
    lost, again = consume(), consume()
    lost.wait_for_an_hour()
    sent = send(producer, "a", "b")
    lost.channel._next_fetch_at = 0
    while not held(redis):
        lost.channel._in_poll or lost.channel._brpop_start()
    lost.channel.client.connection.disconnect()
    # When the worker's next connection begins
    again.channel.qos.adopt(lost.channel.qos.hand_over(), alive=True)
    # Then they are where they were, and nobody counts them as returned
    assert (held(redis), redis.exists(RETURNS)) == (0, 0)
    assert ids(again.receive(2)) == sent


def test_counts_of_messages_that_others_took_over_end_by_themselves(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    send(producer, "a")
    dead, sweeper = consume(), consume()
    dead.receive(1)
    let_leases_end(redis, sweeper)
    assert 0 < redis.ttl(RETURNS) <= RETURNS_KEPT_S


def test_suspect_is_taken_alone(producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis) -> None:
    # Given a message whose workers died twice, among others that are new
    dead, consumer = consume(), consume()
    send(producer, "suspect")
    for death in range(1, SUSPECT_RETURNS + 1):
        dead.receive(death)
        let_leases_end(redis, consumer)
    suspect = dead.messages[0]
    sent = send(producer, "a", "b")
    redis.lmove(MODERATE_QUEUE, MODERATE_QUEUE, "LEFT", "RIGHT")  # one of them goes first
    # When they are consumed
    [first] = consumer.receive(1)
    for _ in range(3):
        consumer.tick()
    # Then what was taken before the suspect is done first, however much room there is
    assert ids(consumer.messages) == sent[1:]
    first.ack()
    # And then the suspect comes, and nothing with it
    consumer.receive(2)
    for _ in range(3):
        consumer.tick()
    assert ids(consumer.messages) == [sent[1], suspect.headers["id"]]
    assert held(redis) == 1
    # And when it is done, the others come
    consumer.messages[1].ack()
    assert ids(consumer.receive(3)[2:]) == sent[:1]
    assert not redis.exists(RETURNS)


@pytest.mark.parametrize("maxmemory", ["0", "1"])
@pytest.mark.parametrize("prefix", ["", "team:"])
def test_suspect_is_replaced_by_its_parts(
    redis_url: str, consume: Callable[..., HubConsumer], redis: Redis, prefix: str, maxmemory: str
) -> None:
    # Given a message with a priority whose workers died twice, before another one
    options = {"global_keyprefix": prefix}
    with celery.Celery(broker=redis_url, broker_transport_options=options, set_as_current=False) as producer:
        send(producer, "suspect", priority=6)
        dead, consumer = consume(**options), consume(**options)
        for death in range(1, SUSPECT_RETURNS + 1):
            dead.receive(death)
            let_leases_end(redis, consumer, prefix)
        [later] = send(producer, "later", priority=6)
    [suspect] = consumer.receive(1)
    parts = [write_envelope({"task": MODERATE_TASK, "id": part}, b"[]", MODERATE_QUEUE) for part in ("1", "2")]
    # When it is replaced, even in a Redis that is full, and once more, as if its lease had run out meanwhile
    tag = suspect.delivery_tag
    with setting(redis, "maxmemory", maxmemory):
        consumer.channel.qos.replace(tag, parts)
        consumer.channel.qos._delivered[tag] = suspect
        consumer.channel.qos.replace(tag, parts)
    # Then its parts are in its list once, where it was, and nothing is left of it
    waiting = redis.lrange(f"{prefix}{MODERATE_QUEUE}\x06\x166", 0, -1)
    assert [json.loads(raw)["headers"]["id"] for raw in waiting[::-1]] == ["1", "2", later]
    assert not redis.exists(f"{prefix}{UNACKED}", f"{prefix}{UNACKED_INDEX}")
    # And each is taken alone
    for place, taken in ((1, ["1"]), (2, ["2"]), (3, [later])):
        consumer.receive(place + 1)
        for _ in range(3):
            consumer.tick()
        assert ids(consumer.messages[place:]) == taken
        assert consumer.messages[place].returns == (SUSPECT_RETURNS if place < 3 else 0)
        consumer.messages[place].ack()
    consumer.tick()
    assert not redis.exists(f"{prefix}{RETURNS}")


def test_message_that_may_kill_who_reads_it_is_not_read(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    send(producer, "a")
    [raw] = cast(list[bytes], redis.lrange(MODERATE_QUEUE, 0, -1))
    redis.hset(RETURNS, hashlib.sha1(raw, usedforsecurity=False).hexdigest(), str(UNREAD_RETURNS))
    [message] = consume().receive(1)
    # Then it is known by its length and hash, and nothing is kept of what nobody looked into
    assert (message.body, message.returns) == (b"", UNREAD_RETURNS)
    assert message.headers[MALFORMED_BYTES_HEADER] == len(raw)
    assert message.headers["id"] == hashlib.sha256(raw).hexdigest()


def test_preferred_queue_goes_first_and_each_lower_one_has_its_share(
    producer: celery.Celery, consume: Callable[..., HubConsumer]
) -> None:
    # Given three full queues, named in no order
    for queue in (BULK_QUEUE, INTERACTIVE_QUEUE, MODERATE_QUEUE):
        send(producer, *(f"{n}" for n in range(40)), queue=queue)
    consumer = consume(queues=(BULK_QUEUE, INTERACTIVE_QUEUE, MODERATE_QUEUE))
    consumer.consumer.qos(prefetch_count=32)
    # When one fetch brings 32 messages
    queues = [message.delivery_info["routing_key"] for message in consumer.receive(32)]
    # Then the lower queues have their shares, behind the preferred one
    assert queues == [INTERACTIVE_QUEUE] * 28 + [MODERATE_QUEUE] * 2 + [BULK_QUEUE] * 2
    # And when they come one at a time it is the same, until the preferred one is empty and the next has all but that
    consumer.consumer.qos(prefetch_count=1)
    for message in consumer.messages:
        message.ack()
    for count in range(33, 65):
        consumer.receive(count)[-1].ack()
    later = [message.delivery_info["routing_key"] for message in consumer.messages[32:]]
    assert {queue: later.count(queue) for queue in later} == {INTERACTIVE_QUEUE: 12, MODERATE_QUEUE: 18, BULK_QUEUE: 2}


def test_queues_of_other_names_take_turns(producer: celery.Celery, consume: Callable[..., HubConsumer]) -> None:
    # Given two full queues, and room for one message at a time
    for queue in ("news", "sports"):
        send(producer, *(f"{n}" for n in range(10)), queue=queue)
    consumer = consume(queues=("news", "sports"))
    consumer.consumer.qos(prefetch_count=1)
    for count in range(1, 11):
        consumer.receive(count)[-1].ack()
    # Then each gives every other message
    queues = [message.delivery_info["routing_key"] for message in consumer.messages]
    assert queues.count("news") == queues.count("sports") == 5


def test_priority_orders_a_queue(producer: celery.Celery, consume: Callable[..., HubConsumer]) -> None:
    # Given messages of every priority; in kombu's Redis transport 0 is the most urgent
    sent = [send(producer, "p", priority=priority)[0] for priority in (9, 6, 3, 0)]
    # When they are taken one at a time, then the urgent come first
    consumer = consume()
    consumer.consumer.qos(prefetch_count=1)
    for count in range(1, 5):
        consumer.receive(count)[-1].ack()
    assert ids(consumer.messages) == sent[::-1]


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not json", id="not-json"),
        pytest.param(b"\xff\xfe\x00", id="not-utf8"),
        pytest.param(b"[1,2]", id="list"),
        pytest.param(b"[" * 200_000 + b"]" * 200_000, id="deep"),
        pytest.param(b'{"body": "e30=", "content-type": "application/json", "headers": {}}', id="no-properties"),
        pytest.param(
            b'{"body": "e30=", "content-type": "application/x-python-serialize", "headers": {}, '
            b'"properties": {"delivery_tag": "a", "body_encoding": "base64"}}',
            id="pickle",
        ),
        pytest.param(
            b'{"body": "*", "content-type": "application/json", "headers": {}, '
            b'"properties": {"delivery_tag": "a", "body_encoding": "base64"}}',
            id="not-base64",
        ),
        pytest.param(
            b'{"body": "e30=", "content-type": "application/json", "headers": {}, '
            b'"properties": {"delivery_tag": "a", "body_encoding": "rot13"}}',
            id="unknown-body-encoding",
        ),
    ],
)
def test_unreadable_message_arrives_wrapped_and_can_be_acknowledged(
    raw: bytes, redis: Redis, producer: celery.Celery, consume: Callable[..., HubConsumer]
) -> None:
    # Given an unreadable message before a good one
    redis.lpush(MODERATE_QUEUE, raw)
    sent = send(producer, "good")
    # When both are consumed
    consumer = consume()
    malformed, good = consumer.receive(2)
    # Then the unreadable one says why, and the good one is not disturbed
    assert malformed.headers[MALFORMED_HEADER]
    assert malformed.body == raw[:65536]
    assert MALFORMED_HEADER not in good.headers
    assert [good.headers["id"]] == sent
    # And it can be returned as it was, and acknowledged
    malformed.requeue()
    assert redis.lindex(MODERATE_QUEUE, 0) == raw
    consumer.receive(3)[2].ack()
    consumer.tick()
    assert held(redis) == 1


def test_message_without_delivery_tag_is_an_ordinary_one(redis: Redis, consume: Callable[..., HubConsumer]) -> None:
    # Given two messages of a producer that writes no tags
    raw = b'{"body": "[]", "content-type": "application/json", "headers": {}, "properties": {}}'
    redis.lpush(MODERATE_QUEUE, raw, raw)
    # When one of them is acknowledged
    consumer = consume()
    first, _ = consumer.receive(2)
    first.ack()
    consumer.tick()
    # Then the other is still held
    assert held(redis) == 1


def test_close_writes_acknowledgements_and_returns_the_rest_in_order(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given three messages held, the first of them just acknowledged
    _, *rest = send(producer, "a", "b", "c")
    consumer = consume()
    consumer.receive(3)[0].ack()
    # When the consumer closes
    consumer.close()
    # Then the others are back, and come again in their order
    assert held(redis) == 0
    assert redis.llen(MODERATE_QUEUE) == 2
    assert ids(consume().receive(2)) == rest
    # And a late acknowledgement of what went back is ignored
    consumer.messages[1].ack()


def test_close_returns_what_a_fetch_under_way_has_taken(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a fetch that Redis has answered
    send(producer, "a", "b")
    consumer = consume()
    consumer.channel.connection.cycle.on_poll_start()
    wait_until(lambda: held(redis) == 2, what="the move")
    # When the consumer closes before it was read
    consumer.close()
    # Then its messages are in the queue, and were not delivered
    assert held(redis) == 0
    assert redis.llen(MODERATE_QUEUE) == 2
    assert not consumer.messages


def test_messages_behind_one_whose_consumer_failed_go_back(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a consumer that fails on the first message of a fetch
    sent = send(producer, "a", "b", "c")
    consumer = consume()

    def fail(message: Any) -> None:
        raise ArithmeticError

    consumer.on_message = fail
    # When the fetch is delivered
    with pytest.raises(ArithmeticError):
        consumer.run_until(lambda: False, "the failure")
    # Then anyone can take all of them, the failed one last, which is counted as one that ended its worker
    assert (held(redis), redis.llen(MODERATE_QUEUE)) == (0, 3)
    consumer.close()
    others = consume().receive(3)
    assert (ids(others), [message.returns for message in others]) == ([*sent[1:], sent[0]], [0, 0, 1])


def test_full_redis_still_hands_out_renews_and_forgets(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a Redis at its memory's limit
    send(producer, "a", "b")
    consumer = consume()
    with setting(redis, "maxmemory", "1"):
        # When messages are taken and their leases renewed, Redis does not refuse
        first, second = consumer.receive(2)
        consumer.channel.qos.renew_leases()
        # And one can be acknowledged, the other returned
        first.ack()
        second.requeue()
        consumer.tick()
        assert held(redis) == 1 - redis.llen(MODERATE_QUEUE)
        # And waiting at the empty queue goes on
        consumer.receive(3)[2].ack()
        for _ in range(3):
            consumer.tick()
    # Then afterwards all is as before
    sent = send(producer, "c")
    consumer.run_until(lambda: ids(consumer.messages[3:]) == sent, "the next message")


def test_global_key_prefix_applies_to_every_key(
    redis_url: str, consume: Callable[..., HubConsumer], redis: Redis
) -> None:
    # Given a producer and a consumer with the same key prefix
    options = {"global_keyprefix": "team:"}
    with celery.Celery(broker=redis_url, broker_transport_options=options, set_as_current=False) as producer:
        send(producer, "a", "b", "c")
    consumer = consume(**options)
    # When messages are taken, one is acknowledged and one is returned
    first, second, _ = consumer.receive(3)
    consumer.channel.fetch_limit = lambda: 0
    first.ack()
    second.requeue()
    consumer.channel.qos.renew_leases()
    consumer.tick()
    # And an answer is published, it is heard by who waits with this prefix
    with celery.Celery(broker=redis_url, broker_transport_options=options, set_as_current=False) as producer:
        line = AnswerLine(producer.connection_for_write())
        consumer.channel.qos.publish(ANSWER_CHANNEL + line.token, b"decided")
        consumer.tick()
        assert line.hear(60) == b"decided"
        assert redis.pubsub_channels() == [f"team:/0.{ANSWER_CHANNEL}{line.token}".encode()]
        line.close()
    # Then every key has the prefix
    assert redis.hlen("team:" + UNACKED) == redis.zcard("team:" + UNACKED_INDEX) == 1
    assert redis.llen("team:" + MODERATE_QUEUE) == 1
    assert redis.dbsize() == len(list(redis.scan_iter("team:*")))


def test_acknowledgements_go_on_where_nothing_may_be_published(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    send(producer, "a", "b")
    consumer = consume()
    messages = consumer.receive(2)
    # Given a user of Redis from before there were answers
    redis.execute_command("ACL", "SETUSER", "default", "resetchannels")
    try:
        for message in messages:
            # When a message is acknowledged, and its answer refused
            consumer.channel.qos.publish(ANSWER_CHANNEL + "x", b"decided")
            message.ack()
            consumer.tick()
    finally:
        redis.execute_command("ACL", "SETUSER", "default", "allchannels")
    # Then Redis forgets the messages, and the refusal is said once
    assert held(redis) == 0
    assert caplog.text.count("Redis refuses to publish what was decided") == 1
    # And its end
    consumer.channel.qos.publish(ANSWER_CHANNEL + "x", b"decided")
    consumer.tick()
    assert "Redis publishes what was decided again" in caplog.text


def test_stock_consumer_can_take_over(
    producer: celery.Celery, consume: Callable[..., HubConsumer], redis_url: str
) -> None:
    # Given a message that our consumer took and gave back
    sent = send(producer, "a")
    consumer = consume()
    consumer.receive(1)
    consumer.close()
    # When a stock consumer reads the queue, then it finds the message
    with kombu.Connection(redis_url) as connection, connection.channel() as channel:
        message = kombu.Queue(MODERATE_QUEUE, channel=channel).get()
        assert ids([message]) == sent
        message.ack()


def test_request_and_reply_leave_nothing_unacknowledged(consume: Callable[..., HubConsumer], redis: Redis) -> None:
    # Given a consumer that does not acknowledge, as of remote control's replies
    consumer = consume(queues=())
    consumer.consumer.add_queue(kombu.Queue("replies"))
    consumer.consumer.consume(no_ack=True)
    # When a reply arrives
    with consumer.connection.Producer() as reply:
        reply.publish({"ok": "pong"}, routing_key="replies", serializer="json")
    # Then it is delivered, and forgotten
    assert consumer.receive(1)[0].decode() == {"ok": "pong"}
    assert held(redis) == 0


def test_channel_of_a_dead_redis_closes_without_an_error(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Given messages held, an acknowledgement not yet written and a wait under way, when Redis ends
    folder = tmp_path_factory.mktemp("r", numbered=True)
    with EmbeddedRedis(folder / "s", data=folder / "data", log=folder / "redis.log") as server:
        with celery.Celery(broker=server.url, set_as_current=False) as producer:
            send(producer, "a", "b")
        consumer = HubConsumer(server.url)
        consumer.receive(2)
        consumer.run_until(lambda: consumer.waits, "waiting")
        consumer.messages[0].ack()
    # Then the loop hears of it as a connection error, which Celery answers by connecting anew
    with pytest.raises(consumer.connection.connection_errors):
        consumer.run_until(lambda: False, "the error")
    # And closing twice, as Celery does, raises nothing
    connection, channel = consumer.connection, consumer.channel
    connection.collect(socket_timeout=1)
    connection.close()
    channel.close()
    consumer.hub.close()


def test_kill_at_any_instant_loses_nothing(producer: celery.Celery, redis_url: str, redis: Redis) -> None:
    # Given many messages, and a consumer that is killed again and again while it works on them
    kills, burst = 6, 1_500
    command = [sys.executable, "-m", "tests.integration.transport_consumer", redis_url, MODERATE_QUEUE, "2"]
    [template] = send(producer, "a")
    raw = redis.rpop(MODERATE_QUEUE)
    assert isinstance(raw, bytes)
    sent = {f"message-{n}" for n in range(kills * burst)}
    redis.lpush(MODERATE_QUEUE, *(raw.replace(template.encode(), name.encode()) for name in sorted(sent)))
    instants = random.Random(20261122)
    left_behind = 0
    # By their ids, not their number: one that an earlier test left may close meanwhile, and hide one of the victim's.
    others = _connections(redis)
    for kill in range(kills):
        victim = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        _wait_for_work(redis, f"work before kill {kill}")
        time.sleep(instants.uniform(0, 0.1))
        victim.kill()
        victim.wait()
        # Redis goes on with what it had sent.
        wait_until(lambda: _connections(redis) <= others, what="the end of its connections")
        left_behind += held(redis)
    assert left_behind > 0
    assert redis.scard("processed") < len(sent)
    # When one is left alive
    survivor = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        wait_until(lambda: redis.scard("processed") == len(sent), what="every message")
        # Then each was processed, and Redis holds nothing more
        wait_until(lambda: not redis.exists(MODERATE_QUEUE, UNACKED, UNACKED_INDEX), what="the end")
    finally:
        survivor.terminate()
        survivor.wait()
    assert redis.smembers("processed") == {name.encode() for name in sent}


def _connections(redis: Redis) -> set[str]:
    return {client["id"] for client in redis.client_list()}


def _wait_for_work(redis: Redis, what: str) -> None:
    before = redis.scard("processed")
    wait_until(lambda: redis.scard("processed") > before, what=what)
