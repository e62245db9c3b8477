"""One retrain from claim to verdict: data, fine-tuning from the active version, the gate, the activation.

The run's row is its only state. Whatever happens before the last transaction changes nothing for the workers.
"""

import logging
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from celery import Celery
from sqlalchemy import Connection, Engine

from config.broker import transport_options
from config.names import ACTIVATION_CHANGED, WORKER_CONTROL_EXCHANGE
from config.settings import Settings, trainer_settings
from db import queries, reviews, trials
from db.activations import hold_activations, told
from db.durable import database_time
from db.outage import Outage
from db.queries import ActivationRow
from db.session import is_outage, open_database, reading, writing
from db.trials import TrialRow
from model.engine import load_scorer
from model.version import version_directory
from trainer.agreement import agreed_examples
from trainer.assembly import assemble
from trainer.dataset import Dataset, from_corrections
from trainer.evaluation import evaluate
from trainer.gate import judge
from trainer.recipe import from_version, train_version
from trainer.sources import read_holdout
from trainer.training import Progress

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
REPORT_EVERY_S = 0.5
BY = "trainer"

Done = TypeVar("Done")


class NothingToTrain(Exception):
    """A run that cannot begin; the message says what is missing."""


class TooFewCorrections(Exception):
    """A run that nothing is wrong with, but for what it would learn from; the message says how many there are."""


def carry_out(run_id: str, settings: Settings) -> None:
    """Carry out a requested run. Its row ends as promoted, refused or failed, with the reason.

    A version that the gate lets pass is refused all the same where something else became active, or a trial began,
    while it trained.

    A run that is not in state `requested` is left alone: its message came twice.
    """
    database = open_database(settings.database_url)
    with writing(database) as connection:
        claimed = queries.claim_run(connection, run_id, database_time(connection))
    if not claimed:
        database.dispose()
        logger.info("run %s was carried out before, or never requested; nothing to do", run_id)
        return
    stopped = threading.Event()
    heartbeat = threading.Thread(target=_show_life, args=(database, run_id, stopped), name="heartbeat", daemon=True)
    heartbeat.start()
    try:
        promoted = _retrain(run_id, settings, database)
    except queries.RunIsOver as error:
        logger.error("run %s stops: %s", run_id, error)
        return
    except TooFewCorrections as few:
        logger.warning("run %s is refused: %s", run_id, few)
        _end(database, run_id, "refused", str(few))
        return
    except Exception as error:
        logger.exception("run %s failed", run_id)
        _end(database, run_id, "failed", f"{type(error).__name__}: {error}")
        return
    finally:
        stopped.set()
        heartbeat.join()
        database.dispose()
    if promoted:
        _tell_workers(settings)


def _end(database: Engine, run_id: str, state: Literal["refused", "failed"], reason: str) -> None:
    def end(connection: Connection) -> None:
        queries.finish_run(connection, run_id, state=state, reason=reason, now=database_time(connection))

    with suppress(queries.RunIsOver):
        _write(database, run_id, end)


def _retrain(run_id: str, settings: Settings, database: Engine) -> bool:
    report = _Reporter(database, run_id)
    report(Progress("data"))
    with reading(database) as connection:
        run = queries.run(connection, run_id)
        active = queries.active(connection)
        corrections = from_corrections(agreed_examples(reviews.judged_texts(connection)))
    assert run is not None
    if active is None:
        raise NothingToTrain("no version is active yet: start a worker once, or activate a version")
    # No checkpoints: a run whose process dies has failed, and nobody goes on with it.
    chosen = trainer_settings(settings, run.overrides | {"checkpoint_steps": 0})
    if "train_files" not in run.overrides and len(corrections) < chosen.min_corrections:
        raise TooFewCorrections(
            f"{len(corrections)} comments were corrected by people, and trainer.min_corrections asks for "
            f"{chosen.min_corrections}; review more (`moderato review next`), or retrain with "
            f"--set min_corrections={len(corrections)}"
        )
    parent_directory = version_directory(active.version, settings.versions_dir)
    # Verified by loading it as a worker would; also what the candidate is compared with.
    parent = load_scorer(parent_directory, device="cpu", expected_version=active.version)

    holdout = _first(read_holdout(chosen), chosen.max_holdout_rows)
    data = assemble(chosen, corrections, holdout)
    if not len(data.training):
        raise NothingToTrain("there are no rows to train on: no corrections, and the training files are empty")
    report.note(parent=active.version, dataset_sha256=data.training.sha256)

    version = f"v{datetime.now(UTC):%Y%m%d-%H%M%S}-{run_id[:8]}"
    with tempfile.TemporaryDirectory(prefix="moderato-training-") as work_dir:
        candidate = train_version(
            from_version(parent_directory),
            data,
            holdout,
            chosen,
            version=version,
            directory=settings.versions_dir / version,
            work_dir=Path(work_dir),
            report=report,
        )
    assert candidate is not None  # this is no torchrun
    report(Progress("judging"))
    active_evaluation = evaluate(parent, holdout, robustness_rows=chosen.robustness_rows)
    judgement = judge(candidate.evaluation, active_evaluation, chosen)

    # Version, verdict and activation in one transaction: a kill leaves all of them or none.
    def give_verdict(connection: Connection) -> tuple[bool, str]:
        hold_activations(connection)
        now = database_time(connection)
        # The gate compared with what was active hours ago.
        newest, trial = queries.active(connection), trials.live_trial(connection)
        superseded = superseded_by(active, newest, trial, now)
        promoted = judgement.promoted and superseded is None
        reason = judgement.reason if superseded is None else f"superseded: {superseded}. The gate: {judgement.reason}"
        queries.register_version(connection, candidate.manifest.model_dump(), now)
        queries.finish_run(
            connection,
            run_id,
            state="promoted" if promoted else "refused",
            reason=reason,
            version=version,
            metrics={
                "candidate": candidate.evaluation.as_dict(),
                "active": active_evaluation.as_dict(),
                "verdict": judgement.as_dict(),
            },
            now=now,
        )
        if promoted:
            # The first sentence; the figures are in the run's row.
            why = f"run {run_id}: {reason.partition('. ')[0]}"
            queries.activate(connection, version=version, instead_of=newest, by=BY, reason=why, now=now)
        return promoted, reason

    promoted, reason = _write(database, run_id, give_verdict)
    logger.info("run %s: version %s: %s", run_id, version, reason)
    return promoted


