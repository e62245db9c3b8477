"""The producer's part of the client: comments onto the queue, dead letters onto it again, and waiting for decisions."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from kombu.connection import ConnectionPool

from api_client.connecting import BrokerUnavailable, Connections
from api_client.limits import Limits, TryLater
from api_client.listening import Nudges
from api_client.messages import (
    InvalidComment,
    SubmissionIds,
    checked_form,
    id_is_taken,
    in_messages,
    name_of,
    pending_submission,
    round_trips,
)
from api_client.publishing import ask, push
from api_client.retrying import NotRetryable, comments_of
from api_client.waiting import SetAside, Verdict, WaitTimeout, verdict_of, wait_for_verdict, wait_until_found
from config.identity import SubmissionId
from config.names import ANSWER_TO_HEADER, ENQUEUED_AT_HEADER, MODERATE_QUEUE, SUBMITTED_AT_HEADER, Reason
from config.queues import check_queue, known_queue
from db import dead_letters, identity, queries
from db.dead_letters import AlreadyDecided
from db.durable import database_time, record_pending
from db.session import DatabaseProblem

DURABLE_RESEND_PAUSES_S = (0.0,)
"""Of what is durable, which somebody else sends later: once more, as a kept connection may be stale."""
DATABASE_CLOCK_STEP = timedelta(milliseconds=1)
"""SQLite's clock tells no shorter time."""
KEPT = "durable submissions are kept in the database, and sent when a worker finds them waiting there"
SAFE_AGAIN = "an idempotency_key makes it safe to submit them again"

logger = logging.getLogger(__name__)


@dataclass
class Retried:
    """What became of dead letters that were to be submitted again."""

    submission_ids: list[str] = field(default_factory=list)
    """Of the comments that are on their way again."""
    left: dict[str, str] = field(default_factory=dict)
    """Letters that stay, by their ids: why."""


