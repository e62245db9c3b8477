"""`moderato demo`: the whole system on real comments, from the first submission to a model swapped in mid-stream."""

import csv
import fcntl
import itertools
import os
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from api_client.client import ModerationClient
from api_client.embedded import EmbeddedRedis
from cli.embedded_system import embedded_system
from cli.terminal import ACTION_STYLES, Problem, out, progress, say, shorten, shown, user
from cli.training import follow_run, verdict
from config.names import LABELS, Action
from config.settings import PREFIX, ROOT, embedded_directory, settings
from db.queries import Result, RunRow

FOLDER = ROOT / "var" / "demo"
"""Of Redis' file, the database, versions and logs: apart from those of `moderato up`, and made anew each time."""
SAMPLES = ROOT / "samples" / "comments.csv"
DECIDE_TIMEOUT_S = 600
CORRECTIONS = 8
RETRAIN = {
    "min_corrections": 0,
    "max_rows": 300,
    "max_holdout_rows": 300,
    "robustness_rows": 100,
    "max_length": 128,
    "epochs": 1,
    "learning_rate": 1e-5,
}
"""Small enough for a minute on two cores."""
LAST_PHASE = "judging"
"""Of a retrain: the new version is near, so the stream begins."""
STREAM_AT_LEAST = 600
STREAM_LIST = 10
STREAM_PAUSE_S = 0.2
LOAD_TIMEOUT_S = 120


@dataclass(frozen=True)
class Sample:
    """A real comment and what people said of it; a label that nobody judged is absent."""

    text: str
    labels: dict[str, bool]


def run_demo() -> None:
    """Start everything, show everything, stop everything.

    Raises:
        Problem: a step did not come out as it must, or another demo runs.
    """
    redis = EmbeddedRedis(Path(f"{embedded_directory()}-demo"), data=FOLDER / "redis", log=FOLDER / "log" / "redis.log")
    with only_demo(FOLDER.with_suffix(".lock")):
        if FOLDER.exists():
            shutil.rmtree(FOLDER)
        # The processes that it starts read the environment too.
        own = own_environment(os.environ, redis.url)
        os.environ.clear()
        os.environ.update(own)
        settings.cache_clear()
        _run(redis)


