"""The promise, against a small model of it: whatever happens to a few comments, in any order.

A submission is a text under a key in a community. Each has one decision or one dead letter; what is retried waits until
it has one again, and what is purged may be submitted again. Nobody else's rows change, and `current_actions` shows the
decision on the text that was submitted last.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from redis import Redis
from sqlalchemy import Engine, text

from api_client.client import InvalidComment, ModerationClient, WaitTimeout
from config.names import LABELS, MODERATE_QUEUE, Reason
from config.policy import parse_policy
from db.durable import database_time, overdue
from db.session import reading, writing
from worker.envelope import read_envelope
from worker.job import Delivery, Item, Job, TextScores
from worker.message import parse_message, refuse_all
from worker.pipeline import Outcome, Pipeline, _letter
from worker.resending import _comment

ACTIONS = {"first text": "allow", "second text": "hide", "third text": "remove"}
POLICY = parse_policy("communities: {default: {}}")
COMMUNITIES = "default", "news"
KEYS = "1", "news/1"
"""The second in `default` is what one may take for the first in `news`."""


class Submission(NamedTuple):
    """What the promise is made for."""

    community: str
    key: str
    text: str


class Message(NamedTuple):
    """One that is on its way, or may come again."""

    headers: dict[str, Any]
    body: bytes
    of: Submission
    is_retry: bool
    """Of a text whose key belongs to another: it names the submission otherwise."""

    @property
    def sent_at(self) -> float:
        return float(self.headers["submitted_at"])


class Promise(RuleBasedStateMachine):
    """The system on one side, on the other what should be true of it."""

    def __init__(self, engine: Engine, client: ModerationClient, redis: Redis) -> None:
        super().__init__()
        self.engine, self.client, self.redis = engine, client, redis
        self.pipeline = Pipeline(None, POLICY, engine, reuse_texts=0, on_settled=list)  # type: ignore[arg-type]
        redis.flushall()
        with writing(engine) as connection:
            for table in ("decisions", "submissions", "dead_letters"):
                connection.execute(text(f"DELETE FROM {table}"))
        self.messages: list[Message] = []
        # The model.
        self.states: dict[Submission, str] = {}
        """`pending`, `decided`, `dead` with its letter, or `gone`: dead without it."""
        self.submitted_at: dict[Submission, float] = {}
        self.owners: dict[tuple[str, str], str] = {}
        """Which text a key belongs to: the first that was recorded."""

    # --- what happens to the system ---

    @rule(
        community=st.sampled_from(COMMUNITIES),
        key=st.sampled_from(KEYS),
        words=st.sampled_from([*ACTIONS]),
        durable=st.booleans(),
    )
    def submit(self, community: str, key: str, words: str, durable: bool) -> None:
        mine = Submission(community, key, words)
        try:
            submission_id = self.client.submit(words, id=key, community=community, idempotency_key=key, durable=durable)
        except InvalidComment:
            assert durable and not self.owns(mine)
            return
        assert not durable or self.owns(mine)
        self.fetch()
        if durable and self.states.get(mine, "gone") == "gone":
            self.come_to(mine, "pending", self.messages[-1].sent_at)
        outcome = {"decided": "decided", "dead": "dead", "gone": "dead"}.get(self.states.get(mine, ""))
        try:
            assert self.client.wait([submission_id], timeout_s=0) == {submission_id: outcome}
        except WaitTimeout:
            assert outcome is None

    @precondition(lambda self: self.messages)
    @rule(which=st.integers(0, 5), comes_again=st.booleans(), fails=st.booleans())
    def work(self, which: int, comes_again: bool, fails: bool) -> None:
        """A worker takes a message; where it dies before it says so, the message comes again."""
        message = self.messages[which % len(self.messages)]
        if not comes_again:
            self.messages.remove(message)
        self.take(message, fails)
        mine, state = message.of, self.states.get(message.of, "gone")
        if not self.owns(mine) and not message.is_retry:
            if state == "gone":
                self.come_to(mine, "dead", message.sent_at)
        elif state in ("gone", "pending"):
            since = self.submitted_at[mine] if state == "pending" else message.sent_at
            self.come_to(mine, "dead" if fails else "decided", since)

    @rule()
    def send_again(self) -> None:
        """A worker's sweeper: whatever is pending may have lost its message."""
        with reading(self.engine) as connection:
            rows = overdue(connection, queue=MODERATE_QUEUE, before=datetime.max.replace(tzinfo=UTC), limit=9)
        for row in rows:
            comment = _comment(row)
            body = json.dumps([[[comment]], {}, {}]).encode()
            headers = {"task": "worker.moderate", "submitted_at": row.submitted_at.timestamp()}
            self.keep(headers, body)

    @rule()
    def retry(self) -> None:
        retried = self.client.retry_dead_letters()
        assert retried.left == {}
        self.fetch()
        for mine, state in self.states.items():
            if state == "dead":
                self.states[mine] = "pending"

    @rule()
    def purge(self) -> None:
        self.client.purge_dead_letters()
        for mine, state in self.states.items():
            if state == "dead":
                self.states[mine] = "gone"

    # --- what should be true ---

    @invariant()
    def each_has_one_end(self) -> None:
        with reading(self.engine) as connection:
            rows = connection.execute(text("SELECT community, comment_id, text_sha256, state FROM submissions")).all()
            count = connection.scalar(text("SELECT COUNT(*) FROM decisions"))
            letters = connection.execute(text("SELECT community, comment_id, payload FROM dead_letters")).all()
            now = connection.execute(text("SELECT community, comment_id, action FROM current_actions")).all()
        with_letter = [Submission(row.community, row.comment_id, json.loads(row.payload)["text"]) for row in letters]
        decided = in_state(rows, "decided")
        assert decided == self.all_of("decided")
        assert in_state(rows, "pending") == self.all_of("pending")
        assert len(decided) == count
        assert sorted(with_letter) == self.all_of("dead")
        newest = {}
        for mine in sorted(decided, key=self.submitted_at.__getitem__):
            newest[mine.community, mine.key] = ACTIONS[mine.text]
        assert {(row.community, row.comment_id): row.action for row in now} == newest

    # --- how it is done ---

    def owns(self, mine: Submission) -> bool:
        return self.owners.get(mine[:2], mine.text) == mine.text

    def come_to(self, mine: Submission, state: str, since: float) -> None:
        self.states[mine], self.submitted_at[mine] = state, since
        self.owners.setdefault(mine[:2], mine.text)

    def all_of(self, state: str) -> list[Submission]:
        return sorted(mine for mine, its in self.states.items() if its == state)

    def fetch(self) -> None:
        while raw := self.redis.rpop(MODERATE_QUEUE):
            assert isinstance(raw, bytes)
            envelope = read_envelope(raw)
            self.keep(envelope["headers"], envelope["body"])

    def keep(self, headers: dict[str, Any], body: bytes) -> None:
        for comment in json.loads(body)[0][0]:
            mine = Submission(comment.get("community", "default"), comment["id"], comment["text"])
            is_retry = comment["idempotency_key"] != comment["id"]
            one = json.dumps([[[comment]], {}, {}]).encode()
            self.messages.append(Message(headers, one, mine, is_retry))

    def take(self, message: Message, fails: bool) -> None:
        with reading(self.engine) as connection:
            now = database_time(connection)
        parsed = parse_message(message.headers, message.body, now=now)
        delivery = Delivery(
            lambda: None, MODERATE_QUEUE, now, datetime.fromtimestamp(message.sent_at, UTC), comments=1, text_bytes=1
        )
        if fails:
            parsed = refuse_all(parsed, Reason.SCORING_FAILED, "")
        items = [Item(each, delivery) for each in parsed.submitted]
        rows = [
            replace(Pipeline._row(item, scored(item), POLICY, now), action=ACTIONS[message.of.text]) for item in items
        ]
        letters = [_letter(refused, delivery) for refused in parsed.refused]
        self.pipeline._record_all(Outcome([], rows, items, letters))


def scored(item: Item) -> Job:
    job = Job(item, SimpleNamespace(version="v1"))  # type: ignore[arg-type]
    job.recall(TextScores([0.1] * len(LABELS), 1))
    return job


def in_state(rows: Sequence[Any], state: str) -> list[Submission]:
    texts = {hashlib.sha256(words.encode()).hexdigest(): words for words in ACTIONS}
    return sorted(
        Submission(row.community, row.comment_id, texts[row.text_sha256]) for row in rows if row.state == state
    )


def test_whatever_happens_each_submission_has_one_end(engine: Engine, database_url: str, redis_url: str) -> None:
    with (
        Redis(unix_socket_path=redis_url.removeprefix("redis+socket://")) as redis,
        ModerationClient(redis_url, database_url) as client,
    ):
        run_state_machine_as_test(
            partial(Promise, engine, client, redis),  # type: ignore[arg-type]
            settings=settings(max_examples=30, stateful_step_count=25, suppress_health_check=[*HealthCheck]),
        )
