"""The outbox of webhooks: what is to be posted to which endpoint, what was, and what was given up. Owns its SQL.

A delivery is made from the feed in the transaction that moves its endpoint's cursor on, so none is made twice and none
is left out. It is claimed in a transaction of its own before it is posted: until its lease runs out nobody else takes
it, and after that anybody may, because its process has died or hangs. So each is posted at least once.

There are two tables: decisions have one delivery for each submission and endpoint, as in the release before, whose
senders may run beside this one; reviews and erasures have one for each position and endpoint. An endpoint has a cursor
for each table, because older senders move the first one on without looking at reviews.

Of one submission events are posted in order: a review or erasure is claimed when none before it is pending.

Functions take a connection from `db.session.reading` or `writing` and never commit. `now` is the database's clock,
see `db.durable.database_time`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ClassVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    CursorResult,
    Select,
    delete,
    exists,
    func,
    literal,
    null,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import aliased

from config.names import EventType
from db import feed
from db.feed import POSITIONS_PER_PAGE, Erased, Reviewed
from db.rows import WithScores, insert_if_absent
from db.tables import (
    Decision,
    ErasedSubmission,
    Review,
    Submission,
    WebhookCursor,
    WebhookDelivery,
    WebhookEventDelivery,
)

PENDING, DELIVERED, DEAD = "pending", "delivered", "dead"
PURGED_AT_ONCE = 5_000

Outbox = type[WebhookDelivery] | type[WebhookEventDelivery]
OUTBOXES: tuple[Outbox, ...] = (WebhookDelivery, WebhookEventDelivery)


def _key(outbox: Outbox) -> Any:
    """What tells the deliveries to one endpoint apart."""
    return WebhookDelivery.submission_id if outbox is WebhookDelivery else WebhookEventDelivery.position


def begin(connection: Connection, endpoint: str, *, position: int, now: datetime) -> None:
    """Have an endpoint's deliveries begin after this position, where they have not begun yet."""
    row = {"endpoint": endpoint, "position": position, "events_position": position, "updated_at": now}
    connection.execute(insert_if_absent(connection, WebhookCursor), row)


def cursor(connection: Connection, endpoint: str) -> int | None:
    """The position up to which all deliveries were made; None of an endpoint that has not begun."""
    mine = select(WebhookCursor.position, WebhookCursor.events_position).where(WebhookCursor.endpoint == endpoint)
    found = connection.execute(mine).one_or_none()
    return None if found is None else min(found)


def fill(
    connection: Connection,
    endpoint: str,
    *,
    settled: int,
    actions: Collection[str] | None,
    communities: Collection[str],
    now: datetime,
) -> bool:
    """Make deliveries of the next events, and move the cursors on; whether there are more.

    Args:
        settled: as `db.feed.settled_position` said.
        actions: what the events that are delivered are about, see `db.feed.concerns`; None delivers all.
        communities: whose comments; none means those of all.
    """
    # Whoever else has it makes the same deliveries.
    mine = select(WebhookCursor.position, WebhookCursor.events_position).where(WebhookCursor.endpoint == endpoint)
    starts = connection.execute(mine.with_for_update(skip_locked=True)).one_or_none()
    if starts is None or min(starts) >= settled:
        return False
    decided = _next(starts.position, settled)
    # Not beyond the decisions: the delivery of a review must find that of its decision.
    others = _next(starts.events_position, min(decided, settled))
    filters: dict[str, Any] = {"actions": actions, "communities": communities}
    _insert(
        connection, WebhookDelivery, _deliveries(endpoint, EventType.DECIDED, starts.position, decided, now, **filters)
    )
    for kind in EventType.REVIEWED, EventType.ERASED:
        made = _deliveries(endpoint, kind, starts.events_position, others, now, **filters)
        _insert(connection, WebhookEventDelivery, made)
    moved = update(WebhookCursor).where(WebhookCursor.endpoint == endpoint)
    connection.execute(moved.values(position=decided, events_position=others, updated_at=now))
    return min(decided, others) < settled


def _next(start: int, end: int) -> int:
    # Never back, where older senders have come further, or the database was set back.
    return max(start, min(end, start + POSITIONS_PER_PAGE))


