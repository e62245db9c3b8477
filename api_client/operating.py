"""The part of the client that says what decides from now on: versions, policies, trials, and trainings for more."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection

from api_client.connecting import BrokerUnavailable, Connections
from config.names import RETRAIN_QUEUE, RETRAIN_TASK
from config.policy import parse_policy
from config.settings import settings, trainer_settings
from db import policies, pruning, queries, trials
from db.activations import hold_activations
from db.durable import database_time
from db.session import DatabaseProblem


class RefusedByGate(DatabaseProblem):
    """A version that the gate refused, or that was superseded while it trained, is activated only by force."""


class Operator(Connections):
    """Trains, activates, tries out and rolls back."""

    # --- Training ------------------------------------------------------------------------------------------------

    def retrain(self, *, requested_by: str, **overrides: Any) -> str:
        """Ask the trainer for a new version, fine-tuned from the active one with everything that people corrected.

        Args:
            overrides: settings of the trainer, for this run only.

        Returns:
            The run's id, for `training_run`.

        Raises:
            SettingsError: an override is unknown or not allowed.
        """
        trainer_settings(settings(), overrides)
        run_id = str(uuid4())
        # The row first: a trainer that got the message and found no row would have nothing to claim.
        with self._writing() as connection:
            queries.request_run(
                connection,
                run_id=run_id,
                requested_by=requested_by,
                overrides=json.loads(json.dumps(overrides, default=str)),
                now=database_time(connection),
            )

        def request() -> None:
            with self._connections.acquire(block=True) as broker:
                self._app.send_task(
                    RETRAIN_TASK, [run_id], task_id=run_id, queue=RETRAIN_QUEUE, connection=broker, ignore_result=True
                )

        try:
            self._with_broker(request, "the training was not requested")
        except BrokerUnavailable as unavailable:
            with self._writing() as connection:
                queries.finish_run(
                    connection, run_id, state="failed", reason=str(unavailable), now=database_time(connection)
                )
            raise
        return run_id

    def training_run(self, run_id: str) -> queries.RunRow | None:
        """One training run, as far as it has come."""
        with self._reading() as connection:
            return queries.run(connection, run_id)

    def run_that_wrote(self, version: str) -> queries.RunRow | None:
        """The training run that a version came from; None where it came another way."""
        with self._reading() as connection:
            return queries.run_that_wrote(connection, version)

    # --- Versions ------------------------------------------------------------------------------------------------

    def versions(self) -> list[queries.VersionRow]:
        """Every registered version, newest first."""
        with self._reading() as connection:
            return queries.versions(connection)

    def register(self, manifest: Mapping[str, Any]) -> None:
        """Make a version known to the database; its files must be in the versions directory of every worker.

        Raises:
            VersionConflict: another version has this name.
        """
        with self._writing() as connection:
            queries.register_version(connection, manifest, database_time(connection))

    def active(self) -> queries.ActivationRow | None:
        """The newest activation; None before the first."""
        with self._reading() as connection:
            return queries.active(connection)

    def activations(self, *, limit: int = 10) -> list[queries.ActivationRow]:
        """The newest activations, newest first."""
        with self._reading() as connection:
            return queries.activations(connection, limit)

    def loads(self, activation_id: int) -> list[queries.LoadRow]:
        """Each worker's newest word on an activation: loaded, or refused and why."""
        with self._reading() as connection:
            return queries.loads(connection, activation_id)

    def activate(
        self, version: str, *, instead_of: queries.ActivationRow | None, by: str, reason: str, force: bool = False
    ) -> int:
        """Make a version the active one. Workers follow within seconds, without a pause; one that cannot goes on
        with the version it has, and `loads` says why.

        Args:
            instead_of: what is to be replaced, as `active` gave it; None where there was none.
            force: also where the gate refused the version.

        Returns:
            The activation's id.

        Raises:
            ActiveChanged: another version was activated after `instead_of`.
            NoSuchVersion: no version is registered under this name.
            RefusedByGate: it is worse than what was active when it was trained, or was superseded meanwhile.
        """
        with self._holding_activations() as connection:
            _require_gate(connection, version, force=force)
            activation_id = queries.activate(
                connection,
                version=version,
                instead_of=instead_of,
                by=by,
                reason=reason,
                now=database_time(connection),
            )
        self._tell_workers()
        return activation_id

    def rollback(
        self,
        *,
        instead_of: queries.ActivationRow | None,
        to: str | None = None,
        by: str,
        reason: str | None = None,
    ) -> int:
        """Go back to the version that was active before; the activation's id is returned.

        Args:
            instead_of: as in `activate`.
            to: an earlier version; without it the one before the active one.

        Raises:
            ActiveChanged: another version was activated after `instead_of`.
            AlreadyRolledBack: the active version is itself the result of going back, and `to` is None.
            NothingToRollBack: no other version was active before, or not the one that `to` names.
        """
        with self._holding_activations() as connection:
            activation_id = queries.roll_back(
                connection,
                instead_of=instead_of,
                to=to,
                by=by,
                reason=reason or "rollback",
                now=database_time(connection),
            )
        self._tell_workers()
        return activation_id

    def rollback_target(self, *, to: str | None = None) -> tuple[queries.ActivationRow, str]:
        """The newest activation, and the version to which `rollback` would go from it.

        Raises:
            AlreadyRolledBack, NothingToRollBack: as `rollback`.
        """
        with self._reading() as connection:
            return queries.rollback_target(connection, to=to, now=database_time(connection))

    @contextmanager
    def _holding_activations(self) -> Iterator[Connection]:
        """A transaction that others wait for; what time it is should be asked only here, after the wait."""
        with self._writing() as connection:
            hold_activations(connection)
            yield connection

    @contextmanager
    def holding_activations(self) -> Iterator[dict[str, str]]:
        """While the block runs nobody else activates a version or starts a trial.

        Yields:
            The versions whose files something needs, and what: see `db.pruning.needed_versions`.
        """
        with self._holding_activations() as connection:
            yield pruning.needed_versions(connection)

    # --- Policies ------------------------------------------------------------------------------------------------

    def active_policy(self) -> policies.PolicyActivationRow | None:
        """The newest activation of a policy; None where each worker decides by its own policy file."""
        with self._reading() as connection:
            return policies.active(connection)

    def policy_activations(self, *, limit: int = 10) -> list[policies.PolicyActivationRow]:
        """The newest activations of policies, newest first."""
        with self._reading() as connection:
            return policies.activations(connection, limit)

    def policy(self, prefix: str) -> tuple[str, str]:
        """Version and text of the one stored policy whose hash begins so.

        Raises:
            NoSuchPolicy: there is none, or more than one.
        """
        with self._reading() as connection:
            return policies.find(connection, prefix)

    def activate_policy(
        self, text: str, *, instead_of: policies.PolicyActivationRow | None, by: str, reason: str
    ) -> int:
        """Store a policy and make it the active one; workers decide by it within seconds.

        Args:
            instead_of: what is to be replaced, as `active_policy` gave it; None where there was none.

        Returns:
            The activation's id.

        Raises:
            ActiveChanged: another policy was activated after `instead_of`.
            PolicyError: the text is no policy; the message names the place and the value.
        """
        parse_policy(text)  # or every worker would refuse it, and the next one to start would decide by an older one
        with self._holding_activations() as connection:
            activation_id = policies.activate(
                connection, text, instead_of=instead_of, by=by, reason=reason, now=database_time(connection)
            )
        self._tell_workers()
        return activation_id

    def rollback_policy(
        self,
        *,
        instead_of: policies.PolicyActivationRow | None,
        to: str | None = None,
        by: str,
        reason: str | None = None,
    ) -> int:
        """Go back to the policy that was active before; the activation's id is returned.

        The first policy goes back to the one that decided before it, from a worker's file.

        Args:
            instead_of: as in `activate_policy`.
            to: the first digits of an earlier policy's hash; without it the one before the active one.

        Raises:
            ActiveChanged: another policy was activated after `instead_of`.
            AlreadyRolledBack: the active policy is itself the result of going back, and `to` is None.
            NothingToRollBack: no other policy was active before, or not the one that `to` names.
            NoSuchPolicy: `to` names none, or more than one.
        """
        with self._holding_activations() as connection:
            activation_id = policies.roll_back(
                connection,
                instead_of=instead_of,
                to=_policy_hash(connection, to),
                by=by,
                reason=reason or "rollback",
                now=database_time(connection),
            )
        self._tell_workers()
        return activation_id

    def rollback_policy_target(self, *, to: str | None = None) -> tuple[policies.PolicyActivationRow, str]:
        """The newest activation of a policy, and the hash of the policy to which `rollback_policy` would go from it.

        Raises:
            AlreadyRolledBack, NothingToRollBack, NoSuchPolicy: as `rollback_policy`.
        """
        with self._reading() as connection:
            return policies.rollback_target(connection, to=_policy_hash(connection, to), now=database_time(connection))

    # --- Trials --------------------------------------------------------------------------------------------------

    def start_trial(
        self, kind: trials.Kind, version: str, *, share: float, by: str, reason: str, force: bool = False
    ) -> trials.TrialRow:
        """Put a version beside the active one; workers load it within seconds.

        Args:
            kind: `canary`: it decides its share and is rolled back by itself when it leaves the bounds in the
                settings; `ab`: it decides its share; `shadow`: its scores are recorded, never acted on.
            share: of the submissions, above 0 and up to 1.
            force: also where the gate refused the version.

        Raises:
            TrialIsLive: another trial runs.
            NoSuchVersion: no version is registered under this name.
            NothingToTry: it is the active version, or none is active.
            RefusedByGate: it is worse than what was active when it was trained, or was superseded meanwhile.
            ValueError: the share.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share {share:g} must be above 0 and at most 1")
        with self._holding_activations() as connection:
            _require_gate(connection, version, force=force)
            trials.start_trial(
                connection,
                kind=kind,
                candidate=version,
                share=share,
                bounds=settings().trial.model_dump(),
                by=by,
                reason=reason,
                now=database_time(connection),
            )
            trial = trials.live_trial_of(connection, kind)
        self._tell_workers()
        return trial

    def live_trial(self) -> trials.TrialRow | None:
        """The trial that runs now."""
        with self._reading() as connection:
            return trials.live_trial(connection)

    def live_trial_of(self, kind: trials.Kind) -> trials.TrialRow:
        """The trial that runs now, if it is of this kind.

        Raises:
            NoTrial: none runs, or one of another kind.
        """
        with self._reading() as connection:
            return trials.live_trial_of(connection, kind)

    def trial_sides(self, kind: trials.Kind) -> tuple[trials.TrialRow, trials.Side, trials.Side]:
        """The newest trial of a kind, and what its candidate and the active version decided while it ran.

        Raises:
            NoTrial: there never was one.
        """
        with self._reading() as connection:
            trial = trials.newest_trial(connection, kind)
            return trial, *trials.sides(connection, trial)

    def trial_reviews(self, kind: trials.Kind) -> tuple[trials.TrialRow, trials.ReviewedSide, trials.ReviewedSide]:
        """The same, with what reviewers made of the decisions."""
        with self._reading() as connection:
            trial = trials.newest_trial(connection, kind)
            return trial, *trials.reviewed_sides(connection, trial)

    def shadow_comparison(self, *, limit: int = 10) -> tuple[trials.TrialRow, trials.ShadowComparison]:
        """The newest shadow, and its scores beside the decisions, with the comments on which they differ most.

        Raises:
            NoTrial: there never was one.
        """
        with self._reading() as connection:
            trial = trials.newest_trial(connection, "shadow")
            return trial, trials.shadow_comparison(connection, trial, limit=limit)

    def promote_trial(self, trial: trials.TrialRow, *, by: str, reason: str) -> trials.TrialRow:
        """Make the candidate of a live trial the active version; the trial as it ended is returned.

        Args:
            trial: the live one as the caller saw it.

        Raises:
            NoTrial: it is over.
        """
        with self._holding_activations() as connection:
            trials.promote_trial(connection, trial, by=by, reason=reason, now=database_time(connection))
            ended = trials.newest_trial(connection, trial.kind)
        self._tell_workers()
        return ended

    def stop_trial(self, trial: trials.TrialRow, *, by: str, reason: str) -> trials.TrialRow:
        """End a live trial; the active version decides everything again. The trial as it ended is returned.

        Args:
            trial: the live one as the caller saw it.

        Raises:
            NoTrial: it is over.
        """
        with self._holding_activations() as connection:
            now = database_time(connection)
            if not trials.end_trial(connection, trial.trial_id, outcome="stopped", by=by, verdict=reason, now=now):
                raise trials.NoTrial(f"the {trial.kind} of {trial.version} is over already")
            ended = trials.newest_trial(connection, trial.kind)
        self._tell_workers()
        return ended


def _require_gate(connection: Connection, version: str, *, force: bool) -> None:
    run = queries.run_that_wrote(connection, version)
    if run is not None and run.state == "refused" and not force:
        raise RefusedByGate(f"version {version} was refused after its training, use force to activate it: {run.reason}")


def _policy_hash(connection: Connection, prefix: str | None) -> str | None:
    return None if prefix is None else policies.find(connection, prefix)[0]
