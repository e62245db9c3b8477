"""`moderato dead-letters`: what could not be decided. Look at it, submit it again, or delete it."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from cli.terminal import Problem, confirm, out, print_json, printable, progress, say, shorten, shown
from cli.times import days_ago
from config.names import Reason

if TYPE_CHECKING:
    from db.dead_letters import DeadLetterRow

MEANINGS: dict[Reason, tuple[str, str]] = {
    Reason.UNREADABLE_MESSAGE: (
        "unreadable message",
        "It is no message that any worker could read. Mend its producer, which must submit it again.",
    ),
    Reason.UNKNOWN_TASK: (
        "unknown task",
        "It names another task: perhaps it was meant for another queue. Mend its producer; if it is a list of comments "
        "after all, `moderato dead-letters retry` submits them.",
    ),
    Reason.NOT_A_LIST: (
        "not a list of comments",
        "The task takes one list of comments. Mend its producer, which must submit it again.",
    ),
    Reason.TOO_MANY_COMMENTS: (
        "too many comments",
        "Mend its producer, which must send shorter lists. `moderato dead-letters retry` submits these in several.",
    ),
    Reason.INVALID_COMMENT: (
        "invalid comment",
        "The comment breaks the contract. Mend its producer, which must submit it again.",
    ),
    Reason.IDEMPOTENCY_CONFLICT: (
        "key used before",
        "Another text was decided under this key, and that stands. Mend its producer: an edited one needs a new key; "
        "`moderato dead-letters retry` decides this text as a submission of its own.",
    ),
    Reason.EXPIRED: (
        "expired",
        "It waited for longer than its producer allowed. If workers are too few or stood still, mend that; "
        "`moderato dead-letters retry` has it decided now, late.",
    ),
    Reason.REVOKED: (
        "revoked",
        "An operator revoked its message. `moderato dead-letters retry` has it decided after all.",
    ),
    Reason.WORKER_DIED: (
        "its workers died",
        "Each worker that took it died or stood still. Look into their logs and their memory; when that is mended, "
        "`moderato dead-letters retry`.",
    ),
    Reason.SCORING_FAILED: (
        "could not be scored",
        "The model failed on this comment alone. Look into the worker's log; another version, or more memory, may do "
        "it: then `moderato dead-letters retry`.",
    ),
    Reason.RECORDING_FAILED: (
        "could not be recorded",
        "The database refused its row. Look into the worker's log and `moderato db upgrade`; then "
        "`moderato dead-letters retry`.",
    ),
    Reason.ERASED: ("erased", "It was erased before it was decided. There is nothing left to do."),
}
"""Of each reason: what it is in words, and what to do."""

Why = Annotated[Reason | None, typer.Option("--reason", help="Only those set aside for it.")]

app = typer.Typer()


@app.callback(invoke_without_command=True)
def without_command(
    context: typer.Context,
    reason: Why = None,
    limit: Annotated[int, typer.Option(min=1, help="Most rows.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
) -> None:
    """What could not be decided, and why: look at it, submit it again, or delete it. Alone it lists.

    Example: moderato dead-letters --limit 5
    """
    if context.invoked_subcommand is None:
        list_letters(reason, limit, as_json)


@app.command("list")
def list_letters(
    reason: Why = None,
    limit: Annotated[int, typer.Option(min=1, help="Most rows.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines, without the payloads.")] = False,
) -> None:
    """List what could not be decided, newest first, and why.

    Example: moderato dead-letters list --reason worker_died --limit 5
    """
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        letters = client.dead_letters(limit=limit, reason=reason)
        total = client.count_dead_letters(reason=reason)
    if as_json:
        for letter in letters:
            print_json(_columns(letter))
        return
    if not letters:
        say("no dead letters" if reason is None else f"no dead letters with reason {reason}")
        return
    table = Table("received", expand=True)
    table.add_column("id", overflow="fold")  # never shortened: the other commands need it
    table.add_column("reason")
    table.add_column("detail", ratio=1)
    for letter in letters:
        table.add_row(
            shown(letter.received_at),
            Text(printable(letter.dead_letter_id)),
            _meaning(letter)[0],
            Text(shorten(letter.detail, 200)),
        )
    out.print(table)
    if len(letters) < total:
        say(f"the newest {len(letters):,} of {total:,}")


@app.command()
def show(
    dead_letter_id: Annotated[str, typer.Argument(metavar="ID", help="As the list shows it.")],
    payload: Annotated[
        bool, typer.Option("--payload", help="Show what came, too: it may be abusive, and is somebody's.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show all that is known of one dead letter, and what to do about it.

    Example: moderato dead-letters show 5f0c…:0 --payload
    """
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        letter = client.dead_letter(dead_letter_id)
    if letter is None:
        raise Problem(f"there is no dead letter {dead_letter_id!r}; `moderato dead-letters` lists them")
    columns = _columns(letter)
    if payload:
        columns["payload"] = printable(letter.payload.decode(errors="backslashreplace"))
    words, advice = _meaning(letter)
    if as_json:
        print_json(columns | {"meaning": words, "advice": advice})
        return
    for name, value in columns.items():
        value = shown(value) if isinstance(value, datetime) else "" if value is None else str(value)
        out.print(Text(f"{name:<16}{value if name == 'payload' else shorten(value, 2_000)}".rstrip()), soft_wrap=True)
    out.print(Text(f"\n{words[:1].upper()}{words[1:]}. {advice}"), soft_wrap=True)


