"""`moderato train` in processes of its own: killed and gone on with, and as two processes that share the work."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from bench.tiny import HOLDOUT, write_tiny_encoder
from config.settings import ROOT
from model.version import verify
from tests.services import wait_until

TRAIN = ["-m", "cli.main", "train"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one without dropout, which two processes would draw otherwise than one."""
    directory = write_tiny_encoder(tmp_path_factory.mktemp("encoder"))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(config | {"dropout": 0.0, "attention_dropout": 0.0}))
    return directory


@pytest.fixture(scope="module")
def settings(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a training of a few short steps, on four rows each."""
    folder = tmp_path_factory.mktemp("settings")
    pd.read_csv(HOLDOUT, dtype=str, keep_default_na=False).head(60).to_csv(folder / "holdout.csv", index=False)
    recipe = {
        "encoder": str(encoder),
        "holdout_file": str(folder / "holdout.csv"),
        "max_rows": 160,
        "validation_share": 0,
        "evasion_share": 0,
        "max_length": 32,
        "epochs": 2,
        "learning_rate": 5e-4,
        "precision": "fp32",
        "checkpoint_steps": 10,
        "report_to": [],
        "calibration_texts": 8,
        "robustness_rows": 8,
        "max_int8_auc_drop": 1.0,  # the orders of a network that has hardly learnt anything say little
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", str(folder / "recipe.yaml"), "--weights", "fp32"]


@pytest.fixture(scope="module")
def versions_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("versions")


def start(versions_dir: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Python with these arguments, in a session of its own, one thread to each process."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={"MODERATO_VERSIONS_DIR": str(versions_dir), "OMP_NUM_THREADS": "1", "PATH": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """What a process that ends well has said, on stdout and stderr."""
    try:
        out, err = process.communicate(timeout=480)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes too
        process.communicate()
        raise
    assert process.returncode == 0, err
    return out, err


def weights(version: Path) -> dict[str, torch.Tensor]:
    return load_file(version / "model.safetensors")


@pytest.fixture(scope="module")
def versions(versions_dir: Path, settings: list[str]) -> tuple[Path, Path]:
    """A version whose training nothing disturbed, and one whose training was killed and gone on with."""
    command = [*TRAIN, "--batch-size", "4", *settings, "--name"]
    folder = versions_dir / ".training" / "killed"
    undisturbed, killed = (start(versions_dir, *command, name) for name in ("whole", "killed"))
    wait_until(lambda: any(folder.glob("checkpoint-[2-9]0/complete")), what="a checkpoint", timeout_s=240)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (versions_dir / "killed").exists()
    _, said = finish(start(versions_dir, *command, "killed", "--resume"))
    assert "from step " in said
    finish(undisturbed)
    return versions_dir / "whole", versions_dir / "killed"


def test_a_training_killed_by_sigkill_goes_on_to_the_same_weights(versions: tuple[Path, Path]) -> None:
    # Given a training that was killed after some checkpoint, and gone on with; and one that nothing disturbed
    whole, killed = versions
    # Then both ended with the same weights, by the same steps
    assert all(torch.equal(tensor, weights(killed)[name]) for name, tensor in weights(whole).items())
    assert verify(killed).metrics["history"] == verify(whole).metrics["history"]
    # And no checkpoint is left
    assert not any((whole.parent / ".training").iterdir())


def test_two_processes_share_the_work_and_one_writes(
    versions: tuple[Path, Path], versions_dir: Path, settings: list[str], encoder: Path
) -> None:
    # When two processes train on two rows of each step, where one took four
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    out, err = finish(start(versions_dir, *torchrun, *TRAIN, "--batch-size", "2", *settings, "--name", "two"))
    # Then one of them has spoken, written and cleared away
    assert err.count("loading torch and the data") == err.count("version two is in") == 1
    assert out.count("average precision") == 1
    two = versions_dir / "two"
    assert verify(two).metrics["history"][-1]["step"] == verify(versions[0]).metrics["history"][-1]["step"]
    assert not any((versions_dir / ".training").iterdir())
    # And the weights are near those of one process with the same rows in each step. Not the same: the heads' dropout is
    # drawn by each process for itself, and numbers are added in another order.
    begun = load_file(encoder / "model.safetensors")
    one, shared = (
        torch.cat([weights(version)[f"encoder.{name}"].flatten() for name in begun]) for version in (versions[0], two)
    )
    moved = one - torch.cat([tensor.flatten() for tensor in begun.values()])
    assert (one - shared).norm() < 0.3 * moved.norm()
