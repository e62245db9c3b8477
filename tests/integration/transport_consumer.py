"""A consumer for the tests to kill: notes each message in the Redis set `processed`, then acknowledges it.

python -m tests.integration.transport_consumer BROKER_URL QUEUE VISIBILITY_TIMEOUT_S
"""

import sys

import kombu
from kombu.asynchronous import Hub

from worker.transport import install, transport_options


def main(broker_url: str, queue: str, visibility_timeout_s: str) -> None:
    install()
    connection = kombu.Connection(broker_url, transport_options=transport_options(float(visibility_timeout_s)))
    channel = connection.channel()
    notes = kombu.Connection(broker_url).channel().client

    def process(message: kombu.Message) -> None:
        notes.sadd("processed", message.headers["id"])
        message.ack()

    consumer = kombu.Consumer(channel, [kombu.Queue(queue)], on_message=process, auto_declare=False)
    consumer.consume()
    hub = Hub()
    connection.transport.register_with_event_loop(connection.connection, hub)
    hub.run_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