def _deliveries(
    endpoint: str,
    kind: EventType,
    start: int,
    end: int,
    now: datetime,
    *,
    actions: Collection[str] | None,
    communities: Collection[str],
) -> Select[*tuple[Any, ...]]:
    event: Any = {EventType.DECIDED: Decision, EventType.REVIEWED: Review, EventType.ERASED: ErasedSubmission}[kind]
    own = [] if kind is EventType.DECIDED else [event.position, literal(kind.value).label("type")]
    time = literal(now, WebhookDelivery.__table__.c.created_at.type)
    made = select(
        literal(endpoint).label("endpoint"),
        event.submission_id,
        *own,
        literal(PENDING).label("state"),
        literal(0).label("attempts"),
        time.label("next_attempt_at"),
        time.label("created_at"),
    ).where(event.position > start, event.position <= end)
    if actions is not None:
        made = made.where(feed.concerns(kind, actions))
    if communities:
        made = made.join(Submission, Submission.submission_id == event.submission_id)
        made = made.where(Submission.community.in_(list(communities)))
    return made.order_by(event.position)


def _insert(connection: Connection, outbox: Outbox, made: Select[*tuple[Any, ...]]) -> None:
    dialect: Any = {"postgresql": postgresql, "sqlite": sqlite}[connection.dialect.name]
    # What is there already was delivered before a cursor was set back by hand.
    inserted = dialect.insert(outbox).from_select(list(made.selected_columns.keys()), made).on_conflict_do_nothing()
    connection.execute(inserted)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionToPost(WithScores):
    """A decision as the model made it, whatever reviewers made of it since."""

    type: ClassVar = EventType.DECIDED

    submission_id: str
    comment_id: str
    community: str
    submitted_at: datetime
    text: str | None
    toxic: float
    severe_toxic: float
    obscene: float
    threat: float
    insult: float
    identity_hate: float
    action: str
    fired_label: str | None
    fired_threshold: float | None
    model_version: str
    policy_version: str
    decided_at: datetime
    position: int

    @property
    def happened_at(self) -> datetime:
        return self.decided_at


