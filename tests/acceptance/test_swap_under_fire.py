"""Versions of every kind are activated and tried at random while comments stream and a worker is killed."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from config.names import LABELS
from db.trials import NothingToTry, TrialIsLive
from model.version import ENCODER_FILE, MANIFEST_FILE, WEIGHTS_FILE, sha256_of
from tests.acceptance.system import SMALL_STEPS, TIMEOUT_S, System
from tests.services import wait_until

ACTIVATIONS = int(os.environ.get("SWAPS", "25"))
SEED = int(os.environ.get("SEED", "20261122"))
KILL_EVERY = 9
SOUND = ["v1", "sound-1", "sound-2"]

# The engine that reads the weights: that of a CPU reads the int8 file in their place.
WORKER = SMALL_STEPS | {"engine": "torch", "threads": "1"}


def change_manifest(directory: Path, **changes: Any) -> None:
    manifest = directory / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def rewrite(directory: Path, file: str, content: bytes) -> None:
    """Another content under a hash that fits, as whoever published the version could have written it."""
    (directory / file).write_bytes(content)
    files = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    change_manifest(directory, files=files | {file: sha256_of(directory / file)})


def corrupt(directory: Path) -> None:
    content = bytearray((directory / WEIGHTS_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / WEIGHTS_FILE).write_bytes(content)


def truncate(directory: Path) -> None:
    (directory / WEIGHTS_FILE).write_bytes((directory / WEIGHTS_FILE).read_bytes()[:-100])


def rename_labels(directory: Path) -> None:
    change_manifest(directory, labels=[*LABELS[:5], "spam"])


def fill_with_nan(directory: Path) -> None:
    weights = load_file(directory / WEIGHTS_FILE)
    name = next(name for name in weights if name.startswith("heads."))
    weights[name] = weights[name].fill_(float("nan"))
    save_file(weights, directory / "weights")
    rewrite(directory, WEIGHTS_FILE, (directory / "weights").read_bytes())


def fill_with_nan_and_say_nothing(directory: Path) -> None:
    fill_with_nan(directory)
    change_manifest(directory, probes=[])


def enlarge(directory: Path) -> None:
    encoder = json.loads((directory / ENCODER_FILE).read_text(encoding="utf-8"))
    rewrite(directory, ENCODER_FILE, json.dumps(encoder | {"n_layers": encoder["n_layers"] + 1}).encode())


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self._file,)


def pickle_weights(directory: Path) -> None:
    rewrite(directory, WEIGHTS_FILE, pickle.dumps(Bomb(directory.parent / "exploded")))


def point_outside(directory: Path) -> None:
    files = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    change_manifest(directory, files=files | {f"../v1/{WEIGHTS_FILE}": files[WEIGHTS_FILE]})


UNSOUND: dict[str, tuple[Callable[[Path], object], str]] = {
    "corrupt": (corrupt, "model.safetensors is damaged"),
    "truncated": (truncate, "model.safetensors is damaged"),
    "wrong-label": (rename_labels, "this release scores"),
    "nan": (fill_with_nan, "not six finite numbers"),
    "nan-unprobed": (fill_with_nan_and_say_nothing, "not six finite numbers"),
    "wrong-architecture": (enlarge, "cannot be loaded: RuntimeError"),
    "vanished": (shutil.rmtree, "there is no directory"),
    "pickle": (pickle_weights, "cannot be loaded: SafetensorError"),
    "outside": (point_outside, "is not a plain file name"),
}
"""What is done to a registered version, and what a worker then says of it."""


@pytest.mark.parametrize("database_kind", ["postgres"], indirect=True)
def test_versions_of_every_kind_are_activated_under_fire(system: System, tiny_version: Path, texts: list[str]) -> None:
    # Given sound and unsound versions, two workers, and comments that keep coming
    print(f"SEED={SEED} SWAPS={ACTIVATIONS}")
    chance = random.Random(SEED)
    for name in SOUND[1:]:
        system.add_version(tiny_version, name)
    for name, (damage, _) in UNSOUND.items():
        damage(system.add_version(tiny_version, name))
    first, second = (system.start_worker(node=node, **WORKER) for node in ("w1", "w2"))
    refusals: dict[str, set[str]] = {name: set() for name in UNSOUND}
    trials = 0

    def word_of_first(activation_id: int) -> bool:
        return first.node in {load.worker for load in system.client.loads(activation_id)}

    with system.stream(texts) as ids:
        # When they are activated at random, in each order at least once, some before the last one was looked at
        rest = [chance.choice([*SOUND * 3, *UNSOUND]) for _ in range(ACTIVATIONS - len(UNSOUND))]
        order = chance.sample([*UNSOUND, *rest], k=ACTIVATIONS)
        activations: dict[int, str] = {}
        for count, version in enumerate(order, 1):
            activation = system.client.activate(
                version, instead_of=system.client.active(), by="the test", reason="fire"
            )
            activations[activation] = version
            if version in UNSOUND or chance.random() < 0.5:
                wait_until(lambda: word_of_first(activation), TIMEOUT_S, f"the word of {first.node} on {version}")  # noqa: B023
            # And tried beside each other, which the next activation may end
            if chance.random() < 0.5:
                with suppress(NothingToTry, TrialIsLive):
                    candidate = chance.choice([*SOUND, *UNSOUND])
                    system.client.start_trial("canary", candidate, share=0.5, by="the test", reason="fire")
                    trials += 1
            # And a worker is killed, and comes back to whatever is active then
            if count % KILL_EVERY == 0:
                second.kill()
                second = system.start_worker(node="w2", **WORKER)
        # Then both workers agree in the end
        last = next(name for name in SOUND if name != order[-1])
        activation = system.client.activate(last, instead_of=system.client.active(), by="the test", reason="the last")
        both = {(first.node, last, None), (second.node, last, None)}

        def agree() -> bool:
            loads = {(load.worker, load.version, load.error) for load in system.client.loads(activation)}
            running = {node: stats.version for node, stats in system.client.activity().pipelines.items()}
            return loads == both and running == {first.node: last, second.node: last}

        wait_until(agree, TIMEOUT_S, "two workers that run the same version")
    assert first.is_running and second.is_running

    # And nothing was lost, doubled, or decided by a version that is not sound
    system.wait_for_decisions(ids)
    rows = system.decisions()
    assert sorted(row.submission_id for row in rows) == sorted(ids)
    assert {row.model_version for row in rows} <= set(SOUND)
    assert len({row.model_version for row in rows}) > 1
    assert system.client.dead_letters() == []
    system.wait_until_nothing_is_left()
    # And each refused one is named with its reason
    for activation, version in activations.items():
        for load in system.client.loads(activation):
            if load.error is not None:
                refusals[version].add(load.error)
    for name, (_, said) in UNSOUND.items():
        assert refusals[name], f"{name} was not refused"
        assert all(f"version {name}" in error and said in error for error in refusals[name]), refusals[name]
    # And no pickle was opened
    assert not (system.versions_dir / "exploded").exists()
    assert trials, "no trial began, which tests less than it should"
