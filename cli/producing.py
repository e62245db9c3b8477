"""Commands of producers: submit comments, read what was decided."""

import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing, suppress
from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cli.comment_ids import CommentId
from cli.tables import BadRows, Encoding, Separator, SkipBadRows, TextColumn
from cli.terminal import ACTION_STYLES, Problem, out, print_json, printable, progress, say, shorten, shown
from cli.times import past
from config.names import BULK_QUEUE, DEFAULT_COMMUNITY, INTERACTIVE_QUEUE, MODERATE_QUEUE, Action
from config.table_files import listed, open_table

if TYPE_CHECKING:
    from api_client.limits import TryLater
    from db.feed import Event
    from db.queries import Result

Label = Literal["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
Order = Literal["newest", "oldest", Label]
DEFAULT_ORDER: Order = "newest"
DEFAULT_LIMIT = 20
TASK_SUBMISSION_ID_CHARS = 40
"""Of a submission's id that was made of a task's: a UUID, a colon, and up to three digits."""


def submit(
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="Comments, each in quotes.")] = None,
    file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="CSV, JSON lines or Parquet, packed or not; - is standard input."),
    ] = None,
    text_column: TextColumn = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of your ids; by default id, where there is one.")
    ] = None,
    key_column: Annotated[
        str | None,
        typer.Option(
            help="Column that names each row's submission; by default idempotency_key. A row without a name is named "
            "by a hash of its community, id, row number and text."
        ),
    ] = None,
    separator: Separator = None,
    encoding: Encoding = None,
    skip_bad_rows: SkipBadRows = False,
    again: Annotated[
        bool, typer.Option("--again", help="Submit rows anew that were submitted before and have no key of their own.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check FILE, and submit nothing.")] = False,
    community: Annotated[
        str | None, typer.Option(help="Selects the policy that decides, where a row names no community.")
    ] = None,
    queue: Annotated[
        str,
        typer.Option(
            help=f"{MODERATE_QUEUE}, {INTERACTIVE_QUEUE} where the author waits, or {BULK_QUEUE} where it may wait. "
            "Only a worker whose -Q names a queue takes from it."
        ),
    ] = MODERATE_QUEUE,
    durable: Annotated[
        bool, typer.Option("--durable", help="Commit them to the database first, so that a lost Redis loses none.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the decisions and show them.")] = False,
    timeout_s: Annotated[float, typer.Option(help="Seconds to wait at most.")] = 600,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """Submit comments to be moderated; prints each submission's id, or with --wait its decision.

    Waits where the queue is full, or a community has submitted all that it may for now.

    Every column of FILE that is a field of a comment is read: id, community, author, language, created_at and others.
    The same command on the same FILE, as after a failure, submits no row twice, and --wait then shows the decisions
    that are there. --again submits its rows as new comments.

    Example: moderato submit "You are right, thank you." "You are an idiot." --wait

    Example: moderato submit --file samples/comments.csv --community news --queue toxicity.bulk
    """
    if bool(texts) == bool(file):
        raise Problem("give either texts or --file: moderato submit 'You are right.' or moderato submit --file c.csv")
    of_files = {
        "--text-column": text_column,
        "--id-column": id_column,
        "--key-column": key_column,
        "--separator": separator,
        "--encoding": encoding,
        "--skip-bad-rows": skip_bad_rows,
        "--again": again,
        "--dry-run": dry_run,
    }
    if texts and (given := [option for option, value in of_files.items() if value]):
        raise Problem(f"{given[0]} goes with --file")

    from api_client.client import ModerationClient
    from cli.comment_files import find_fields, read_comments
    from config.settings import settings

    ids: list[str] = []
    sent = 0
    bad = BadRows(skip_bad_rows)
    durable = durable or settings().client.durable
    with ExitStack() as stack:
        table = None
        if file:
            table = stack.enter_context(open_table(file, bad.form(separator, encoding)))
            found = find_fields(table, text_column=text_column, id_column=id_column, key_column=key_column)
            if found.unread and not table.is_json:
                say(f"not read, because they are no field of a comment: {listed(found.unread)}")
            comments = read_comments(table, found, community=community, durable=durable, again=again)
            if dry_run:
                would = sum(1 for _ in comments)
                bad.tell()
                say(f"{would:,} would be submitted, {bad.count:,} skipped")
                return
        else:
            comments = ({"text": text, "community": community} for text in texts or ())
        client = stack.enter_context(ModerationClient())
        with progress("submitting", table.size if table else None) as update:

            def show(note: str = "") -> None:
                update(table.bytes_read() if table and table.size else sent, note=note or f"{sent:,} submitted")

            def on_sent(new: list[str]) -> None:
                nonlocal sent
                sent += len(new)
                show()
                if wait:
                    ids.extend(new)
                elif as_json:
                    for submission_id in new:
                        print_json({"submission_id": submission_id})
                else:
                    print("\n".join(new))

            def on_full(later: "TryLater") -> None:
                show(f"waiting: {later}")
                time.sleep(later.wait_s)

            try:
                client.submit_many(comments, queue=queue, durable=durable, on_sent=on_sent, on_full=on_full)
            except BaseException:
                if file:
                    once = "" if again else "; run the same command again: it submits no row twice"
                    say(f"{sent:,} submitted{once}")
                raise
        if file:
            bad.tell()
            say(f"{sent:,} submitted, {bad.count:,} skipped")
        if not wait:
            return
        with progress("deciding", len(ids)) as update:
            outcomes = client.wait(ids, timeout_s=timeout_s, on_progress=update)
        decided = [row for each in ids if (row := client.result(each)) is not None]
        _show(decided, as_json=as_json, with_text=bool(texts))
        if dead := sum(outcome == "dead" for outcome in outcomes.values()):
            say(f"{dead} could not be decided: `moderato dead-letters` says why")


