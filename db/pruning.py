"""Which model versions something still needs. Like `db.queries`: functions take a connection and never commit."""

from sqlalchemy import Connection, select

from db import queries, trials
from db.tables import TrainingRun


def needed_versions(connection: Connection) -> dict[str, str]:
    """The versions whose files must stay, and for each what needs it, in words.

    Of workers it knows what they said of the newest activation. Hold the activations
    (`db.activations.hold_activations`) for as long as the answer is to be true.
    """
    needed: dict[str, str] = {}
    newest = queries.active(connection)
    if newest is not None:
        needed[newest.version] = "the active version"
        # One that refused the active version goes on with another, which it may have to load again after a restart.
        for load in queries.loads(connection, newest.activation_id):
            needed.setdefault(load.version, f"{load.worker} runs it")
    if (previous := queries.previous_version(connection)) is not None:
        needed.setdefault(previous, "active before: a rollback goes back to it")
    if (trial := trials.live_trial(connection)) is not None:
        needed.setdefault(trial.version, f"on trial: {trial.kind}")
        needed.setdefault(trial.baseline, f"beside the {trial.kind} of {trial.version}")
    for parent in connection.scalars(select(TrainingRun.parent).where(TrainingRun.state == "running")):
        if parent is not None:  # it has not come so far yet, and starts from the active version
            needed.setdefault(parent, "a training that runs starts from it")
    return needed
