"""The outbox of webhooks: what is to be posted to which endpoint, what was, and what was given up. Owns its SQL.

A delivery comes from the feed in the transaction that moves its endpoint's cursor on, so none is made twice and none is
left out. It is claimed in a transaction of its own before it is posted: for a while nobody else takes it, and after
that anybody may, as its process has died or stands still. So each is posted at least once.

Functions take a connection from `db.session.reading` or `writing` and never commit. `now` is the database's clock,
see `db.durable.database_time`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, CursorResult, delete, func, literal, null, select, update
from sqlalchemy.dialects import postgresql, sqlite

from db.feed import POSITIONS_PER_PAGE
from db.rows import WithScores, every, insert_if_absent
from db.tables import Decision, Submission, WebhookCursor, WebhookDelivery

PENDING, DELIVERED, DEAD = "pending", "delivered", "dead"
PURGED_AT_ONCE = 5_000


def begin(connection: Connection, endpoint: str, *, position: int, now: datetime) -> None:
    """Have an endpoint's deliveries begin after this position, where they have not begun yet."""
    row = {"endpoint": endpoint, "position": position, "updated_at": now}
    connection.execute(insert_if_absent(connection, WebhookCursor), row)


def cursor(connection: Connection, endpoint: str) -> int | None:
    """The position up to which deliveries were made; None of an endpoint that has not begun."""
    return connection.scalar(select(WebhookCursor.position).where(WebhookCursor.endpoint == endpoint))


def fill(
    connection: Connection,
    endpoint: str,
    *,
    settled: int,
    actions: Collection[str],
    communities: Collection[str],
    now: datetime,
) -> bool:
    """Make deliveries of the next decisions, and move the cursor on; whether there are more.

    Args:
        settled: as `db.feed.settled_position` said.
        actions: of the decisions that are delivered.
        communities: whose comments; none means those of all.
    """
    # Whoever else has it makes the same deliveries.
    mine = select(WebhookCursor.position).where(WebhookCursor.endpoint == endpoint)
    start = connection.scalar(mine.with_for_update(skip_locked=True))
    if start is None or start >= settled:
        return False
    end = min(settled, start + POSITIONS_PER_PAGE)
    wanted = [Decision.position > start, Decision.position <= end, Decision.action.in_(list(actions))]
    time = literal(now, _TIME)
    decided = select(literal(endpoint), Decision.submission_id, literal(PENDING), literal(0), time, time)
    if communities:
        decided = decided.join_from(Decision, Submission)
        wanted.append(Submission.community.in_(list(communities)))
    columns = ["endpoint", "submission_id", "state", "attempts", "next_attempt_at", "created_at"]
    dialect: Any = {"postgresql": postgresql, "sqlite": sqlite}[connection.dialect.name]
    # What is there already was delivered before a cursor was set back by hand.
    connection.execute(
        dialect.insert(WebhookDelivery)
        .from_select(columns, decided.where(*wanted).order_by(Decision.position))
        .on_conflict_do_nothing()
    )
    moved = update(WebhookCursor).where(WebhookCursor.endpoint == endpoint).values(position=end, updated_at=now)
    connection.execute(moved)
    return end < settled


_TIME = WebhookDelivery.__table__.c.created_at.type


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim(WithScores):
    """A delivery that this process posts now, and the decision that it tells of: as the model decided it."""

    endpoint: str
    attempts: int
    """With the one that begins."""
    submission_id: str
    comment_id: str
    community: str
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


def _pending(endpoint: str) -> list[ColumnElement[bool]]:
    # Written out, so that the index of what is pending fits.
    return [WebhookDelivery.endpoint == endpoint, WebhookDelivery.state == literal(PENDING, literal_execute=True)]


def _due(endpoint: str, now: datetime) -> list[ColumnElement[bool]]:
    return [*_pending(endpoint), WebhookDelivery.next_attempt_at <= now]


def is_due(connection: Connection, endpoint: str, now: datetime) -> bool:
    """Whether anything is to be posted. On SQLite a claim that finds nothing would keep others from writing."""
    return connection.scalar(select(literal(1)).where(*_due(endpoint, now)).limit(1)) is not None


def claim(connection: Connection, endpoint: str, *, limit: int, lease: timedelta, now: datetime) -> list[Claim]:
    """Take deliveries that are due, the longest waiting first; nobody else takes them before the lease has run out."""
    decision = [each for each in Decision.__table__.c if each.name in Claim.__slots__]
    submission = Submission.comment_id, Submission.community, Submission.text
    due = (
        select(WebhookDelivery.endpoint, WebhookDelivery.attempts + 1, *decision, *submission)
        .join_from(WebhookDelivery, Decision, WebhookDelivery.submission_id == Decision.submission_id)
        .join(Submission, Submission.submission_id == Decision.submission_id)
        .where(*_due(endpoint, now))
        .order_by(WebhookDelivery.next_attempt_at, Decision.position)
        .limit(limit)
        .with_for_update(of=WebhookDelivery, skip_locked=True)
    )
    names = ["endpoint", "attempts", *(column.name for column in decision), "comment_id", "community", "text"]
    claims = [Claim(**dict(zip(names, row, strict=True))) for row in connection.execute(due)]
    if claims:
        _change(connection, claims, attempts=WebhookDelivery.attempts + 1, next_attempt_at=now + lease)
    return claims


def delivered(connection: Connection, claims: Sequence[Claim], *, now: datetime) -> None:
    """They were taken by the endpoint, also where another process has claimed them since."""
    _change(connection, claims, state=DELIVERED, next_attempt_at=null(), error=null(), finished_at=now)