def results(
    community: Annotated[str | None, typer.Option()] = None,
    comment_id: CommentId = None,
    author: Annotated[str | None, typer.Option()] = None,
    action: Annotated[Action | None, typer.Option(help="What holds now, after reviews.")] = None,
    label: Annotated[
        Label | None, typer.Option(help="The label that fired, or with --min-score must reach it.")
    ] = None,
    min_score: Annotated[float | None, typer.Option(min=0, max=1, help="Least score, of --label or of any.")] = None,
    version: Annotated[str | None, typer.Option(help="Model version that decided.")] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Decided then or later: 10m, 2h, 7d, 4w ago, or a local time."),
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Decided before then.")] = None,
    order: Annotated[Order, typer.Option(help="By time of decision, or a label: highest score first.")] = DEFAULT_ORDER,
    limit: Annotated[int, typer.Option(min=0, help="Most rows; 0 shows all.")] = DEFAULT_LIMIT,
    text: Annotated[bool, typer.Option("--text", help="Show the comments too. They may be abusive.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines, with all six scores.")] = False,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            "-f",
            help="Show decisions, reviews and erasures as they happen, until Ctrl-C: from now on, or from --since.",
        ),
    ] = False,
    after: Annotated[
        str | None, typer.Option(metavar="CURSOR", help="With --follow: start after the event that this came with.")
    ] = None,
) -> None:
    """Show decisions, newest first; or with --follow all that happens to them, in the order in which it is recorded.

    Example: moderato results --action hide --limit 50

    Example: moderato results --label threat --min-score 0.5 --json

    Example: moderato results --follow --since 10m --action hide
    """
    from api_client.client import ModerationClient

    if follow:
        others = {
            "--comment-id": comment_id,
            "--author": author,
            "--label": label,
            "--min-score": min_score,
            "--version": version,
            "--until": until,
            "--order": None if order == DEFAULT_ORDER else order,
            "--limit": None if limit == DEFAULT_LIMIT else limit,
        }
        if given := [option for option, value in others.items() if value is not None]:
            raise Problem(f"--follow does not go with {given[0]}: it takes --community, --action, --since or --after")
        _follow(community, action, past(since) if since else None, after, as_json=as_json, with_text=text)
        return
    if after is not None:
        raise Problem("--after goes with --follow: moderato results --follow --after CURSOR")
    with ModerationClient() as client:
        rows = client.results(
            community=community,
            comment_id=comment_id,
            author=author,
            action=action,
            label=label,
            min_score=min_score,
            model_version=version,
            since=past(since) if since else None,
            until=past(until) if until else None,
            order=order,
            limit=limit or None,
        )
        _show(rows, as_json=as_json, with_text=text)


