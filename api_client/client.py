"""What producers and moderators hold: submit comments, read decisions, correct them, retrain, choose the version.

Owns the producer's side of the queue. Imports neither torch nor the model: tasks are sent by name.
"""

import hashlib
import json
import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, TypeVar, Unpack, overload
from uuid import uuid4

from celery import Celery
from kombu import Connection as BrokerConnection
from kombu.pidbox import Mailbox
from pydantic import ValidationError
from sqlalchemy import Connection, Row
from sqlalchemy.exc import DBAPIError

from api_client import following
from api_client.connecting import transport_options
from api_client.explaining import explanation
from api_client.limits import Limits, TryLater
from api_client.listening import BROKER_ERRORS, AnswerLines, Nudges
from api_client.pipeline_stats import PipelineStats
from api_client.publishing import ask, new_task_id, push
from api_client.retrying import NotRetryable, comments_of
from api_client.waiting import SetAside, Verdict, verdict_of, wait_for_verdict, wait_until_found
from config.comment import Comment
from config.comment import explain as explain_refusal
from config.names import (
    ACTIVATION_CHANGED,
    ANSWER_TO_HEADER,
    DEFAULT_COMMUNITY,
    ENQUEUED_AT_HEADER,
    MAX_POLICY_BYTES,
    MODERATE_QUEUE,
    MODERATE_QUEUES,
    PIPELINE_STATS,
    RETRAIN_QUEUE,
    RETRAIN_TASK,
    SUBMITTED_AT_HEADER,
    TRAINER_CONTROL_EXCHANGE,
    WORKER_CONTROL_EXCHANGE,
    WORKER_UNACKED_KEY,
    Action,
    Reason,
)
from config.settings import settings, trainer_settings, without_password
from db import dead_letters, explain, feed, policies, privacy, pruning, queries, reviews, trials, webhooks
from db.dead_letters import AlreadyDecided, DeadLetterRow
from db.drift import Drift, measure_drift
from db.durable import PendingSubmission, database_time, record_pending
from db.session import DatabaseProblem, open_database, reading, without_rows, writing

if TYPE_CHECKING:
    import pandas as pd

COMMENTS_PER_MESSAGE = 64
COMMENTS_PER_ROUND_TRIP = 1_024
TEXT_BYTES_PER_ROUND_TRIP = 4 * 1024 * 1024
"""Bounds the memory of `submit_many`, whatever the comments' lengths."""
RESEND_PAUSES_S = (0.2, 1.0)
"""Before each further attempt to send. The same message twice is one submission: its task id stays."""
DURABLE_RESEND_PAUSES_S = (0.0,)
"""The same of what is durable, which somebody else sends later: once more, as a kept connection may be stale."""
MAX_CONNECTIONS = 10
ANSWER_TIMEOUT_S = 1.0

KEPT = "durable submissions are kept in the database, and sent when a worker finds them waiting there"
SAFE_AGAIN = "an idempotency_key makes it safe to submit them again"

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


class BrokerUnavailable(Exception):
    """Redis did not take or answer something; the message names its URL without the password."""


class InvalidComment(Exception):
    """A comment that no worker would take; the message names the field and what is allowed, never the text."""


class WaitTimeout(Exception):
    """Some submissions have no outcome in time; the message says how many and where to look."""

    def __init__(self, message: str, submission_ids: Sequence[str]) -> None:
        super().__init__(message)
        self.submission_ids = list(submission_ids)
        """Those that have none; they may still be decided."""


class RefusedByGate(DatabaseProblem):
    """A version that the gate refused is activated only by force."""


class NothingToRollBack(DatabaseProblem):
    """No other version was active before."""


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