EventToPost = DecisionToPost | Reviewed | Erased


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A delivery that this process posts now."""

    endpoint: str
    attempts: int
    """With the one that begins."""
    event: EventToPost
    """What it tells of."""

    @property
    def submission_id(self) -> str:
        return self.event.submission_id

    @property
    def outbox(self) -> Outbox:
        return WebhookDelivery if self.event.type is EventType.DECIDED else WebhookEventDelivery

    @property
    def key(self) -> str | int:
        return self.submission_id if self.outbox is WebhookDelivery else self.event.position


def _pending(outbox: Outbox, endpoint: str) -> list[ColumnElement[bool]]:
    # Written out, so that the index of what is pending fits.
    return [outbox.endpoint == endpoint, outbox.state == literal(PENDING, literal_execute=True)]


def _due(outbox: Outbox, endpoint: str, now: datetime) -> list[ColumnElement[bool]]:
    due = [*_pending(outbox, endpoint), outbox.next_attempt_at <= now]
    return due if outbox is WebhookDelivery else [*due, *_none_before(endpoint)]


def _none_before(endpoint: str) -> list[ColumnElement[bool]]:
    """That of the submission of a review or erasure nothing that came before is pending."""
    before = aliased(WebhookEventDelivery)
    same = WebhookEventDelivery.submission_id
    decision = exists().where(*_pending(WebhookDelivery, endpoint), WebhookDelivery.submission_id == same)
    event = exists().where(
        *_pending(before, endpoint), before.submission_id == same, before.position < WebhookEventDelivery.position
    )
    return [~decision, ~event]


def is_due(connection: Connection, endpoint: str, now: datetime) -> bool:
    """Whether anything is to be posted. On SQLite a claim that finds nothing would keep others from writing."""
    return any(
        connection.scalar(select(literal(1)).select_from(outbox).where(*_due(outbox, endpoint, now)).limit(1))
        is not None
        for outbox in OUTBOXES
    )


def claim(connection: Connection, endpoint: str, *, limit: int, lease: timedelta, now: datetime) -> list[Claim]:
    """Take deliveries that are due, the longest waiting first; nobody else takes them before the lease has run out."""
    found = [*_due_decisions(connection, endpoint, limit, now), *_due_events(connection, endpoint, limit, now)]
    found.sort(key=lambda each: (each[0], each[1].event.position))
    claims = [claimed for _, claimed in found[:limit]]
    for outbox in OUTBOXES:
        _change(connection, outbox, claims, attempts=outbox.attempts + 1, next_attempt_at=now + lease)
    return claims


def _due_decisions(connection: Connection, endpoint: str, limit: int, now: datetime) -> list[tuple[datetime, Claim]]:
    decision = [each for each in Decision.__table__.c if each.name in DecisionToPost.__slots__]
    submission = Submission.comment_id, Submission.community, Submission.submitted_at, Submission.text
    due = (
        select(WebhookDelivery.next_attempt_at, WebhookDelivery.attempts, *decision, *submission)
        .join_from(WebhookDelivery, Decision, WebhookDelivery.submission_id == Decision.submission_id)
        .join(Submission, Submission.submission_id == Decision.submission_id)
        .where(*_due(WebhookDelivery, endpoint, now))
        .order_by(WebhookDelivery.next_attempt_at, Decision.position)
        .limit(limit)
        .with_for_update(of=WebhookDelivery, skip_locked=True)
    )
    claims = []
    for row in connection.execute(due).mappings():
        values = dict(row)
        due_at, attempts = values.pop("next_attempt_at"), values.pop("attempts")
        claims.append((due_at, Claim(endpoint=endpoint, attempts=attempts + 1, event=DecisionToPost(**values))))
    return claims


def _due_events(connection: Connection, endpoint: str, limit: int, now: datetime) -> list[tuple[datetime, Claim]]:
    event = WebhookEventDelivery
    due = (
        select(event.next_attempt_at, event.attempts, event.type, event.position)
        .where(*_due(event, endpoint, now))
        .order_by(event.next_attempt_at, event.position)
        .limit(limit)
        .with_for_update(of=event, skip_locked=True)
    )
    rows = connection.execute(due).all()
    reviewed = [row.position for row in rows if row.type == EventType.REVIEWED]
    erased = [row.position for row in rows if row.type == EventType.ERASED]
    events: dict[int, EventToPost] = {**feed.reviews_at(connection, reviewed), **feed.erasures_at(connection, erased)}
    return [
        (row.next_attempt_at, Claim(endpoint=endpoint, attempts=row.attempts + 1, event=events[row.position]))
        for row in rows
    ]


def delivered(connection: Connection, claims: Sequence[Claim], *, now: datetime) -> None:
    """They were taken by the endpoint, also where another process has claimed them since."""
    for outbox in OUTBOXES:
        _change(connection, outbox, claims, state=DELIVERED, next_attempt_at=null(), error=null(), finished_at=now)


def failed(
    connection: Connection, failed: Claim, *, error: str, next_attempt_at: datetime | None, now: datetime
) -> None:
    """It was not; unless another process has claimed it since, it is tried again, or without a time for that given up.

    Args:
        error: never quoting the comment.
    """
    outbox = failed.outbox
    ours = outbox.state == PENDING, outbox.attempts == failed.attempts
    if next_attempt_at is None:
        ended = {"state": DEAD, "next_attempt_at": null(), "error": error, "finished_at": now}
        _change(connection, outbox, [failed], *ours, **ended)
    else:
        _change(connection, outbox, [failed], *ours, next_attempt_at=next_attempt_at, error=error)


def _change(
    connection: Connection, outbox: Outbox, claims: Sequence[Claim], *also: ColumnElement[bool], **values: Any
) -> None:
    """Update those of the claims that are in this outbox."""
    if mine := [each for each in claims if each.outbox is outbox]:
        theirs = outbox.endpoint == mine[0].endpoint, _key(outbox).in_([each.key for each in mine])
        connection.execute(update(outbox).where(*theirs, *also).values(values))


def purge(connection: Connection, *, finished_before: datetime) -> int:
    """Delete some of what was delivered or given up before then; PURGED_AT_ONCE or more where more is left."""
    return sum(_purge(connection, outbox, finished_before) for outbox in OUTBOXES)


def _purge(connection: Connection, outbox: Outbox, finished_before: datetime) -> int:
    key = _key(outbox)
    old = select(outbox.endpoint, key.label("key")).where(outbox.finished_at < finished_before).limit(PURGED_AT_ONCE)
    rows = connection.execute(old).all()
    purged = 0
    for endpoint in {row.endpoint for row in rows}:
        keys = [row.key for row in rows if row.endpoint == endpoint]
        for start in range(0, len(keys), 500):
            some = outbox.endpoint == endpoint, key.in_(keys[start : start + 500])
            deleted: CursorResult[Any] = connection.execute(delete(outbox).where(*some))
            purged += deleted.rowcount
    return purged


# --- For monitoring ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outstanding:
    """What an endpoint has not taken yet."""

    pending: int
    oldest_age_s: float
    """Since what waits longest came into the outbox, or was decided if it is not there yet; 0 where nothing waits."""


def outstanding(connection: Connection, endpoint: str, *, now: datetime) -> Outstanding | None:
    """What waits for an endpoint, however much was delivered; None of one that has not begun."""
    mine = select(WebhookCursor.position, WebhookCursor.events_position).where(WebhookCursor.endpoint == endpoint)
    if (cursors := connection.execute(mine).one_or_none()) is None:
        return None
    pending, since = 0, list[datetime]()
    for outbox in OUTBOXES:
        waiting = select(func.count(), func.min(outbox.created_at)).where(*_pending(outbox, endpoint))
        count, oldest = connection.execute(waiting).one()
        pending += count
        since += [oldest] if count else []
    # Whoever writes events for long holds the feed back, and then nothing comes into the outbox.
    ahead = (
        (Decision.decided_at, Decision.position, cursors.position),
        (Review.reviewed_at, Review.position, cursors.events_position),
        (ErasedSubmission.erased_at, ErasedSubmission.position, cursors.events_position),
    )
    for time, position, looked_at in ahead:
        first = connection.scalar(select(time).where(position > looked_at).order_by(position).limit(1))
        since += [] if first is None else [first]
    return Outstanding(pending, max(0.0, (now - min(since)).total_seconds()) if since else 0.0)


# --- For the operator --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """How an endpoint's deliveries stand."""

    endpoint: str
    pending: int
    oldest_pending_at: datetime | None
    """When what waits longest was handed on."""
    delivered: int
    last_delivered_at: datetime | None
    dead: int
    error: str | None
    """Of the attempt that failed last, of what is pending."""


