"""The network's heads and its form: a text is scored alike whatever is beside it."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model.network import ToxicityNetwork
from model.torch_engine import load_network


@pytest.fixture
def network(tiny_version: Path) -> ToxicityNetwork:
    return load_network(tiny_version)


def batch(*lengths: int) -> tuple[Tensor, Tensor]:
    """Token ids and their mask."""
    longest = max(lengths)
    mask = torch.tensor([[1] * length + [0] * (longest - length) for length in lengths])
    return torch.arange(5, 5 + len(lengths) * longest).reshape(len(lengths), longest) * mask, mask


def test_padding_and_neighbours_do_not_change_a_logit(network: ToxicityNetwork) -> None:
    ids, mask = batch(3, 30)
    with torch.inference_mode():
        together = network(ids, mask)["logits"][0]
        alone = network(ids[:1, :3], mask[:1, :3])["logits"][0]
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_network_is_rebuilt_from_its_configuration(network: ToxicityNetwork, tiny_version: Path) -> None:
    rebuilt = ToxicityNetwork.from_config(json.loads((tiny_version / "encoder.json").read_text(encoding="utf-8")))
    assert {name: p.shape for name, p in rebuilt.state_dict().items()} == {
        name: p.shape for name, p in network.state_dict().items()
    }
    assert all(isinstance(head, nn.Linear) and head.out_features == 1 for head in rebuilt.heads)
    assert len(rebuilt.heads) == 6