@contextmanager
def only_demo(lock: Path) -> Iterator[None]:
    """Hold this file while the context is open.

    Raises:
        Problem: another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+", encoding="utf-8") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.seek(0)
            raise Problem(f"a demo runs already (process {held.read()}): wait for its end, or stop it") from None
        held.truncate(0)
        held.write(str(os.getpid()))
        held.flush()
        yield


def own_environment(environment: Mapping[str, str], broker_url: str) -> dict[str, str]:
    """The same without anybody's settings, so that it comes out the same for everyone, and with the demo's places."""
    others = {name: value for name, value in environment.items() if not name.startswith(PREFIX)}
    return others | {
        "MODERATO_BROKER_URL": broker_url,
        "MODERATO_DATABASE_URL": f"sqlite:///{FOLDER / 'moderato.db'}",
        "MODERATO_VERSIONS_DIR": str(FOLDER / "versions"),
    }


def _run(redis: EmbeddedRedis) -> None:
    samples = _read_samples()
    community = "demo"  # the default policy judges it
    with embedded_system(settings(), redis, FOLDER / "log"), ModerationClient() as client:
        _heading(f"1. {len(samples):,} real comments through the queue")
        decided = _decide(client, samples, community)
        _show_batches(decided)
        _show_actions(decided)
        _show_highest(client, community)

        _heading("2. A moderator corrects clear mistakes")
        _correct(client, samples, decided)

        _heading("3. Retrain on the corrections, and change the model while comments go on streaming")
        _retrain_and_swap(client, samples, f"{community}-stream")
    _heading("Done. Everything is stopped")
    _farewell(community)


def _read_samples() -> list[Sample]:
    with SAMPLES.open(encoding="utf-8", newline="") as file:
        return [
            Sample(row["comment_text"], {label: row[label] in ("1", "1.0") for label in LABELS if row[label]})
            for row in csv.DictReader(file)
        ]


def _decide(client: ModerationClient, samples: Sequence[Sample], community: str) -> list[Result]:
    comments = ({"text": sample.text, "id": str(n), "community": community} for n, sample in enumerate(samples))
    sent = 0
    started = time.monotonic()
    with progress("submitting", len(samples)) as update:

        def on_sent(new: list[str]) -> None:
            nonlocal sent
            sent += len(new)
            update(sent)

        ids = client.submit_many(comments, on_sent=on_sent)
    with progress("deciding", len(ids)) as update:
        outcomes = client.wait(ids, timeout_s=DECIDE_TIMEOUT_S, on_progress=update)
    seconds = time.monotonic() - started
    if dead := [i for i, outcome in outcomes.items() if outcome == "dead"]:
        raise Problem(f"{len(dead)} of the samples became dead letters; `moderato dead-letters` says why")
    out.print(f"{len(ids):,} comments decided in {seconds:.1f} s: [bold]{len(ids) / seconds:.0f} comments/s[/]")
    return list(client.results(community=community))


def _show_batches(decided: Sequence[Result]) -> None:
    # A batch is one transaction, and all its decisions bear one time.
    batches = Counter((row.model_version, row.decided_at) for row in decided)
    compute_ms = {(row.model_version, row.decided_at): row.compute_ms for row in decided}
    sizes = sorted(batches.values())
    median_ms = statistics.median(compute_ms.values())
    out.print(
        f"in {len(sizes):,} batches of {sizes[0]} to {sizes[-1]} comments (median {statistics.median(sizes):.0f}, mean "
        f"{statistics.mean(sizes):.1f}), cut by length; a forward pass took {median_ms:.0f} ms (median)"
    )
    out.print(f"by version {', '.join(sorted({row.model_version for row in decided}))}")


def _show_actions(decided: Sequence[Result]) -> None:
    counts = Counter(row.action for row in decided)
    table = Table("action", "comments", "share")
    for action in Action:
        share = f"{counts[action] / len(decided):.1%}"
        table.add_row(Text(action, ACTION_STYLES[action]), f"{counts[action]:,}", share)
    out.print(table)


def _show_highest(client: ModerationClient, community: str) -> None:
    out.print("[bold yellow]What follows is abusive:[/] the comment that scored highest on each label.")
    table = Table("label", "score", "action", "comment")
    for label in LABELS:
        for row in client.results(community=community, order=label, limit=1):
            action = Text(row.action, ACTION_STYLES[row.action])
            table.add_row(label, f"{row.scores[label]:.3f}", action, Text(shorten(row.text)))
    out.print(table)


def clear_action(labels: Mapping[str, bool]) -> Action | None:
    """What people's labels of a comment call for; None where they may be mistaken, as single labels often are."""
    if sum(labels.values()) > 1:
        return Action.HIDE
    return Action.ALLOW if len(labels) == len(LABELS) and not any(labels.values()) else None


def is_clear_mistake(labels: Mapping[str, bool], decided: Action) -> bool:
    """Whether a moderator would certainly undo this decision."""
    should = clear_action(labels)
    is_hidden = decided in (Action.HIDE, Action.REMOVE)
    return (should is Action.HIDE and not is_hidden) or (should is Action.ALLOW and is_hidden)


def _correct(client: ModerationClient, samples: Sequence[Sample], decided: Sequence[Result]) -> None:
    def conflict(row: Result) -> float:
        return max(abs(row.scores[label] - known) for label, known in samples[int(row.comment_id)].labels.items())

    table = Table("the model said", "the moderator says", "comment (may be abusive)")
    mistakes = [row for row in decided if is_clear_mistake(samples[int(row.comment_id)].labels, Action(row.action))]
    for row in sorted(mistakes, key=conflict, reverse=True)[:CORRECTIONS]:
        labels = samples[int(row.comment_id)].labels
        action = clear_action(labels)
        assert action is not None
        client.review(row.submission_id, action=action, labels=labels, reviewer="demo moderator", note="demo")
        model = f"{row.action}, toxic {row.toxic:.2f}"
        person = f"{action}, {', '.join(label for label, known in labels.items() if known) or 'not toxic'}"
        table.add_row(Text(model), Text(person), Text(shorten(row.text, 80)))
    out.print(table)


def _retrain_and_swap(client: ModerationClient, samples: Sequence[Sample], community: str) -> None:
    before = client.active()
    assert before is not None  # it has just decided
    run_id = client.retrain(requested_by=user(), **RETRAIN)
    with _streaming(client, samples, community) as stream:

        def on_look(run: RunRow) -> None:
            if run.phase == LAST_PHASE:
                stream.begin()

        run = follow_run(client, run_id, on_look)
        say(verdict(run))
        if run.state == "failed":
            raise Problem("the demo ends here; var/demo/log/trainer.log says more")
        assert run.version is not None
        forced = run.state == "refused"
        stream.begin()
        if forced:
            # Some for the old version to decide; a promoted one was near when the stream began.
            while len(stream.sent()) < STREAM_AT_LEAST // 4:
                time.sleep(0.1)
            say(f"the demo activates {run.version} all the same, with force, and goes back at the end")
            client.activate(
                run.version, instead_of=client.active(), by=user(), reason="demo: in spite of the gate", force=True
            )
        _wait_until_loaded(client, stream)
    _show_stream(client, stream.sent(), community, {before.version, run.version})
    if forced:
        client.rollback(instead_of=client.active(), by=user(), reason="demo: the gate was right")
        active = client.active()
        say(f"rolled back: {active.version if active else 'nothing'} is the active version again")