@app.command()
def retry(
    dead_letter_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="As the list shows them.")
    ] = None,
    reason: Why = None,
    every: Annotated[bool, typer.Option("--all", help="All of them, whatever the reason.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count them.")] = False,
) -> None:
    """Submit dead letters again, once their cause is fixed, and take them off the list. Prints the submissions' ids.

    The retry is durable: no crash of this command, Redis or a worker loses a comment. Letters that cannot be retried
    stay, and the command lists them with the reason.

    Example: moderato dead-letters retry 5f0c…:0

    Example: moderato dead-letters retry --reason worker_died
    """
    if bool(dead_letter_ids) + (reason is not None) + every != 1:
        raise Problem("give either ids, or --reason, or --all: moderato dead-letters retry --reason worker_died")
    from api_client.client import ModerationClient

    if dry_run:
        with ModerationClient() as client:
            count = len(dead_letter_ids or ()) or client.count_dead_letters(reason=reason)
        say(f"dead letters to be retried: {count:,}")
        return
    with ModerationClient() as client, progress("retrying") as update:
        retried = client.retry_dead_letters(dead_letter_ids or None, reason=reason, on_progress=update)
    for submission_id in retried.submission_ids:
        print(printable(submission_id))
    for dead_letter_id, why in retried.left.items():
        say(f"{printable(dead_letter_id)} not retried: {why}")
    say(f"comments submitted again: {len(retried.submission_ids):,}; dead letters not retried: {len(retried.left):,}")
    if retried.left:
        raise typer.Exit(1)


@app.command()
def purge(
    older_than_days: Annotated[float | None, typer.Option(min=0, help="Only those received before then.")] = None,
    reason: Why = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete dead letters for good. Nothing then says what became of these comments.

    Example: moderato dead-letters purge --older-than-days 90

    Example: moderato dead-letters purge --reason unreadable_message --yes
    """
    if older_than_days is None and reason is None:
        raise Problem("say which: moderato dead-letters purge --older-than-days 90, or --reason, or both")
    before = None if older_than_days is None else days_ago(older_than_days)

    from api_client.client import ModerationClient

    with ModerationClient() as client:
        count = client.count_dead_letters(reason=reason, received_before=before)
        if not count:
            say("no dead letters match")
            return
        say(f"dead letters to be deleted, for good: {count:,}")
        if dry_run:
            return
        if not yes:
            confirm("Delete them?")
        purged = client.purge_dead_letters(reason=reason, received_before=before)
    say(f"dead letters deleted: {purged:,}")


def _columns(letter: "DeadLetterRow") -> dict[str, object]:
    # The payload may hold a comment: only who asks for it sees it.
    return {name: getattr(letter, name) for name in letter.__slots__ if name != "payload"}


def _meaning(letter: "DeadLetterRow") -> tuple[str, str]:
    try:
        return MEANINGS[Reason(letter.reason)]
    except ValueError:  # of a later release
        return letter.reason, "This release does not know the reason; upgrade it."
