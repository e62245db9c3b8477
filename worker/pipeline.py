"""Prepare, score, decide, record: what happens to comments between intake and acknowledgement.

One thread tokenizes, one for each lane of the engine runs forward passes, one writes to the database, so that the
next texts are tokenized and the last ones written while the device is at work. The queues between them need no bounds
of their own: intake bounds how much the whole pipeline holds. A version whose engine has more lanes adds threads; no
engine runs more forward passes side by side than it has lanes.
"""

import copy
import hashlib
import logging
import os
import queue
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import count
from typing import Any, TypeVar

import numpy as np
import orjson
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from config.identity import refused_id
from config.names import ANSWERED, INTERACTIVE_QUEUE, LABELS, Reason
from config.policy import Policy
from db import dead_letters, policies
from db.dead_letters import DeadLetterRow
from db.outage import Outage
from db.queries import ScoredSubmission, record_decisions
from db.session import is_foreign_key_missing, is_outage, without_rows, writing
from db.trials import TrialScoreRow, record_trial_scores
from model.batching import padded_tokens
from model.engine import Engine as ModelEngine
from model.engine import Scorer, Scores
from model.text import Windows
from worker import clock
from worker.histogram import Histogram
from worker.job import Delivery, Item, Job, Piece
from worker.line import Line
from worker.message import Refused, refuse_comment
from worker.reuse import Reuse
from worker.trial import LiveTrial

logger = logging.getLogger(__name__)

PREPARE_COMMENTS = 64
"""Tokenized at a time: enough to use every core, few enough that the engine need not wait for them."""
RECORD_COMMENTS = 512
"""Written in one transaction, or a batch more."""
GATHER_S = 0.1
"""Waited for more to write, while more than so many comments wait for the engine."""
GATHER_BACKLOG_COMMENTS = 64
SILENT_S = 10.0
"""A database that has not answered for so long is away, whatever it may still do."""
SHADOW_COMMENTS = 256
"""Most that wait for a shadow's scores; while the engine has no time for them, further ones are passed over."""
EXIT_BROKEN = 70
"""Exit status of a worker whose engine or pipeline broke; EX_SOFTWARE of sysexits.h."""

Work = TypeVar("Work")


@dataclass(slots=True, eq=False)
class Outcome:
    """What comments came to, to be recorded in one transaction."""

    deliveries: list[Delivery]
    """One entry for each comment, or refusal, that is settled by it."""
    rows: list[ScoredSubmission] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    """The comments of `rows`, in their order."""
    letters: list[DeadLetterRow] = field(default_factory=list)
    trial_scores: list[TrialScoreRow] = field(default_factory=list)
    """Beside what the deliveries wait for."""

    def extend(self, other: "Outcome") -> None:
        self.deliveries.extend(other.deliveries)
        self.rows.extend(other.rows)
        self.items.extend(other.items)
        self.letters.extend(other.letters)
        self.trial_scores.extend(other.trial_scores)


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """What an engine made of a batch, or of a part of one."""

    pieces: list[Piece]
    scores: list[list[float]]
    """Six for each piece."""
    started_at: datetime
    seconds: float


@dataclass(slots=True)
class Counters:
    """Since the pipeline began. A shadow's share is in the time of `score` alone."""

    arrived: int = 0
    prepared: int = 0
    decided: int = 0
    set_aside: int = 0
    """Prepared, and then found that no version can score them."""
    recorded: int = 0
    decisions: Counter[tuple[str, str, str | None]] = field(default_factory=Counter)
    """Those recorded, by action, version, and the label that fired."""
    dead_letters: Counter[str] = field(default_factory=Counter)
    """By reason."""
    batches: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    queue: Histogram = field(default_factory=Histogram)
    """Of each comment: from its submission to the start of its forward pass."""
    prepare: Histogram = field(default_factory=Histogram)
    """Of at most PREPARE_COMMENTS."""
    score: Histogram = field(default_factory=Histogram)
    """Of each forward pass; of the lanes together."""
    record: Histogram = field(default_factory=Histogram)
    """Of each transaction, with the wait for a database that is away."""

    @property
    def waiting_for_score(self) -> int:
        return self.prepared - self.decided - self.set_aside


