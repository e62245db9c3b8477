"""The part of the client that reads what became of comments: decisions, their order and reasons, dead letters."""

import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from sqlalchemy import Connection, Row

from api_client import following
from api_client.connecting import Connections
from api_client.explaining import explanation
from api_client.listening import Nudges
from config.names import DEFAULT_COMMUNITY, Action, EventType, Reason
from db import dead_letters, explain, feed, identity, policies, privacy, queries, reviews, webhooks
from db.dead_letters import DeadLetterRow

if TYPE_CHECKING:
    import pandas as pd


class ResultFilters(TypedDict, total=False):
    """What `results` may be narrowed by; see `db.queries.results` for each."""

    community: str | None
    comment_id: str | None
    author: str | None
    action: str | None
    label: str | None
    min_score: float | None
    model_version: str | None
    since: datetime | None
    until: datetime | None
    order: str
    limit: int | None


class Results:
    """Decisions that fit some filters: iterates over `db.queries.Result`, asking the database anew each time."""

    def __init__(self, read: Callable[[], AbstractContextManager[Connection]], filters: ResultFilters) -> None:
        self._read = read
        self._filters = filters

    def __iter__(self) -> Iterator[queries.Result]:
        with self._read() as connection:
            yield from queries.results(connection, **self._filters)

    def to_frame(self) -> "pd.DataFrame":
        """All of them as a pandas DataFrame, one column per field of `db.queries.Result`."""
        import pandas as pd

        columns = [column.name for column in fields(queries.Result)]
        return pd.DataFrame([[getattr(row, name) for name in columns] for row in self], columns=columns)


