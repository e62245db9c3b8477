"""Commands on the system itself: its database, running all of it on this machine."""

from typing import Annotated

import typer

from cli.terminal import Problem, say

database = typer.Typer(help="Bring the database to this release's tables, or back.", no_args_is_help=True)


def up() -> None:
    """Run everything on this machine until Ctrl-C: Redis (unless another broker is set), worker and trainer, and
    `moderato webhooks run` where endpoints are set.

    Example: moderato up
    """
    from api_client.embedded import EmbeddedRedis
    from cli.embedded_system import LOG_DIRECTORY, embedded_system, keep_running
    from config.settings import settings, without_password

    chosen = settings()
    broker, database = without_password(chosen.broker_url), without_password(chosen.database_url)
    redis = EmbeddedRedis()
    is_embedded = chosen.broker_url == redis.url
    try:
        with embedded_system(chosen, redis if is_embedded else None) as services:
            say(
                f"{', '.join(service.name for service in services)} are running; Ctrl-C stops them\n\n"
                f"  broker    {broker}\n"
                f"  database  {database}\n"
                f"  logs      {LOG_DIRECTORY}\n\n"
                "Try in another terminal:\n\n"
                '  moderato submit "You are right, thank you." "You are an idiot." --wait\n'
                "  moderato results --text\n"
                "  moderato review next\n"
                "  moderato review SUBMISSION --action allow --label toxic=0\n"
                "  moderato retrain --set min_corrections=1 --set max_rows=300 --set epochs=1 --follow\n"
                "  moderato models"
            )
            keep_running(services)
    except (KeyboardInterrupt, SystemExit) as stopped:
        say(f"stopped; what is queued is in {redis.data if is_embedded else broker}, what is decided in {database}")
        if isinstance(stopped, SystemExit):
            raise
        raise typer.Exit(130) from None


def demo() -> None:
    """See all of it in a few minutes: 2,000 real comments, corrections, a retrain, a swap in mid-stream.

    It uses Redis, a database and versions of its own in var/demo, which it makes anew each time, and the default
    settings: not yours.

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
    say(f"{shown_url} {f'is at {revision}' if revision else 'has the tables that this release needs'}")
