"""Drives an HTTP server at saturation: so many connections, each with a request under way all the time.

Plain sockets under asyncio, some 100 µs of CPU for each request, since client and server share the cores.
"""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence


def rate(port: int, texts: Sequence[str], connections: int) -> float:
    """Answered comments per second.

    Raises:
        ConnectionError: a request was refused, or a connection was lost.
    """
    requests = [_request(text) for text in texts]
    started = time.perf_counter()
    asyncio.run(_send_all(port, iter(requests), connections))
    return len(requests) / (time.perf_counter() - started)


async def _send_all(port: int, requests: Iterator[bytes], connections: int) -> None:
    await asyncio.gather(*(_send_some(port, requests) for _ in range(connections)))


async def _send_some(port: int, requests: Iterator[bytes]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for request in requests:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            status = head.partition(b"\r\n")[0]
            if b" 200 " not in status + b" ":
                raise ConnectionError(f"the server answered {status.decode(errors='replace')}")
            length = next(
                int(line.partition(b":")[2])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            )
            await reader.readexactly(length)
    finally:
        writer.close()


def _request(text: str) -> bytes:
    body = json.dumps({"text": text}).encode()
    head = (
        "POST /inference HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
