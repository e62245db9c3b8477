"""Commands that train: `retrain` asks the trainer behind the queue, `train` does it here and now."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.terminal import Problem, err, print_json, progress, say, user

if TYPE_CHECKING:
    from api_client.client import ModerationClient
    from db.queries import RunRow

LOOK_S = 0.5
TRAINER_HINT_S = 20

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the trainer; may be repeated.")
]


def retrain(
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", "--wait", help="Watch it to its end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The run as one JSON object.")] = False,
) -> None:
    """Fine-tune the active version with what people corrected; it is activated only where the gate finds it no worse.

    Example: moderato retrain --set epochs=1 --set max_rows=2000 --follow
    """
    from api_client.client import ModerationClient

    with ModerationClient() as client:
        run_id = client.retrain(requested_by=user(), **parse_overrides(overrides))
        run = follow_run(client, run_id) if follow else client.training_run(run_id)
    assert run is not None  # it was just written
    if as_json:
        print_json(run)
    elif follow:
        say(verdict(run))
    else:
        say(f"requested: run {run_id}; `moderato status` shows how it goes")
    if run.state == "failed":
        raise typer.Exit(1)


def train(
    name: Annotated[str, typer.Option(help="Name of the new version.")],
    files: Annotated[
        list[Path] | None, typer.Option("--train", exists=True, dir_okay=False, help="Training CSV; may be repeated.")
    ] = None,
    holdout: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="CSV that it is measured on.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Start from this encoder: a hub name or a directory.")] = None,
    parent: Annotated[str | None, typer.Option("--from", help="Fine-tune this version further.")] = None,
    overrides: Overrides = None,
    precision: Annotated[Literal["fp32", "fp16", "int8"], typer.Option(help="Of the stored weights.")] = "fp16",
    output: Annotated[
        Path | None, typer.Option(help="Directory to write it to; by default its name in the versions directory.")
    ] = None,
) -> None:
    """Train a version here and now, without queue or database. `moderato activate NAME` puts it to work.

    Example: moderato train --name mine-1 --train my.csv --holdout my-holdout.csv --from starter-1 --set epochs=1
    """
    if encoder and parent:
        raise Problem("--encoder and --from exclude each other: a training has one start")

    from config.settings import settings, trainer_settings

    chosen = trainer_settings(settings(), parse_overrides(overrides) | ({"encoder": encoder} if encoder else {}))
    say("loading torch and the data")

    from cli.offline import find_version, show_evaluation
    from trainer.dataset import concatenate, from_corrections, read_csv, training_set
    from trainer.recipe import from_encoder, from_version, train_version
    from trainer.training import Progress

    held_out = read_csv(holdout or chosen.holdout_file)
    rows = training_set(
        concatenate([read_csv(Path(path)) for path in files or chosen.train_files]),
        from_corrections([]),
        held_out,
        max_rows=chosen.max_rows,
        correction_repeats=chosen.correction_repeats,
        seed=chosen.seed,
    )
    if not len(rows):
        raise Problem("no row is left to train on: the files are empty, or every text in them is held out too")
    with tempfile.TemporaryDirectory(prefix="moderato-training-") as directory, progress("training") as update:
        work_dir = Path(directory)
        start = from_version(find_version(parent)) if parent else from_encoder(chosen, work_dir)

        def report(now: Progress) -> None:
            _show_progress(update, now.phase, now.step, now.total_steps, now.loss, now.seconds_left)

        written = train_version(
            start,
            rows,
            held_out,
            chosen,
            version=name,
            directory=output or settings().versions_dir / name,
            work_dir=work_dir,
            report=report,
            precision=precision,
        )
    say(f"version {name} is in {written.directory}")
    show_evaluation(written.evaluation.as_dict())


def follow_run(
    client: "ModerationClient", run_id: str, on_look: "Callable[[RunRow], object] | None" = None
) -> "RunRow":
    """Show a run's progress until its verdict. `on_look` is given its row each time it was looked at."""
    waits_since = time.monotonic()
    hinted = False
    with progress("retraining") as update:
        while True:
            run = client.training_run(run_id)
            assert run is not None
            if on_look is not None:
                on_look(run)
            if run.state in ("promoted", "refused", "failed"):
                return run
            phase = run.phase or "waiting for the trainer"
            _show_progress(update, phase, run.step, run.total_steps, run.loss, run.seconds_left)
            if run.state == "requested" and not hinted and time.monotonic() - waits_since > TRAINER_HINT_S:
                hinted = True
                err.print("no trainer has taken it yet; is one running? celery -A trainer worker -Q retrain")
            time.sleep(LOOK_S)


def verdict(run: "RunRow") -> str:
    """How a run ended, in words."""
    if run.state == "promoted":
        return f"version {run.version} is active now: {run.reason}"
    if run.state == "refused":
        return f"the gate refused version {run.version}: {run.reason}"
    return f"the run failed and changed nothing: {run.reason}"


def parse_overrides(overrides: list[str] | None) -> dict[str, Any]:
    """`NAME=VALUE` strings as settings; values are read as YAML."""
    import yaml

    parsed = {}
    for override in overrides or []:
        name, equals, value = override.partition("=")
        if not equals:
            raise Problem(f"--set {override} must be NAME=VALUE, for example --set epochs=1")
        try:
            parsed[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise Problem(f"--set {override}: the value is not YAML") from None
    return parsed


def _show_progress(
    update: Any, phase: str, step: int | None, total: int | None, loss: float | None, seconds_left: float | None
) -> None:
    note = phase
    if phase == "training" and step is not None:
        note += f", step {step} of {total}"
        note += "" if loss is None else f", loss {loss:.4f}"
        note += "" if seconds_left is None else f", {seconds_left:.0f} s left"
    update(step or 0, total, note)
