"""Prepare, score, decide, record: what happens to comments between intake and acknowledgement.

Three threads joined by queues: one tokenizes, one runs the engine, one writes to the database, so that the next
batch is tokenized and the last one written while the device runs this one. The queues need no bounds of their own:
intake bounds how much the whole pipeline holds.
"""

import hashlib
import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np
from sqlalchemy import Connection, Engine

from config.names import LABELS, Reason
from db.queries import DeadLetterRow, ScoredSubmission, record_dead_letters, record_decisions, store_policy
from db.session import is_outage, writing
from model.batching import plan_batches
from model.engine import Scorer, Scores
from model.policy import Policy
from model.text import EncodedText
from worker.message import Refused, Submitted, refuse_comment

logger = logging.getLogger(__name__)

PREPARE_COMMENTS = 64
"""Tokenized at a time: enough to use every core, few enough that the engine need not wait for them."""
FIRST_RETRY_S, LAST_RETRY_S = 0.5, 30.0
"""Pauses while the database is away, doubling from the first to the last."""
EXIT_BROKEN = 70
"""Exit status of a worker whose engine or pipeline broke; EX_SOFTWARE of sysexits.h."""


@dataclass(slots=True, eq=False)
class Delivery:
    """One message on its way: it may be acknowledged when `open` reaches nothing.

    `open` is counted down by the recorder alone.
    """

    acknowledge: Callable[[], None]
    queue: str
    received_at: datetime
    submitted_at: datetime
    comments: int
    text_bytes: int
    open: int = field(init=False)

    def __post_init__(self) -> None:
        self.open = self.comments


@dataclass(slots=True, eq=False)
class Item:
    """One comment on its way, and the version whose tokenizer prepared it and which must therefore score it."""

    submitted: Submitted
    delivery: Delivery
    encoded: EncodedText | None = None
    scorer: Scorer | None = None

    @property
    def text(self) -> str:
        return self.submitted.comment.text


@dataclass(slots=True, eq=False)
class Outcome:
    """What a batch came to, to be recorded in one transaction."""

    deliveries: list[Delivery]
    """One entry for each comment, or refusal, that is settled by it."""
    rows: list[ScoredSubmission] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    """The comments of `rows`, in their order."""
    letters: list[DeadLetterRow] = field(default_factory=list)