class SubmissionIds(Sequence[str]):
    """The ids of submitted comments, in their order; kept for each message rather than for each comment."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, dict[int, str]]] = []
        self._ends: list[int] = []

    def add(self, task_id: str, comments: Sequence[Mapping[str, Any]]) -> None:
        """Take in one message."""
        keys = {
            index: comment["idempotency_key"] for index, comment in enumerate(comments) if "idempotency_key" in comment
        }
        self._messages.append((task_id, keys))
        self._ends.append(len(self) + len(comments))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        message = bisect_right(self._ends, position)
        task_id, keys = self._messages[message]
        place = position - (self._ends[message - 1] if message else 0)
        return keys.get(place, f"{task_id}:{place}")

    def __repr__(self) -> str:
        return f"<{len(self):,} submission ids>"


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


@dataclass
class Retried:
    """What became of dead letters that were to be submitted again."""

    submission_ids: list[str] = field(default_factory=list)
    """Of the comments that are on their way again."""
    left: dict[str, str] = field(default_factory=dict)
    """Letters that stay, by their ids: why."""


@dataclass(kw_only=True)
class Activity:
    """What the broker and the workers say now. What could not be asked is None or empty, and `problems` says why."""

    problems: list[str] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)
    """Node names of those that answer."""
    trainers: list[str] = field(default_factory=list)
    queue_depths: dict[str, int] = field(default_factory=dict)
    """Messages that wait for a worker, by queue."""
    held_messages: int | None = None
    """Taken by a worker and not yet decided, or left by one that died."""
    pipelines: dict[str, PipelineStats] = field(default_factory=dict)
    """By node name of the worker; `pipeline_rates` says what two of them mean."""


@dataclass(kw_only=True)
class Status(Activity):
    """The state of the system: its activity, and what the database knows."""

    broker_url: str
    """Without its password, as the next."""
    database_url: str
    active: queries.ActivationRow | None = None
    loads: list[queries.LoadRow] = field(default_factory=list)
    """Each worker's newest word on the active version."""
    totals: queries.Totals | None = None
    last_run: queries.RunRow | None = None
    trial: trials.TrialRow | None = None
    """That runs now."""
    policy: policies.PolicyActivationRow | None = None
    """The active one; None where each worker decides by its own policy file."""
    drift: Drift | None = None
    """None before any version was active."""


