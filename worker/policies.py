"""Which policy decides: follows the newest row of `policy_activations`, or where there is none the worker's own file.

Like a version's, the row is the truth, and whatever is wrong with a new policy, the old one goes on. A text says all of
it, so one that was refused is refused for good: it is of a newer release, or was stored by a client that did not check.
"""

import logging
from collections.abc import Callable

from sqlalchemy import Engine

from config.policy import Policy, PolicyError, parse_policy, read_policy
from config.settings import Settings
from db import policies
from db.policies import PolicyActivationRow
from db.session import reading
from worker.watch import Watch

logger = logging.getLogger(__name__)

Exchange = Callable[[Policy], None]

HISTORY = 100
"""Activations that a worker whose start meets a policy it cannot read looks back for one that it can."""


class PolicyFollower:
    """Keeps a worker on the active policy: `load_first` once, then `follow` from a thread of its own."""

    def __init__(self, database: Engine, settings: Settings) -> None:
        self._database = database
        self._file = settings.policy_file
        self._watch = Watch("policy", settings.worker.activation_poll_s)
        self._running = ""
        self._seen: PolicyActivationRow | None = None
        self.refusal: str | None = None
        """Why the active policy does not decide here; None where it does, or there is none."""

    def load_first(self) -> Policy:
        """The policy to start with: the active one, or where that is refused the newest before it that is not.

        Raises:
            PolicyError: none was ever activated that can be read, and neither can the worker's own policy file.
        """
        with reading(self._database) as connection:
            history = policies.activations(connection, limit=HISTORY)
            versions = list(dict.fromkeys(row.policy_version for row in history))
            texts = policies.texts(connection, versions)
        for version in versions:
            try:
                policy = _parse(version, texts[version])
            except PolicyError as error:
                if version == history[0].policy_version:
                    self._refuse(history[0], error)
                continue
            self._warn_of_file(policy, history[0])
            break
        else:
            policy = read_policy(self._file)
        if history:
            self._seen = history[0]
        self._running = policy.version
        logger.info("policy %s decides", policy.version[:12])
        return policy

    def follow(self, exchange: Exchange) -> None:
        """Watch for activations from a thread of its own.

        Args:
            exchange: is given each policy that is to decide from then on.
        """
        self._watch.start(lambda: self._look(exchange), lambda: self._running[:12])

    def look_now(self) -> None:
        """Look at the newest activation at once rather than at the next poll."""
        self._watch.look_now()

    def _look(self, exchange: Exchange) -> None:
        with reading(self._database) as connection:
            newest = policies.active(connection)
            # The whole row, not its number: a database that was restored gives the same numbers again.
            if newest is None or newest == self._seen:
                return
            version = newest.policy_version
            text = policies.texts(connection, [version])[version]
        try:
            policy = _parse(version, text)
        except PolicyError as error:
            self._refuse(newest, error)
        else:
            if version != self._running:
                exchange(policy)
                logger.info("policy %s replaces %s from the next batch on", version[:12], self._running[:12])
            self._running, self.refusal = version, None
        self._seen = newest

    def _refuse(self, newest: PolicyActivationRow, error: PolicyError) -> None:
        self.refusal = f"policy {newest.policy_version[:12]} cannot be used by this worker: {error}"
        logger.error("%s; %s goes on", self.refusal, self._running[:12] or "the newest one before it that can be used")

    def _warn_of_file(self, policy: Policy, newest: PolicyActivationRow) -> None:
        """Who changes the file and sees nothing happen finds here why."""
        try:
            if read_policy(self._file).version == policy.version:
                return
            its_state = f"{self._file} differs from it and decides nothing"
        except PolicyError as error:
            its_state = f"the file that would decide without it cannot be used: {error}"
        logger.warning(
            "policy %s decides, activated by %s; %s: `moderato policy activate %s` makes the file's the active one, "
            "`moderato policy show --text` writes the one that decides",
            policy.version[:12],
            newest.activated_by,
            its_state,
            self._file,
        )


def _parse(version: str, text: str) -> Policy:
    policy = parse_policy(text)
    if policy.version != version:
        raise PolicyError(f"its text was changed after it was stored: its hash is {policy.version}")
    return policy
