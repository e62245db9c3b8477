"""`moderato health`: what a process says of itself, as an exit status. For containers, which have no curl."""

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from cli.terminal import Problem, out

if TYPE_CHECKING:
    import httpx2

TIMEOUT_S = 15.0
"""For the whole answer: longer than a process takes to say that its engine does not answer."""


class Part(StrEnum):
    WORKER = "worker"
    TRAINER = "trainer"
    WEBHOOKS = "webhooks"


def health(
    part: Annotated[Part, typer.Argument(help="Which process of this host.")] = Part.WORKER,
    ready: Annotated[
        bool, typer.Option("--ready", help="Ask /readyz: whether it can take work now, rather than whether it works.")
    ] = False,
    url: Annotated[
        str | None, typer.Option(help="Ask this address instead, such as http://worker-2:9464/healthz.")
    ] = None,
) -> None:
    """Ask a running worker, trainer or sender of webhooks how it is. Exit status 0 if well, else 1 with the reason.

    A worker scores a comment to answer. The address is that of the settings `metrics`, whose ports are 0, which is
    off, unless they are set: MODERATO_METRICS__WORKER_PORT=9464.

    Example: moderato health

    Example: moderato health trainer --ready
    """
    import httpx2

    url = url or _url(part, ready=ready)
    try:
        answer = asyncio.run(_ask(url))
    except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError) as error:
        raise Problem(f"{url} does not answer: {error or type(error).__name__}") from None
    said = answer.text.strip()
    if answer.status_code != 200:
        raise Problem(f"{url} says {answer.status_code}: {said}")
    out.print(said, markup=False)


async def _ask(url: str) -> "httpx2.Response":
    import httpx2

    # One deadline, however slowly it answers: httpx's own timeouts hold for each read. Not through a proxy that the
    # environment names: it is asked on this host, or in its own network.
    async with asyncio.timeout(TIMEOUT_S), httpx2.AsyncClient(timeout=None, trust_env=False) as http:
        return await http.get(url)


def _url(part: Part, *, ready: bool) -> str:
    from config.settings import settings

    metrics = settings().metrics
    port, usual_port = {
        Part.WORKER: (metrics.worker_port, 9464),
        Part.TRAINER: (metrics.trainer_port, 9465),
        Part.WEBHOOKS: (metrics.webhooks_port, 9466),
    }[part]
    if not port:
        raise Problem(
            f"metrics.{part}_port is 0, so nothing answers: set it for that process and for this command alike, as in "
            f"MODERATO_METRICS__{part.upper()}_PORT={usual_port}"
        )
    # Listening on every address, it answers on this one.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(metrics.host, metrics.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{'readyz' if ready else 'healthz'}"
