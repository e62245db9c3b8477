"""Which versions may go, and how they go."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.names import STARTER_VERSION
from model.pruning import choose, delete_what_is_aside, set_aside, versions_on_disk
from model.version import MANIFEST_FILE, WEIGHTS_FILE, VersionError, version_directory, was_pruned

NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
FIVE = {f"v{day}": NOON + timedelta(days=day) for day in range(1, 6)}
NAMES = st.sampled_from(sorted(FIVE))


class TestChoosing:
    @pytest.mark.parametrize(
        "needed, keep, days, going",
        [
            ({"v5", "v2"}, 0, 9, ["v1", "v3", "v4"]),
            # what is needed is not among the newest that stay
            ({"v5", "v2"}, 1, 9, ["v1", "v3"]),
            (set(), 2, 9, ["v1", "v2", "v3"]),
            (set(), 9, 9, []),
            # only what is older than the time given
            (set(), 0, 3, ["v1", "v2"]),
            (set(), 4, 3, ["v1"]),
        ],
    )
    def test_what_nothing_needs_goes_but_the_newest(
        self, needed: set[str], keep: int, days: int, going: list[str]
    ) -> None:
        before = NOON + timedelta(days=days)
        assert choose(FIVE, needed, list(FIVE), keep=keep, before=before) == going

    @given(st.sets(NAMES), st.sets(NAMES | st.just("mine")), st.integers(0, 6), st.integers(0, 7))
    def test_nothing_goes_that_is_needed_unknown_or_not_there(
        self, needed: set[str], on_disk: set[str], keep: int, days: int
    ) -> None:
        going = set(choose(FIVE, needed, on_disk, keep=keep, before=NOON + timedelta(days=days)))
        assert going <= (on_disk & set(FIVE)) - needed
        assert all(FIVE[name] < NOON + timedelta(days=days) for name in going)
        # And of what else is there, as many as asked for stay
        others = (on_disk & set(FIVE)) - needed
        assert len(others - going) >= min(keep, len(others))


def write(versions_dir: Path, name: str) -> Path:
    directory = versions_dir / name
    (directory / "figures").mkdir(parents=True)
    for file in (MANIFEST_FILE, WEIGHTS_FILE, "figures/curve.png"):
        (directory / file).write_bytes(b"x" * 100)
    return directory


class TestDeleting:
    def test_what_is_being_written_or_leads_elsewhere_is_no_version(self, tmp_path: Path) -> None:
        assert versions_on_disk(tmp_path / "absent") == {}
        # Given a version, one that is being written, and a link to one elsewhere
        write(tmp_path / "versions", "v1")
        write(tmp_path / "versions", ".v2.k3j4")
        (tmp_path / "versions" / "v3").symlink_to(write(tmp_path / "elsewhere", "v3"))
        # Then there is one version
        assert versions_on_disk(tmp_path / "versions") == {"v1": 300}

    def test_a_version_goes_but_for_its_manifest_which_says_so(self, tmp_path: Path) -> None:
        for name in ("v1", "v2"):
            write(tmp_path, name)
        # When it is set aside
        set_aside("v1", tmp_path)
        # Then it is no longer there, whole or in part, even if nobody comes to delete its files
        assert versions_on_disk(tmp_path) == {"v2": 300}
        with pytest.raises(VersionError, match=r"version v1 was pruned: .*\.pruned; bring .*/v1 back from a backup"):
            version_directory("v1", tmp_path)
        # And when somebody does
        delete_what_is_aside(tmp_path)
        assert [path.name for path in (tmp_path / ".pruned").rglob("*")] == ["v1", MANIFEST_FILE]
        assert version_directory("v2", tmp_path).is_dir()

    def test_one_that_is_brought_back_is_there_and_may_go_again(self, tmp_path: Path) -> None:
        shutil.copytree(write(tmp_path, "v1"), tmp_path / "backup")
        set_aside("v1", tmp_path)
        (tmp_path / "backup").rename(tmp_path / "v1")
        assert not was_pruned("v1", tmp_path)
        assert version_directory("v1", tmp_path) == tmp_path / "v1"
        set_aside("v1", tmp_path)
        assert was_pruned("v1", tmp_path)

    def test_a_name_leads_nowhere_else(self, tmp_path: Path) -> None:
        (tmp_path / "versions" / ".pruned").mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir()
        assert not was_pruned("../../elsewhere", tmp_path / "versions")
        assert not was_pruned(STARTER_VERSION, tmp_path / "versions")
