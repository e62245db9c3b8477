"""`moderato models prune`: the files of versions that nothing needs any more."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cli.terminal import Problem, out, print_json, say, shown
from cli.times import days_ago

if TYPE_CHECKING:
    from pathlib import Path

    from api_client.client import ModerationClient


def prune(
    keep: Annotated[int, typer.Option(min=0, help="How many of the newest stay besides those that are needed.")] = 3,
    older_than_days: Annotated[
        float, typer.Option(min=0, help="Only versions that were registered so many days ago.")
    ] = 0,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only show what would go.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Delete the files of old model versions, or without --yes show which would go and what they take.

    The active version stays, and the one before it, one on trial, one that any worker runs, one that a training starts
    from, the starter, and whatever the database does not know. The rows of those that go stay too, with their figures
    and all they decided. Run it where the versions directory may be written to, which is where the trainer runs.

    Example: moderato models prune --keep 5 --older-than-days 30
    """
    from api_client.client import ModerationClient
    from config.names import STARTER_VERSION
    from config.settings import settings
    from model.pruning import choose, delete_what_is_aside, set_aside, versions_on_disk

    versions_dir = settings().versions_dir
    before = days_ago(older_than_days)
    with ModerationClient() as client, _explained(versions_dir):
        registered = {row.version: row.registered_at for row in client.versions()}
        needed = {STARTER_VERSION: "the starter"} | versions_on_workers(client)
        # Nobody activates a version between the choice and its renaming.
        with client.holding_activations() as needed_by_database:
            needed |= needed_by_database
            bytes_of = versions_on_disk(versions_dir)
            going = choose(registered, needed, bytes_of, keep=keep, before=before)
            if yes:
                for version in going:
                    set_aside(version, versions_dir)
        if yes:
            delete_what_is_aside(versions_dir)

    freed = sum(bytes_of[version] for version in going)
    fates = {version: needed.get(version) or _why_it_stays(registered.get(version), before) for version in bytes_of}
    fates |= dict.fromkeys(going, "deleted" if yes else "goes")
    if as_json:
        print_json({"versions": fates, "going": going, "bytes": freed, "deleted": yes})
        return
    table = Table("version", "registered", "size", "")
    for version in sorted(bytes_of, key=lambda name: (registered.get(name, datetime.max.replace(tzinfo=UTC)), name)):
        table.add_row(version, shown(registered.get(version)), _mib(bytes_of[version]), fates[version])
    out.print(table)
    count = f"{len(going)} version{'' if len(going) == 1 else 's'}, {_mib(freed)}"
    say(f"deleted {count}" if yes else f"{count} would go" + ("; --yes deletes them" if going else ""))


def versions_on_workers(client: "ModerationClient") -> dict[str, str]:
    """The versions that the workers who answer score with."""
    activity = client.activity()
    if activity.problems:
        raise Problem(
            f"{'; '.join(activity.problems)}. No worker could be asked which version it runs, so nothing was deleted"
        )
    return {stats.version: f"{worker} runs it" for worker, stats in activity.pipelines.items()}


def _why_it_stays(registered_at: datetime | None, before: datetime) -> str:
    if registered_at is None:
        return "not known to the database"
    return "one of the newest" if registered_at < before else "not old enough"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


@contextmanager
def _explained(versions_dir: "Path") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Problem(
            f"{error.filename or versions_dir}: {error.strerror}. Workers have the versions directory read-only: prune "
            "where the trainer runs, as its user; what was set aside is deleted by the next prune"
        ) from None
