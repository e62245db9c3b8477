"""What is made of measured forward passes. The measuring itself runs on a small real version."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model import tuning
from model.batching import BatchCost, Batching
from model.engine import Scorer, Scores, load_scorer
from model.tuning import Pass, choose_batching, choose_window_tokens, fit_cost, measure, tuned


@pytest.fixture(scope="module")
def scorer(tiny_version: Path) -> Scorer:
    return load_scorer(tiny_version, device="cpu", threads=1)


class Device:
    """An engine of which only this is looked at."""

    description = "a device"
    lanes = 2
    max_batch_tokens = 512

    def __init__(self, *, pads: bool = True) -> None:
        self.pads = pads

    def score(self, token_ids: Sequence[Sequence[int]]) -> Scores:
        raise NotImplementedError


def passes(tokens_per_s: dict[int, float]) -> list[Pass]:
    """Single windows, slow ones, and batches of each size at its speed."""
    singles = [Pass(length, 1, length / 100) for length in (32, 256)]
    return singles + [
        Pass(length, size // length, size / speed) for size, speed in tokens_per_s.items() for length in (32, 256)
    ]


def test_the_cost_of_a_device_is_read_from_its_passes() -> None:
    # Given a device on which a batch costs 2 ms, a token 0.1 ms, and a token looking at another 0.1 µs
    measured = [
        Pass(length, count, 2e-3 + count * (length * 1e-4 + length**2 * 1e-7))
        for length in (24, 80, 256)
        for count in (1, 2, 8)
    ]
    cost = fit_cost(measured)
    # Then a batch costs as much as 20 tokens, and 5 for what it costs the process beside
    assert cost.fixed_tokens == pytest.approx(25)
    assert cost.quadratic == pytest.approx(1e-3)


def test_passes_that_say_nothing_leave_the_usual_cost() -> None:
    # Given a device so disturbed that more tokens took less time
    assert fit_cost([Pass(24, 1, 1.0), Pass(24, 8, 0.1), Pass(80, 1, 0.5), Pass(80, 8, 0.05)]) == BatchCost()


@pytest.mark.parametrize(
    ("tokens_per_s", "chosen"),
    [
        ({512: 1000, 1024: 1010, 2048: 990}, 512),
        ({512: 1000, 1024: 1100, 2048: 1110}, 1024),
        ({512: 1000, 1024: 2000, 2048: 4000}, 2048),
    ],
)
def test_the_smallest_batch_that_is_about_as_fast_as_any_is_chosen(tokens_per_s: dict[int, float], chosen: int) -> None:
    assert choose_batching(Device(), passes(tokens_per_s)).max_batch_tokens == chosen


def test_a_device_that_is_as_fast_with_single_texts_gets_them() -> None:
    assert choose_batching(Device(), passes({512: 100, 1024: 100})).max_batch_tokens == 256


def test_a_device_without_padding_needs_no_cost_and_a_window_for_its_lanes() -> None:
    assert choose_batching(Device(pads=False), passes({512: 1000, 1024: 1010})) == Batching(512, 2_048, None)


def test_the_dearer_a_batch_the_larger_the_window() -> None:
    windows = [choose_window_tokens(BatchCost(fixed), 512, lanes=1) for fixed in (1.0, 10.0, 50.0)]
    assert windows == sorted(windows)
    assert windows[0] < windows[-1]


def test_a_real_device_is_measured_once(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    # Given a device that was measured
    first = tuned(scorer, tmp_path)
    assert first.batching.max_batch_tokens > 0 < first.batching.window_tokens
    assert "measured in" in caplog.text
    # When the worker starts again, it is read from the file
    monkeypatch.setattr(tuning, "measure", None)
    assert tuned(scorer, tmp_path).batching == first.batching
    # And a fine-tuned version runs alike
    renamed = replace(scorer, manifest=scorer.manifest.model_copy(update={"version": "v2"}))
    assert tuned(renamed, tmp_path).batching == first.batching
    # And what is set counts
    assert tuned(scorer, tmp_path, max_batch_tokens=77).batching == replace(first.batching, max_batch_tokens=77)
    assert tuned(scorer, tmp_path / "other", max_batch_tokens=77, window_tokens=99).batching.window_tokens == 99
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("content", ["", "{}", json.dumps({"max_batch_tokens": "many"})])
def test_a_damaged_measurement_is_made_again(
    scorer: Scorer, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    tuned(scorer, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    tuned(scorer, tmp_path)
    assert "cannot be read (ValidationError); measuring again" in caplog.text
    assert json.loads(file.read_text())["max_batch_tokens"] > 0


def test_a_measurement_that_cannot_be_kept_is_used(
    scorer: Scorer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "file").write_text("")
    assert tuned(scorer, tmp_path / "file" / "directory").batching.max_batch_tokens > 0
    assert "cannot be kept" in caplog.text


def test_batches_too_large_for_the_device_end_the_measurement(scorer: Scorer) -> None:
    class Small(Device):
        lanes = 1
        max_batch_tokens = 256

        def score(self, token_ids: Sequence[Sequence[int]]) -> Scores:
            if sum(map(len, token_ids)) > 400:
                raise MemoryError
            return np.zeros((len(token_ids), 6), dtype=np.float32)

    measured = measure(replace(scorer, engine=Small()))
    assert max(each.longest * each.count for each in measured) <= 400
