"""How messages get into Redis: Celery and kombu write each of them, one command takes them all there.

Owns the producer's wire form, which is that of Celery's `send_task`, field by field. What is left out is what
`send_task` does again for every message: routing, declaring its queue, a new Redis client and a pipeline of its own.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from celery import Celery
from celery.signals import after_task_publish, before_task_publish
from kombu import Connection
from kombu.common import maybe_declare
from kombu.entity import PERSISTENT_DELIVERY_MODE
from kombu.serialization import dumps

from api_client.limits import Limits
from config.names import MODERATE_TASK


def new_task_id() -> str:
    """A UUID of version 7: the time in milliseconds, then 74 random bits.

    It becomes the key of a row. In the order of time new rows go to the end of an index, where those before them went;
    at random places of a large one each row costs a page of its own, read and written.
    https://www.rfc-editor.org/rfc/rfc9562#section-5.7
    """
    random = secrets.randbits(74)
    milliseconds = time.time_ns() // 1_000_000
    return str(UUID(int=milliseconds << 80 | 7 << 76 | (random >> 62) << 64 | 2 << 62 | random & (1 << 62) - 1))


def push(
    app: Celery,
    broker: Connection,
    queue: str,
    messages: Sequence[tuple[str, list[dict[str, Any]]]],
    own_headers: Mapping[str, float | str],
    limits: Limits | None = None,
    before_sending: Callable[[], None] | None = None,
) -> None:
    """Append messages to a queue, all of them or none, in their order.

    Args:
        broker: a connection that no other thread uses meanwhile.
        messages: at least one; of each the task id and its comments.
        own_headers: of each message, beside Celery's: see `config.names`.
        limits: within which they must stay.
        before_sending: called once Redis has answered and everything is ready to be sent.

    Raises:
        QueueFull, RateLimited: they do not.
        KombuError, RedisError, OSError: Redis may or may not have taken them; without a call of `before_sending` it
            has not.
    """
    channel = broker.default_channel
    declared = app.amqp.queues[queue]
    # maybe_declare asks the same, but binds a copy of the queue to the channel before it does.
    if hash(declared) not in broker.declared_entities:
        maybe_declare(declared, channel)
    pushed = _Pushed()
    for task_id, comments in messages:
        headers, properties, body, _ = app.amqp.create_task_message(
            task_id,
            MODERATE_TASK,
            [comments],
            reply_to=app.thread_oid,
            ignore_result=True,
            # Celery's own would put the texts into the headers, and from there into other people's logs.
            argsrepr=f"({len(comments)} comments,)",
            kwargsrepr="{}",
        )
        headers |= own_headers
        properties["delivery_mode"] = PERSISTENT_DELIVERY_MODE
        route = {"exchange": "", "routing_key": queue}
        # What traces tasks listens to these two, and adds its headers.
        before_task_publish.send(
            sender=MODERATE_TASK, body=body, headers=headers, properties=properties, declare=[declared], **route
        )
        content_type, encoding, encoded = dumps(body, "json")
        channel.basic_publish(
            channel.prepare_message(encoded, 0, content_type, encoding, headers, properties),
            _publish_batch=pushed,
            **route,
        )
        after_task_publish.send(sender=MODERATE_TASK, body=body, headers=headers, **route)
    if before_sending:
        before_sending()
    if limits:
        limits.take(channel, queue, len(pushed.payloads), pushed.payloads)
    else:
        channel.client.lpush(pushed.list_key, *pushed.payloads)


def ask(broker: Connection, queue: str, messages: int, limits: Limits) -> None:
    """Use up what so many messages need, as `push` does; they may then be pushed without limits.

    Raises:
        QueueFull, RateLimited: it is too much; nothing is used up.
        KombuError, RedisError, OSError: Redis may or may not have done it.
    """
    channel = broker.default_channel
    limits.take(channel, queue, messages)


class _Pushed:
    """What kombu would push: stands where kombu's own PublishBatch does, which makes a Redis client for every batch."""

    def __init__(self) -> None:
        self.list_key = ""
        self.payloads: list[str] = []

    def add(self, command: str, list_key: str, payload: str) -> None:
        self.list_key = list_key
        self.payloads.append(payload)
