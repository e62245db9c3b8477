"""Commands whose user may not write where they would: each says so in a line; scoring needs no database."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.main import in_a_line
from config.settings import ROOT
from db.migrate import upgrade

PR_CAPBSET_DROP = 24
_libc = ctypes.CDLL(None)


def give_up_privileges() -> None:
    """From the next exec on: else root may write everywhere. Other users have none to give up."""
    for capability in range(64):
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def run(database: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        cwd=ROOT,
        env=os.environ
        | {"MODERATO_DATABASE_URL": f"sqlite:///{database}", "MODERATO_BROKER_URL": "redis://127.0.0.1:1/0"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=give_up_privileges,
    )


@pytest.fixture
def database(tmp_path: Path) -> Path:
    file = tmp_path / "folder" / "moderato.db"
    upgrade(f"sqlite:///{file}")
    return file


@pytest.mark.parametrize(
    ("command", "folder_mode", "file_mode"),
    [
        ("db upgrade", 0o555, None),
        ("up", 0o555, None),
        ("results", 0o555, 0o444),
        ("models", 0o700, 0o000),
        ("policy show", 0o000, 0o600),
    ],
)
def test_a_database_that_cannot_be_used_is_told_in_a_line(
    database: Path, command: str, folder_mode: int, file_mode: int | None
) -> None:
    if file_mode is None:
        database.unlink()
    else:
        database.chmod(file_mode)
    database.parent.chmod(folder_mode)
    done = run(database, *command.split())
    database.parent.chmod(0o700)  # so that it can be deleted
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert str(database) in done.stderr


def test_scoring_needs_no_database_that_can_be_used(database: Path, tmp_path: Path) -> None:
    database.chmod(0o000)
    (tmp_path / "in.csv").write_text("comment_text\nYou are an idiot.\n")
    done = run(database, "score", f"{tmp_path}/in.csv", f"{tmp_path}/out.csv")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.csv").read_text().startswith("comment_text,toxic,")


def test_what_the_system_refuses_is_a_line_and_a_bug_is_not() -> None:
    said = in_a_line(PermissionError(13, "Permission denied", "/srv/versions"))
    assert said is not None
    assert "/srv/versions" in said
    assert in_a_line(ZeroDivisionError()) is None
    assert in_a_line(FileNotFoundError(2, "No such file or directory", "/srv")) is None
