"""Checkpoints of a training that may be killed: which are whole, whose they are, and who may write them.

A folder of them belongs to one training. `run.json` says by what it was begun; a resume that was begun by anything else
is refused, because it would end in weights that neither run describes. transformers' Trainer writes a checkpoint file
by file, so one is whole only when a mark of ours says so.

The weights are safetensors. The optimizer's and the random generators' states are torch's own files, which the Trainer
reads with `weights_only`: without running code. They are private to this user all the same (mode 0700).
"""

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.version import sync

RUN_FILE = "run.json"
LOCK_FILE = "lock"
COMPLETE_FILE = "complete"
ARGUMENTS_FILE = "training_args.bin"


class CheckpointError(Exception):
    """A training that cannot begin where its checkpoints are; the message says what is there and what to do."""


@contextmanager
def checkpoint_folder(folder: Path) -> Iterator[Path]:
    """The folder of one training, held by this process alone, and removed at its end.

    A checkpoint that an exception or a kill leaves in it is there for a resume.

    Raises:
        CheckpointError: another process trains there, or the folder is a link to another place.
    """
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link; remove it, or choose another name: its target is not touched")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it, however this process ends
        except BlockingIOError:
            raise CheckpointError(f"another process is training in {folder}; choose another name, or wait") from None
        try:
            yield folder
        except BaseException:
            if last_checkpoint(folder) is None:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    return max((mark.parent for mark in folder.glob(f"checkpoint-*/{COMPLETE_FILE}")), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """After which step of the training it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def begin(folder: Path, run: Mapping[str, Any], *, resume: bool, writes: bool) -> Path | None:
    """Settle where a training begins: at a checkpoint, or at the beginning.

    Args:
        run: everything that determines the weights it will end in, as JSON values.
        resume: go on from the last checkpoint where there is one.
        writes: this process keeps the folder; the others of a torchrun only look.

    Raises:
        CheckpointError: checkpoints are there and `resume` was not said, or they are of another run.
    """
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        if writes:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_others(folder, set())
            (folder / RUN_FILE).write_text(json.dumps(run, indent=2), encoding="utf-8")
        return None
    if not resume:
        raise CheckpointError(
            f"{folder} holds an unfinished training, up to step {step_of(checkpoint)}: go on from there with --resume, "
            "or remove that folder to begin anew"
        )
    try:
        begun_by = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / RUN_FILE} cannot be read ({error}); remove {folder} to begin anew") from None
    if differences := _differences(begun_by, json.loads(json.dumps(run))):
        raise CheckpointError(
            f"the training in {folder} was begun by something else, so it cannot be gone on with: "
            f"{'; '.join(differences)}. Put that back, or remove the folder to begin anew"
        )
    return checkpoint


def mark_complete(checkpoint: Path) -> None:
    """Say of a checkpoint that all of it is written, and see to it that this outlasts a loss of power."""
    # The Trainer's pickle of its own arguments, which nobody reads.
    (checkpoint / ARGUMENTS_FILE).unlink(missing_ok=True)
    for path in checkpoint.iterdir():
        sync(path)
    (checkpoint / COMPLETE_FILE).touch()
    sync(checkpoint)


def remove_others(folder: Path, keep: set[Path]) -> None:
    """Remove checkpoints, whole or not, but for some."""
    for checkpoint in set(folder.glob("checkpoint-*")) - keep:
        # The mark goes first: a folder that is half removed must not pass for whole.
        (checkpoint / COMPLETE_FILE).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)


def _differences(begun_by: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {_shown(begun_by.get(name))}, is {_shown(run.get(name))}"
        for name in sorted({*begun_by, *run})
        if begun_by.get(name) != run.get(name)
    ]


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:16]}…"
