"""Commands that train: `retrain` asks the trainer behind the queue, `train` does it here and now."""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.tables import BadRows, Encoding, Separator, SkipBadRows
from cli.terminal import Problem, err, print_json, progress, say, user
from cli.trainer_options import Recipe, chosen_settings, forms
from cli.versions import new_version_name

if TYPE_CHECKING:
    from api_client.client import ModerationClient
    from db.queries import RunRow

LOOK_S = 0.5
TRAINER_HINT_S = 20
CHECKPOINTS_FOLDER = ".training"
"""Beside the version to be written; gone when it is."""

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
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Option(help="Name of the new version: letters, digits, '.', '_' and '-'.", callback=new_version_name),
    ],
    parent: Annotated[str | None, typer.Option("--from", help="Fine-tune this version further.")] = None,
    config: Recipe = None,
    separator: Separator = None,
    encoding: Encoding = None,
    skip_bad_rows: SkipBadRows = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of a training that was killed.")
    ] = False,
    weights: Annotated[Literal["fp32", "fp16", "int8"], typer.Option(help="Form in which they are stored.")] = "fp16",
    output: Annotated[
        Path | None, typer.Option(help="Directory to write it to; by default its name in the versions directory.")
    ] = None,
) -> None:
    """Train a version here and now, without queue or database. `moderato activate NAME` puts it to work.

    Each setting of the trainer is an option; below are its default and the reason for it.

    Example: moderato train --name mine-1 --train my.csv --holdout my-holdout.csv --from starter-2 --epochs 1
    """
    if parent and "encoder" in ctx.obj:
        raise Problem("--encoder and --from exclude each other: a training has one start")

    from config.settings import settings

    chosen = chosen_settings(ctx.obj, config)
    directory = (output or settings().versions_dir / name).absolute()
    if os.path.lexists(directory):
        raise Problem(f"{directory} exists, and versions are never overwritten: take another --output")
    # Of the processes of a torchrun; the others do their share unheard.
    is_first = int(os.environ.get("RANK", "0")) == 0
    err.quiet = not is_first
    say("loading torch and the data")

    from cli.evaluating import show_evaluation
    from cli.offline import find_version
    from trainer.assembly import assemble
    from trainer.checkpoints import checkpoint_folder
    from trainer.dataset import from_corrections
    from trainer.recipe import from_encoder, from_version, train_version
    from trainer.sources import read_holdout
    from trainer.training import Progress

    bad = BadRows(skip_bad_rows)
    of_training, of_holdout = forms(chosen, bad.form(separator, encoding))
    held_out = read_holdout(chosen, of_holdout)
    data = assemble(chosen, from_corrections([]), held_out, of_training)
    bad.tell()
    if not len(data.training):
        raise Problem("no row is left to train on: the files are empty, or every text in them is held out too")
    folder = directory.parent / CHECKPOINTS_FOLDER / directory.name

    def report(now: Progress) -> None:
        _show_progress(update, now.phase, now.step, now.total_steps, now.loss, now.seconds_left, now.validation_auc)

    with (
        tempfile.TemporaryDirectory(prefix="moderato-training-") as temporary,
        checkpoint_folder(folder) if is_first else nullcontext(),
        _told_how_to_resume(folder, resume),
        progress("training") as update,
    ):
        start = from_version(find_version(parent)) if parent else from_encoder(chosen, Path(temporary))
        written = train_version(
            start,
            data,
            held_out,
            chosen,
            version=name,
            directory=directory,
            work_dir=folder,
            report=report,
            precision=weights,
            resume=resume,
        )
    if written is not None:
        show_evaluation(written.evaluation.as_dict())
        say(f"version {name} is in {written.directory}")
        if written.without_report is not None:
            say(f"warning: it has no report: {written.without_report}")
            say(f"`moderato report {written.directory}` writes one")
        say(
            f"next: `moderato canary start {name}` lets it decide a small share, `moderato activate {name}` everything"
            if output is None
            else f"next: copy it to {name} in the versions directory, then `moderato activate {name}`"
        )


@contextmanager
def _told_how_to_resume(folder: Path, resume: bool) -> Iterator[None]:
    """Say where a training begins, and where the next could, if this one is stopped."""
    from trainer.checkpoints import CheckpointError, last_checkpoint, step_of

    if resume:
        last = last_checkpoint(folder)
        where = "there is no checkpoint: from the beginning" if last is None else f"from step {step_of(last)}"
        say(f"{where} ({folder})")
    # SIGTERM like Ctrl-C: temporary files are removed, and people told.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except CheckpointError:
        raise
    except BaseException:
        if last := last_checkpoint(folder):
            say(f"stopped; the same command with --resume goes on from step {step_of(last)}")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


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
                err.print(
                    "no trainer has taken it yet; is one running? celery -A trainer worker -Q retrain -n trainer@%h"
                )
            time.sleep(LOOK_S)


def verdict(run: "RunRow") -> str:
    """How a run ended, in words."""
    if run.state == "promoted":
        return f"version {run.version} is active now: {run.reason}"
    if run.state == "refused":
        what = "no version was trained" if run.version is None else f"version {run.version} was not activated"
        return f"{what}: {run.reason}"
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
    update: Any,
    phase: str,
    step: int | None,
    total: int | None,
    loss: float | None,
    seconds_left: float | None,
    validation_auc: float | None = None,
) -> None:
    note = phase
    if phase == "training" and step is not None:
        # What is told first is seen in a narrow terminal too.
        note += f", step {step} of {total}"
        note += "" if seconds_left is None else f", {timedelta(seconds=round(seconds_left))} left"
        note += "" if loss is None else f", loss {loss:.4f}"
        note += "" if validation_auc is None else f", validation ROC-AUC {validation_auc:.4f}"
    update(step or 0, total, note)
