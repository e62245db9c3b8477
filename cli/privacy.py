"""Erasing what people wrote, because they ask for it or because it has grown old."""

from typing import TYPE_CHECKING, Annotated

import typer

from cli.comment_ids import CommentId, community_of
from cli.terminal import Problem, confirm, say, user

if TYPE_CHECKING:
    from db.privacy import Erased

OUT_OF_REACH = (
    "Not reached: what still waits in the queue (run this again when it is decided), comments and messages set aside "
    "that could not be read (`moderato dead-letters`), reviewers' notes, versions trained on the text, your backups."
)


def erase(
    comment_id: CommentId = None,
    author: Annotated[str | None, typer.Option(metavar="NAME", help="Everything of this author, and the name.")] = None,
    community: Annotated[str | None, typer.Option(help="Only in this community.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why, for the record; it is kept.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be erased.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase the texts of a comment or an author from the database; scores and decisions stay.

    A comment's id belongs to a community; an author without --community is erased in all of them.

    Example: moderato erase --comment-id 42 --community news --reason "asked by its author"

    Example: moderato erase --author ann --yes
    """
    if (comment_id is None) == (author is None):
        raise Problem("give either --comment-id ID or --author NAME")

    from api_client.client import ModerationClient
    from db.privacy import Subject

    with ModerationClient() as client:
        if comment_id is not None:
            subject = Subject("comment", comment_id, community_of(client, comment_id, community))
        else:
            subject = Subject("author", str(author), community)
        found = client.erasable(subject)
        if not (found.submissions or found.dead_letters):
            say(f"nothing of this {subject.kind} is in the database. {OUT_OF_REACH}")
            return
        say(f"to be erased, for good: {_counted(found)}")
        if dry_run:
            return
        if not yes:
            confirm("Erase them?")
        erased, remains = client.erase(subject, by=user(), reason=reason)
    say(f"erased: {_counted(erased)}")
    if remains is not None:
        say(f"warning: {remains}")
    say(OUT_OF_REACH)


def _counted(erased: "Erased") -> str:
    undecided = f", {erased.undecided:,} of them not decided yet, which will not be" if erased.undecided else ""
    return f"the texts of {erased.submissions:,} submissions{undecided}; {erased.dead_letters:,} dead letters' payloads"