class Reader(Connections):
    """Reads results. Changes nothing."""

    def result(self, submission_id: str) -> queries.Result | None:
        """What became of one submission; None while it has no decision.

        An id as `submit` returned it finds the decision on that text, a plain string whatever was decided under it.
        """
        with self._reading() as connection:
            [row] = identity.standing(connection, [submission_id])
            return None if row is None else queries.result(connection, row.submission_id)

    def results(self, **filters: Unpack[ResultFilters]) -> Results:
        """The decisions that fit every filter given; see `db.queries.results` for each. Iterating asks the database."""
        return Results(self._reading, filters)

    def explain(self, submission_id: str) -> dict[str, Any] | None:
        """How a decision came about: scores, rule, policy, version, way, reviews; or why there is none.

        Returns:
            The object that `moderato explain --json` prints, but for `margins` and `rerun`, which need the model's own
            code: JSON types only, without the comment's text. docs/explain.md has every key. None where neither a
            submission nor a dead letter has this id.
        """
        with self._reading() as connection:
            facts = explain.facts(connection, submission_id)
        return None if facts is None else explanation(submission_id, facts)

    def newest_submission(self, comment_id: str, *, community: str = DEFAULT_COMMUNITY) -> str | None:
        """The id of the newest submission of a comment, decided or not; None where there is none."""
        with self._reading() as connection:
            return explain.newest_submission(connection, community=community, comment_id=comment_id)

    def communities_of(self, comment_id: str) -> list[str]:
        """The communities that have a comment of this id, in order."""
        with self._reading() as connection:
            return identity.communities_of(connection, comment_id)

    def follow(
        self,
        cursor: str | None = None,
        *,
        since: datetime | None = None,
        community: str | None = None,
        actions: Collection[str] | None = None,
        events: Collection[str] = feed.EVENT_TYPES,
        stop: threading.Event | None = None,
    ) -> Generator[feed.Event, None, None]:
        """Every event as it happens, in the order of the feed; never ends by itself. `close` it.

        An event is a decision (`db.feed.DecidedResult`), a person's review of one (`db.feed.Reviewed`), or the erasure
        of a submission (`db.feed.Erased`); its `type` says which. Keep the `cursor` of the last one that was dealt
        with, and begin there the next time: none is missed, and those after it come again. Outages of Redis or the
        database are waited for. See docs/feed.md.

        Args:
            cursor: begin after the event that it came with; without it, and `since`, with the next event.
            since: begin with what happened then or later.
            community: only events of its comments.
            actions: only decisions for one of these actions, and what comes after them: reviews and erasures of a
                submission that the model, or a review, led to one of these.
            events: only these types, of `config.names.EventType`; `["comment.decided"]` gives decisions alone.
            stop: ends it within a second when it is set.

        Raises:
            ValueError: the cursor is none, there is also a `since`, or an action or a type of event is unknown.
            DatabaseProblem: where to begin cannot be found out; a cursor needs no asking.
        """
        if cursor is not None and since is not None:
            raise ValueError("give a cursor or a time to begin at, not both")
        if unknown := sorted(set(actions or ()) - set(Action)):
            raise ValueError(f"unknown action {unknown[0]!r}; the actions are {', '.join(Action)}")
        if unknown := sorted(set(events) - set(EventType)):
            raise ValueError(f"unknown event {unknown[0]!r}; the events are {', '.join(EventType)}")
        return following.follow(
            self._reading,
            Nudges(self._app.connection_for_write),
            self._position(since) if cursor is None else feed.position_of(cursor),
            types=[EventType(each) for each in events],
            community=community,
            actions=actions,
            stop=stop or threading.Event(),
        )

    def _position(self, since: datetime | None) -> int:
        with self._reading() as connection:
            return feed.settled_position(connection) if since is None else feed.position_before(connection, since)

    def dead_letters(self, *, limit: int | None = 100, reason: Reason | None = None) -> list[DeadLetterRow]:
        """The newest comments and messages that could not be decided, newest first, each with its reason."""
        with self._reading() as connection:
            return dead_letters.newest(connection, limit=limit, reason=reason)

    def dead_letter(self, dead_letter_id: str) -> DeadLetterRow | None:
        """One dead letter, by its own id or its submission's, with its payload; None where there is none."""
        with self._reading() as connection:
            found = dead_letters.by_id(connection, [dead_letter_id]).get(dead_letter_id)
            return found or dead_letters.letter_of(connection, dead_letter_id)

    def count_dead_letters(self, *, reason: Reason | None = None, received_before: datetime | None = None) -> int:
        """How many dead letters `purge_dead_letters` would delete."""
        with self._reading() as connection:
            return dead_letters.count(connection, reason=reason, received_before=received_before)

    def count_scored(self, *, since: datetime | None = None, community: str | None = None) -> int:
        """How many rows `scored` gives."""
        with self._reading() as connection:
            return policies.count_scored(connection, since=since, community=community)

    def scored(self, *, since: datetime | None = None, community: str | None = None) -> Iterator[Sequence[Row[Any]]]:
        """Stream the stored scores that a policy can be tried on, in chunks; see `db.policies.scored`."""
        with self._reading() as connection:
            yield from policies.scored(connection, since=since, community=community)

    def known_communities(self, names: Collection[str]) -> set[str]:
        """Those of these communities that ever submitted a comment."""
        with self._reading() as connection:
            return policies.known_communities(connection, names)

    def unreviewed(
        self, *, community: str | None = None, among: int = 5_000
    ) -> tuple[list[reviews.UnreviewedDecision], dict[str, str]]:
        """Decisions on texts that nobody reviewed, newest first, and the policies that decided, by version.

        Args:
            community: only those of it.
            among: how many of the newest decisions are looked at.
        """
        with self._reading() as connection:
            decisions = list(reviews.unreviewed_decisions(connection, community=community, among=among))
            return decisions, policies.texts(connection, {each.policy_version for each in decisions})

    def judged_texts(self) -> Iterator[reviews.JudgedText]:
        """Stream every reviewed text with what each reviewer says of it; see `moderato review agreement`."""
        with self._reading() as connection:
            yield from reviews.judged_texts(connection)

    def erasable(self, subject: privacy.Subject) -> privacy.Erased:
        """How much `erase` would take."""
        with self._reading() as connection:
            return privacy.erasable(connection, subject)

    def webhook_backlogs(self) -> dict[str, webhooks.Backlog]:
        """How the deliveries of each endpoint stand, by its name."""
        with self._reading() as connection:
            return webhooks.backlogs(connection)

    def dead_deliveries(self, *, endpoint: str | None = None, limit: int | None = 100) -> list[webhooks.DeadDelivery]:
        """The deliveries that were given up, newest first."""
        with self._reading() as connection:
            return webhooks.dead(connection, endpoint=endpoint, limit=limit)