@dataclass
class _Stream:
    """Comments submitted in small lists, one after the other, from a thread of its own."""

    client: ModerationClient
    comments: Iterator[dict[str, Any]]
    ids: list[str] = field(default_factory=list)
    error: Exception | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start submitting; does nothing where it has begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._submit, name="stream", daemon=True)
            self._thread.start()

    def sent(self) -> list[str]:
        """The ids so far.

        Raises:
            Exception: what ended the thread before its time.
        """
        if self.error is not None:
            raise self.error
        return self.ids

    def end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _submit(self) -> None:
        try:
            while not self._stop.wait(STREAM_PAUSE_S):
                comments = itertools.islice(self.comments, STREAM_LIST)
                self.client.submit_many(comments, on_sent=self.ids.extend)
        except Exception as error:
            self.error = error


@contextmanager
def _streaming(client: ModerationClient, samples: Sequence[Sample], community: str) -> Iterator[_Stream]:
    endless = (
        {"text": sample.text, "id": str(n), "community": community} for n, sample in enumerate(itertools.cycle(samples))
    )
    stream = _Stream(client, endless)
    try:
        yield stream
    finally:
        stream.end()


def _wait_until_loaded(client: ModerationClient, stream: _Stream) -> None:
    """Return once a worker has followed the activation and the stream has gone on for a while after it."""
    active = client.active()
    assert active is not None
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    loaded_at: int | None = None
    with progress("streaming", STREAM_AT_LEAST) as update:
        while loaded_at is None or len(stream.sent()) < max(STREAM_AT_LEAST, loaded_at + STREAM_AT_LEAST // 4):
            update(len(stream.ids), note="" if loaded_at is None else f"{active.version} is loaded")
            for load in client.loads(active.activation_id):
                if load.error is not None:
                    raise Problem(f"{load.worker} refused {active.version} and goes on: {load.error}")
                loaded_at = len(stream.ids) if loaded_at is None else loaded_at
            if time.monotonic() > deadline:
                raise Problem(
                    f"no worker followed the activation of {active.version}; var/demo/log/worker.log says more"
                )
            time.sleep(0.1)


def _show_stream(client: ModerationClient, ids: Sequence[str], community: str, versions: set[str]) -> None:
    with progress("deciding", len(ids)) as update:
        client.wait(ids, timeout_s=DECIDE_TIMEOUT_S, on_progress=update)
    rows = list(client.results(community=community, order="oldest"))
    decisions = Counter(row.submission_id for row in rows)
    if decisions.keys() != set(ids) or max(decisions.values()) != 1 or not {r.model_version for r in rows} <= versions:
        raise Problem(f"{len(ids)} comments were submitted, but {len(rows)} decisions of {len(decisions)} were made")
    out.print(f"[bold]{len(ids):,} comments submitted meanwhile, {len(rows):,} decisions: exactly one for each[/]")
    table = Table("decided by", "comments", "from", "to")
    for version in dict.fromkeys(row.model_version for row in rows):
        times = [row.decided_at for row in rows if row.model_version == version]
        table.add_row(version, f"{len(times):,}", shown(min(times)), shown(max(times)))
    out.print(table)


def _farewell(community: str) -> None:
    query = (
        "SELECT action, decided_by, COUNT(*) FROM current_actions "  # noqa: S608 (shown, never executed)
        f"WHERE community = '{community}' GROUP BY action, decided_by"
    )
    database = FOLDER / "moderato.db"
    say(f"Its database, versions and logs stay in {FOLDER} until the next demo. Two looks at them:\n")
    say(f"  python3 -c \"import sqlite3; print(*sqlite3.connect('{database}').execute(\\\"{query}\\\"), sep='\\n')\"")
    say(f"  MODERATO_DATABASE_URL=sqlite:///{database} moderato results --text")
    say("\nTo go on by hand: `moderato up`, and in another terminal `moderato submit`, `results`, `models`, …")


def _heading(text: str) -> None:
    out.print()
    out.print(Text(text, "bold"))
