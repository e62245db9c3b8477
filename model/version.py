"""A model version on disk: written whole or not at all, verified before it is used. Never a pickle.

A directory of `manifest.json`, `model.safetensors`, `encoder.json`, `tokenizer.json` and, where exported,
`model.int8.onnx`.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from config.files import read_bounded
from config.names import FORMER_STARTERS, LABELS, STARTER_VERSION
from config.settings import ROOT
from model.text import TOKENIZER_FILE

MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 8_388_608
WEIGHTS_FILE = "model.safetensors"
ENCODER_FILE = "encoder.json"
ONNX_FILE = "model.int8.onnx"
REQUIRED_FILES = (WEIGHTS_FILE, ENCODER_FILE, TOKENIZER_FILE)

PRUNED_FOLDER = ".pruned"
"""In the versions directory: manifests of versions whose other files were deleted (model.pruning)."""

VERSION_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"

STARTER_DIRECTORY = ROOT / "model" / "starter"


class VersionError(Exception):
    """A version that cannot be used; the message names it and what does not fit."""


class Probe(BaseModel):
    """A text and the scores a sound load of the version gives it, in the order of the manifest's labels."""

    model_config = ConfigDict(extra="forbid")

    text: str
    torch_scores: list[float]
    onnx_scores: list[float] | None


class Manifest(BaseModel):
    """What manifest.json says of a version. Unknown keys are refused: they come from a format we do not know."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1]
    version: str = Field(pattern=f"^{VERSION_NAME}$")
    parent: str | None
    created_at: str
    labels: list[str]
    max_length: int = Field(ge=8, le=8192)
    weights: Literal["fp32", "fp16", "int8"]
    calibration: dict[str, Any] = {}
    """What was folded into the heads so that scores are probabilities; empty where nothing was."""
    thresholds: dict[str, Any] = {}
    """Advice for whoever writes a policy, per label; nothing decides by it."""
    files: dict[str, str]
    probes: list[Probe]
    dataset: dict[str, Any]
    settings: dict[str, Any]
    metrics: dict[str, Any]
    libraries: dict[str, str]


def held_out_figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Of a manifest's metrics those on the held-out rows, of the form that ships where it was measured; or none."""
    return metrics.get("holdout_int8") or metrics.get("holdout_fp32") or {}


def checked_name(version: str) -> str:
    """A name that a version may have. It is a folder's name too, and cannot lead out of the versions directory.

    Raises:
        VersionError: it is none.
    """
    if not re.fullmatch(VERSION_NAME, version):
        raise VersionError(
            f"{version!r} cannot be a version's name: use 1 to 100 letters, digits, '.', '_' and '-', and begin with a "
            "letter or a digit"
        )
    return version


def new_version_directory(version: str, versions_dir: Path) -> Path:
    """Where a new version is to be written.

    Raises:
        VersionError: `version` cannot be a name, or another version has or had it.
    """
    directory = versions_dir / checked_name(version)
    # A link that leads nowhere is in the way too.
    if os.path.lexists(directory):
        raise VersionError(
            f"version {version}: {directory} exists, and versions are never overwritten: take another name"
        )
    if version in (STARTER_VERSION, *FORMER_STARTERS):
        raise VersionError(f"version {version} ships with a release: take another name")
    if was_pruned(version, versions_dir):
        raise VersionError(f"version {version} existed and was pruned: take another name")
    return directory


def version_directory(version: str, versions_dir: Path) -> Path:
    """Where a version's files are; the starter is found in the repository where the directory lacks it.

    Raises:
        VersionError: there is no such directory, or no longer, or it cannot be told.
    """
    directory = versions_dir / version
    # A name comes from the database; it must not lead out of the versions directory.
    try:
        if re.fullmatch(VERSION_NAME, version) and directory.is_dir():
            return directory
    except OSError as error:
        raise VersionError(f"version {version}: {directory} cannot be read: {error.strerror}") from None
    if version == STARTER_VERSION and STARTER_DIRECTORY.is_dir():
        return STARTER_DIRECTORY
    if was_pruned(version, versions_dir):
        raise VersionError(
            f"version {version} was pruned: of its files only the manifest is left, in {versions_dir / PRUNED_FOLDER}; "
            f"bring {directory} back from a backup, or take another version"
        )
    raise VersionError(f"version {version}: there is no directory {directory}; is MODERATO_VERSIONS_DIR shared?")


def was_pruned(version: str, versions_dir: Path) -> bool:
    """Whether `moderato models prune` deleted a version's files, and nobody has brought them back."""
    if not re.fullmatch(VERSION_NAME, version) or (versions_dir / version).is_dir():
        return False
    return (versions_dir / PRUNED_FOLDER / version).is_dir()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a version directory, its form checked but not its files.

    Raises:
        VersionError: it cannot be read or is of another form.
    """
    path = directory / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(read_bounded(path, MAX_MANIFEST_BYTES))
    except OSError as error:
        raise VersionError(f"version {directory.name}: {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors()[:3])
        raise VersionError(f"version {directory.name}: {path} is not a manifest of format 1: {problems}") from None


def verify(directory: Path, *, expected_version: str | None = None) -> Manifest:
    """The manifest of a version whose labels fit and whose every file is there, whole.

    Raises:
        VersionError: says what is missing or differs.
    """
    manifest = read_manifest(directory)
    name = manifest.version
    if expected_version is not None and name != expected_version:
        raise VersionError(f"version {expected_version}: {directory} holds version {name}")
    if tuple(manifest.labels) != LABELS:
        raise VersionError(f"version {name} has labels {manifest.labels}; this release scores {list(LABELS)}")
    if missing := [file for file in REQUIRED_FILES if file not in manifest.files]:
        raise VersionError(f"version {name}: its manifest lists no {', '.join(missing)}")
    for file, expected in manifest.files.items():
        if Path(file).name != file:
            raise VersionError(f"version {name}: {file!r} is not a plain file name")
        try:
            actual = sha256_of(directory / file)
        except OSError as error:
            raise VersionError(f"version {name}: {file} cannot be read: {error.strerror}") from None
        if actual != expected:
            raise VersionError(f"version {name}: {file} is damaged: sha256 {actual[:12]}…, expected {expected[:12]}…")
    return manifest


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing_version(directory: Path) -> Iterator[Path]:
    """A temporary directory that becomes `directory` on leaving, or is removed on an exception.

    A reader sees a whole version or none: every file is synced before the rename, the parent after it.

    Raises:
        VersionError: `directory` exists.
    """
    if os.path.lexists(directory):
        raise VersionError(f"version {directory.name}: {directory} exists; versions are never overwritten")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield temporary
        for path in temporary.iterdir():
            path.chmod(0o644)  # workers on other hosts may run as other users
            sync(path)
        temporary.chmod(0o755)
        sync(temporary)
        temporary.rename(directory)
        sync(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> Manifest:
    """Write the manifest of the files in `directory`, with their hashes."""
    files = {path.name: sha256_of(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST_FILE}
    checked = Manifest.model_validate({**manifest, "format": 1, "labels": list(LABELS), "files": files})
    text = json.dumps(checked.model_dump(), indent=2, ensure_ascii=False, allow_nan=False)
    (directory / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
    return checked


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk: what is synced outlasts a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
