"""The part of the client for what people change about decisions: reviews, erasure, what was set aside."""

from collections.abc import Collection, Mapping
from datetime import datetime

from api_client.connecting import Connections
from config.names import Action, Reason
from db import dead_letters, identity, privacy, queries, webhooks
from db.durable import database_time


class Moderator(Connections):
    """Reviews, erases and clears away."""

    def review(
        self,
        submission_id: str,
        *,
        action: str,
        labels: Mapping[str, bool | int] | None = None,
        reviewer: str,
        note: str | None = None,
    ) -> int:
        """Confirm or overturn a decision. It holds from now on, and the next retrain learns from it.

        Args:
            action: what should be done with the comment.
            labels: true or false (1 or 0) for each label the reviewer speaks about.

        Returns:
            The review's id.

        Raises:
            NoSuchDecision: the submission has none.
            ValueError: an unknown action or label, or a label that is neither true nor false.
        """
        if action not in list(Action):
            raise ValueError(f"unknown action {action!r}; the actions are {', '.join(Action)}")
        if wrong := [label for label, value in (labels or {}).items() if value not in (0, 1)]:
            raise ValueError(f"label {wrong[0]} must be true or false (1 or 0)")
        with self._writing() as connection:
            return queries.add_review(
                connection,
                submission_id=identity.stored_id(connection, submission_id),
                action=action,
                labels={label: bool(value) for label, value in (labels or {}).items()},
                reviewer=reviewer,
                note=note,
                now=database_time(connection),
            )

    def erase(
        self, subject: privacy.Subject, *, by: str, reason: str | None = None
    ) -> tuple[privacy.Erased, str | None]:
        """Erase what a comment says, or everything an author wrote and the name; scores and decisions stay.

        It reaches what is in the database now. A comment that still waits in the queue is written when it is decided:
        erase again then. docs/privacy.md says what else there may be.

        Args:
            subject: whose texts.
            by: who erases, for the record.

        Returns:
            How much was erased, and why the database's files may still hold the bytes; None where they do not.
        """
        with self._writing() as connection:
            erased = privacy.erase(connection, subject, by=by, reason=reason, now=database_time(connection))
        return erased, privacy.reclaim(self._engine)

    def purge_dead_letters(self, *, reason: Reason | None = None, received_before: datetime | None = None) -> int:
        """Delete dead letters for good: those that fit all that is given. How many there were."""
        with self._writing() as connection:
            return dead_letters.purge(connection, reason=reason, received_before=received_before)

    def retry_dead_deliveries(
        self, *, endpoint: str | None = None, submission_ids: Collection[str] | None = None
    ) -> int:
        """Have deliveries that were given up tried again, those that fit all that is given; how many there were."""
        with self._writing() as connection:
            return webhooks.retry(
                connection, endpoint=endpoint, submission_ids=submission_ids, now=database_time(connection)
            )
