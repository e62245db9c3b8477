"""Waiting for decisions: Redis says when to look, or what was decided, and the database where that is not heard."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from api_client.listening import BROKER_ERRORS, AnswerLine, Nudges
from db.dead_letters import DeadLetterRow
from db.queries import Result
from db.rows import WithScores
from db.session import DatabaseProblem

FIRST_LOOK_S, LONGEST_LOOK_S = 0.1, 1.0
"""Between two looks into the database while Redis may still say something."""
FIRST_BLIND_LOOK_S, LONGEST_BLIND_LOOK_S = 0.02, 0.25
"""The same where no answer can be heard."""
FIRST_REST_S, LONGEST_REST_S = 0.005, 0.1
"""After a look, whatever Redis says: while decisions stream in, each look is to find many."""
LOOKS_GROW = 1.5


class WaitTimeout(Exception):
    """Some submissions have no outcome in time; the message says how many and where to look."""

    def __init__(self, message: str, submission_ids: Sequence[str]) -> None:
        super().__init__(message)
        self.submission_ids = list(submission_ids)
        """Those that have none; they may still be decided."""


class SetAside(Exception):
    """The comment could not be decided; `letter` says why and what to do about it."""

    def __init__(self, letter: DeadLetterRow) -> None:
        super().__init__(f"{letter.dead_letter_id} was not decided ({letter.reason}): {letter.detail}")
        self.letter = letter


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict(WithScores):
    """What was decided on a comment; `ModerationClient.result` has all of its row."""

    submission_id: str
    community: str
    comment_id: str
    toxic: float
    severe_toxic: float
    obscene: float
    threat: float
    insult: float
    identity_hate: float
    action: str
    fired_label: str | None
    fired_threshold: float | None
    model_version: str
    policy_version: str
    windows: int
    decided_at: datetime


COLUMNS = [field.name for field in fields(Verdict)]


def verdict_of(result: Result) -> Verdict:
    """What the model's scores led to; reviews of it are later."""
    values = {name: getattr(result, name) for name in COLUMNS}
    return Verdict(**values | {"action": result.model_action})


def read_answer(answer: bytes, submission_id: str) -> Verdict | None:
    """The verdict in a worker's answer; None where it holds none on this submission."""
    try:
        said: Any = json.loads(answer)
        if said.get("submission_id") != submission_id:
            return None
        said["decided_at"] = datetime.fromisoformat(said["decided_at"])
        return Verdict(**{name: said[name] for name in COLUMNS})
    except (ValueError, AttributeError, KeyError, TypeError):
        return None  # of a release that answers otherwise: the database has it


def wait_for_verdict(
    submission_id: str,
    line: AnswerLine | None,
    look: Callable[[], Verdict | None],
    timeout_s: float,
) -> Verdict | None:
    """The verdict as soon as it is known; None after the timeout.

    Args:
        line: on which a worker may answer.
        look: asks the database; it may raise what else became of the submission.

    Raises:
        DatabaseProblem: the last look failed, and nobody answered in time.
    """
    deadline = time.monotonic() + timeout_s
    pause_s, longest_s = (FIRST_BLIND_LOOK_S, LONGEST_BLIND_LOOK_S) if line is None else (FIRST_LOOK_S, LONGEST_LOOK_S)
    while True:
        left_s = max(0.0, deadline - time.monotonic())
        if line is None:
            time.sleep(min(pause_s, left_s))
        else:
            try:
                answer = line.hear(min(pause_s, left_s))
            except BROKER_ERRORS:
                line, answer, longest_s = None, None, LONGEST_BLIND_LOOK_S
            if answer is not None and (verdict := read_answer(answer, submission_id)) is not None:
                return verdict
        try:
            if (found := look()) is not None:
                return found
        except DatabaseProblem:
            if not left_s:
                raise
        if not left_s:
            return None
        pause_s = min(pause_s * LOOKS_GROW, longest_s)


def wait_until_found(look: Callable[[], bool], nudges: Nudges, timeout_s: float) -> bool:
    """Look at once, and whenever something was decided, until all is found; False after the timeout.

    Args:
        look: asks the database; whether it found all.
    """
    deadline = time.monotonic() + timeout_s
    rest_s = FIRST_REST_S
    while True:
        began = time.monotonic()
        if look():
            return True
        ended = time.monotonic()
        if ended >= deadline:
            return False
        # A look for a hundred thousand takes long: no more than half of the time is spent on it.
        time.sleep(min(max(rest_s, ended - began), deadline - ended))
        rest_s = min(rest_s * LOOKS_GROW, LONGEST_REST_S)
        nudges.wait(min(LONGEST_LOOK_S, max(0.0, deadline - time.monotonic())))
