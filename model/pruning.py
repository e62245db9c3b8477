"""Old versions leave the versions directory: which of them may, and how their files go without a moment in between.

A version that goes is first renamed into `.pruned`, where no worker looks, and then its files are deleted, all but the
manifest: that remains to say that it was here. Whoever dies in between leaves files in `.pruned`, and the next who
prunes deletes them.
"""

import shutil
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path

from model.version import MANIFEST_FILE, PRUNED_FOLDER, sync


def versions_on_disk(versions_dir: Path) -> dict[str, int]:
    """Bytes of each version in the directory, by name. What begins with a dot is being written, or kept by a training.

    A link is left out: what it leads to is somebody else's.
    """
    if not versions_dir.is_dir():
        return {}
    directories = (each for each in versions_dir.iterdir() if each.is_dir() and not each.is_symlink())
    return {each.name: _size(each) for each in directories if not each.name.startswith(".")}


def choose(
    registered: Mapping[str, datetime],
    needed: Collection[str],
    on_disk: Collection[str],
    *,
    keep: int,
    before: datetime,
) -> list[str]:
    """The versions that may go, the oldest first. Pure.

    Args:
        registered: when the database came to know each version. What it does not know never goes: a training may just
            have written it, or somebody have put it there.
        needed: those that stay whatever else holds.
        keep: how many of the newest others stay.
        before: only what was registered before then goes.
    """
    others = sorted((at, name) for name, at in registered.items() if name in on_disk and name not in needed)
    return [name for at, name in others[: max(0, len(others) - keep)] if at < before]


def set_aside(version: str, versions_dir: Path) -> None:
    """Rename a version into `.pruned`: from now on it is not there.

    Raises:
        OSError: the directory cannot be written to.
    """
    aside = versions_dir / PRUNED_FOLDER / version
    aside.parent.mkdir(exist_ok=True)
    if aside.exists():  # pruned before, and brought back since
        shutil.rmtree(aside)
    (versions_dir / version).rename(aside)
    sync(versions_dir)


def delete_what_is_aside(versions_dir: Path) -> None:
    """Delete the files of every version that was set aside, now or by one who died over it; the manifests stay.

    Raises:
        OSError: a file cannot be deleted.
    """
    for path in versions_dir.glob(f"{PRUNED_FOLDER}/*/*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MANIFEST_FILE:
            path.unlink(missing_ok=True)


def _size(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if not path.is_dir())