class Pipeline:
    """Takes comments, and calls `on_settled` from the recording thread with the deliveries that are through."""

    def __init__(
        self,
        scorer: Scorer,
        policy: Policy,
        database: Engine,
        *,
        max_batch_tokens: int,
        window_batches: int,
        on_settled: Callable[[list[Delivery]], None],
    ) -> None:
        self._scorer = scorer
        self._policy = policy
        self._database = database
        self._max_batch_tokens = max_batch_tokens
        self._window_batches = window_batches
        self._on_settled = on_settled
        self._policy_stored = False
        self._outage = threading.Event()
        self._stopping = threading.Event()
        self._arrived: queue.SimpleQueue[list[Item]] = queue.SimpleQueue()
        self._prepared: queue.SimpleQueue[list[Item]] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    @property
    def database_is_away(self) -> bool:
        """Whether recording waits for the database to come back."""
        return self._outage.is_set()

    def start(self) -> None:
        for stage in (self._prepare, self._score, self._record):
            threading.Thread(target=self._run, args=(stage,), name=stage.__name__.strip("_"), daemon=True).start()

    def exchange(self, scorer: Scorer) -> None:
        """Prepare with this version from now on. What is already prepared goes on with the one that prepared it."""
        self._scorer = scorer

    def stop_waiting(self) -> None:
        """Give up on an absent database; what is not recorded is redelivered to whoever comes next."""
        self._stopping.set()

    def put(self, items: list[Item]) -> None:
        """Comments to score. Never blocks."""
        self._arrived.put(items)

    def refuse(self, refused: Sequence[Refused], delivery: Delivery) -> None:
        """What cannot be scored, to be recorded as it is. Never blocks."""
        letters = [_letter(refusal, delivery) for refusal in refused]
        self._finished.put(Outcome([delivery] * len(letters), letters=letters))

    def _run(self, stage: Callable[[], None]) -> None:
        try:
            while True:
                stage()
        except BaseException as error:
            # A pipeline without one of its stages would hold messages for ever. Nothing unrecorded was
            # acknowledged, so all of it comes back.
            _die(f"the {stage.__name__.strip('_')} stage broke", error)

    # --- prepare ---

    def _prepare(self) -> None:
        items = self._arrived.get()
        while len(items) < PREPARE_COMMENTS and not self._arrived.empty():
            items.extend(self._arrived.get())
        for start in range(0, len(items), PREPARE_COMMENTS):
            divide_on_failure(items[start : start + PREPARE_COMMENTS], self._encode, self._refuse_poison)

    def _encode(self, chunk: list[Item]) -> None:
        scorer = self._scorer
        for item, encoded in zip(chunk, scorer.encode([item.text for item in chunk]), strict=True):
            item.encoded, item.scorer = encoded, scorer
        self._prepared.put(chunk)

    # --- score and decide ---

    def _score(self) -> None:
        """One window: everything that came while the last one was scored, up to several batches' worth."""
        window = self._prepared.get()
        tokens = sum(map(_length, window))
        while tokens < self._window_batches * self._max_batch_tokens and not self._prepared.empty():
            chunk = self._prepared.get()
            tokens += sum(map(_length, chunk))
            window.extend(chunk)
        # Two versions only meet in a window while they are being exchanged.
        for scorer in dict.fromkeys(item.scorer for item in window):
            assert scorer is not None
            same = [item for item in window if item.scorer is scorer]
            for batch in plan_batches(list(map(_length, same)), self._max_batch_tokens):
                divide_on_failure([same[index] for index in batch], self._score_batch, self._refuse_poison)

    def _score_batch(self, batch: list[Item]) -> None:
        scorer = batch[0].scorer
        assert scorer is not None
        started_at, started = datetime.now(UTC), time.perf_counter()
        scores = _checked(scorer.engine.score([item.encoded.ids for item in batch if item.encoded]), len(batch))
        compute_ms = (time.perf_counter() - started) * 1000
        rows = [
            self._decide(item, scorer.version, row, started_at, compute_ms)
            for item, row in zip(batch, scores.tolist(), strict=True)
        ]
        self._finished.put(Outcome([item.delivery for item in batch], rows, batch))

    def _refuse_poison(self, item: Item, error: Exception) -> None:
        """Set one comment aside; unless the engine is dead, which is no comment's fault."""
        scorer = item.scorer or self._scorer
        try:
            _checked(scorer.score_texts(["ok"]), 1)
        except Exception as also:
            _die(f"the engine ({scorer.engine.description}) can no longer score anything", also)
        detail = f"version {scorer.version} could not score it ({_kind(error)}), though it scores others"
        refused = refuse_comment(item.submitted.submission_id, item.submitted.comment, Reason.SCORING_FAILED, detail)
        self.refuse([refused], item.delivery)

    def _decide(
        self, item: Item, version: str, scores: list[float], started_at: datetime, compute_ms: float
    ) -> ScoredSubmission:
        submitted, comment, delivery = item.submitted, item.submitted.comment, item.delivery
        verdict = self._policy.decide(comment.community, scores)
        return ScoredSubmission(
            submission_id=submitted.submission_id,
            community=comment.community,
            comment_id=comment.id or submitted.submission_id,
            author=comment.author,
            text=comment.text if comment.store_text else None,
            text_sha256=hashlib.sha256(comment.text.encode()).hexdigest(),
            language=comment.language,
            context=comment.context,
            created_at=comment.created_at,
            submitted_at=delivery.submitted_at,
            **dict(zip(LABELS, scores, strict=True)),
            action=verdict.action.value,
            fired_label=verdict.label,
            fired_threshold=verdict.threshold,
            model_version=version,
            policy_version=self._policy.version,
            windows=1,
            truncated=item.encoded is not None and item.encoded.truncated,
            queue_ms=max(0.0, (started_at - delivery.submitted_at) / timedelta(milliseconds=1)),
            compute_ms=compute_ms,
            # The whole batch carries one time: that of its forward pass' end.
            decided_at=started_at + timedelta(milliseconds=compute_ms),
        )

    # --- record ---

    def _record(self) -> None:
        outcome = self._finished.get()
        pause_s = FIRST_RETRY_S
        while not self._try_to_record(outcome):
            if self._stopping.is_set():
                return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_RETRY_S)
        settled = []
        for delivery in outcome.deliveries:
            delivery.open -= 1
            if not delivery.open:
                settled.append(delivery)
        if settled:
            self._on_settled(settled)

    def _try_to_record(self, outcome: Outcome) -> bool:
        """Whether it is committed. False while the database is away, which is said once."""
        try:
            try:
                self._commit(outcome.rows, outcome.items, outcome.letters)
            except Exception as error:
                if is_outage(error):
                    raise
                # One row that the database refuses must not take its batch along.
                self._record_singly(outcome, error)
        except Exception as error:
            if not is_outage(error):
                raise
            if not self._outage.is_set():
                logger.error("the database cannot be written to (%s); decisions wait for it", _kind(error))
                self._outage.set()
            return False
        if self._outage.is_set():
            logger.warning("the database can be written to again")
            self._outage.clear()
        return True

    def _record_singly(self, outcome: Outcome, error: Exception) -> None:
        logger.warning("the database refused a batch of %d (%s); trying one by one", len(outcome.rows), _kind(error))
        for row, item in zip(outcome.rows, outcome.items, strict=True):
            try:
                self._commit([row], [item], [])
            except Exception as refusal:
                if is_outage(refusal):
                    raise
                detail = f"the database refused its row ({_kind(refusal)})"
                refused = refuse_comment(row.submission_id, item.submitted.comment, Reason.RECORDING_FAILED, detail)
                self._commit([], [], [_letter(refused, item.delivery)])
        for letter in outcome.letters:
            self._commit([], [], [letter])

    def _commit(self, rows: list[ScoredSubmission], items: list[Item], letters: list[DeadLetterRow]) -> None:
        with writing(self._database) as connection:
            self._store_policy_once(connection)
            conflicts = record_decisions(connection, rows).conflicts
            record_dead_letters(connection, [*letters, *(_conflict(items[index]) for index in sorted(conflicts))])
        self._policy_stored = True

    def _store_policy_once(self, connection: Connection) -> None:
        if not self._policy_stored:
            store_policy(connection, self._policy.text, now=datetime.now(UTC))


