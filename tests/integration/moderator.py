"""A pipeline with its messages: what the intake does around it, without Redis."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from sqlalchemy import Engine

from config.names import MODERATE_QUEUE, MODERATE_TASK
from config.policy import read_policy
from config.settings import ROOT
from model.engine import Scorer, Scores
from tests.services import wait_until
from worker.job import Delivery, Item
from worker.message import parse_message
from worker.pipeline import Pipeline

POLICY = read_policy(ROOT / "config" / "policy.yaml")


class Moderator:
    """Reads messages, and notes which are acknowledged."""

    def __init__(self, scorer: Scorer, database: Engine, *, reuse_texts: int = 1_000) -> None:
        self.delivered: list[str] = []
        self.acknowledged: list[str] = []
        self.pipeline = Pipeline(
            scorer,
            POLICY,
            database,
            reuse_texts=reuse_texts,
            on_settled=self._acknowledge,
        )

    def deliver(self, message_id: str, *comments: object, queue: str = MODERATE_QUEUE) -> None:
        """One message with these comments."""
        now = datetime.now(UTC)
        body = json.dumps([[list(comments)], {}, {}]).encode()
        parsed = parse_message({"task": MODERATE_TASK, "id": message_id}, body, now=now)
        delivery = Delivery(
            acknowledge=lambda: self.acknowledged.append(message_id),
            queue=queue,
            received_at=now,
            submitted_at=now,
            comments=len(parsed.submitted) + len(parsed.refused),
            text_bytes=len(body),
        )
        self.delivered.append(message_id)
        if parsed.refused:
            self.pipeline.refuse(parsed.refused, delivery)
        if parsed.submitted:
            self.pipeline.put([Item(submitted, delivery) for submitted in parsed.submitted])

    def _acknowledge(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            delivery.acknowledge()

    def start(self) -> None:
        """What was delivered before is one window."""
        self.pipeline.start()

    def finish(self) -> None:
        """Wait until every message is acknowledged: once, since nothing is left that could do it again."""
        wait_until(lambda: len(self.acknowledged) >= len(self.delivered), what="the acknowledgement of every message")
        assert sorted(self.acknowledged) == sorted(self.delivered)


class _Wrapped:
    def __init__(
        self,
        scorer: Scorer,
        before: Callable[[Sequence[Sequence[int]]], None],
        after: Callable[[Sequence[Sequence[int]], Scores], None],
    ) -> None:
        self.description = scorer.engine.description
        self.lanes, self.pads = scorer.engine.lanes, scorer.engine.pads
        self.max_batch_tokens = scorer.engine.max_batch_tokens
        self._engine = scorer.engine
        self._before = before
        self._after = after

    def score(self, token_ids: Sequence[Sequence[int]]) -> Scores:
        self._before(token_ids)
        scores = self._engine.score(token_ids)
        self._after(token_ids, scores)
        return scores


def wrapped(
    scorer: Scorer,
    before: Callable[[Sequence[Sequence[int]]], None] = lambda token_ids: None,
    after: Callable[[Sequence[Sequence[int]], Scores], None] = lambda token_ids, scores: None,
) -> Scorer:
    """The scorer with something done around each forward pass, which may raise or change the scores."""
    return replace(scorer, engine=_Wrapped(scorer, before, after))
