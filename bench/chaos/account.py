"""The account of a run: what was submitted, what became of it, and how soon after each fault the next was decided.

What `submit` raised an error for may have been submitted or not; it is counted apart, and its comment may still have
one decision at most.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate

from redis import Redis
from sqlalchemy import Connection, text

from bench.chaos.monkey import Strike
from bench.chaos.producer import Journal, MutatedJournal, read_journal, read_mutated_journal
from bench.chaos.system import MUTATED, PRODUCERS, ChaosSystem
from bench.system import as_time
from config.names import RETRAIN_QUEUE, WORKER_UNACKED_KEY
from db.session import reading

MOST_LISTED = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One decision."""

    submission_id: str
    comment_id: str
    text_sha256: str
    model_version: str
    submitted_at: float
    committed_at: float
    """By the commit's own time on PostgreSQL; on SQLite when it was decided, which is a moment before."""


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter."""

    reason: str
    comment_id: str | None


@dataclass(slots=True)
class Account:
    """What a run came to. Empty `broken` is the promise kept."""

    submitted: int = 0
    """Comments that `submit` returned for."""
    decided: int = 0
    dead: dict[str, int] = field(default_factory=dict)
    """Of those, dead letters by reason."""
    unknown: int = 0
    """Comments that `submit` raised for, or whose producer died while it submitted."""
    unknown_decided: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """What `submit` raised, and how often."""
    mutated: int = 0
    mutated_decided: int = 0
    mutated_dead: dict[str, int] = field(default_factory=dict)
    """Of the mutated messages' comments, by reason; a message that is refused whole counts once."""
    comments_per_s: float = 0.0
    seconds: float = 0.0
    versions: dict[str, int] = field(default_factory=dict)
    """Decisions by version."""
    refused_loads: int = 0
    training_runs: dict[str, int] = field(default_factory=dict)
    """By their state."""
    starts: dict[str, int] = field(default_factory=dict)
    """Of each process."""
    deaths: list[str] = field(default_factory=list)
    """Processes that ended though nobody had killed them."""
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    """By kind of fault: seconds from the end of each to the commit of the next decision that was submitted after it."""
    undisturbed: dict[str, list[float]] = field(default_factory=dict)
    """Those during which no other fault lasted or struck."""
    broken: dict[str, list[str]] = field(default_factory=dict)
    """Each promise that was not kept, with the ids of what broke it."""

    def breaks(self, promise: str, found: Iterable[str]) -> None:
        if listed := sorted(found):
            self.broken[promise] = listed


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What is still on its way."""

    in_redis: Mapping[str, int]
    """Messages, or leases, by key."""
    pending: Sequence[str]
    """Submissions that wait for a decision in the database."""

    def __bool__(self) -> bool:
        return bool(self.in_redis or self.pending)


def leftovers(system: ChaosSystem) -> Leftovers:
    """What is left in Redis and among the pending rows; the requests to train have a queue of their own."""
    with reading(system.engine) as connection:
        pending = connection.execute(text("SELECT submission_id FROM submissions WHERE state = 'pending'"))
        return Leftovers(_left_in_redis(system.redis), [row[0] for row in pending])


def _left_in_redis(redis: Redis) -> dict[str, int]:
    left = {}
    for key in redis.scan_iter(count=1_000):
        name = key.decode(errors="replace")
        if name in (WORKER_UNACKED_KEY, f"{WORKER_UNACKED_KEY}_index"):
            left[name] = redis.hlen(key) if name == WORKER_UNACKED_KEY else redis.zcard(key)
        elif redis.type(key) == b"list" and name.partition("\x06")[0] != RETRAIN_QUEUE and "pidbox" not in name:
            left[name] = redis.llen(key)
    return left


def take_account(system: ChaosSystem, strikes: Sequence[Strike], seconds: float) -> Account:
    """Compare what the journals say with what is in the database and in Redis."""
    journals = {name: read_journal(system.journal(name)) for name in PRODUCERS}
    mutated = read_mutated_journal(system.journal(MUTATED))
    left = leftovers(system)
    with reading(system.engine) as connection:
        rows = list(_decisions(connection, commit_times=system.postgres is not None))
        letters = {
            row[0]: Letter(row[1], row[2])
            for row in connection.execute(text("SELECT dead_letter_id, reason, comment_id FROM dead_letters"))
        }
        runs = list(connection.execute(text("SELECT state, version FROM training_runs")))
        refused_loads = connection.scalar(text("SELECT count(*) FROM version_loads WHERE error IS NOT NULL"))
    account = compare(journals, mutated, rows, letters, left, strikes)
    account.seconds = seconds
    account.comments_per_s = len(rows) / seconds
    account.training_runs = dict(Counter(run.state for run in runs))
    account.refused_loads = refused_loads or 0
    valid = {*system.sound_versions, *(run.version for run in runs if run.state == "promoted")}
    account.breaks("no row has a version that was never valid", {row.model_version for row in rows} - valid)
    account.starts = {name: process.starts for name, process in system.processes.items()}
    account.deaths = [death for process in system.processes.values() for death in process.deaths]
    account.recoveries, account.undisturbed = recoveries(strikes, rows)
    return account


def _decisions(connection: Connection, *, commit_times: bool) -> Iterable[Row]:
    committed = "pg_xact_commit_timestamp(d.xmin)" if commit_times else "d.decided_at"
    found = connection.execute(
        text(
            f"SELECT d.submission_id, s.comment_id, s.text_sha256, d.model_version, s.submitted_at, {committed} "
            "FROM decisions d JOIN submissions s ON s.submission_id = d.submission_id"
        )
    )
    for submission_id, comment_id, text_sha256, version, submitted_at, committed_at in found:
        yield Row(submission_id, comment_id, text_sha256, version, _epoch(submitted_at), _epoch(committed_at))


def _epoch(value: datetime | str) -> float:
    return as_time(value).timestamp()


# --- Pure ------------------------------------------------------------------------------------------------------------


def compare(
    journals: Mapping[str, Journal],
    mutated: MutatedJournal,
    rows: Sequence[Row],
    letters: Mapping[str, Letter],
    left: Leftovers,
    strikes: Sequence[Strike] = (),
) -> Account:
    """Set against each other what was submitted and what became of it.

    Args:
        rows: every decision.
        letters: every dead letter by its id.
        left: what is still on its way.
        strikes: tell what had just happened when a comment that is missing was submitted.
    """
    account = Account()
    returned = {sid: sha for journal in journals.values() for sid, sha in journal.returned.items()}
    returned_at = {sid: at for journal in journals.values() for sid, at in journal.returned_at.items()}
    producer = {sid: name for name, journal in journals.items() for sid in journal.returned}
    tried = {comment_id for journal in journals.values() for comment_id in journal.tried}
    decided = {row.submission_id: row for row in rows}

    def letter_of(submission_id: str) -> Letter | None:
        # A message that is set aside whole is a dead letter under its own id.
        return letters.get(submission_id) or letters.get(submission_id.rpartition(":")[0])

    account.submitted = len(returned)
    account.decided = sum(sid in decided for sid in returned)
    dead = (letter.reason for sid in returned if sid not in decided and (letter := letter_of(sid)))
    account.dead = dict(Counter(dead))
    account.unknown = len(tried)
    unknown_rows = [row for row in rows if row.comment_id in tried and row.submission_id not in returned]
    account.unknown_decided = len(unknown_rows)
    account.failures = dict(sum((Counter(journal.failures) for journal in journals.values()), Counter()))
    account.versions = dict(Counter(row.model_version for row in rows))

    account.breaks(
        "every comment that submit returned for is decided or a dead letter",
        (
            f"{sid}, returned to {producer[sid]} at {datetime.fromtimestamp(returned_at[sid]):%H:%M:%S.%f}"
            f"{_between(strikes, returned_at[sid])}, "
            f"{'its row is pending' if sid in left.pending else 'seen nowhere since'}"
            for sid in returned
            if sid not in decided and not letter_of(sid)
        ),
    )
    account.breaks(
        "no submission is both decided and a dead letter",
        (sid for sid in returned if sid in decided and letter_of(sid)),
    )
    ours = [row for row in rows if row.submission_id in returned or row.comment_id in tried]
    times_decided = Counter(row.comment_id for row in ours)
    account.breaks("no comment is decided twice", (comment for comment, times in times_decided.items() if times > 1))
    account.breaks(
        "every decision is of the text that was submitted",
        (sid for sid, sha in returned.items() if sid in decided and decided[sid].text_sha256 != sha),
    )

    from_mutated = {sid for ids in (*mutated.pushed, *mutated.unknown) for sid in ids}
    account.mutated = len(mutated.pushed)
    account.mutated_decided = sum(sid in decided for sid in from_mutated)
    account.mutated_dead = dict(Counter(letter.reason for sid in from_mutated if (letter := letter_of(sid))))
    account.breaks(
        "every mutated message is decided or a dead letter",
        (sid for ids in mutated.pushed for sid in ids if sid not in decided and not letter_of(sid)),
    )

    known = {row.submission_id for row in unknown_rows} | from_mutated | returned.keys()
    account.breaks("no decision without a submission", decided.keys() - known)
    messages = {sid.rpartition(":")[0] for sid in known}
    account.breaks(
        "no dead letter without a submission",
        (
            name
            for name, letter in letters.items()
            # A message refused whole does not name its comments, nor does a conflict the submission alone.
            if not {name, name.partition("#")[0]} & known
            and name not in messages
            and letter.comment_id not in tried
            and not (letter.comment_id is None and tried)
        ),
    )
    account.breaks("nothing is left in Redis", (f"{key}: {count}" for key, count in left.in_redis.items()))
    account.breaks("no submission is left pending", left.pending)
    return account


def _between(strikes: Sequence[Strike], at: float) -> str:
    """The faults that began before and after."""
    before = max((s for s in strikes if s.began_at <= at), key=lambda s: s.began_at, default=None)
    after = min((s for s in strikes if s.began_at > at), key=lambda s: s.began_at, default=None)
    told = ""
    if before is not None:
        told += f", {at - before.began_at:.1f} s after {before.fault.kind}"
    if after is not None:
        told += f", {after.began_at - at:.1f} s before {after.fault.kind}"
    return told


def recoveries(strikes: Sequence[Strike], rows: Sequence[Row]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds from the end of each fault to the first commit of a decision that was submitted after it, by kind; and
    those of them during which no other fault lasted or struck."""
    ordered = sorted((row.submitted_at, row.committed_at) for row in rows)
    submitted = [at for at, _ in ordered]
    first_commit = list(accumulate((at for _, at in reversed(ordered)), min))[::-1]
    every: dict[str, list[float]] = {}
    alone: dict[str, list[float]] = {}
    for strike in strikes:
        place = bisect_left(submitted, strike.ended_at)
        if place == len(ordered):
            continue
        seconds = max(first_commit[place] - strike.ended_at, 0.0)
        every.setdefault(strike.fault.kind, []).append(seconds)
        others = (other for other in strikes if other is not strike)
        if not any(o.began_at < first_commit[place] and o.ended_at > strike.began_at for o in others):
            alone.setdefault(strike.fault.kind, []).append(seconds)
    return every, alone
