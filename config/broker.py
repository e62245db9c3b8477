"""How a process connects to Redis to send something: soon or not at all."""

from collections.abc import Mapping
from typing import Any

CONNECT_TIMEOUT_S = 3
SOCKET_TIMEOUT_S = 15


def transport_options(broker_options: Mapping[str, Any]) -> dict[str, Any]:
    """Celery's `broker_transport_options`, with those that the settings or a producer give."""
    return {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": SOCKET_TIMEOUT_S,
        # Of the first connection: by default kombu tries for ever.
        "max_retries": 1,
        "interval_start": 0.1,
        **broker_options,
    }
