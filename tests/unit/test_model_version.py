"""A version on disk: whole or refused by name, and never code."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.tiny import copy_version
from config.names import LABELS, STARTER_VERSION
from config.settings import ROOT
from model import version as version_module
from model.engine import load_scorer
from model.network import ToxicityNetwork
from model.version import (
    MANIFEST_FILE,
    ONNX_FILE,
    WEIGHTS_FILE,
    Manifest,
    VersionError,
    read_manifest,
    sha256_of,
    verify,
    version_directory,
    write_manifest,
    writing_version,
)

Damage = Callable[[Path], object]


@pytest.fixture
def copy(tiny_version: Path, tmp_path: Path) -> Path:
    """The tiny version as "v1", to be damaged."""
    return copy_version(tiny_version, tmp_path, "v1")


def flip_one_byte(file: str) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return damage


def remove(file: str) -> Damage:
    return lambda directory: (directory / file).unlink()


def change_manifest(**changes: Any) -> Damage:
    """Values for its keys; a dictionary is merged into the one there, and None removes from it."""

    def damage(directory: Path) -> None:
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        for key, value in changes.items():
            if isinstance(value, dict):
                merged = manifest[key] | value
                value = {name: content for name, content in merged.items() if content is not None}
            manifest[key] = value
        (directory / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")

    return damage


def write_manifest_text(text: str) -> Damage:
    return lambda directory: (directory / MANIFEST_FILE).write_text(text, encoding="utf-8")


def test_a_written_version_is_whole(copy: Path) -> None:
    manifest = verify(copy, expected_version="v1")
    assert set(manifest.files) == {path.name for path in copy.iterdir()} - {MANIFEST_FILE}
    assert set(manifest.files) >= {WEIGHTS_FILE, ONNX_FILE, "encoder.json", "tokenizer.json", "words.txt"}
    assert tuple(manifest.labels) == LABELS
    assert manifest.parent is None
    # And nothing tells where on this host the repository is
    assert str(ROOT) not in (copy / MANIFEST_FILE).read_text(encoding="utf-8")
    assert manifest.settings["holdout_file"] == "samples/holdout.csv"


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no manifest": (remove(MANIFEST_FILE), r"manifest\.json cannot be read: No such file"),
    "no weights": (remove(WEIGHTS_FILE), r"model\.safetensors cannot be read: No such file"),
    "no tokenizer": (remove("tokenizer.json"), r"tokenizer\.json cannot be read: No such file"),
    "damaged weights": (flip_one_byte(WEIGHTS_FILE), r"model\.safetensors is damaged: sha256 \w{12}…, expected \w{12}"),
    "damaged int8": (flip_one_byte(ONNX_FILE), r"model\.int8\.onnx is damaged"),
    "damaged tokenizer": (flip_one_byte("tokenizer.json"), r"tokenizer\.json is damaged"),
    "damaged architecture": (flip_one_byte("encoder.json"), r"encoder\.json is damaged"),
    "other labels": (change_manifest(labels=[*LABELS[:5], "spam"]), r"has labels .*'spam'.*; this release scores"),
    "labels in another order": (change_manifest(labels=list(reversed(LABELS))), r"has labels \['identity_hate'"),
    "unlisted weights": (change_manifest(files={WEIGHTS_FILE: None}), r"lists no model\.safetensors"),
    "too long": (write_manifest_text(" " * 8_388_609), r"it has 8,388,609 bytes; at most 8,388,608 are read"),
    "not JSON": (write_manifest_text("{"), r"not a manifest of format 1"),
    "empty manifest": (write_manifest_text(""), r"not a manifest of format 1"),
    "no fields": (write_manifest_text("{}"), r"format: Field required"),
    "unknown key": (change_manifest(signature="x"), r"signature: Extra inputs are not permitted"),
    "another format": (change_manifest(format=2), r"format: Input should be 1"),
    "a name with a path": (change_manifest(version="../v1"), r"version: String should match"),
    "a file elsewhere": (change_manifest(files={"../secret": "0"}), r"'\.\./secret' is not a plain file name"),
    "an absolute file": (change_manifest(files={"/etc/passwd": "0"}), r"'/etc/passwd' is not a plain file name"),
    "the folder above": (change_manifest(files={"..": "0"}), r"\.\. cannot be read"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_version_is_refused_by_name(copy: Path, damage: Damage, said: str) -> None:
    verify(copy)
    damage(copy)
    with pytest.raises(VersionError, match=f"version v1.*{said}"):
        verify(copy)


def test_a_version_under_another_name_is_refused(copy: Path) -> None:
    with pytest.raises(VersionError, match=r"version v2: .*/v1 holds version v1"):
        verify(copy, expected_version="v2")


# --- Loading ---


def probes(**changes: Any) -> Damage:
    """The first probe with other expectations."""

    def damage(directory: Path) -> None:
        first, *others = read_manifest(directory).model_dump()["probes"]
        change_manifest(probes=[first | changes, *others])(directory)

    return damage


def shifted_by(amount: float) -> Damage:
    """The first probe expects each score to be this much off."""

    def damage(directory: Path) -> None:
        onnx_scores = read_manifest(directory).probes[0].onnx_scores
        assert onnx_scores is not None
        probes(onnx_scores=[score + amount for score in onnx_scores])(directory)

    return damage


def one_probe_without_int8_scores(directory: Path) -> None:
    first = read_manifest(directory).model_dump()["probes"][0]
    change_manifest(probes=[first | {"onnx_scores": None}])(directory)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(shifted_by(0.06), r"is 0\.06\d from the manifest's, more than 0\.05", id="too far up"),
        pytest.param(shifted_by(-0.06), r"is 0\.06\d from the manifest's", id="too far down"),
        pytest.param(probes(onnx_scores=[0.5]), r"cannot be loaded", id="too few scores"),
        pytest.param(one_probe_without_int8_scores, r"is nan from the manifest's", id="no scores for this engine"),
    ],
)
def test_a_version_that_scores_otherwise_than_it_did_is_refused(copy: Path, damage: Damage, said: str) -> None:
    damage(copy)
    with pytest.raises(VersionError, match=f"version v1.*{said}"):
        load_scorer(copy, device="cpu", threads=1)


def test_a_probe_within_the_tolerance_is_accepted(copy: Path) -> None:
    shifted_by(0.03)(copy)
    assert load_scorer(copy, device="cpu", threads=1).version == "v1"


@pytest.mark.parametrize(("file", "engine"), [(WEIGHTS_FILE, "torch"), (ONNX_FILE, "onnx"), ("tokenizer.json", "onnx")])
def test_a_foreign_file_with_the_right_hash_is_refused(copy: Path, file: str, engine: str) -> None:
    # Given a file that the manifest vouches for, and that is something else
    (copy / file).write_bytes(b"something else")
    change_manifest(files={file: sha256_of(copy / file)})(copy)
    with pytest.raises(VersionError, match="version v1 cannot be loaded"):
        load_scorer(copy, device="cpu", engine=engine, threads=1)


class TouchesWhenUnpickled:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_a_pickle_is_never_executed(copy: Path, tmp_path: Path) -> None:
    # Given weights that are a pickle, which would leave a trace if it were read as one
    trace = tmp_path / "trace"
    (copy / WEIGHTS_FILE).write_bytes(pickle.dumps(TouchesWhenUnpickled(trace)))
    change_manifest(files={WEIGHTS_FILE: sha256_of(copy / WEIGHTS_FILE)})(copy)
    # When it is loaded, it is refused
    with pytest.raises(VersionError, match="version v1 cannot be loaded"):
        load_scorer(copy, device="cpu", engine="torch", threads=1)
    # And so is a pretrained encoder that comes as one
    torch.save(TouchesWhenUnpickled(trace), copy / "pytorch_model.bin")
    (copy / "config.json").write_bytes((copy / "encoder.json").read_bytes())
    (copy / WEIGHTS_FILE).unlink()
    with pytest.raises(OSError, match="safetensors"):
        ToxicityNetwork.from_pretrained_encoder(copy)
    # Then there is no trace, though there would be one
    assert not trace.exists()
    pickle.loads(pickle.dumps(TouchesWhenUnpickled(trace)))  # noqa: S301
    assert trace.exists()


# --- Where versions are ---


@pytest.mark.parametrize("name", ["../outside", "..", ".", "", "/outside", "in/side", "inside\x00", ".hidden", "none"])
def test_a_name_never_leads_out_of_the_versions_directory(tmp_path: Path, name: str) -> None:
    versions_dir = tmp_path / "versions"
    for directory in (versions_dir / "in" / "side", versions_dir / ".hidden", tmp_path / "outside"):
        directory.mkdir(parents=True)
    name = name.replace("/outside", str(tmp_path / "outside")) if name.startswith("/") else name
    with pytest.raises(VersionError, match="there is no directory"):
        version_directory(name, versions_dir)


def test_a_versions_directory_that_cannot_be_looked_into_is_named(tmp_path: Path) -> None:
    with pytest.raises(VersionError, match=r"version v1: .* cannot be read: File name too long"):
        version_directory("v1", tmp_path / ("x" * 300))


def test_the_starter_is_in_the_repository_unless_the_versions_directory_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version_module, "STARTER_DIRECTORY", tmp_path / "repository" / "starter")
    with pytest.raises(VersionError):
        version_directory(STARTER_VERSION, tmp_path / "versions")
    (tmp_path / "repository" / "starter").mkdir(parents=True)
    assert version_directory(STARTER_VERSION, tmp_path / "versions") == tmp_path / "repository" / "starter"
    (tmp_path / "versions" / STARTER_VERSION).mkdir(parents=True)
    assert version_directory(STARTER_VERSION, tmp_path / "versions") == tmp_path / "versions" / STARTER_VERSION


# --- Writing ---


def test_a_version_appears_whole(tmp_path: Path, copy: Path) -> None:
    directory = tmp_path / "versions" / "v2"
    facts = read_manifest(copy).model_dump()
    with writing_version(directory) as written:
        for file in facts["files"]:
            shutil.copyfile(copy / file, written / file)
        manifest: Manifest = write_manifest(written, facts | {"version": "v2"})
        # Until it is whole nobody sees it
        assert not directory.exists()
    assert verify(directory, expected_version="v2") == manifest
    assert list(directory.parent.iterdir()) == [directory]
    # And workers that run as another user may read it
    assert directory.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o644}


def test_an_exception_while_writing_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "versions" / "v2"
    with pytest.raises(KeyboardInterrupt), writing_version(directory) as written:
        (written / WEIGHTS_FILE).write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(directory.parent.iterdir()) == []


def test_a_kill_while_writing_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    # Given a process that is killed while it writes a version
    directory = tmp_path / "versions" / "v2"
    code = (
        "import os, pathlib, signal, sys\n"
        "from model.version import writing_version\n"
        "with writing_version(pathlib.Path(sys.argv[1])) as written:\n"
        "    (written / 'model.safetensors').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(directory)], cwd=ROOT, check=False)
    assert killed.returncode == -9
    # Then there is no such version, and the next attempt succeeds
    assert not directory.exists()
    with writing_version(directory) as written:
        (written / WEIGHTS_FILE).write_bytes(b"whole")
    assert (directory / WEIGHTS_FILE).read_bytes() == b"whole"


def test_a_version_is_never_overwritten(copy: Path) -> None:
    before = sha256_of(copy / MANIFEST_FILE)
    with pytest.raises(VersionError, match="v1 exists; versions are never overwritten"), writing_version(copy):
        pytest.fail("it may not even begin")
    assert sha256_of(copy / MANIFEST_FILE) == before


def test_a_version_that_another_process_published_meanwhile_stays(tmp_path: Path) -> None:
    directory = tmp_path / "v2"
    with pytest.raises(OSError, match="not empty"), writing_version(directory) as written:
        (written / WEIGHTS_FILE).write_bytes(b"second")
        directory.mkdir()
        (directory / WEIGHTS_FILE).write_bytes(b"first")
    assert (directory / WEIGHTS_FILE).read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [directory]