class Pipeline:
    """Takes comments, and calls `on_settled` from the recording thread with the deliveries that are through."""

    def __init__(
        self,
        scorer: Scorer,
        policy: Policy,
        database: Engine,
        *,
        reuse_texts: int,
        on_settled: Callable[[list[Delivery]], None],
    ) -> None:
        self._scorer = scorer
        self._trial: LiveTrial | None = None
        self._policy = policy
        self._database = database
        self._on_settled = on_settled
        self._unstored = [policy]
        """Policies that the database may not know yet."""
        self._stored: list[Policy] = []
        """Those that it knew when they were last written. A failover or a restore may have lost them."""
        self._outage = Outage()
        self._outage_lock = threading.Lock()
        self._writing_since: float | None = None
        """Of the transaction under way, by the monotonic clock."""
        self._stopping = threading.Event()
        self._started = time.monotonic()
        self._arrived: queue.SimpleQueue[list[Item]] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        # What the lanes share, and the lock for it.
        self._lock = threading.Lock()
        self._prepared = threading.Condition(self._lock)
        self._urgent, self._ordinary = Line(), Line()
        self._urgent_was_last = False
        self._shadow = Line()
        self._shadows: set[Job] = set()
        self._scoring_threads = 0
        self._running: Counter[ModelEngine] = Counter()
        """How many batches each engine scores now."""
        self._reuse = Reuse(reuse_texts)
        self._counters = Counters()
        self._batch_ids = count(1)

    @property
    def database_is_away(self) -> bool:
        """Whether recording waits for the database to come back."""
        return self._outage.lasts

    @property
    def scorer(self) -> Scorer:
        """The active version's."""
        return self._scorer

    def counters(self) -> Counters:
        """As they are now; a copy."""
        with self._lock:
            return copy.deepcopy(self._counters)

    def notice_silent_database(self) -> None:
        """Take a database for away that does not answer, frozen or behind a dead line: called every second or so."""
        with self._outage_lock:
            since = self._writing_since
            if since is not None and time.monotonic() - since > SILENT_S and self._outage.begin():
                logger.error("the database has not answered for %g s; decisions wait for it", SILENT_S)

    def start(self) -> None:
        for stage in (self._prepare, self._record):
            self._start(stage)
        self._add_lanes(self._scorer)

    def _start(self, stage: Callable[[], None]) -> None:
        threading.Thread(target=self._run, args=(stage,), name=stage.__name__.strip("_"), daemon=True).start()

    def _add_lanes(self, scorer: Scorer) -> None:
        """Have at least as many threads as this version's engine has lanes. Threads that no engine needs wait."""
        with self._lock:
            while self._scoring_threads < scorer.engine.lanes:
                self._start(self._score)
                self._scoring_threads += 1

    def exchange(self, scorer: Scorer) -> None:
        """Prepare with this version from now on. What is already prepared goes on with the one that prepared it."""
        self._add_lanes(scorer)
        self._scorer = scorer

    def exchange_policy(self, policy: Policy) -> None:
        """Decide by this policy from the next batch on. A comment is decided by one, which its row names."""
        # First: it is stored with the first decision by it, if not before.
        self._unstored.append(policy)
        self._policy = policy
        with self._lock:
            # Judged by this policy, their scores would be compared with decisions of the one before.
            self._shadow, self._shadows = Line(), set()

    def try_out(self, trial: LiveTrial | None) -> None:
        """Give this trial's candidate its share from now on; None ends it, and what it has prepared is its last."""
        if trial is not None:
            self._add_lanes(trial.scorer)
        self._trial = trial
        with self._lock:
            self._shadow, self._shadows = Line(), set()

    def stop_waiting(self) -> None:
        """Give up on an absent database; what is not recorded is redelivered to whoever comes next."""
        self._stopping.set()

    def put(self, items: list[Item]) -> None:
        """Comments to score. Never blocks."""
        self._counters.arrived += len(items)
        self._arrived.put(items)

    def refuse(self, refused: Sequence[Refused], delivery: Delivery) -> None:
        """What cannot be scored, to be recorded as it is. Never blocks."""
        letters = [_letter(refusal, delivery) for refusal in refused]
        self._finished.put(Outcome([delivery] * len(letters), letters=letters))

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what waits now, as plain JSON: see `config.names.PIPELINE_STATS`."""
        scorer = self._scorer
        with self._lock:
            now = self._counters
            return {
                "uptime_s": time.monotonic() - self._started,
                "version": scorer.version,
                "policy_version": self._policy.version,
                "engine": scorer.engine.description,
                "lanes": scorer.engine.lanes,
                "max_batch_tokens": scorer.batching.max_batch_tokens,
                "comments": now.recorded,
                "batches": now.batches,
                "tokens": now.tokens,
                "padded_tokens": now.padded_tokens,
                "dead_letters": now.dead_letters.total(),
                "duplicates": self._reuse.joined,
                "cache_hits": self._reuse.recalled,
                "busy_s": {"prepare": now.prepare.sum_s, "score": now.score.sum_s, "record": now.record.sum_s},
                "waiting": {
                    "prepare": now.arrived - now.prepared,
                    "score": now.waiting_for_score,
                    "record": now.decided - now.recorded,
                },
            }

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
            some = items[start : start + PREPARE_COMMENTS]
            started = time.perf_counter()
            self._counters.prepared += len(some)
            scorer, trial = self._scorer, self._trial
            if trial is None:
                self._begin([Job(item, scorer) for item in some])
            else:
                self._begin_on_trial(some, scorer, trial)
            self._counters.prepare.observe(time.perf_counter() - started)

    def _begin_on_trial(self, items: list[Item], scorer: Scorer, trial: LiveTrial) -> None:
        chosen: list[Item] = []
        others: list[Item] = []
        for item in items:
            (chosen if trial.chooses(item.submitted.submission_id) else others).append(item)
        jobs = [Job(item, trial.scorer, trial) for item in chosen]
        self._begin([Job(item, scorer) for item in (items if trial.is_shadow else others)])
        if not trial.is_shadow:
            self._begin(jobs)
        elif jobs := jobs[: max(0, SHADOW_COMMENTS - len(self._shadows))]:
            # Without reuse: whoever decides must never wait for a shadow.
            self._line_up(jobs)

    def _begin(self, jobs: list[Job]) -> None:
        """Have the texts that are new scored, all by one version, and decide those whose scores are known."""
        with self._lock:
            new, answered = self._reuse.sort(jobs)
        if answered:
            self._decide(answered)
        if new:
            self._line_up(new)

    def _line_up(self, jobs: list[Job]) -> None:
        """Tokenize the texts and add their windows to the line."""
        encoded: list[tuple[Job, Windows]] = []

        # Only the tokenizing may be repeated: a text that is added to the line twice would be decided twice.
        def encode(some: list[Job]) -> None:
            texts = [job.readable.text for job in some]
            encoded.extend(list(zip(some, some[0].scorer.encode_readable(texts), strict=True)))

        divide_on_failure(jobs, encode, self._fail)
        with self._prepared:
            for job, windows in encoded:
                job.expect(len(windows))
                self._line_for(job).add(job, windows)
            self._prepared.notify()

    def _line_for(self, job: Job) -> Line:
        if job.is_shadow:
            self._shadows.add(job)
            return self._shadow
        return self._urgent if job.items[0].delivery.queue == INTERACTIVE_QUEUE else self._ordinary

    # --- score and decide ---

    def _score(self) -> None:
        batch = self._next_batch()
        # Only the forward passes may be repeated: a text with a window added twice would never be complete.
        passes: list[ForwardPass] = []
        divide_on_failure(
            batch,
            lambda part: passes.append(_forward(part)),
            lambda piece, error: self._fail(piece.job, error),
        )
        for each in passes:
            self._take_in(each)
        engine = batch[0].job.scorer.engine
        with self._prepared:
            self._running[engine] -= 1
            if not self._running[engine]:
                del self._running[engine]  # else an engine that nobody uses any more stays in memory

    def _next_batch(self) -> list[Piece]:
        with self._prepared:
            while (line := self._next_line()) is None:
                self._prepared.wait()
            self._urgent_was_last = line is self._urgent
            self._running[line.engine] += 1
            batch = line.next_batch()
            if self._next_line() is not None:
                self._prepared.notify()
            return batch

    def _next_line(self) -> Line | None:
        """Whose turn it is. None where nothing waits, or the engines of what is next have no free lane.

        Urgent ones pass the others by, but take no more than every other turn while others wait. A shadow has its turn
        when nobody waits for a decision.
        """
        if not (self._urgent or self._ordinary):
            return self._shadow if self._can_begin(self._shadow) else None
        urgent, ordinary = self._can_begin(self._urgent), self._can_begin(self._ordinary)
        if not (urgent or ordinary):
            return None
        return self._urgent if urgent and not (ordinary and self._urgent_was_last) else self._ordinary

    def _can_begin(self, line: Line) -> bool:
        return bool(line) and self._running[line.engine] < line.engine.lanes

    def _take_in(self, done: ForwardPass) -> None:
        """Count a forward pass, and decide the comments whose last windows it scored."""
        scorer, is_shadow = done.pieces[0].job.scorer, done.pieces[0].job.is_shadow
        lengths = [len(piece.ids) for piece in done.pieces]
        windows: dict[Job, list[list[float]]] = {}
        for piece, labels in zip(done.pieces, done.scores, strict=True):
            windows.setdefault(piece.job, []).append(labels)
        ms = done.seconds * 1000
        if logger.isEnabledFor(logging.DEBUG):
            _log_batch(next(self._batch_ids), scorer.version, lengths, ms)
        with self._lock:
            self._counters.score.observe(done.seconds)
            if not is_shadow:
                self._counters.batches += 1
                self._counters.tokens += sum(lengths)
                self._counters.padded_tokens += padded_tokens(lengths, scorer.batching)
            complete = [job for job, scores in windows.items() if job.add(scores, done.started_at, ms)]
            for job in complete:
                self._end(job)
        if complete:
            (self._compare if is_shadow else self._decide)(complete)

    def _end(self, job: Job) -> None:
        if job.is_shadow:
            self._shadows.discard(job)
        else:
            self._reuse.end(job)

    def _fail(self, job: Job, error: Exception) -> None:
        """A text that its version cannot score: it is the active version's turn, or that of the dead letters."""
        if job.trial is None:
            self._refuse_poison(job, error)
        else:
            self._pass_to_active(job, error, job.trial)

    def _refuse_poison(self, job: Job, error: Exception) -> None:
        """Set a text's comments aside; unless the engine is dead, which is no comment's fault."""
        scorer = job.scorer
        try:
            _checked(scorer.score_texts(["ok"]), 1)
        except Exception as also:
            _die(f"the engine ({scorer.engine.description}) can no longer score anything", also)
        if not self._give_up(job):
            return
        with self._lock:
            self._counters.set_aside += len(job.items)
        detail = f"version {scorer.version} could not score it ({_kind(error)}), though it scores others"
        for submitted, delivery in job.items:
            refused = refuse_comment(submitted, Reason.SCORING_FAILED, detail)
            self.refuse([refused], delivery)

    def _pass_to_active(self, job: Job, error: Exception, trial: LiveTrial) -> None:
        """Count a candidate's failure, dead engine or not: nothing of it may cost a comment its decision."""
        if not self._give_up(job):
            return
        now, kind = clock.now(), _kind(error)
        ids = [item.submitted.submission_id for item in job.items]
        failures = [
            TrialScoreRow(trial_id=trial.trial_id, submission_id=each, error=kind, scored_at=now) for each in ids
        ]
        self._finished.put(Outcome([], trial_scores=failures))
        if not trial.is_shadow:
            self._begin([Job(item, self._scorer) for item in job.items])

    def _give_up(self, job: Job) -> bool:
        """Nobody joins it any more; false where another of its windows was here before."""
        with self._lock:
            if job.failed:
                return False
            job.failed = True
            self._end(job)
            return True

    def _compare(self, jobs: list[Job]) -> None:
        """Note what a shadow says; nothing is done by it."""
        now, policy = clock.now(), self._policy
        rows = [self._trial_score(item, job, policy, now) for job in jobs for item in job.items]
        self._finished.put(Outcome([], trial_scores=rows))

    @staticmethod
    def _trial_score(item: Item, job: Job, policy: Policy, now: datetime) -> TrialScoreRow:
        assert job.scores is not None and job.trial is not None
        scores: dict[str, Any] = dict(zip(LABELS, job.scores.labels, strict=True))
        return TrialScoreRow(
            trial_id=job.trial.trial_id,
            submission_id=item.submitted.submission_id,
            **scores,
            action=policy.decide(
                item.submitted.comment.community, job.scores.labels, truncated=job.readable.truncated
            ).action.value,
            scored_at=now,
        )

    def _decide(self, jobs: list[Job]) -> None:
        decided = [(item, job) for job in jobs for item in job.items]
        now, policy = clock.now(), self._policy
        rows = [self._row(item, job, policy, now) for item, job in decided]
        items = [item for item, _ in decided]
        with self._lock:
            self._counters.decided += len(rows)
        self._finished.put(Outcome([item.delivery for item in items], rows, items))

    @staticmethod
    def _row(item: Item, job: Job, policy: Policy, now: datetime) -> ScoredSubmission:
        submitted, delivery = item
        comment = submitted.comment
        assert job.scores is not None and job.started_at is not None
        truncated = job.readable.truncated
        verdict = policy.decide(comment.community, job.scores.labels, truncated=truncated)
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
            **dict(zip(LABELS, job.scores.labels, strict=True)),
            action=verdict.action.value,
            fired_label=verdict.label,
            fired_threshold=verdict.threshold,
            model_version=job.scorer.version,
            policy_version=policy.version,
            windows=job.scores.windows,
            truncated=truncated,
            # One that joined a text already on its way may have come after that one's forward pass began.
            queue_ms=max(0.0, (job.started_at - delivery.submitted_at).total_seconds() * 1000),
            compute_ms=job.compute_ms,
            decided_at=now,
            name=submitted.name,
        )

    # --- record ---

    def _record(self) -> None:
        outcome = self._finished.get()
        self._gather(outcome)
        started = time.perf_counter()
        while not self._try_to_record(outcome):
            if self._stopping.wait(self._outage.pause_s()):
                return
        with self._lock:
            self._counters.recorded += len(outcome.rows)
            self._counters.record.observe(time.perf_counter() - started)
        settled = []
        for delivery in outcome.deliveries:
            delivery.open -= 1
            if not delivery.open:
                settled.append(delivery)
        if settled:
            self._on_settled(settled)

    def _gather(self, outcome: Outcome) -> None:
        """Add what else is through; where a backlog waits, also what will be in a moment.

        A transaction of one batch takes the database nearly as long as one of several, on cores that the engine could
        use. Without a backlog nobody should wait for it, nor where a producer waits for one of them.
        """
        deadline = time.monotonic() + GATHER_S
        if any(delivery.answer_to for delivery in outcome.deliveries):
            deadline = 0.0
        while len(outcome.deliveries) + len(outcome.trial_scores) < RECORD_COMMENTS:
            # Read without the lock: a count that is out of date for a moment does no harm.
            backlog = self._counters.waiting_for_score > GATHER_BACKLOG_COMMENTS
            try:
                outcome.extend(self._finished.get(timeout=max(0.0, deadline - time.monotonic()) if backlog else 0.0))
            except queue.Empty:
                return

    def _try_to_record(self, outcome: Outcome) -> bool:
        """Whether it is committed. False while the database is away, which is said once."""
        try:
            self._record_all(outcome)
        except Exception as error:
            if not is_outage(error):
                raise
            with self._outage_lock:
                if self._outage.begin():
                    # An outage is no row's doing, so what the driver says of it quotes none.
                    said = without_rows(error) if isinstance(error, DBAPIError) else _kind(error)
                    logger.error("the database cannot be written to (%s); decisions wait for it", said)
            return False
        if self._outage.end():
            logger.warning("the database can be written to again")
        return True

    def _record_all(self, outcome: Outcome) -> None:
        try:
            self._commit(outcome.rows, outcome.items, outcome.letters, outcome.trial_scores)
        except Exception as error:
            if is_outage(error):
                raise
            if is_foreign_key_missing(error) and self._stored:
                logger.warning("the database has lost a row that others refer to; the policies are stored again")
                self._unstored.extend(self._stored)
                self._stored = []
                self._record_all(outcome)
                return
            if outcome.trial_scores:
                # Nobody waits for them, so they are the first to go.
                logger.warning("the database refused a batch with scores of a trial (%s); without them", _kind(error))
                outcome.trial_scores = []
                self._record_all(outcome)
                return
            if not outcome.rows:
                raise
            # One row that the database refuses must not take its batch along.
            rows = list(zip(outcome.rows, outcome.items, strict=True))
            divide_on_failure(rows, self._commit_part, self._refuse_row)
            self._commit([], [], outcome.letters)

    def _commit_part(self, part: list[tuple[ScoredSubmission, Item]]) -> None:
        self._commit([row for row, _ in part], [item for _, item in part], [])

    def _refuse_row(self, refused_row: tuple[ScoredSubmission, Item], error: Exception) -> None:
        _, (submitted, delivery) = refused_row
        detail = f"the database refused its row ({_kind(error)})"
        letter = _letter(refuse_comment(submitted, Reason.RECORDING_FAILED, detail), delivery)
        try:
            self._commit([], [], [letter])
        except Exception as also:
            if is_outage(also):
                raise
            # It refuses the row of a dead submission, too. As of what cannot be read, there is only a letter then.
            name = submitted.name or submitted.submission_id
            self._commit([], [], [replace(letter, dead_letter_id=refused_id(name), name=None, text_sha256=None)])

    def _commit(
        self,
        rows: list[ScoredSubmission],
        items: list[Item],
        letters: list[DeadLetterRow],
        trial_scores: Sequence[TrialScoreRow] = (),
    ) -> None:
        self._writing_since = time.monotonic()
        try:
            with writing(self._database) as connection:
                unstored = self._unstored[:]
                for policy in unstored:
                    policies.store(connection, policy.text, now=clock.now())
                done = record_decisions(connection, rows)
                conflicts = [_conflict(items[index]) for index in sorted(done.conflicts)]
                letters = dead_letters.record(connection, [*letters, *conflicts])
                record_trial_scores(connection, trial_scores)
        finally:
            with self._outage_lock:
                self._writing_since = None
        self._stored += unstored
        del self._unstored[: len(unstored)]
        self._count(rows if len(done.recorded) == len(rows) else [rows[index] for index in done.recorded], letters)
        for index, (_, delivery) in enumerate(items):
            # One that was there before stays as it is, and may say otherwise.
            if delivery.answer_to is not None and index in done.recorded:
                delivery.answers.append(_answer(rows[index]))

    def _count(self, decided: list[ScoredSubmission], letters: list[DeadLetterRow]) -> None:
        """What has just been committed."""
        now = self._counters
        with self._lock:
            now.decisions.update([(row.action, row.model_version, row.fired_label) for row in decided])
            now.dead_letters.update([letter.reason for letter in letters])
            for row in decided:
                now.queue.observe(row.queue_ms / 1000)
        for letter in letters:
            about = {"submission_id": letter.dead_letter_id, "reason": letter.reason}
            logger.info("%r is a dead letter: %s", letter.dead_letter_id, letter.reason, extra=about)