def superseded_by(
    start: ActivationRow, newest: ActivationRow | None, trial: TrialRow | None, now: datetime
) -> str | None:
    """Why a candidate must not replace what is active now, whatever the gate says of it; None if nothing has changed.

    Args:
        start: what was active when the run began, and what the gate compared the candidate with.
        newest: the newest activation now.
        trial: the live trial, which an activation would end.
    """
    if newest is None or newest.version != start.version:
        # None only where somebody deleted rows, or restored an older backup.
        since = "nothing is active any more" if newest is None else told(newest, now)
        return f"the run began from version {start.version}, and meanwhile {since}"
    if trial is not None:
        return (
            f"a {trial.kind} of version {trial.version}, started by {trial.started_by}, is live and would be ended; "
            "end it, then activate the new version or retrain"
        )
    return None


def _first(holdout: Dataset, rows: int) -> Dataset:
    """The same rows every time, so that one run's figures can be held against another's."""
    return holdout.take(range(min(rows, len(holdout)))) if rows else holdout


class _Reporter:
    """Writes progress to the run's row, at most a few times a second.

    Raises:
        RunIsOver: the run was given up while it trained; it must not go on to publish anything.
    """

    def __init__(self, database: Engine, run_id: str) -> None:
        self._database = database
        self._run_id = run_id
        self._phase = ""
        self._reported_at = 0.0

    def __call__(self, progress: Progress) -> None:
        is_last = progress.step is not None and progress.step == progress.total_steps
        due = time.monotonic() >= self._reported_at + REPORT_EVERY_S
        if progress.phase == self._phase and not due and not is_last:
            return
        self._phase, self._reported_at = progress.phase, time.monotonic()
        steps = {
            "step": progress.step,
            "total_steps": progress.total_steps,
            "loss": progress.loss,
            "seconds_left": progress.seconds_left,
        }
        try:
            with writing(self._database) as connection:
                self._report(connection, phase=progress.phase, **(steps if progress.step is not None else {}))
        except Exception as error:
            # The training goes on without a database; the heartbeat says that it is away.
            if not is_outage(error):
                raise

    def note(self, **columns: object) -> None:
        """Write what must not be missing; waits for a database that is away."""
        _write(self._database, self._run_id, lambda connection: self._report(connection, **columns))

    def _report(self, connection: Connection, **columns: object) -> None:
        now = database_time(connection)
        queries.report_progress(connection, self._run_id, now=now, **columns)  # type: ignore[arg-type]


def _write(database: Engine, run_id: str, work: Callable[[Connection], Done]) -> Done:
    """Do it in one transaction; while the database is away, again after growing pauses. A training costs hours."""
    outage = Outage()
    while True:
        try:
            with writing(database) as connection:
                done = work(connection)
        except Exception as error:
            if not is_outage(error):
                raise
            if outage.begin():
                logger.error("run %s: the database cannot be written to (%s); waiting", run_id, type(error).__name__)
            time.sleep(outage.pause_s())
        else:
            if outage.end():
                logger.warning("run %s: the database can be written to again", run_id)
            return done


def _show_life(database: Engine, run_id: str, stopped: threading.Event) -> None:
    """Heartbeats, also while a phase takes long."""
    outage = Outage()
    while not stopped.wait(HEARTBEAT_S):
        try:
            with writing(database) as connection:
                queries.report_progress(connection, run_id, now=database_time(connection))
        except queries.RunIsOver:
            return
        except Exception as error:
            if outage.begin():
                logger.warning("run %s: no heartbeat can be written (%s)", run_id, type(error).__name__)
        else:
            if outage.end():
                logger.warning("run %s: heartbeats are written again", run_id)


def _tell_workers(settings: Settings) -> None:
    """The activation's row is the truth and workers look at it by themselves; this only makes it sooner."""
    try:
        with Celery(broker=settings.broker_url, set_as_current=False) as app:
            app.conf.update(
                control_exchange=WORKER_CONTROL_EXCHANGE,
                broker_transport_options=transport_options(settings.broker_options.for_celery()),
            )
            app.control.broadcast(ACTIVATION_CHANGED)
    except Exception as error:
        logger.info("workers were not told at once (%s); they will see the activation by themselves", error)