def failed(
    connection: Connection, failed: Claim, *, error: str, next_attempt_at: datetime | None, now: datetime
) -> None:
    """It was not; unless another process has claimed it since, it is tried again, or without a time for that given up.

    Args:
        error: never quoting the comment.
    """
    ours = WebhookDelivery.state == PENDING, WebhookDelivery.attempts == failed.attempts
    if next_attempt_at is None:
        _change(connection, [failed], *ours, state=DEAD, next_attempt_at=null(), error=error, finished_at=now)
    else:
        _change(connection, [failed], *ours, next_attempt_at=next_attempt_at, error=error)


def _change(connection: Connection, claims: Sequence[Claim], *also: ColumnElement[bool], **values: Any) -> None:
    if not claims:
        return
    theirs = (
        WebhookDelivery.endpoint == claims[0].endpoint,
        WebhookDelivery.submission_id.in_([each.submission_id for each in claims]),
    )
    connection.execute(update(WebhookDelivery).where(*theirs, *also).values(values))


def purge(connection: Connection, *, finished_before: datetime) -> int:
    """Delete some of what was delivered or given up before then; how much it was, PURGED_AT_ONCE where more is left."""
    key = WebhookDelivery.endpoint, WebhookDelivery.submission_id
    old = select(*key).where(WebhookDelivery.finished_at < finished_before).limit(PURGED_AT_ONCE)
    rows = connection.execute(old).all()
    purged = 0
    for endpoint in {row.endpoint for row in rows}:
        ids = [row.submission_id for row in rows if row.endpoint == endpoint]
        for start in range(0, len(ids), 500):
            some = key[0] == endpoint, key[1].in_(ids[start : start + 500])
            deleted: CursorResult[Any] = connection.execute(delete(WebhookDelivery).where(*some))
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
    if (position := cursor(connection, endpoint)) is None:
        return None
    waiting = select(func.count(), func.min(WebhookDelivery.created_at)).where(*_pending(endpoint))
    pending, oldest = connection.execute(waiting).one()
    # Whoever writes decisions for long holds the feed back, and then nothing comes into the outbox.
    ahead = select(Decision.decided_at).where(Decision.position > position).order_by(Decision.position).limit(1)
    since = [time for time in (oldest, connection.scalar(ahead)) if time is not None]
    return Outstanding(pending, max(0.0, (now - min(since)).total_seconds()) if since else 0.0)


# --- For the operator --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """How an endpoint's deliveries stand."""

    endpoint: str
    pending: int
    oldest_pending_at: datetime | None
    """When the decision that waits longest was handed on."""
    delivered: int
    last_delivered_at: datetime | None
    dead: int
    error: str | None
    """Of the attempt that failed last, of what is pending."""


def backlogs(connection: Connection) -> dict[str, Backlog]:
    """Of every endpoint that has begun, in the settings or not."""
    states = select(
        WebhookDelivery.endpoint,
        WebhookDelivery.state,
        func.count().label("deliveries"),
        func.min(WebhookDelivery.created_at).label("first"),
        func.max(WebhookDelivery.finished_at).label("last"),
    ).group_by(WebhookDelivery.endpoint, WebhookDelivery.state)
    found = {(row.endpoint, row.state): row for row in connection.execute(states)}
    backlogs = {}
    for endpoint in connection.scalars(select(WebhookCursor.endpoint).order_by(WebhookCursor.endpoint)).all():
        pending, done, dead = (found.get((endpoint, state)) for state in (PENDING, DELIVERED, DEAD))
        backlogs[endpoint] = Backlog(
            endpoint=endpoint,
            pending=pending.deliveries if pending else 0,
            oldest_pending_at=pending.first if pending else None,
            delivered=done.deliveries if done else 0,
            last_delivered_at=done.last if done else None,
            dead=dead.deliveries if dead else 0,
            error=_last_error(connection, endpoint) if pending else None,
        )
    return backlogs


def _last_error(connection: Connection, endpoint: str) -> str | None:
    failing = WebhookDelivery.endpoint == endpoint, WebhookDelivery.state == PENDING, WebhookDelivery.error.is_not(None)
    return connection.scalar(
        select(WebhookDelivery.error).where(*failing).order_by(WebhookDelivery.next_attempt_at.desc()).limit(1)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadDelivery:
    """A delivery that was given up."""

    endpoint: str
    submission_id: str
    attempts: int
    error: str | None
    created_at: datetime
    finished_at: datetime


def dead(connection: Connection, *, endpoint: str | None = None, limit: int | None = None) -> list[DeadDelivery]:
    """What was given up, newest first."""
    columns = [each for each in WebhookDelivery.__table__.c if each.name in DeadDelivery.__slots__]
    newest = select(*columns).where(*_dead(endpoint)).order_by(WebhookDelivery.finished_at.desc()).limit(limit)
    return every(connection, newest, DeadDelivery)


def retry(
    connection: Connection, *, endpoint: str | None = None, submission_ids: Collection[str] | None = None, now: datetime
) -> int:
    """Have what was given up delivered after all, as if for the first time; how many there were.

    Args:
        submission_ids: all of them where they are not given.
    """
    given_up = _dead(endpoint)
    if submission_ids is not None:
        given_up.append(WebhookDelivery.submission_id.in_(list(submission_ids)))
    again = update(WebhookDelivery).where(*given_up)
    changed: CursorResult[Any] = connection.execute(
        again.values(state=PENDING, attempts=0, next_attempt_at=now, finished_at=null())
    )
    return changed.rowcount


def _dead(endpoint: str | None) -> list[ColumnElement[bool]]:
    is_dead = WebhookDelivery.state == DEAD
    return [is_dead] if endpoint is None else [is_dead, WebhookDelivery.endpoint == endpoint]
