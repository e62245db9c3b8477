"""Commands on the system itself: its state, its database, running all of it on this machine."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cli.terminal import Problem, out, print_json, say, shown

if TYPE_CHECKING:
    from api_client.client import Status

database = typer.Typer(help="Bring the database to this release's tables, or back.", no_args_is_help=True)


def status(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Show what runs, what waits and which version decides. What cannot be reached is said, and the exit status is 1.

    Example: moderato status --json
    """
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        state = client.status()
    if as_json:
        print_json({**asdict(state), "active_version": state.active.version if state.active else None})
    else:
        for name, value in _lines(state):
            out.print(Text(f"{name:<14}{value}"), soft_wrap=True)
    for problem in state.problems:
        say(f"moderato: {problem}")
    if state.problems:
        raise typer.Exit(1)


def _lines(state: "Status") -> list[tuple[str, str]]:
    lines = [
        ("broker", state.broker_url),
        ("database", state.database_url),
        ("workers", ", ".join(state.workers) or "none answers"),
        ("trainers", ", ".join(state.trainers) or "none answers"),
    ]
    if state.queue_depth is not None:
        lines.append(("queue", f"{state.queue_depth} messages wait, workers hold {state.held_messages}"))
    if state.active is not None:
        active = state.active
        by = f"{active.version}, by {active.activated_by} at {shown(active.activated_at)}: {active.reason}"
        lines.append(("active", by))
    for load in state.loads:
        refusal = "" if load.error is None else f", refused the active one: {load.error}"
        lines.append(("", f"{load.worker} runs {load.version}{refusal}"))
    if state.totals is not None:
        totals = state.totals
        actions = ", ".join(f"{action} {count:,}" for action, count in sorted(totals.actions.items()))
        lines.append(("decisions", f"{totals.decisions:,}{f' ({actions})' if actions else ''}"))
        lines.append(("", f"{totals.reviews:,} reviews, {totals.dead_letters:,} dead letters"))
    if state.last_run is not None:
        run = state.last_run
        step = f", step {run.step} of {run.total_steps}" if run.state == "running" and run.step else ""
        lines.append(("last training", f"{run.state} {run.phase if run.state == 'running' else ''}{step}".strip()))
        if run.reason:
            lines.append(("", run.reason))
    return lines


def up() -> None:
    """Run everything on this machine until Ctrl-C: Redis (unless another broker is set), worker and trainer.

    Example: moderato up
    """
    from cli.embedded_system import LOG_DIRECTORY, embedded_system, keep_running
    from config.settings import settings, without_password

    chosen = settings()
    with embedded_system(chosen) as services:
        say(
            f"worker and trainer are running; Ctrl-C stops them\n\n"
            f"  broker    {without_password(chosen.broker_url)}\n"
            f"  database  {without_password(chosen.database_url)}\n"
            f"  logs      {LOG_DIRECTORY}\n\n"
            "Try in another terminal:\n\n"
            '  moderato submit "You are right, thank you." "You are an idiot." --wait\n'
            "  moderato results --text\n"
            "  moderato review SUBMISSION --action allow --label toxic=0\n"
            "  moderato retrain --set max_rows=300 --set epochs=1 --follow\n"
            "  moderato models"
        )
        keep_running(services)


def demo() -> None:
    """See all of it in about three minutes: 2,000 real comments, corrections, a retrain, a swap in mid-stream.

    Example: moderato demo
    """
    from cli.demo import run_demo

    run_demo()


@database.command("upgrade")
def upgrade_database() -> None:
    """Create the tables, or bring older ones to this release.

    Example: moderato db upgrade
    """
    _migrate(None)


@database.command("downgrade")
def downgrade_database(
    revision: Annotated[str, typer.Argument(help="An older revision, or `base`: no tables.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Go back to an older revision. What its newer tables and columns hold is lost.

    Example: moderato db downgrade base
    """
    if not yes:
        typer.confirm(f"Downgrade to {revision}, and lose what newer tables and columns hold?", abort=True)
    _migrate(revision)


def _migrate(revision: str | None) -> None:
    from alembic.util import CommandError
    from sqlalchemy.exc import DBAPIError

    from config.settings import settings, without_password
    from db import migrate

    url = settings().database_url
    shown_url = without_password(url)
    try:
        if revision is None:
            migrate.upgrade(url)
        else:
            migrate.downgrade(url, revision)
    except (CommandError, DBAPIError) as error:
        raise Problem(f"the database {shown_url} was not changed: {getattr(error, 'orig', error)}") from None
    say(f"{shown_url} is at {revision or 'this release'}")