def _forward(pieces: list[Piece]) -> ForwardPass:
    started_at, started = clock.now(), time.perf_counter()
    scores = pieces[0].job.scorer.engine.score([piece.ids for piece in pieces])
    seconds = time.perf_counter() - started
    return ForwardPass(pieces, _checked(scores, len(pieces)).tolist(), started_at, seconds)


def _log_batch(batch_id: int, version: str, lengths: list[int], ms: float) -> None:
    about = {"batch_id": batch_id, "version": version, "texts": len(lengths), "tokens": sum(lengths), "ms": ms}
    logger.debug("batch %d: %d texts, %d tokens, %.1f ms", batch_id, len(lengths), sum(lengths), ms, extra=about)


def _checked(scores: Scores, count: int) -> Scores:
    if scores.shape != (count, len(LABELS)) or not np.isfinite(scores).all():
        raise FloatingPointError("the engine gave no finite score")
    return scores


def _answer(row: ScoredSubmission) -> bytes:
    """What a producer that waits is told: the decision, without the text."""
    return orjson.dumps({name: getattr(row, name) for name in ANSWERED})


def _conflict(item: Item) -> DeadLetterRow:
    refused = refuse_comment(
        item.submitted,
        Reason.IDEMPOTENCY_CONFLICT,
        f"the id {item.submitted.submission_id!r} belongs to another text, whose outcome stands: use a new idempotency "
        "key for an edited comment",
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
        payload_sha256=refused.payload_sha256,
        text_sha256=refused.text_sha256,
        community=refused.community,
        comment_id=refused.comment_id,
        author=refused.author,
        received_at=delivery.received_at,
        name=refused.name,
        submitted_at=delivery.submitted_at,
    )


def divide_on_failure(
    batch: list[Work], work: Callable[[list[Work]], None], fail_alone: Callable[[Work, Exception], None]
) -> None:
    """Do the work on a batch; where it fails, on its halves.

    So a batch too large for the device's memory goes on in parts, and one poison text fails alone. A database that is
    away fails all of it, which is raised.
    """
    try:
        work(batch)
    except Exception as error:
        if is_outage(error):
            raise
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
