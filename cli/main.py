"""`moderato`: every command under one name. Imports nothing heavy: each command loads what it needs when it runs."""

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
from cli.terminal import out, say
from cli.trainer_options import TrainerCommand

OUR_PACKAGES = ("config", "db", "model", "worker", "trainer", "api_client", "cli")


class Commands(TyperGroup):
    """Shows an exception of our own as the one line it was written to be; any other is a bug with its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in OUR_PACKAGES:
                raise
            say(f"moderato: {error}")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    help="Moderate comments: submit them to a queue, read the decisions, correct them, retrain, swap the model live. "
    "Begin with `moderato up`, or with `moderato demo` to see all of it in three minutes.",
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
