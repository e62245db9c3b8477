"""`moderato`: every command under one name. Imports nothing heavy: each command loads what it needs when it runs."""

import errno
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli import (
    dataset,
    dead_letters,
    doctor,
    evaluating,
    explaining,
    health,
    offline,
    policies,
    privacy,
    producing,
    report,
    reviewing,
    status,
    system,
    training,
    trials,
    versions,
    webhooks,
)
from cli.terminal import out, say, user
from cli.trainer_options import TrainerCommand

OUR_PACKAGES = ("config", "db", "model", "worker", "trainer", "api_client", "cli")
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""Of the system: this user may not do that there, or there is no space left."""


class Commands(TyperGroup):
    """Shows an exception of our own, and what the system or the database refuses, in one line.

    Any other is a bug with its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if (said := in_a_line(error)) is None:
                raise
            say(f"moderato: {said}")
            raise typer.Exit(1) from None


def in_a_line(error: Exception) -> str | None:
    """What a command says instead of a traceback; None where the traceback is needed."""
    if type(error).__module__.partition(".")[0] in OUR_PACKAGES:
        return str(error)
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return f"{error.filename or 'a file'} cannot be used by {user()}: {error.strerror}"

    from sqlalchemy.exc import DBAPIError

    from config.settings import settings, without_password
    from db.session import is_outage, without_rows

    if isinstance(error, DBAPIError) and is_outage(error):
        return f"the database {without_password(settings().database_url)} cannot be used: {without_rows(error)}"
    return None


app = typer.Typer(
    cls=Commands,
    help="Moderate comments: submit them to a queue, read the decisions, correct them, retrain, swap the model live. "
    "Begin with `moderato up`, or with `moderato demo` to see all of it in a few minutes.",
    no_args_is_help=True,
    # A traceback with local variables would show comments.
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"moderato {version('moderato')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the release and exit.")
    ] = False,
) -> None:
    """Options of `moderato` itself."""


app.command()(system.demo)
app.command()(system.up)
app.command()(status.status)
app.command()(health.health)
app.command()(doctor.doctor)
app.command()(producing.submit)
app.command()(producing.results)
app.command()(explaining.explain)
app.add_typer(reviewing.app, name="review")
app.command()(privacy.erase)
app.command()(training.retrain)
app.add_typer(versions.app, name="models")
app.command()(versions.activate)
app.command()(versions.rollback)
app.add_typer(policies.app, name="policy")
app.command()(offline.score)
app.command()(evaluating.evaluate)
app.command(cls=TrainerCommand)(training.train)
app.command(cls=dataset.DatasetCommand)(dataset.dataset)
app.command()(report.report)
app.add_typer(trials.canary, name="canary")
app.add_typer(trials.shadow, name="shadow")
app.add_typer(trials.ab, name="ab")
app.add_typer(dead_letters.app, name="dead-letters")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(system.database, name="db")

if __name__ == "__main__":
    app()
