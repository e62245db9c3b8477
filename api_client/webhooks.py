"""Posting events to the endpoints in the settings: signed, at least once, again after growing pauses.

An event is a decision, a review or an erasure. The form is that of https://www.standardwebhooks.com, whose libraries
verify what comes from here. Each endpoint has a thread that takes its events from the feed into the outbox
(`db.webhooks`), claims what is due and posts it, several at a time; one that hangs or fails delays no other endpoint.
Several processes may do this side by side.

What if the process dies here: the outbox keeps what was not posted; what was, and was not yet noted, is posted again
when its lease has run out, under the same `webhook-id`.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from api_client.connecting import connect
from api_client.listening import Nudges
from api_client.webhook_metrics import DEAD, DELIVERED, FAILED, WebhookMonitor
from config.endpoints import HEALTH_PATH, READY_PATH, serve
from config.names import Action, EventType
from config.settings import EndpointSettings, Settings
from db import feed, webhooks
from db.durable import database_time
from db.feed import Erased, Reviewed, WritersDoNotEnd
from db.migrate import require_current
from db.outage import Outage
from db.session import is_outage, open_database, reading, without_rows, writing
from db.webhooks import Claim, DecisionToPost, EventToPost

CONCURRENT_POSTS = 8
"""To one endpoint."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 3_600.0
"""Between two attempts at one delivery."""
LEASE_MARGIN_S = 5.0
"""Beyond the timeout of an attempt: to record its outcome."""
LOOK_S = 1.0
"""Between two looks into feed and outbox where nobody says that there is something new."""
FILL_PAUSE_S = 0.25
"""Between two looks into the feed while events stream in: each moves a cursor, which is a transaction."""
PURGE_S = 600.0
MAX_ANSWER_BYTES = 65_536
"""Of an endpoint's answer: read so that the connection can be used again, and not looked at."""
TRY_LATER = (408, 425, 429)
"""Beside 5xx: what an endpoint answers that is not well, whatever is posted."""

logger = logging.getLogger(__name__)
# It says at INFO where each request went; an endpoint's URL may hold what only its owner should know.
logging.getLogger("httpx2").setLevel(logging.WARNING)


class NoSecret(Exception):
    """An endpoint whose deliveries cannot be signed."""


# --- What is posted ----------------------------------------------------------------------------------------------


def webhook_id(claim: Claim) -> str:
    """The same for every attempt at a delivery, and of no other: by it a receiver knows what it has seen."""
    event = claim.event
    # A name of an endpoint holds neither slash nor number sign. That of a decision is as older releases made it. The
    # time tells an event apart from another that has its position, in a database that was set back to a backup.
    what = (
        f"/{event.submission_id}"
        if event.type is EventType.DECIDED
        else f"#{event.position}#{event.happened_at.isoformat()}"
    )
    return f"msg_{hashlib.sha256(f'{claim.endpoint}{what}'.encode()).hexdigest()[:32]}"