def _length(item: Item) -> int:
    assert item.encoded is not None, "an item is scored before it is prepared; this is a bug"
    return len(item.encoded.ids)


def _checked(scores: Scores, count: int) -> Scores:
    if scores.shape != (count, len(LABELS)) or not np.isfinite(scores).all():
        raise FloatingPointError("the engine gave no finite score")
    return scores


def _conflict(item: Item) -> DeadLetterRow:
    submission_id, comment = item.submitted.submission_id, item.submitted.comment
    text_sha256 = hashlib.sha256(comment.text.encode()).hexdigest()
    refused = refuse_comment(
        # Not under the id alone, which is that of the submission that was decided.
        f"{submission_id}#{text_sha256[:16]}",
        comment,
        Reason.IDEMPOTENCY_CONFLICT,
        f"the idempotency key {submission_id!r} was used before with another text; "
        "the first one's decision stands: use a new key for an edited comment",
    )
    return _letter(refused, item.delivery)


def _letter(refused: Refused, delivery: Delivery) -> DeadLetterRow:
    return DeadLetterRow(
        dead_letter_id=refused.dead_letter_id,
        queue=delivery.queue,
        reason=refused.reason.value,
        detail=refused.detail,
        payload=refused.payload,
        payload_bytes=refused.payload_bytes,
        received_at=delivery.received_at,
    )


def divide_on_failure(
    batch: list[Item], work: Callable[[list[Item]], None], fail_alone: Callable[[Item, Exception], None]
) -> None:
    """Do the work on a batch; where it fails, on its halves.

    So a batch too large for the device's memory goes on in parts, and one poison comment fails alone.
    """
    try:
        work(batch)
    except Exception as error:
        if len(batch) == 1:
            fail_alone(batch[0], error)
            return
        logger.warning("a batch of %d failed (%s); trying its halves", len(batch), _kind(error))
        half = len(batch) // 2
        divide_on_failure(batch[:half], work, fail_alone)
        divide_on_failure(batch[half:], work, fail_alone)


def _die(what: str, error: BaseException) -> None:
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.critical("%s (%s); this worker ends, and what it holds returns to the queue\n%s", what, _kind(error), where)
    logging.shutdown()
    os._exit(EXIT_BROKEN)


def _kind(error: BaseException) -> str:
    """The error's class, and its cause's. Its text stays out of logs and letters: drivers quote the row in it."""
    cause = getattr(error, "orig", None)
    return type(error).__name__ + (f": {type(cause).__name__}" if cause else "")