def backlogs(connection: Connection) -> dict[str, Backlog]:
    """Of every endpoint that has begun, in the settings or not."""
    names = connection.scalars(select(WebhookCursor.endpoint).order_by(WebhookCursor.endpoint)).all()
    rows = [row for outbox in OUTBOXES for row in connection.execute(_states(outbox))]
    backlogs = {}
    for name in names:
        pending, done, dead = (
            [row for row in rows if (row.endpoint, row.state) == (name, state)] for state in (PENDING, DELIVERED, DEAD)
        )
        backlogs[name] = Backlog(
            endpoint=name,
            pending=sum(row.deliveries for row in pending),
            oldest_pending_at=min((row.first for row in pending), default=None),
            delivered=sum(row.deliveries for row in done),
            last_delivered_at=max((row.last for row in done), default=None),
            dead=sum(row.deliveries for row in dead),
            error=_last_error(connection, name) if pending else None,
        )
    return backlogs


def _states(outbox: Outbox) -> Select[*tuple[Any, ...]]:
    return select(
        outbox.endpoint,
        outbox.state,
        func.count().label("deliveries"),
        func.min(outbox.created_at).label("first"),
        func.max(outbox.finished_at).label("last"),
    ).group_by(outbox.endpoint, outbox.state)


def _last_error(connection: Connection, endpoint: str) -> str | None:
    last: list[Any] = []
    for outbox in OUTBOXES:
        failing = select(outbox.next_attempt_at, outbox.error).where(
            *_pending(outbox, endpoint), outbox.error.is_not(None)
        )
        last += connection.execute(failing.order_by(outbox.next_attempt_at.desc()).limit(1)).all()
    return max(last)[1] if last else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadDelivery:
    """A delivery that was given up."""

    endpoint: str
    submission_id: str
    event: str
    """Its type, one of `config.names.EventType`."""
    attempts: int
    error: str | None
    created_at: datetime
    finished_at: datetime


def dead(connection: Connection, *, endpoint: str | None = None, limit: int | None = None) -> list[DeadDelivery]:
    """What was given up, newest first."""
    found = []
    for outbox in OUTBOXES:
        kind = literal(EventType.DECIDED.value) if outbox is WebhookDelivery else WebhookEventDelivery.type
        columns = outbox.endpoint, outbox.submission_id, outbox.attempts, outbox.error, outbox.created_at
        newest = select(*columns, outbox.finished_at, kind.label("event")).where(*_dead(outbox, endpoint))
        newest = newest.order_by(outbox.finished_at.desc()).limit(limit)
        found += [DeadDelivery(**row) for row in connection.execute(newest).mappings()]
    return sorted(found, key=lambda each: each.finished_at, reverse=True)[:limit]


def retry(
    connection: Connection, *, endpoint: str | None = None, submission_ids: Collection[str] | None = None, now: datetime
) -> int:
    """Have what was given up delivered after all, as if for the first time; how many there were.

    Args:
        submission_ids: all of them where they are not given.
    """
    count = 0
    for outbox in OUTBOXES:
        given_up = _dead(outbox, endpoint)
        if submission_ids is not None:
            given_up.append(outbox.submission_id.in_(list(submission_ids)))
        again = update(outbox).where(*given_up)
        changed: CursorResult[Any] = connection.execute(
            again.values(state=PENDING, attempts=0, next_attempt_at=now, finished_at=null())
        )
        count += changed.rowcount
    return count


def _dead(outbox: Outbox, endpoint: str | None) -> list[ColumnElement[bool]]:
    is_dead = outbox.state == DEAD
    return [is_dead] if endpoint is None else [is_dead, outbox.endpoint == endpoint]