class Producer(Connections):
    """Submits, and waits."""

    _broker_is_away = False
    """As the last durable submission found it."""

    def submit(
        self,
        text: str,
        *,
        id: str | int | None = None,
        community: str | None = None,
        author: str | int | None = None,
        language: str | None = None,
        created_at: datetime | str | None = None,
        expires_at: datetime | str | None = None,
        context: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        store_text: bool = True,
        queue: str = MODERATE_QUEUE,
        durable: bool | None = None,
    ) -> str:
        """Send one comment to be moderated; for many, `submit_many` is ten times faster.

        Args:
            text: 1 to 20,480 bytes of UTF-8.
            id: the producer's own, at most 200 characters.
            community: selects the policy.
            author: opaque.
            created_at: when it was written, with a time zone.
            expires_at: after which it needs no decision any more.
            context: up to 4 KiB of JSON, stored beside the decision and never scored.
            idempotency_key: names this submission, so that the same one sent twice is decided once.
            store_text: false keeps the text out of the database.
            queue: `toxicity`, `toxicity.interactive` where the author waits for the decision, or `toxicity.bulk` where
                it may wait. Only a worker whose `-Q` names a queue takes from it.
            durable: commit it to the database before it is a message, so that it is decided even where Redis is away
                now or loses everything later; from the settings where it is not given.

        Returns:
            The submission's id, made of the community and the idempotency key, or a name made here: see
            `config.identity`. It also knows the text, for `wait` and `result`.

        Raises:
            InvalidComment: what would not be taken; or a durable submission's idempotency key belongs to another text.
            UnknownQueue: `queue` is none of the three.
            QueueFull: too many messages wait already.
            RateLimited: the community has submitted all that it may for now.
        """
        comment = {
            "text": text,
            "id": id,
            "community": community,
            "author": author,
            "language": language,
            "created_at": created_at,
            "expires_at": expires_at,
            "context": context,
            "idempotency_key": idempotency_key,
            "store_text": store_text,
        }
        check_queue(queue)
        durable = self._settings.durable if durable is None else durable
        return self._send([checked_form(comment, durable)], queue, durable, SubmissionIds())[0]

    def moderate(
        self,
        text: str,
        *,
        timeout_s: float,
        queue: str = MODERATE_QUEUE,
        durable: bool | None = None,
        **comment: Any,
    ) -> Verdict:
        """Send one comment and wait for its decision, which the worker pushes here as soon as it is committed.

        Args:
            timeout_s: from when the comment is sent; before, a Redis that does not answer is given up within 10 s.
            queue: `toxicity.interactive` passes by what waits in the other queues, where a worker's `-Q` names it.
            comment: any other argument of `submit`.

        Raises:
            WaitTimeout: there is no decision in time. It may still come: `submission_ids` says under which id.
            SetAside: the comment became a dead letter, such as one that expired.
            InvalidComment, QueueFull, RateLimited, UnknownQueue: as `submit`; the idempotency key of another text, too.
        """
        check_queue(queue)
        durable = self._settings.durable if durable is None else durable
        form = checked_form({**comment, "text": text}, durable)
        with self._answer_lines.borrow() as line:
            token = None if line is None else line.token
            submission_id = self._send(
                [form], queue, durable, SubmissionIds(), answer_to=token, connections=self._prompt_connections
            )[0]
            verdict = wait_for_verdict(submission_id, line, lambda: self._verdict(submission_id), timeout_s)
        if verdict is None:
            raise WaitTimeout(
                f"{submission_id} has no decision after {timeout_s:g} s; it may still come. `moderato status` says "
                "whether a worker runs and how many comments wait",
                [submission_id],
            )
        return verdict

    def _verdict(self, submission_id: SubmissionId) -> Verdict | None:
        with self._reading() as connection:
            [row] = identity.standing(connection, [submission_id])
            result = None if row is None else queries.result(connection, row.submission_id)
            if result is not None:
                return verdict_of(result)
            letter = dead_letters.letter_of(connection, submission_id)
            if letter is not None and letter.reason != Reason.IDEMPOTENCY_CONFLICT:
                raise SetAside(letter)
            # The same whether a worker has set the message aside already, or not yet.
            if letter is not None or (row is None and identity.standing(connection, [str(submission_id)]) != [None]):
                raise InvalidComment(id_is_taken(submission_id))
        return None

    def submit_many(
        self,
        comments: Iterable[str | Mapping[str, Any]],
        *,
        queue: str = MODERATE_QUEUE,
        durable: bool | None = None,
        on_sent: Callable[[list[str]], object] | None = None,
        on_full: Callable[[TryLater], object] | None = None,
    ) -> SubmissionIds:
        """Send any number of comments, many in one message; when it returns, all of them are in Redis, or durable.

        They are read as they are sent, at most 1,024 (or 4 MiB of text) at a time, so the iterable may be larger than
        memory, or without an end. A source that pauses keeps up to 1,023 comments waiting here: call this once for
        each burst, or use `submit`.

        Args:
            comments: texts, or mappings with the arguments of `submit` as keys.
            queue: as for `submit`.
            durable: as for `submit`; one transaction for each step.
            on_sent: is given the ids of each step as it is sent, in the order of the comments.
            on_full: is called where the queue or a community takes no more, to wait `wait_s`; then the step is tried
                again. Without it the exception is raised.

        Returns:
            Their ids, in the order of the comments.

        Raises:
            InvalidComment: a comment would not be taken; the message says which. Those before it are sent.
            QueueFull, RateLimited: as `submit`. The steps before are sent, as `on_sent` was told.
            UnknownQueue: as `submit`; no comment was read.
        """
        check_queue(queue)
        ids = SubmissionIds()
        durable = self._settings.durable if durable is None else durable
        for batch in round_trips(comments, durable):
            sent = len(ids)
            while True:
                try:
                    self._send(batch, queue, durable, ids)
                    break
                except TryLater as later:
                    if on_full is None:
                        raise
                    on_full(later)
            if on_sent is not None:
                on_sent(ids[sent:])
        return ids

    def wait(
        self,
        ids: Iterable[str],
        *,
        timeout_s: float,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> dict[str, Literal["decided", "dead"]]:
        """Wait until each of these submissions is decided or set aside as a dead letter.

        Redis says when to look for them in the database. For one comment, `moderate` is told the decision itself.

        Args:
            ids: as `submit` and `submit_many` returned them, they know their texts: a text that was set aside because
                its id belongs to another one is `dead`, also where that other one is decided. A plain string asks for
                whatever stands under it.
            on_progress: is told how many have an outcome, and how many there are.

        Raises:
            WaitTimeout: some have none after `timeout_s`.
        """
        # Several texts may have come under one id: each is waited for.
        missing = {(each, getattr(each, "text_hash", None)): each for each in ids}
        total = len(missing)
        outcomes: dict[str, Literal["decided", "dead"]] = {}

        def look() -> bool:
            with self._reading() as connection:
                found = queries.outcomes(connection, [*missing.values()])
            for (asked, submission_id), outcome in zip([*missing.items()], found, strict=True):
                if outcome is not None:
                    del missing[asked]
                    if outcomes.get(submission_id) != "dead":
                        outcomes[submission_id] = outcome
            if on_progress is not None:
                on_progress(total - len(missing), total)
            return not missing

        with closing(Nudges(self._app.connection_for_write)) as nudges:
            if not wait_until_found(look, nudges, timeout_s):
                raise WaitTimeout(
                    f"{len(missing)} of {total} comments have no decision after {timeout_s:g} s, the first of them "
                    f"{next(iter(missing.values()))}; `moderato status` says whether a worker runs and how many wait",
                    list(missing.values()),
                )
        return outcomes

    def retry_dead_letters(
        self,
        dead_letter_ids: Iterable[str] | None = None,
        *,
        reason: Reason | None = None,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> Retried:
        """Submit again what was set aside, after its cause was mended. It is durable, whatever the settings say.

        In one transaction a letter is deleted and its comments are pending submissions; then their messages are sent,
        by a worker's sweeper where this process dies first. So each comment is at any instant in one of them.

        Args:
            dead_letter_ids: all letters where they are not given.
            reason: only those set aside for it.
            on_progress: is told how many letters were looked at, and how many there are.
        """
        with self._reading() as connection:
            ids = dead_letters.ids(connection, reason=reason) if dead_letter_ids is None else [*dead_letter_ids]
        retried = Retried()
        for done, dead_letter_id in enumerate(dict.fromkeys(ids), start=1):
            try:
                retried.submission_ids += self._retry(dead_letter_id, reason)
            except (NotRetryable, AlreadyDecided) as why:
                retried.left[dead_letter_id] = str(why)
            if on_progress is not None:
                on_progress(done, len(ids))
        return retried

    def _retry(self, dead_letter_id: str, reason: Reason | None) -> list[str]:
        with self._writing() as connection:
            letter = dead_letters.by_id(connection, [dead_letter_id]).get(dead_letter_id)
            if letter is None or reason not in (None, letter.reason):
                raise NotRetryable("there is no such dead letter")
            comments, now, queue = comments_of(letter), database_time(connection), known_queue(letter.queue)
            # It keeps its place: a text that was edited since does not become the newest by being retried.
            since = letter.submitted_at or letter.received_at
            rows = [pending_submission(form, name, queue, since, now) for name, form in comments]
            rows = identity.under_stored_ids(connection, rows)
            if not dead_letters.take_back(connection, dead_letter_id, rows):
                raise NotRetryable("somebody else has just retried or deleted it")
        messages = in_messages([form for _, form in comments])
        # Its first time in the queue says nothing of how long it waits now.
        own_headers = dict.fromkeys((SUBMITTED_AT_HEADER, ENQUEUED_AT_HEADER), now.timestamp())

        def publish() -> None:
            with self._connections.acquire(block=True) as broker:
                push(self._app, broker, queue, messages, own_headers)

        self._if_broker_is_there(publish)
        return [row.submission_id for row in rows]

    def _send(
        self,
        comments: list[dict[str, Any]],
        queue: str,
        durable: bool,
        ids: SubmissionIds,
        *,
        answer_to: str | None = None,
        connections: ConnectionPool | None = None,
    ) -> SubmissionIds:
        connections = connections or self._connections
        messages = in_messages(comments)
        submitted_at = time.time()
        own_headers: dict[str, float | str] = {SUBMITTED_AT_HEADER: submitted_at}
        if answer_to is not None:
            own_headers[ANSWER_TO_HEADER] = answer_to
        limits: Limits | None = Limits.of(comments, self._settings)

        def ask_first() -> None:
            nonlocal limits
            if limits:
                with connections.acquire(block=True) as broker:
                    ask(broker, queue, len(messages), limits)
            limits = None

        may_be_there = False

        def before_sending() -> None:
            nonlocal may_be_there
            may_be_there = True

        def consequence() -> str:
            if not may_be_there:
                return "nothing was submitted"
            how_many = "1 comment" if len(comments) == 1 else f"{len(comments):,} comments"
            return f"{how_many} may or may not have been submitted; {SAFE_AGAIN}"

        def publish() -> None:
            nonlocal limits
            # Once: where Redis took them and its answer was lost, the queue may be full of them.
            asked, limits = limits, None
            with connections.acquire(block=True) as broker:
                push(self._app, broker, queue, messages, own_headers, asked, before_sending)

        if durable:
            is_there = self._if_broker_is_there(ask_first)
            own_headers[ENQUEUED_AT_HEADER] = self._commit(messages, queue, submitted_at)
            # A process that dies here has submitted them: a worker's sweeper sends what nobody did.
            if is_there:
                self._if_broker_is_there(publish)
        else:
            self._with_broker(publish, consequence)
        for task_id, listed in messages:
            ids.add(task_id, listed)
        return ids

    def _commit(self, messages: list[tuple[str, list[dict[str, Any]]]], queue: str, submitted_at: float) -> float:
        """Write them as pending; when that was, by the database's clock, in seconds since the epoch."""
        named = [
            (name_of(form, task_id, place), form) for task_id, listed in messages for place, form in enumerate(listed)
        ]
        try:
            with self._writing() as connection:
                now = database_time(connection)
                # A producer's clock that is ahead must not make this the newest submission of its comment for long.
                since = min(datetime.fromtimestamp(submitted_at, UTC), now + DATABASE_CLOCK_STEP)
                rows = [pending_submission(form, name, queue, since, now) for name, form in named]
                if taken := record_pending(connection, rows):
                    raise InvalidComment(f"{id_is_taken(taken[0])}; nothing was submitted")
        except DatabaseProblem as problem:
            raise DatabaseProblem(
                f"{problem}; {len(named)} comments were not submitted, unless the answer to the commit was lost: "
                f"{SAFE_AGAIN}"
            ) from problem
        return now.timestamp()

    def _if_broker_is_there(self, act: Callable[[], None]) -> bool:
        """Do something with Redis that may be left to a worker; whether it was done. Said once where it was not."""
        try:
            self._with_broker(act, KEPT, DURABLE_RESEND_PAUSES_S)
        except BrokerUnavailable as unavailable:
            if not self._broker_is_away:
                logger.warning("%s", unavailable)
            self._broker_is_away = True
            return False
        self._broker_is_away = False
        return True
