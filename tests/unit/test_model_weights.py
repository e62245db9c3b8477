"""Weights to disk and back: what each precision keeps."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.weights import Precision, load_weights, save_weights


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Matrices of several magnitudes, one with a row of zeros, and a vector."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(8, 300, generator=generator) * torch.logspace(-4, 2, 8).unsqueeze(1)
    wide[3] = 0
    return {
        "matrix": wide,
        "transposed": torch.randn(16, 8, generator=generator).t(),
        "vector": torch.randn(50, generator=generator),
    }


def round_trip(state: dict[str, Tensor], precision: Precision, path: Path) -> dict[str, Tensor]:
    save_weights(path, state, precision)
    loaded = load_weights(path)
    assert loaded.keys() == state.keys()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert all(loaded[name].shape == state[name].shape for name in state)
    return loaded


def test_fp32_keeps_every_bit(state: dict[str, Tensor], tmp_path: Path) -> None:
    loaded = round_trip(state, "fp32", tmp_path / "weights")
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_fp16_keeps_eleven_bits(state: dict[str, Tensor], tmp_path: Path) -> None:
    loaded = round_trip(state, "fp16", tmp_path / "weights")
    # Numbers below 2^-14 lose bits one by one; half a step there is 2^-25.
    assert all(torch.allclose(loaded[name], state[name], rtol=2**-11, atol=2**-25) for name in state)
    assert not torch.equal(loaded["matrix"], state["matrix"])


def test_int8_keeps_each_row_within_half_a_step(state: dict[str, Tensor], tmp_path: Path) -> None:
    loaded = round_trip(state, "int8", tmp_path / "weights")
    for name in ("matrix", "transposed"):
        step = state[name].abs().amax(dim=1, keepdim=True) / 127
        assert ((loaded[name] - state[name]).abs() <= step * 0.5001).all()
    # What is no matrix is small, and kept as it is
    assert torch.equal(loaded["vector"], state["vector"])
    assert torch.equal(loaded["matrix"][3], torch.zeros(300))


def test_a_smaller_precision_is_a_smaller_file(state: dict[str, Tensor], tmp_path: Path) -> None:
    sizes = []
    for precision in ("fp32", "fp16", "int8"):
        save_weights(tmp_path / precision, state, precision)
        sizes.append((tmp_path / precision).stat().st_size)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.5 * sizes[1] > 2 * sizes[2]
