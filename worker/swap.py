"""Which version scores: follows the newest row of `activations`, loads beside the running version, exchanges.

The row is the truth. Whatever goes wrong with a new version, the old one goes on and the failure is a row in
`version_loads`. The live trial is followed in the same way; one whose candidate cannot be loaded is rolled back.
"""

import logging
import time
from collections.abc import Callable

from sqlalchemy import Engine

from config.names import FORMER_STARTERS, STARTER_VERSION
from config.settings import ROOT, Settings
from db import queries, trials
from db.activations import hold_activations
from db.durable import database_time
from db.queries import ActivationRow
from db.session import reading, writing
from db.trials import TrialRow
from model.engine import Scorer, load_scorer
from model.tuning import tuned
from model.version import STARTER_DIRECTORY, VersionError, read_manifest, version_directory
from worker.trial import LiveTrial
from worker.watch import Watch

logger = logging.getLogger(__name__)

Exchange = Callable[[Scorer], None]
TryOut = Callable[[LiveTrial | None], None]

MEASUREMENTS_DIRECTORY = ROOT / "var" / "batching"
RETRY_REFUSED_S = 30.0
"""Between two attempts at an activated version that was refused: a shared directory may only be late."""


class VersionFollower:
    """Keeps a worker on the active version: `load_first` once, then `follow` from a thread of its own."""

    def __init__(self, database: Engine, settings: Settings, worker: str) -> None:
        self._database = database
        self._settings = settings
        self._worker = worker
        self._watch = Watch("version", settings.worker.activation_poll_s)
        self._running: str | None = None
        self._trial: LiveTrial | None = None
        # Whole rows, not their numbers: a database that was restored gives the same numbers again.
        self._live: TrialRow | None = None
        self._spoiled: TrialRow | None = None
        """A trial whose candidate this worker cannot load; its end may still have to be recorded."""
        self._spoiled_by = ""
        self._followed: ActivationRow | None = None
        self._refused: ActivationRow | None = None
        self._refusal = ""
        self._recorded: tuple[ActivationRow, str | None] | None = None
        """The last activation of which `version_loads` knows what came of it here, and the error if any."""
        self._retry_at = 0.0
        self.accepted = 0
        """Versions that were exchanged for the one before them."""
        self.refused = 0
        """Activations that could not be followed."""
        self.is_behind = False
        """Whether another version goes on because the active one is refused."""

    def load_first(self) -> Scorer:
        """The scorer to start with: the active version, or where that is refused the newest before it that loads.

        A database without any activation is given the starter as its first. A starter of an earlier release whose files
        are nowhere is succeeded by this one's.

        Raises:
            VersionError: no version that was ever active can be loaded.
        """
        with reading(self._database) as connection:
            history = queries.activations(connection, limit=100)
        if not history:
            history = [self._activate_starter(None, "first start")]
        elif (former := history[0].version) in FORMER_STARTERS and not self._has_directory(former):
            reason = f"{former} came with an earlier release and is not in {self._settings.versions_dir}"
            logger.warning("%s; %s of this release takes its place", reason, STARTER_VERSION)
            history.insert(0, self._activate_starter(former, reason))
        newest = history[0]
        refusals: dict[str, str] = {}
        for version in dict.fromkeys(activation.version for activation in history):
            try:
                scorer = self._load(version)
            except VersionError as error:
                logger.error("%s", error)
                refusals[version] = str(error)
                continue
            self._running = version
            if version == newest.version:
                self._follow(newest)
            else:
                logger.warning("version %s is active but refused; starting with %s", newest.version, version)
                self._refuse(newest, refusals[newest.version])
            return scorer
        raise VersionError(f"no version that was ever active can be loaded: {'; '.join(refusals.values())}")

    def follow(self, exchange: Exchange, try_out: TryOut) -> None:
        """Watch from a thread of its own for activations and trials.

        Args:
            exchange: is given each newly loaded scorer.
            try_out: is given each trial that begins, once its candidate is loaded, and None when it is over.
        """
        # The look at once matters: a trial may be live, and a comment that was its candidate's should be so again.
        self._watch.start(lambda: self._look(exchange, try_out), lambda: str(self._running))

    def look_now(self) -> None:
        """Look at the newest activation and the live trial at once rather than at the next poll."""
        self._watch.look_now()

    def _look(self, exchange: Exchange, try_out: TryOut) -> None:
        with reading(self._database) as connection:
            # In this order: a trial promoted in between is still live here, and its candidate is not loaded again.
            live = trials.live_trial(connection)
            newest = queries.active(connection)
        over = self._trial
        if over is not None and live != self._live:
            logger.info("the trial of version %s is over", over.scorer.version)
            try_out(None)
            self._trial = None
        if newest is not None:
            # A candidate that was promoted is loaded already.
            self._look_at_activation(newest, exchange, None if over is None else over.scorer)
        if live is not None and self._trial is None:
            self._begin_trial(live, try_out)

    def _look_at_activation(self, newest: ActivationRow, exchange: Exchange, candidate: Scorer | None) -> None:
        if newest == self._followed:
            return
        if newest == self._refused and time.monotonic() < self._retry_at:
            # The database may not have taken it before.
            self._record(newest, self._refusal)
            return
        if newest.version != self._running:
            if candidate is not None and candidate.version == newest.version:
                loaded = candidate
            else:
                try:
                    loaded = self._load(newest.version)
                except VersionError as error:
                    self._refuse(newest, str(error))
                    return
            logger.info("version %s replaces %s from the next batch on", loaded.version, self._running)
            exchange(loaded)
            self._running = loaded.version
            self.accepted += 1
        self._follow(newest)

    def _begin_trial(self, live: TrialRow, try_out: TryOut) -> None:
        if live != self._spoiled:
            try:
                scorer = self._load(live.version)
            except VersionError as error:
                logger.error("the %s of version %s is rolled back: %s", live.kind, live.version, error)
                self._spoiled, self._spoiled_by = live, str(error)
        if live == self._spoiled:
            # A trial that some of the workers cannot take part in shows nothing of the version.
            verdict = f"worker {self._worker} cannot load it: {self._spoiled_by}"
            with writing(self._database) as connection:
                trials.end_trial(
                    connection,
                    live.trial_id,
                    outcome="rolled_back",
                    by=self._worker,
                    verdict=verdict,
                    now=database_time(connection),
                )
            return
        logger.info(
            "%s of version %s beside %s begins: %.3g %%", live.kind, live.version, self._running, 100 * live.share
        )
        self._live, self._trial = live, LiveTrial(live.trial_id, live.share, live.kind == "shadow", scorer)
        try_out(self._trial)

    def _follow(self, activation: ActivationRow) -> None:
        self.is_behind = False
        self._record(activation, None)
        self._followed = activation

    def _refuse(self, activation: ActivationRow, refusal: str) -> None:
        self._retry_at = time.monotonic() + RETRY_REFUSED_S
        self.is_behind = True
        if activation != self._refused:
            self.refused += 1
        if (activation, refusal) != (self._refused, self._refusal):  # said once, not at every attempt
            logger.error("%s; %s goes on", refusal, self._running)
        # Before it is recorded: a version must not be loaded at every look because the database takes no rows.
        self._refused, self._refusal = activation, refusal
        self._record(activation, refusal)

    def _load(self, version: str) -> Scorer:
        """A version, loaded and measured.

        Raises:
            VersionError: anything is wrong with it, or with this machine's way to run it.
        """
        worker = self._settings.worker
        try:
            scorer = load_scorer(
                version_directory(version, self._settings.versions_dir),
                device=worker.device,
                engine=worker.engine,
                threads=worker.threads,
                expected_version=version,
            )
            return tuned(
                scorer,
                MEASUREMENTS_DIRECTORY,
                max_batch_tokens=worker.max_batch_tokens,
                window_tokens=worker.window_tokens,
            )
        except VersionError:
            raise
        except Exception as error:
            # Such as a GPU without memory for its largest passes beside the running version, or without its library.
            raise VersionError(f"version {version} cannot be run: {type(error).__name__}: {error}") from error

    def _record(self, activation: ActivationRow, error: str | None) -> None:
        """Note what came of an activation, once."""
        if self._recorded == (activation, error):
            return
        assert self._running is not None
        with writing(self._database) as connection:
            queries.record_load(
                connection,
                activation_id=activation.activation_id,
                worker=self._worker,
                version=self._running,
                error=error,
                now=database_time(connection),
            )
        self._recorded = activation, error

    def _has_directory(self, version: str) -> bool:
        try:
            version_directory(version, self._settings.versions_dir)
        except VersionError:
            return False
        return True

    def _activate_starter(self, instead_of: str | None, reason: str) -> ActivationRow:
        """Make the starter active where this version, or none, still is; what is active then is returned."""
        manifest = read_manifest(STARTER_DIRECTORY).model_dump()
        with writing(self._database) as connection:
            now = database_time(connection)
            queries.register_version(connection, manifest, now)
            hold_activations(connection)
            # Another worker may have come first while this one waited for the lock.
            newest = queries.active(connection)
            if (newest.version if newest else None) == instead_of:
                queries.activate(
                    connection, version=STARTER_VERSION, instead_of=newest, by=self._worker, reason=reason, now=now
                )
                newest = queries.active(connection)
        assert newest is not None
        return newest