def signature(keys: Sequence[bytes], webhook_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: HMAC-SHA256 over id, time and body, by each of the keys."""
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    digests = [hmac.digest(key, signed, "sha256") for key in keys]
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def body_of(event: EventToPost, *, include_text: bool) -> bytes:
    """The same bytes at each attempt, but for a text that was erased in between."""
    data: dict[str, Any] = {
        "submission_id": event.submission_id,
        "comment_id": event.comment_id,
        "community": event.community,
        "submitted_at": event.submitted_at.isoformat(),
    }
    happened_at = event.happened_at.isoformat()
    match event:
        case DecisionToPost():
            data |= {
                "action": event.action,
                "scores": event.scores,
                "fired_label": event.fired_label,
                "fired_threshold": event.fired_threshold,
                "model_version": event.model_version,
                "policy_version": event.policy_version,
                "decided_at": happened_at,
            }
            text = {"text": event.text}
        case Reviewed():
            data |= {
                "action": event.action,
                "model_action": event.model_action,
                "labels": event.labels,
                "reviewer": event.reviewer,
                "reviewed_at": happened_at,
            }
            text = {"note": event.note}  # a reviewer may quote the comment
        case Erased():
            data["erased_at"] = happened_at
            text = {}
    data["cursor"] = str(event.position)
    if include_text:
        data |= text
    return _as_json({"type": event.type, "timestamp": happened_at, "data": data})


def _as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def retry_pause_s(attempts: int) -> float:
    """Seconds until the next attempt: twice as long each time up to LONGEST_PAUSE_S, up to a third less by chance."""
    return min(FIRST_PAUSE_S * 2 ** min(attempts - 1, 30), LONGEST_PAUSE_S) * random.uniform(2 / 3, 1)


def delivered_actions(min_action: Action) -> list[str] | None:
    """Those at or above one; None where that is every one."""
    actions = list(Action)
    above = [action.value for action in actions[actions.index(min_action) :]]
    return above if len(above) < len(actions) else None


# --- Posting it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an endpoint did not take a delivery."""

    reason: str
    of_endpoint: bool
    """Whatever is posted; else of this delivery perhaps."""


class Poster:
    """Posts to one endpoint, several deliveries at a time, from an event loop in a thread of its own.

    An event loop, because it can put one deadline over a whole exchange: name lookup, connection, TLS, request,
    headers and body. Timeouts of blocking sockets hold for each read, and a receiver that sends a byte now and then
    would outlast them, and the lease of the delivery too.
    """

    def __init__(self, name: str, settings: EndpointSettings) -> None:
        """Prepare, connecting to nothing.

        Raises:
            NoSecret: what is posted could not be signed.
        """
        self._name = name
        self._settings = settings
        self._keys = settings.signing_keys
        if not self._keys:
            raise NoSecret(
                f"endpoint {name} has no secret to sign with: set MODERATO_WEBHOOKS__ENDPOINTS__{name.upper()}__SECRET"
                ", for example to whsec_$(openssl rand -base64 32), and give it to the receiver"
            )
        # An endpoint that redirects has moved, and the operator should know. The deadline is in `_exchange`.
        self._http = httpx2.AsyncClient(
            timeout=None,
            follow_redirects=False,
            limits=httpx2.Limits(max_connections=CONCURRENT_POSTS, max_keepalive_connections=CONCURRENT_POSTS),
            headers={"user-agent": "moderato-webhooks", "content-type": "application/json"},
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"post-{name}", daemon=True)
        self._thread.start()

    def post(self, claim: Claim) -> Future[Failure | None]:
        """Begin to post a delivery; the future gives None where the endpoint took it. It ends within `timeout_s`."""
        body = body_of(claim.event, include_text=self._settings.include_text)
        return self._begin(webhook_id(claim), body)

    def ping(self) -> Failure | None:
        """Post something that tells of no comment, and wait for the answer."""
        now = datetime.now(UTC)
        body = _as_json({"type": "ping", "timestamp": now.isoformat(), "data": {"endpoint": self._name}})
        return self._begin(f"msg_ping_{now.timestamp():.6f}", body).result()

    def _begin(self, message_id: str, body: bytes) -> Future[Failure | None]:
        return asyncio.run_coroutine_threadsafe(self._post(message_id, body), self._loop)

    async def _post(self, message_id: str, body: bytes) -> Failure | None:
        # Of the attempt, not of the event: receivers refuse what is old.
        timestamp = int(time.time())
        headers = {
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(self._keys, message_id, timestamp, body),
        }
        try:
            status = await self._exchange(body, headers)
        except TimeoutError:
            return Failure(f"no answer within {self._settings.timeout_s:g} s", of_endpoint=True)
        except Exception as error:  # of the network, of TLS, or of what it answered
            return Failure(f"cannot be reached ({type(error).__name__})", of_endpoint=True)
        if 200 <= status < 300:
            return None
        return Failure(f"answered {status}", of_endpoint=status >= 500 or status in TRY_LATER)

    async def _exchange(self, body: bytes, headers: dict[str, str]) -> int:
        """Post, and return the status.

        Raises:
            TimeoutError: the headers of the answer were not complete in time.
            Exception: of the network, of TLS, or of HTTP.
        """
        status = None
        try:
            async with (
                asyncio.timeout(self._settings.timeout_s),
                self._http.stream("POST", self._settings.url, content=body, headers=headers) as response,
            ):
                status = response.status_code
                await _read_to_end(response)
        except TimeoutError:
            if status is None:  # else it has answered: that counts
                raise
        return status

    def close(self) -> None:
        """Close the connections, when every post has ended."""
        asyncio.run_coroutine_threadsafe(self._http.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _read_to_end(response: httpx2.Response) -> None:
    """Read what little it answers; what is left unread closes the connection."""
    read_bytes = 0
    with suppress(httpx2.HTTPError):  # it has answered: that counts
        async for chunk in response.aiter_raw():
            read_bytes += len(chunk)
            if read_bytes > MAX_ANSWER_BYTES:
                return


# --- From the feed to the endpoint -------------------------------------------------------------------------------


class Sender:
    """One endpoint's thread, and those that it posts from."""

    def __init__(
        self, name: str, settings: EndpointSettings, database: Engine, *, max_attempts: int, stop: threading.Event
    ) -> None:
        """Prepare, connecting to nothing.

        Raises:
            NoSecret: see `Poster`.
        """
        self.wake = threading.Event()
        """Something may be new in the feed."""
        self.name = name
        self.outcomes: Counter[str] = Counter()
        """Of the attempts."""
        self.stepped_at = time.monotonic()
        """When it last began a step."""
        self._settings = settings
        self._database = database
        self._max_attempts = max_attempts
        self._stop = stop
        self._poster = Poster(name, settings)
        self._posting: dict[Future[Failure | None], Claim] = {}
        self._posted: list[tuple[Claim, Failure | None]] = []
        """And not noted yet, as while the database is away."""
        self._lease_s = settings.timeout_s + LEASE_MARGIN_S
        self._next_fill_at = 0.0
        self._away, self._failing, self._refusing = Outage(), Outage(), Outage()
        self._next_probe_at = 0.0
        self.thread = threading.Thread(target=self._run, name=f"webhook-{name}", daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._try_step(self._step)
        # Each post ends within the timeout, and its outcome should be recorded.
        wait(self._posting)
        self._try_step(self._note)
        self._poster.close()

    def join(self) -> None:
        """Wait for its end after a stop, for as long as what it posts may take."""
        self.wake.set()
        self.thread.join(self._lease_s)

    def _try_step(self, step: Callable[[], None]) -> None:
        self.stepped_at = time.monotonic()
        try:
            step()
        except (DBAPIError, WritersDoNotEnd) as error:
            if isinstance(error, DBAPIError) and not is_outage(error):
                raise
            said = without_rows(error) if isinstance(error, DBAPIError) else str(error)
            if self._away.begin():
                logger.warning("endpoint %s waits for the database: %s", self.name, said)
            self._stop.wait(self._away.pause_s())
        else:
            if self._away.end():
                logger.warning("endpoint %s goes on with the database", self.name)

    def _step(self) -> None:
        self._note()
        self._claim()
        fill_in_s = self._next_fill_at - time.monotonic()
        if fill_in_s <= 0 and self._fill():
            return
        look_in_s = fill_in_s if fill_in_s > 0 else LOOK_S
        if self._posting:
            wait(self._posting, timeout=look_in_s, return_when=FIRST_COMPLETED)
        else:
            self.wake.wait(look_in_s)
        self.wake.clear()

    def _fill(self) -> bool:
        """Take what happened into the outbox; whether there was anything to look at."""
        with reading(self._database) as connection:
            settled = feed.settled_position(connection)
            position = webhooks.cursor(connection, self.name)
            now = database_time(connection)
        if position is None:
            with writing(self._database) as connection:
                webhooks.begin(connection, self.name, position=settled, now=now)
            logger.info("endpoint %s begins with what happens from now on", self.name)
        actions = delivered_actions(self._settings.min_action)
        more = found = position is not None and position < settled
        while more and not self._stop.is_set():
            self.stepped_at = time.monotonic()
            with writing(self._database) as connection:
                more = webhooks.fill(
                    connection,
                    self.name,
                    settled=settled,
                    actions=actions,
                    communities=self._settings.communities,
                    now=now,
                )
        self._next_fill_at = time.monotonic() + FILL_PAUSE_S if found else 0.0
        return found

    def _claim(self) -> None:
        """Begin to post what is due; while the endpoint fails one delivery at a time, after growing pauses."""
        free = CONCURRENT_POSTS - len(self._posting)
        if self._failing.lasts:
            free = 0 if self._posting or time.monotonic() < self._next_probe_at else 1
        if not free:
            return
        with reading(self._database) as connection:
            if not webhooks.is_due(connection, self.name, database_time(connection)):
                return
        lease = timedelta(seconds=self._lease_s)
        with writing(self._database) as connection:
            claims = webhooks.claim(connection, self.name, limit=free, lease=lease, now=database_time(connection))
        for claim in claims:
            self._posting[self._poster.post(claim)] = claim

    def _note(self) -> None:
        """Write down what came of the posts that have ended."""
        for future in [each for each in self._posting if each.done()]:
            self._posted.append((self._posting.pop(future), future.result()))
        if not self._posted:
            return
        with writing(self._database) as connection:
            now = database_time(connection)
            webhooks.delivered(connection, [claim for claim, failure in self._posted if failure is None], now=now)
            for claim, failure in self._posted:
                if failure is not None:
                    webhooks.failed(
                        connection, claim, error=failure.reason, next_attempt_at=self._next_attempt(claim, now), now=now
                    )
        posted, self._posted = self._posted, []
        for claim, failure in posted:
            self._say(claim, failure)

    def _next_attempt(self, claim: Claim, now: datetime) -> datetime | None:
        if claim.attempts >= self._max_attempts:
            return None
        return now + timedelta(seconds=retry_pause_s(claim.attempts))

    def _say(self, claim: Claim, failure: Failure | None) -> None:
        given_up = failure is not None and claim.attempts >= self._max_attempts
        self.outcomes[DELIVERED if failure is None else DEAD if given_up else FAILED] += 1
        if failure is None:
            # A list, so that both end.
            if any([self._failing.end(), self._refusing.end()]):
                logger.warning("endpoint %s takes deliveries again", self.name)
            return
        if failure.of_endpoint:
            if self._failing.begin():
                logger.warning("endpoint %s %s; deliveries wait for it", self.name, failure.reason)
            self._next_probe_at = time.monotonic() + self._failing.pause_s()
        elif not given_up and self._refusing.begin():
            logger.warning("endpoint %s %s to a delivery; it is tried again", self.name, failure.reason)
        if given_up:
            logger.error(
                "endpoint %s: the delivery of %s is given up after %d attempts: %s; see `moderato webhooks dead`",
                self.name,
                claim.submission_id,
                claim.attempts,
                failure.reason,
            )


def deliver(settings: Settings, stop: threading.Event) -> None:
    """Deliver to every endpoint in the settings until `stop` is set; what is being posted is finished then.

    Raises:
        NoSecret: an endpoint has none.
        SchemaMismatch: the database has another schema than this release.
    """
    database = open_database(settings.database_url)
    chosen = settings.webhooks
    senders = [
        Sender(name, endpoint, database, max_attempts=chosen.max_attempts, stop=stop)
        for name, endpoint in chosen.endpoints.items()
    ]
    monitor = WebhookMonitor(senders, database, stop)
    metrics = settings.metrics
    serve(metrics.host, metrics.webhooks_port, monitor, {HEALTH_PATH: monitor.healthy, READY_PATH: monitor.ready})
    _wait_for_database(database, stop)
    nudges = Nudges(lambda: connect(settings))
    for sender in senders:
        sender.thread.start()
    next_purge_at = 0.0
    try:
        while not stop.is_set():
            if nudges.wait(LOOK_S / 2):
                for sender in senders:
                    sender.wake.set()
            if time.monotonic() >= next_purge_at:
                next_purge_at = time.monotonic() + PURGE_S
                _purge(database, timedelta(days=chosen.keep_days))
            dead = [sender.thread.name for sender in senders if not sender.thread.is_alive()]
            # Looked at after the threads: one may have ended because it was told to, since the loop began this round.
            if dead and not stop.is_set():
                raise RuntimeError(f"{', '.join(dead)} broke; the log says why")
    finally:
        stop.set()
        nudges.close()
        for sender in senders:
            sender.join()
        database.dispose()


def _wait_for_database(database: Engine, stop: threading.Event) -> None:
    """Both may have just been switched on."""
    outage = Outage()
    while not stop.is_set():
        try:
            return require_current(database)
        except DBAPIError as error:
            if not is_outage(error):
                raise
            if outage.begin():
                logger.warning("the database cannot be used: %s; waiting for it", without_rows(error))
            stop.wait(outage.pause_s())


def _purge(database: Engine, keep: timedelta) -> None:
    try:
        while True:
            with writing(database) as connection:
                before = database_time(connection) - keep
                if webhooks.purge(connection, finished_before=before) < webhooks.PURGED_AT_ONCE:
                    return
    except DBAPIError as error:
        if not is_outage(error):
            raise
        logger.warning("old deliveries could not be deleted (%s); the next time", without_rows(error))