class ModerationClient:
    """Speaks to the queue and the database. Connects when first used; one client may serve several threads.

    Every method may raise BrokerUnavailable or DatabaseProblem, where it uses the one or the other.
    """

    def __init__(
        self,
        broker_url: str | None = None,
        database_url: str | None = None,
        broker_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare, connecting to nothing.

        Args:
            broker_url: as Celery writes it; from the settings where it is not given.
            database_url: SQLite or PostgreSQL; from the settings where it is not given.
            broker_options: of Celery's `broker_transport_options`, such as `global_keyprefix`, or `master_name` of a
                Sentinel's broker; from the settings where the broker is.

        Raises:
            SettingsError: they cannot be read.
        """
        if broker_options is None:
            broker_options = {} if broker_url else settings().broker_options.model_dump()
        self._broker_url = broker_url or settings().broker_url
        self._database_url = database_url or settings().database_url
        self._settings = settings().client
        self._engine = open_database(self._database_url)
        self._broker_is_away = False
        """As the last durable submission found it."""
        self._app = Celery("moderato", broker=self._broker_url, set_as_current=False)
        self._app.conf.update(
            task_serializer="json",
            accept_content=["json"],
            task_ignore_result=True,
            task_publish_retry=False,  # `_with_broker` sends again
            broker_transport_options=transport_options(broker_options),
        )

        # Our own pools: Celery's are shared by every app with the same URL in the process, and are not ours to close.
        self._connections = self._app.connection_for_write().Pool(MAX_CONNECTIONS)
        # Waiting for answers leaves a BRPOP in flight, whose reply the next command there would take for its own.
        self._asking_connections = self._app.connection_for_write().Pool(MAX_CONNECTIONS)
        self._answer_lines = AnswerLines(self._app.connection_for_write)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        self._answer_lines.close()
        self._asking_connections.force_close_all()
        self._connections.force_close_all()
        self._app.close()
        self._engine.dispose()

    # --- Submitting ----------------------------------------------------------------------------------------------

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
            queue: `toxicity.interactive` where the author waits for the decision, `toxicity.bulk` where it may wait.
                Only a worker whose `-Q` names a queue takes from it.
            durable: commit it to the database before it is a message, so that it is decided even where Redis is away
                now or loses everything later; from the settings where it is not given.

        Returns:
            The submission's id: the idempotency key, or one made here.

        Raises:
            InvalidComment: what would not be taken; or a durable submission's idempotency key belongs to another text.
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
        durable = self._settings.durable if durable is None else durable
        return self._send([_checked_form(comment, durable)], queue, durable, SubmissionIds())[0]

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
            timeout_s: from when the comment is sent.
            queue: `toxicity.interactive` passes by what waits in the other queues, where a worker's `-Q` names it.
            comment: any other argument of `submit`.

        Raises:
            WaitTimeout: there is no decision in time. It may still come: `submission_ids` says under which id.
            SetAside: the comment became a dead letter, such as one that expired.
            InvalidComment, QueueFull, RateLimited: as `submit`; the idempotency key of another text, too.
        """
        durable = self._settings.durable if durable is None else durable
        form = _checked_form({**comment, "text": text}, durable)
        with self._answer_lines.borrow() as line:
            token = None if line is None else line.token
            [submission_id] = self._send([form], queue, durable, SubmissionIds(), answer_to=token)
            verdict = wait_for_verdict(submission_id, line, lambda: self._verdict(submission_id, form), timeout_s)
        if verdict is None:
            raise WaitTimeout(
                f"{submission_id} has no decision after {timeout_s:g} s; it may still come. `moderato status` says "
                "whether a worker runs and how many comments wait",
                [submission_id],
            )
        return verdict

    def _verdict(self, submission_id: str, form: Mapping[str, Any]) -> Verdict | None:
        with self._reading() as connection:
            result = queries.result(connection, submission_id)
            letter = None if result else dead_letters.by_id(connection, [submission_id]).get(submission_id)
        if letter is not None:
            raise SetAside(letter)
        if result is not None and result.text_sha256 != _text_sha256(form):
            raise InvalidComment(_key_is_taken(submission_id))
        return None if result is None else verdict_of(result)

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
        """
        ids = SubmissionIds()
        durable = self._settings.durable if durable is None else durable
        for batch in _round_trips(comments, durable):
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

    def _send(
        self,
        comments: list[dict[str, Any]],
        queue: str,
        durable: bool,
        ids: SubmissionIds,
        *,
        answer_to: str | None = None,
    ) -> SubmissionIds:
        messages = _in_messages(comments)
        submitted_at = time.time()
        own_headers: dict[str, float | str] = {SUBMITTED_AT_HEADER: submitted_at}
        if answer_to is not None:
            own_headers[ANSWER_TO_HEADER] = answer_to
        limits: Limits | None = Limits.of(comments, self._settings)

        def ask_first() -> None:
            nonlocal limits
            if limits:
                with self._connections.acquire(block=True) as broker:
                    ask(broker, queue, len(messages), limits)
            limits = None

        def publish() -> None:
            nonlocal limits
            # Once: where Redis took them and its answer was lost, the queue may be full of them.
            asked, limits = limits, None
            with self._connections.acquire(block=True) as broker:
                push(self._app, broker, queue, messages, own_headers, asked)

        if durable:
            is_there = self._if_broker_is_there(ask_first)
            own_headers[ENQUEUED_AT_HEADER] = self._commit(messages, queue, submitted_at)
            # A process that dies here has submitted them: a worker's sweeper sends what nobody did.
            if is_there:
                self._if_broker_is_there(publish)
        else:
            self._with_broker(publish, f"{len(comments)} comments may or may not have been submitted; {SAFE_AGAIN}")
        for task_id, listed in messages:
            ids.add(task_id, listed)
        return ids

    def _commit(self, messages: list[tuple[str, list[dict[str, Any]]]], queue: str, submitted_at: float) -> float:
        """Write them as pending; when that was, by the database's clock, in seconds since the epoch."""
        ids = SubmissionIds()
        for task_id, listed in messages:
            ids.add(task_id, listed)
        comments = [comment for _, listed in messages for comment in listed]
        try:
            with self._writing() as connection:
                now = database_time(connection)
                rows = [
                    _pending(comment, submission_id, queue, datetime.fromtimestamp(submitted_at, UTC), now)
                    for comment, submission_id in zip(comments, ids, strict=True)
                ]
                if taken := record_pending(connection, rows):
                    raise InvalidComment(_key_is_taken(taken[0]))
        except DatabaseProblem as problem:
            raise DatabaseProblem(
                f"{problem}; {len(comments)} comments were not submitted, unless the answer to the commit was lost: "
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

    # --- Results -------------------------------------------------------------------------------------------------

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
            on_progress: is told how many have an outcome, and how many there are.

        Raises:
            WaitTimeout: some have none after `timeout_s`.
        """
        missing = dict.fromkeys(ids)
        total = len(missing)
        outcomes: dict[str, Literal["decided", "dead"]] = {}

        def look() -> bool:
            with self._reading() as connection:
                found = queries.outcomes(connection, missing)
            outcomes.update(found)
            for submission_id in found:
                del missing[submission_id]
            if on_progress is not None:
                on_progress(len(outcomes), total)
            return not missing

        with closing(Nudges(self._app.connection_for_write)) as nudges:
            if not wait_until_found(look, nudges, timeout_s):
                raise WaitTimeout(
                    f"{len(missing)} of {total} comments have no decision after {timeout_s:g} s, the first of them "
                    f"{next(iter(missing))}; `moderato status` says whether a worker runs and how many still wait",
                    list(missing),
                )
        return outcomes

    def result(self, submission_id: str) -> queries.Result | None:
        """What became of one submission; None while it has no decision."""
        with self._reading() as connection:
            return queries.result(connection, submission_id)

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

    def follow(
        self,
        cursor: str | None = None,
        *,
        since: datetime | None = None,
        community: str | None = None,
        actions: Collection[str] | None = None,
        stop: threading.Event | None = None,
    ) -> Generator[feed.DecidedResult, None, None]:
        """Every decision as it is made, in the order in which they are handed on; never ends by itself. `close` it.

        Keep the `cursor` of the last one that was dealt with, and begin there the next time: none is missed, and those
        after it come again. Outages of Redis or the database are waited for. See docs/feed.md.

        Args:
            cursor: begin after the decision that it came with; without it, and `since`, with the next decision.
            since: begin with what was decided then or later.
            community: only decisions on its comments.
            actions: only decisions for one of these actions, by the model, whatever reviewers made of them since.
            stop: ends it within a second when it is set.

        Raises:
            ValueError: the cursor is none, there is also a `since`, or an action is unknown.
            DatabaseProblem: where to begin cannot be found out; a cursor needs no asking.
        """
        if cursor is not None and since is not None:
            raise ValueError("give a cursor or a time to begin at, not both")
        if unknown := sorted(set(actions or ()) - set(Action)):
            raise ValueError(f"unknown action {unknown[0]!r}; the actions are {', '.join(Action)}")
        return following.follow(
            self._reading,
            Nudges(self._app.connection_for_write),
            self._position(since) if cursor is None else feed.position_of(cursor),
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
        """One dead letter, with its payload; None where there is none of this id."""
        with self._reading() as connection:
            return dead_letters.by_id(connection, [dead_letter_id]).get(dead_letter_id)

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
            comments, now = comments_of(letter), database_time(connection)
            # Its first time in the queue says nothing of how long it waits now.
            rows = [_pending(form, submission_id, letter.queue, now, now) for submission_id, form in comments]
            if not dead_letters.take_back(connection, dead_letter_id, rows):
                raise NotRetryable("somebody else has just retried or deleted it")
        messages = _in_messages([form for _, form in comments])
        own_headers = dict.fromkeys((SUBMITTED_AT_HEADER, ENQUEUED_AT_HEADER), now.timestamp())

        def publish() -> None:
            with self._connections.acquire(block=True) as broker:
                push(self._app, broker, letter.queue, messages, own_headers)

        self._if_broker_is_there(publish)
        return [submission_id for submission_id, _ in comments]

    def count_dead_letters(self, *, reason: Reason | None = None, received_before: datetime | None = None) -> int:
        """How many dead letters `purge_dead_letters` would delete."""
        with self._reading() as connection:
            return dead_letters.count(connection, reason=reason, received_before=received_before)

    def purge_dead_letters(self, *, reason: Reason | None = None, received_before: datetime | None = None) -> int:
        """Delete dead letters for good: those that fit all that is given. How many there were."""
        with self._writing() as connection:
            return dead_letters.purge(connection, reason=reason, received_before=received_before)

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
                submission_id=submission_id,
                action=action,
                labels={label: bool(value) for label, value in (labels or {}).items()},
                reviewer=reviewer,
                note=note,
                now=datetime.now(UTC),
            )

    def judged_texts(self) -> Iterator[reviews.JudgedText]:
        """Stream every reviewed text with what each reviewer says of it; see `moderato review agreement`."""
        with self._reading() as connection:
            yield from reviews.judged_texts(connection)

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

    # --- Erasing -------------------------------------------------------------------------------------------------

    def erasable(self, subject: privacy.Subject) -> privacy.Erased:
        """How much `erase` would take."""
        with self._reading() as connection:
            return privacy.erasable(connection, subject)

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
            erased = privacy.erase(connection, subject, by=by, reason=reason, now=datetime.now(UTC))
        return erased, privacy.reclaim(self._engine)

    # --- Training ------------------------------------------------------------------------------------------------

    def retrain(self, *, requested_by: str, **overrides: Any) -> str:
        """Ask the trainer for a new version, fine-tuned from the active one with everything that people corrected.

        Args:
            overrides: settings of the trainer, for this run only.

        Returns:
            The run's id, for `training_run`.

        Raises:
            SettingsError: an override is unknown or not allowed.
        """
        trainer_settings(settings(), overrides)
        run_id = str(uuid4())
        # The row first: a trainer that got the message and found no row would have nothing to claim.
        with self._writing() as connection:
            queries.request_run(
                connection,
                run_id=run_id,
                requested_by=requested_by,
                overrides=json.loads(json.dumps(overrides, default=str)),
                now=datetime.now(UTC),
            )

        def request() -> None:
            with self._connections.acquire(block=True) as broker:
                self._app.send_task(
                    RETRAIN_TASK, [run_id], task_id=run_id, queue=RETRAIN_QUEUE, connection=broker, ignore_result=True
                )

        try:
            self._with_broker(request, "the training was not requested")
        except BrokerUnavailable as unavailable:
            with self._writing() as connection:
                queries.finish_run(connection, run_id, state="failed", reason=str(unavailable), now=datetime.now(UTC))
            raise
        return run_id

    def training_run(self, run_id: str) -> queries.RunRow | None:
        """One training run, as far as it has come."""
        with self._reading() as connection:
            return queries.run(connection, run_id)

    def run_that_wrote(self, version: str) -> queries.RunRow | None:
        """The training run that a version came from; None where it came another way."""
        with self._reading() as connection:
            return queries.run_that_wrote(connection, version)

    # --- Versions ------------------------------------------------------------------------------------------------

    def versions(self) -> list[queries.VersionRow]:
        """Every registered version, newest first."""
        with self._reading() as connection:
            return queries.versions(connection)

    def register(self, manifest: Mapping[str, Any]) -> None:
        """Make a version known to the database; its files must be in the versions directory of every worker.

        Raises:
            VersionConflict: another version has this name.
        """
        with self._writing() as connection:
            queries.register_version(connection, manifest, datetime.now(UTC))

    def active(self) -> queries.ActivationRow | None:
        """The newest activation; None before the first."""
        with self._reading() as connection:
            return queries.active(connection)

    def activations(self, *, limit: int = 10) -> list[queries.ActivationRow]:
        """The newest activations, newest first."""
        with self._reading() as connection:
            return queries.activations(connection, limit)

    def loads(self, activation_id: int) -> list[queries.LoadRow]:
        """Each worker's newest word on an activation: loaded, or refused and why."""
        with self._reading() as connection:
            return queries.loads(connection, activation_id)

    def activate(self, version: str, *, by: str, reason: str, force: bool = False) -> int:
        """Make a version the active one. Workers follow within seconds, without a pause; one that cannot goes on
        with the version it has, and `loads` says why.

        Args:
            force: also where the gate refused the version.

        Returns:
            The activation's id.

        Raises:
            NoSuchVersion: no version is registered under this name.
            RefusedByGate: it is worse than what was active when it was trained.
        """
        with self._writing() as connection:
            _require_gate(connection, version, force=force)
            activation_id = queries.activate(connection, version=version, by=by, reason=reason, now=datetime.now(UTC))
        self._tell_workers()
        return activation_id

    def rollback(self, *, by: str, reason: str | None = None) -> int:
        """Make the version that was active before the active one again; the activation's id is returned.

        Raises:
            NothingToRollBack: there was none.
        """
        with self._writing() as connection:
            version = queries.previous_version(connection)
            if version is None:
                raise NothingToRollBack("no other version was active before; `moderato models` lists them all")
            activation_id = queries.activate(
                connection, version=version, by=by, reason=reason or "rollback", now=datetime.now(UTC)
            )
        self._tell_workers()
        return activation_id

    @contextmanager
    def holding_activations(self) -> Iterator[dict[str, str]]:
        """While the block runs nobody else activates a version or starts a trial.

        Yields:
            The versions whose files something needs, and what: see `db.pruning.needed_versions`.
        """
        with self._writing() as connection:
            queries.hold_activations(connection)
            yield pruning.needed_versions(connection)

    # --- Policies ------------------------------------------------------------------------------------------------

    def active_policy(self) -> policies.PolicyActivationRow | None:
        """The newest activation of a policy; None where each worker decides by its own policy file."""
        with self._reading() as connection:
            return policies.active(connection)

    def policy_activations(self, *, limit: int = 10) -> list[policies.PolicyActivationRow]:
        """The newest activations of policies, newest first."""
        with self._reading() as connection:
            return policies.activations(connection, limit)

    def policy(self, prefix: str) -> tuple[str, str]:
        """Version and text of the one stored policy whose hash begins so.

        Raises:
            NoSuchPolicy: there is none, or more than one.
        """
        with self._reading() as connection:
            return policies.find(connection, prefix)

    def activate_policy(self, text: str, *, by: str, reason: str) -> int:
        """Store a policy and make it the active one; workers decide by it within seconds.

        What the text means is not looked at here: `moderato policy activate` does, and so does each worker, which goes
        on by the policy that it has where it cannot read this one.

        Returns:
            The activation's id.

        Raises:
            ValueError: the text is longer than a policy may be.
        """
        if (size := len(text.encode())) > MAX_POLICY_BYTES:
            raise ValueError(f"the policy has {size:,} bytes; at most {MAX_POLICY_BYTES:,} are allowed")
        with self._writing() as connection:
            activation_id = policies.activate(connection, text, by=by, reason=reason, now=datetime.now(UTC))
        self._tell_workers()
        return activation_id

    def rollback_policy(self, *, by: str, reason: str | None = None) -> int:
        """Make the policy that was active before the active one again; the activation's id is returned.

        Raises:
            NothingToRollBack: there was none.
        """
        with self._writing() as connection:
            before = policies.previous(connection)
            if before is None:
                raise NothingToRollBack("no other policy was active before; `moderato policy activate FILE` sets one")
            text = policies.texts(connection, [before.policy_version])[before.policy_version]
            activation_id = policies.activate(
                connection, text, by=by, reason=reason or "rollback", now=datetime.now(UTC)
            )
        self._tell_workers()
        return activation_id

    def known_communities(self, names: Collection[str]) -> set[str]:
        """Those of these communities that ever submitted a comment."""
        with self._reading() as connection:
            return policies.known_communities(connection, names)

    def count_scored(self, *, since: datetime | None = None, community: str | None = None) -> int:
        """How many rows `scored` gives."""
        with self._reading() as connection:
            return policies.count_scored(connection, since=since, community=community)

    def scored(self, *, since: datetime | None = None, community: str | None = None) -> Iterator[Sequence[Row[Any]]]:
        """Stream the stored scores that a policy can be tried on, in chunks; see `db.policies.scored`."""
        with self._reading() as connection:
            yield from policies.scored(connection, since=since, community=community)

    # --- Trials --------------------------------------------------------------------------------------------------

    def start_trial(
        self, kind: trials.Kind, version: str, *, share: float, by: str, reason: str, force: bool = False
    ) -> trials.TrialRow:
        """Put a version beside the active one; workers load it within seconds.

        Args:
            kind: `canary`: it decides its share and is rolled back by itself when it leaves the bounds in the
                settings; `ab`: it decides its share; `shadow`: its scores are recorded, never acted on.
            share: of the submissions, above 0 and up to 1.
            force: also where the gate refused the version.

        Raises:
            TrialIsLive: another trial runs.
            NoSuchVersion: no version is registered under this name.
            NothingToTry: it is the active version, or none is active.
            RefusedByGate: it is worse than what was active when it was trained.
            ValueError: the share.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share {share:g} must be above 0 and at most 1")
        with self._writing() as connection:
            _require_gate(connection, version, force=force)
            trials.start_trial(
                connection,
                kind=kind,
                candidate=version,
                share=share,
                bounds=settings().trial.model_dump(),
                by=by,
                reason=reason,
                now=datetime.now(UTC),
            )
            trial = trials.live_trial_of(connection, kind)
        self._tell_workers()
        return trial

    def live_trial(self) -> trials.TrialRow | None:
        """The trial that runs now."""
        with self._reading() as connection:
            return trials.live_trial(connection)

    def trial_sides(self, kind: trials.Kind) -> tuple[trials.TrialRow, trials.Side, trials.Side]:
        """The newest trial of a kind, and what its candidate and the active version decided while it ran.

        Raises:
            NoTrial: there never was one.
        """
        with self._reading() as connection:
            trial = trials.newest_trial(connection, kind)
            return trial, *trials.sides(connection, trial)

    def trial_reviews(self, kind: trials.Kind) -> tuple[trials.TrialRow, trials.ReviewedSide, trials.ReviewedSide]:
        """The same, with what reviewers made of the decisions."""
        with self._reading() as connection:
            trial = trials.newest_trial(connection, kind)
            return trial, *trials.reviewed_sides(connection, trial)

    def shadow_comparison(self, *, limit: int = 10) -> tuple[trials.TrialRow, trials.ShadowComparison]:
        """The newest shadow, and its scores beside the decisions, with the comments on which they differ most.

        Raises:
            NoTrial: there never was one.
        """
        with self._reading() as connection:
            trial = trials.newest_trial(connection, "shadow")
            return trial, trials.shadow_comparison(connection, trial, limit=limit)

    def promote_trial(self, kind: trials.Kind, *, by: str, reason: str) -> trials.TrialRow:
        """Make the candidate of the live trial the active version; the trial as it ended is returned.

        Raises:
            NoTrial: no trial of this kind runs.
        """
        with self._writing() as connection:
            live = trials.live_trial_of(connection, kind)
            trials.promote_trial(connection, live, by=by, reason=reason, now=datetime.now(UTC))
            trial = trials.newest_trial(connection, kind)
        self._tell_workers()
        return trial

    def stop_trial(self, kind: trials.Kind, *, by: str, reason: str) -> trials.TrialRow:
        """End the live trial; the active version decides everything again. The trial as it ended is returned.

        Raises:
            NoTrial: no trial of this kind runs.
        """
        with self._writing() as connection:
            live = trials.live_trial_of(connection, kind)
            trials.end_trial(connection, live.trial_id, outcome="stopped", by=by, verdict=reason, now=datetime.now(UTC))
            trial = trials.newest_trial(connection, kind)
        self._tell_workers()
        return trial

    def _tell_workers(self) -> None:
        # The row is the truth and workers look for it every few seconds; this only makes it faster.
        with suppress(*BROKER_ERRORS), self._connections.acquire(block=True) as broker:
            _mailbox(WORKER_CONTROL_EXCHANGE, broker).abcast(ACTIVATION_CHANGED)

    # --- Webhooks ------------------------------------------------------------------------------------------------

    def webhook_backlogs(self) -> dict[str, webhooks.Backlog]:
        """How the deliveries of each endpoint stand, by its name."""
        with self._reading() as connection:
            return webhooks.backlogs(connection)

    def dead_deliveries(self, *, endpoint: str | None = None, limit: int | None = 100) -> list[webhooks.DeadDelivery]:
        """The deliveries that were given up, newest first."""
        with self._reading() as connection:
            return webhooks.dead(connection, endpoint=endpoint, limit=limit)

    def retry_dead_deliveries(
        self, *, endpoint: str | None = None, submission_ids: Collection[str] | None = None
    ) -> int:
        """Have deliveries that were given up tried again, those that fit all that is given; how many there were."""
        with self._writing() as connection:
            return webhooks.retry(
                connection, endpoint=endpoint, submission_ids=submission_ids, now=database_time(connection)
            )

    # --- The system ----------------------------------------------------------------------------------------------

    def nodes(self) -> tuple[list[str], list[str]]:
        """Node names of the workers and of the trainers that answer within a second."""
        return self._with_broker(self._ping_all, "no worker could be asked")

    def activity(self) -> Activity:
        """What waits and what the workers do, without the database: as cheap for a large system as for a small one.

        A broker that cannot be reached is a line in `problems`, never an exception.
        """
        activity = Activity()
        self._look_at_broker(activity)
        return activity

    def status(self) -> Status:
        """How the system is. A part that cannot be reached is a line in `problems`, never an exception."""
        status = Status(
            broker_url=without_password(self._broker_url), database_url=without_password(self._database_url)
        )
        self._look_at_broker(status)
        try:
            with self._reading() as connection:
                status.active = queries.active(connection)
                status.loads = queries.loads(connection, status.active.activation_id) if status.active else []
                status.totals = queries.totals(connection)
                status.trial = trials.live_trial(connection)
                status.policy = policies.active(connection)
                status.last_run = next(iter(queries.runs(connection, limit=1)), None)
                status.drift = measure_drift(connection, now=database_time(connection))
        except DatabaseProblem as problem:
            status.problems.append(str(problem))
        return status

    def _look_at_broker(self, activity: Activity) -> None:
        nothing = "nothing was asked"
        try:
            activity.queue_depths, activity.held_messages = self._with_broker(self._count_messages, nothing)
            (activity.workers, activity.trainers), activity.pipelines = self._with_broker(self._ask_all, nothing)
        except BrokerUnavailable as unavailable:
            activity.problems.append(str(unavailable))

    def _count_messages(self) -> tuple[dict[str, int], int]:
        with self._connections.acquire(block=True) as broker:
            channel = broker.default_channel
            steps = channel.priority_steps
            with channel.client.pipeline(transaction=False) as asked:
                for queue in MODERATE_QUEUES:
                    for step in steps:  # a message with a priority waits in a list of its own
                        asked.llen(channel._q_for_pri(queue, step))
                *lengths, held = asked.hlen(WORKER_UNACKED_KEY).execute()
        depths = {
            queue: sum(lengths[index * len(steps) : (index + 1) * len(steps)])
            for index, queue in enumerate(MODERATE_QUEUES)
        }
        return depths, held

    def _ask_all(self) -> tuple[tuple[list[str], list[str]], dict[str, PipelineStats]]:
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(self._ask, WORKER_CONTROL_EXCHANGE, PIPELINE_STATS)
            nodes = self._ping_all()
        stats = {node: PipelineStats.from_reply(answer) for node, answer in sorted(answers.result().items())}
        return nodes, {node: told for node, told in stats.items() if told is not None}

    def _ping_all(self) -> tuple[list[str], list[str]]:
        with ThreadPoolExecutor(2) as pool:
            exchanges = (WORKER_CONTROL_EXCHANGE, TRAINER_CONTROL_EXCHANGE)
            workers, trainers = pool.map(lambda exchange: sorted(self._ask(exchange, "ping")), exchanges)
        return workers, trainers

    def _ask(self, exchange: str, command: str) -> dict[str, Any]:
        """What each node on this exchange answers to a remote-control command, by node name."""
        with self._asking_connections.acquire(block=True) as broker:
            replies = _mailbox(exchange, broker).multi_call(command, timeout=ANSWER_TIMEOUT_S)
        return {node: answer for reply in replies for node, answer in reply.items()}

    # --- Connections ---------------------------------------------------------------------------------------------

    def _with_broker(
        self, act: Callable[[], Answer], consequence: str, pauses_s: Sequence[float] = RESEND_PAUSES_S
    ) -> Answer:
        """Do something with Redis, again after a pause where it fails.

        Raises:
            BrokerUnavailable: it failed each time.
        """
        for pause_s in (*pauses_s, None):
            try:
                return act()
            except BROKER_ERRORS as error:
                if pause_s is None:
                    url = without_password(self._broker_url)
                    raise BrokerUnavailable(f"the broker {url} cannot be used: {error}; {consequence}") from error
                time.sleep(pause_s)
        raise AssertionError("unreachable")

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._explaining(), reading(self._engine) as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._explaining(), writing(self._engine) as connection:
            yield connection

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn what the driver says into what happened: most often a database without, or with older, tables."""
        try:
            yield
        except DBAPIError as error:
            from db.migrate import require_current

            with suppress(DBAPIError):
                require_current(self._engine)
            url = without_password(self._database_url)
            # Not from the error: whoever logs the chain would log what the driver quotes.
            raise DatabaseProblem(f"the database {url} cannot be used: {without_rows(error)}") from None


def _require_gate(connection: Connection, version: str, *, force: bool) -> None:
    run = queries.run_that_wrote(connection, version)
    if run is not None and run.state == "refused" and not force:
        raise RefusedByGate(f"version {version} was refused by the gate, use force to activate it: {run.reason}")


def _mailbox(exchange: str, broker: BrokerConnection) -> Any:
    return Mailbox(exchange, type="fanout", accept=["json"], serializer="json")(broker)


def message_form(comment: str | Mapping[str, Any]) -> dict[str, Any]:
    """The comment as it travels: JSON types only, what is None left out.

    The worker checks again by the same contract: messages also come from plain Celery.

    Args:
        comment: its text, or a mapping with `text` and any other field of `config.comment.Comment`.

    Raises:
        InvalidComment: a field is missing, unknown or breaks its bound.
    """
    if isinstance(comment, str):
        comment = {"text": comment}
    if not isinstance(comment, Mapping):
        raise InvalidComment(f"a comment is a string or a mapping, not {type(comment).__name__}")
    try:
        checked = Comment.model_validate({name: value for name, value in comment.items() if value is not None})
    except ValidationError as error:
        raise InvalidComment(explain_refusal(error)) from None
    return checked.model_dump(mode="json", exclude_unset=True)


def _checked_form(comment: str | Mapping[str, Any], durable: bool) -> dict[str, Any]:
    form = message_form(comment)
    if durable and not form.get("store_text", True):
        raise InvalidComment(
            "store_text=False forbids what durable needs, the text in the database until it is decided; "
            "submit this one with durable=False"
        )
    return form


def _in_messages(comments: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """In lists that are not too long for a message, each with a task id of its own."""
    return [
        (new_task_id(), comments[start : start + COMMENTS_PER_MESSAGE])
        for start in range(0, len(comments), COMMENTS_PER_MESSAGE)
    ]


def _pending(
    form: Mapping[str, Any], submission_id: str, queue: str, submitted_at: datetime, now: datetime
) -> PendingSubmission:
    return PendingSubmission(
        submission_id=submission_id,
        community=form.get("community", DEFAULT_COMMUNITY),
        comment_id=form.get("id", submission_id),
        author=form.get("author"),
        text=form["text"],
        text_sha256=_text_sha256(form),
        language=form.get("language"),
        context=form.get("context"),
        created_at=_time(form.get("created_at")),
        submitted_at=submitted_at,
        queue=queue,
        expires_at=_time(form.get("expires_at")),
        enqueued_at=now,
    )


def _text_sha256(form: Mapping[str, Any]) -> str:
    return hashlib.sha256(form["text"].encode()).hexdigest()


def _key_is_taken(idempotency_key: str) -> str:
    return (
        f"the idempotency key {idempotency_key!r} was used before with another text; nothing was submitted: "
        "use a new key for an edited comment"
    )


def _time(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value)


def _round_trips(comments: Iterable[str | Mapping[str, Any]], durable: bool) -> Iterator[list[dict[str, Any]]]:
    """Checked comments in lists bounded by count and bytes; those before a bad one are handed out before it raises."""
    batch: list[dict[str, Any]] = []
    text_bytes = 0
    try:
        for position, comment in enumerate(comments):
            try:
                form = _checked_form(comment, durable)
            except InvalidComment as error:
                raise InvalidComment(f"comment {position} (counted from 0): {error}") from None
            batch.append(form)
            text_bytes += len(form["text"].encode())
            if len(batch) == COMMENTS_PER_ROUND_TRIP or text_bytes >= TEXT_BYTES_PER_ROUND_TRIP:
                yield batch
                batch, text_bytes = [], 0
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch
