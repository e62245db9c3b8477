"""Comments by the ids that their producers gave them: an id belongs to a community, as a submission's does."""

from typing import TYPE_CHECKING, Annotated

import typer

from cli.terminal import Problem
from config.names import DEFAULT_COMMUNITY

if TYPE_CHECKING:
    from api_client.client import ModerationClient

CommentId = Annotated[
    str | None, typer.Option("--comment-id", "--comment", metavar="ID", help="Your own id of the comment.")
]
CommentCommunity = Annotated[
    str | None, typer.Option(help="The comment's; it may be left out where only one community has such an id.")
]


def community_of(client: "ModerationClient", comment_id: str, community: str | None) -> str:
    """The community that is given, or else the only one with a comment of this id.

    Raises:
        Problem: several have one.
    """
    if community is not None:
        return community
    found = client.communities_of(comment_id)
    if len(found) > 1:
        raise Problem(
            f"{len(found)} communities have a comment {comment_id!r}: {', '.join(map(repr, found))}; "
            "name one with --community"
        )
    return found[0] if found else DEFAULT_COMMUNITY
