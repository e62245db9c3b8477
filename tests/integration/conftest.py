"""Fixtures of the integration tests: a Redis client, and Celery apps that speak as our worker does."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from kombu import transport as kombu_transport
from redis import Redis

from worker import transport


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as client:
        yield client


@pytest.fixture
def make_app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Celery]]:
    """Celery apps with the worker's transport."""
    monkeypatch.setattr(kombu_transport, "TRANSPORT_ALIASES", dict(kombu_transport.TRANSPORT_ALIASES))
    transport.install()
    apps: list[Celery] = []

    def make(broker_url: str, **options: Any) -> Celery:
        app = Celery(broker=broker_url, set_as_current=False)
        app.conf.broker_transport_options = transport.transport_options(30) | options
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.close()
    kombu_transport._transport_cache.clear()