def _follow(
    community: str | None,
    action: Action | None,
    since: datetime | None,
    after: str | None,
    *,
    as_json: bool,
    with_text: bool,
) -> None:
    from api_client.client import ModerationClient

    cursor = after
    with ModerationClient() as client:
        try:
            actions = None if action is None else [action]
            feed = client.follow(after, since=since, community=community, actions=actions)
        except ValueError as error:
            raise Problem(str(error)) from None
        with closing(feed), suppress(KeyboardInterrupt):
            for row in feed:
                if as_json:
                    print_json({"type": row.type, **_values(row, with_text=with_text), "cursor": row.cursor})
                else:
                    _print_line(row, with_text=with_text)
                sys.stdout.flush()
                cursor = row.cursor
    if cursor is not None:
        say(f"go on from here: moderato results --follow --after {cursor}")


def _print_line(event: "Event", *, with_text: bool) -> None:
    from db.feed import Erased, Reviewed

    match event:
        case Erased():
            word, why = "erased", ""
        case Reviewed():
            word, why = event.action, f"by {printable(event.reviewer)}; the model said {event.model_action}"
        case _:
            word, why = event.action, f"{_reason(event):<20}  {printable(event.reviewer or event.model_version)}"
            why += f"  {shorten(event.text)}" if with_text else ""
    parts = [
        (f"{shown(event.happened_at)}  ", "dim"),
        (f"{printable(event.submission_id)}  ", ""),
        (f"{word:<7}", ACTION_STYLES.get(word, "")),
        (why, ""),
    ]
    out.print(Text.assemble(*parts), soft_wrap=True)


def _reason(row: "Result") -> str:
    return "" if row.fired_label is None else f"{row.fired_label} {getattr(row, row.fired_label):.2f}"


def _values(row: "Result | Event", *, with_text: bool) -> dict[str, Any]:
    names = [column.name for column in fields(row) if column.name != "position"]
    return {name: getattr(row, name) for name in names if with_text or name != "text"}


def _show(rows: "Iterable[Result]", *, as_json: bool, with_text: bool) -> None:
    if as_json:
        for row in rows:
            print_json(_values(row, with_text=with_text))
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("decided", overflow="fold")
    table.add_column("comment id", overflow="fold")
    # Never shortened, because the other commands need it; one of a task's id is never broken either.
    rows = list(rows)
    longest = max((len(row.submission_id) for row in rows), default=0)
    # Where the table is too wide the others are wrapped: rich narrows none that is marked so.
    keep = longest <= TASK_SUBMISSION_ID_CHARS
    width = min(longest, TASK_SUBMISSION_ID_CHARS)
    table.add_column("submission", min_width=width, no_wrap=keep, overflow="fold")
    for name in ("action", "because of", "decided by", *(["text"] if with_text else [])):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(
            shown(row.decided_at),
            Text(_comment_name(row)),
            Text(printable(row.submission_id)),
            Text(row.action, ACTION_STYLES[row.action]),
            _reason(row),
            Text(row.reviewer or row.model_version),
            *([Text(shorten(row.text))] if with_text else []),
        )
    if not table.row_count:
        say("no decisions match")
        return
    out.print(table)


def _comment_name(row: "Result") -> str:
    """What the site knows the comment by: its own id, and the community where that is not the default one."""
    own_id = "" if row.comment_id == row.submission_id else row.comment_id
    names = [own_id] if row.community == DEFAULT_COMMUNITY else [row.community, own_id]
    return printable(" ".join(filter(None, names)))
