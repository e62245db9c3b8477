"""`moderato webhooks`: post events to endpoints, see how that stands, try one, deliver again what was given up."""

import signal
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from cli.terminal import Problem, out, print_json, say, shorten, shown

if TYPE_CHECKING:
    from config.settings import EndpointSettings
    from db.webhooks import Backlog

app = typer.Typer()

NOT_STARTED = "not started"
"""No `moderato webhooks run` has had this endpoint in its settings yet."""


@app.callback(invoke_without_command=True)
def without_command(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False
) -> None:
    """Post decisions, reviews and erasures to the endpoints in the settings. Alone it lists the endpoints.

    Example: moderato webhooks
    """
    if context.invoked_subcommand is None:
        list_endpoints(as_json)


@app.command()
def run() -> None:
    """Deliver until Ctrl-C or SIGTERM: one process, or several side by side. What is being posted is finished then.

    Each endpoint needs its secret in the environment: MODERATO_WEBHOOKS__ENDPOINTS__NEWS__SECRET=whsec_…

    Example: moderato webhooks run
    """
    from api_client.webhooks import deliver
    from config.logs import log_to_stderr
    from config.settings import settings

    chosen = settings()
    if not chosen.webhooks.endpoints:
        raise Problem("no endpoint is set: see webhooks.endpoints in config/default.yaml, and docs/feed.md")
    log_to_stderr(chosen.log_format)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    deliver(chosen, stop)


@app.command("list")
def list_endpoints(as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False) -> None:
    """List the endpoints, and how many deliveries of each are done, pending or given up.

    Example: moderato webhooks list --json
    """
    from api_client.client import ModerationClient
    from config.settings import settings, without_password

    endpoints = settings().webhooks.endpoints
    with ModerationClient() as client:
        backlogs = client.webhook_backlogs()
    names = sorted({*endpoints, *backlogs})
    states = {name: _state(backlogs.get(name), in_settings=name in endpoints) for name in names}
    if as_json:
        for name in names:
            url = without_password(endpoints[name].url) if name in endpoints else None
            known = asdict(backlogs[name]) if name in backlogs else {"endpoint": name}
            print_json({**known, "url": url, "state": states[name]})
        return
    if not names:
        say("no endpoints: set webhooks.endpoints in the settings; docs/feed.md shows how")
        return
    table = Table("endpoint", "url", "state", "pending", "oldest", "delivered", "last", "dead", "last error")
    for name in names:
        url = without_password(endpoints[name].url) if name in endpoints else ""
        row: list[str | Text] = [name, Text(url), states[name]]
        if backlog := backlogs.get(name):
            row += [
                f"{backlog.pending:,}",
                shown(backlog.oldest_pending_at),
                f"{backlog.delivered:,}",
                shown(backlog.last_delivered_at),
                f"{backlog.dead:,}",
                Text(shorten(backlog.error)),
            ]
        table.add_row(*row)
    out.print(table)
    if waiting := [name for name in names if states[name] == NOT_STARTED]:
        say(f"start `moderato webhooks run` to deliver to {', '.join(waiting)}")


def _state(backlog: "Backlog | None", *, in_settings: bool) -> str:
    if not in_settings:
        return "not in the settings"
    if backlog is None:
        return NOT_STARTED
    return "failing" if backlog.error else "ok"


@app.command()
def test(name: Annotated[str, typer.Argument(metavar="NAME", help="Of the endpoint in the settings.")]) -> None:
    """Post a signed `ping` to an endpoint, and say what it answered.

    Example: moderato webhooks test news
    """
    from api_client.webhooks import Poster

    poster = Poster(name, _endpoint(name))
    failure = poster.ping()
    poster.close()
    if failure is not None:
        raise Problem(f"endpoint {name} {failure.reason}")
    say(f"endpoint {name} took a ping")


def _endpoint(name: str) -> "EndpointSettings":
    from config.settings import settings

    endpoints = settings().webhooks.endpoints
    if name not in endpoints:
        raise Problem(f"there is no endpoint {name!r} in the settings; there are: {', '.join(endpoints) or 'none'}")
    return endpoints[name]


Endpoint = Annotated[str | None, typer.Option("--endpoint", metavar="NAME", help="Only those to it.")]


@app.command()
def dead(
    endpoint: Endpoint = None,
    limit: Annotated[int, typer.Option(min=1, help="Most rows.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
) -> None:
    """List the deliveries that were given up, newest first, and why.

    Example: moderato webhooks dead --endpoint news
    """
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        deliveries = client.dead_deliveries(endpoint=endpoint, limit=limit)
    if as_json:
        for delivery in deliveries:
            print_json(delivery)
        return
    if not deliveries:
        say("no delivery was given up")
        return
    table = Table("given up", "endpoint", "submission", "event", "attempts", "why")
    for delivery in deliveries:
        table.add_row(
            shown(delivery.finished_at),
            delivery.endpoint,
            Text(delivery.submission_id),
            delivery.event,
            f"{delivery.attempts:,}",
            Text(shorten(delivery.error)),
        )
    out.print(table)


@app.command()
def retry(
    submission_ids: Annotated[
        list[str] | None, typer.Argument(metavar="SUBMISSION...", help="As `moderato webhooks dead` shows them.")
    ] = None,
    endpoint: Endpoint = None,
    every: Annotated[bool, typer.Option("--all", help="All that were given up.")] = False,
) -> None:
    """Deliver after all what was given up, once its cause is mended.

    Example: moderato webhooks retry --endpoint news
    """
    if not (submission_ids or endpoint or every):
        raise Problem("say which: moderato webhooks retry SUBMISSION, or --endpoint NAME, or --all")
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        count = client.retry_dead_deliveries(endpoint=endpoint, submission_ids=submission_ids or None)
    say(f"deliveries that are tried again: {count:,}")
